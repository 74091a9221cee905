"""The notebook of examples/ is run as its reader runs it: from its folder, cell by cell, in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


def read_cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_stores_no_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.slow
def test_the_notebook_runs_from_an_empty_folder(tmp_path: Path) -> None:
    """Each cell is compiled by itself in one namespace, as a kernel does; then what it promises is looked at."""
    sources = ["".join(cell["source"]) for cell in read_cells() if cell["cell_type"] == "code"]
    program = f"""
for number, source in enumerate({sources!r}):
    exec(compile(source, f"cell {{number}}", "exec"), globals())
print(len(features.ids), features.array.shape, len(ema), comparison["metric"].tolist(), len(figure.axes))
assert comparison["a_mean"].gt(20).all()  # percent of 67 classes; chance is below 6
"""
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1473 (1473, 1280) 3 ['acc1', 'acc5'] 2"
    assert len(list((tmp_path / "artifacts" / "runs" / "openmoji").glob("*/seed*/done"))) == 6
