"""What a sweep makes of damaged runs, of a test split that cannot be read, and how often it writes its table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.tiny_grids import short_grid

from pipeline.evaluation.evaluate import evaluate
from pipeline.runtime import runs
from pipeline.studies.search import sweep


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """A copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


def test_while_a_run_may_come_back_the_test_split_is_not_read(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = short_grid(home, "ema", ("tau=0.07,0.2", "lr=1e-3,1e-2"))
    sweep(grid, workers=0, read_test=False)
    (left,) = (head.run for (cell, _), head in grid.heads.items() if cell == 3)
    (left.path / "state.pt").write_bytes(b"left by a kill")
    history = (left.path / "history.csv").read_text()
    for damage in ("epoch\n", "epoch,val_metric,val_loss\n0,high,1\n", None):
        (left.path / "history.csv").write_text(damage) if damage else (left.path / "history.csv").unlink()
        swept = sweep(grid, workers=0)
        assert list(swept.failed) == [str(left.path)]
        assert f"delete {left.path} and run" in swept.failed[str(left.path)]
        assert "the test split is not read: 1 runs failed" in capsys.readouterr().err
        assert swept.winner["test"] == {}
        assert not list(home.glob("runs/**/test_reads.jsonl"))
    assert not (left.path / "state.pt").exists()
    (left.path / "history.csv").write_text(history)
    other = next(head.run for head in grid.heads.values() if str(head.run.path.relative_to(home)) not in swept.winner["runs"])
    evaluate(home, other, "test", {})
    assert sweep(grid, workers=0).winner["test"]
    said = capsys.readouterr().err
    assert "is read, for the winner: " in said
    assert "; it was read before for 1 runs of other cells" in said


def test_a_test_read_that_fails_leaves_the_validation_part(home: Path) -> None:
    grid = short_grid(home, "ema", ("tau=0.07,0.2",))
    winner = sweep(grid, workers=0, read_test=False).winner
    (home / winner["runs"][0] / "checkpoint.safetensors").write_bytes(b"")
    swept = sweep(grid, workers=0)
    assert swept.winner == winner == json.loads((swept.folder / "winner.json").read_text())
    assert list(swept.ranking["state"]) == ["done", "done"]
    assert "not evaluated on the test split: " in swept.failed[str(home / winner["runs"][0])]


def test_cells_are_not_written_for_every_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = short_grid(home, "ema", ("tau=0.05,0.07,0.1,0.2,0.3,0.5",))
    sweep(grid, workers=0, read_test=False)
    written: list[str] = []

    def counted(path: Path, data: str) -> None:
        written.append(path.name)
        runs.write_atomic(path, data)

    monkeypatch.setattr("pipeline.studies.leaderboard.write_atomic", counted)
    sweep(grid, workers=0, read_test=False)
    assert written.count("cells.csv") == 2
