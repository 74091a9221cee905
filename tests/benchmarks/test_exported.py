"""The program that compares exported programs with their runs, on a small home: one row for each run, and what is refused."""

from __future__ import annotations

from pathlib import Path

import exported
import numpy as np
import pytest
from helpers.tiny_heads import small_settings

import pipeline as da


def test_agreement_counts_classes_and_takes_the_largest_difference() -> None:
    expected = np.array([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    found = expected + np.array([[0.5, 0.0], [-2.5, 0.0], [0.0, 0.0]])
    agreement = exported.Agreement.of(found, expected)
    assert agreement == (3, 2, 2.5)
    assert str(agreement) == "2 of 3 (66.67%), 2.5e+00"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_heads_give_the_classes_of_their_runs_and_knn_is_refused(
    tiny_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("manifests", "caches"):
        (tmp_path / name).symlink_to(tiny_home / name)
    workspace = da.Workspace(tmp_path)
    for method in ("cdr", "knn"):
        workspace.train_head("tiny", method, train={"epochs": "1"}, settings=small_settings(method))
    exported.main(["cdr/seed0", "knn/seed0", "--home", str(tmp_path), "--pictures", "0"])
    _, _, cdr, knn = capsys.readouterr().out.strip().splitlines()
    assert cdr.startswith("| cdr/seed0 | 12 of 12 (100.00%), ")
    assert cdr.count("12 of 12 (100.00%)") == 2
    assert "refused: this run cannot be exported: KNearest" in knn
    run = next((tmp_path / "runs").rglob("cdr-*/seed0"))
    assert "benchmarks/exported.py" in (run / "test_reads.jsonl").read_text()
