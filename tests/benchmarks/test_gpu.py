"""The program that measures on a GPU reads the figures that its parts print, and runs from a source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import head_steps
import pytest

LINES = [
    "torch 2.0, some device",
    "one seda head, float32, a step: ms 1.20 (wanted <= 1.5)",
    "one seda head, float32, over the loop by hand: ratio 2.50 (wanted >= 3); 2.50 (2.40 to 2.60, 3 rounds)",
    "one ema head, float32, a step: ms 0.90",
    "bound ViT-B/16: wall 9.0 s, decode alone 8.1: ratio 1.11 (wanted <= 1.15); the processor bounds",
]


def test_lines_with_a_goal_become_rows() -> None:
    rows = gpu.rows_of("heads", LINES)
    assert [(row["measured"], row["wanted"], row["is_met"]) for row in rows] == [
        (1.2, "<= 1.5", True),
        (2.5, ">= 3", False),
        (1.11, "<= 1.15", True),
    ]
    assert rows[1]["what"] == "one seda head, float32, over the loop by hand"


def test_the_table_says_what_is_short_and_what_failed() -> None:
    part = {"rows": gpu.rows_of("heads", LINES), "returned": -9, "seconds": 110.0}
    table = gpu.table({"device": "a GPU", "torch": "2.0", "python": "3.12", "parts": {"heads": part}})
    assert "| heads | one seda head, float32, over the loop by hand | >= 3 | 2.5: **short** |" in table
    assert "| heads | bound ViT-B/16 | <= 1.15 | 1.11 |" in table
    assert "| heads | the whole part | | **failed** (-9) after 110 s |" in table
    assert table.startswith("Device: a GPU; torch 2.0, Python 3.12.")


def test_every_part_is_a_program_and_together_they_take_less_than_eight_minutes() -> None:
    for full, small, _ in gpu.PARTS.values():
        for command in (full, small):
            assert command.startswith("-m pytest") or (gpu.HERE / command.split()[0]).is_file()
    assert sum(limit for _, _, limit in gpu.PARTS.values()) < 480
    assert str(gpu.HERE.parent / "tests" / "training" / "test_captured.py") in gpu.gpu_tests()


def test_the_cells_are_those_of_the_figure() -> None:
    cells = head_steps.cells_of_figure(48)
    assert len({tuple(cell.values()) for cell in cells}) == 48
    assert {cell["num_steps"] for cell in cells} == {900, 1200, 1500, 1800}


ROWS = {"heads": 7, "tests": 0, "heads-mixed": 6, "extraction": 2, "joint": 2}  # figures with a goal


@pytest.mark.parametrize(
    "part", ["heads", *(pytest.param(part, marks=pytest.mark.exhaustive) for part in ROWS if part != "heads")]
)
@pytest.mark.slow
def test_it_runs_from_a_source_tree_without_a_gpu(part: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [str(gpu.HERE / "gpu.sh"), "--small", "--parts", part, "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment | {"PYTHON": sys.executable}, stdout=subprocess.DEVNULL)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["parts"][part]["returned"] == 0
    assert len(results["parts"][part]["rows"]) == ROWS[part]
    assert results["device"] in (tmp_path / "gpu.md").read_text()
