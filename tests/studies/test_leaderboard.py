"""Tests of a grid with damaged runs or an unreadable test split, and of how often it writes cells.csv."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.tiny_grids import short_grid

from pipeline.evaluation.evaluate import evaluate
from pipeline.runtime import runs
from pipeline.studies.search import run_grid


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


def test_the_test_split_is_not_read_while_a_failed_run_may_still_succeed(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = short_grid(home, "ema", ("tau=0.07,0.2", "lr=1e-3,1e-2"))
    run_grid(grid, workers=0, read_test=False)
    (damaged,) = (head.run for (cell, _), head in grid.heads.items() if cell == 3)
    (damaged.path / "state.pt").write_bytes(b"left by a kill")
    history = (damaged.path / "history.csv").read_text()
    for damage in ("epoch\n", "epoch,val_metric,val_loss\n0,high,1\n", None):
        (damaged.path / "history.csv").write_text(damage) if damage else (damaged.path / "history.csv").unlink()
        result = run_grid(grid, workers=0)
        assert list(result.failed) == [str(damaged.path)]
        assert f"delete {damaged.path} and run" in result.failed[str(damaged.path)]
        assert "the test split is not read: 1 runs failed" in capsys.readouterr().err
        assert result.winner["test"] == {}
        assert not list(home.glob("runs/**/test_reads.jsonl"))
    assert not (damaged.path / "state.pt").exists()
    (damaged.path / "history.csv").write_text(history)
    other = next(head.run for head in grid.heads.values() if str(head.run.path.relative_to(home)) not in result.winner["runs"])
    evaluate(home, other, "test", {})
    assert run_grid(grid, workers=0).winner["test"]
    logged = capsys.readouterr().err
    assert "is read, for the winner: " in logged
    assert "; it was read before for 1 runs of other cells" in logged


def test_a_failed_test_evaluation_keeps_the_validation_results(home: Path) -> None:
    grid = short_grid(home, "ema", ("tau=0.07,0.2",))
    winner = run_grid(grid, workers=0, read_test=False).winner
    (home / winner["runs"][0] / "checkpoint.safetensors").write_bytes(b"")
    result = run_grid(grid, workers=0)
    assert result.winner == winner == json.loads((result.folder / "winner.json").read_text())
    assert list(result.ranking["state"]) == ["done", "done"]
    assert "not evaluated on the test split: " in result.failed[str(home / winner["runs"][0])]


def test_cells_csv_is_not_written_for_every_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = short_grid(home, "ema", ("tau=0.05,0.07,0.1,0.2,0.3,0.5",))
    run_grid(grid, workers=0, read_test=False)
    written: list[str] = []

    def write_and_count(path: Path, data: str) -> None:
        written.append(path.name)
        runs.write_atomic(path, data)

    monkeypatch.setattr("pipeline.studies.leaderboard.write_atomic", write_and_count)
    run_grid(grid, workers=0, read_test=False)
    assert written.count("cells.csv") == 2
