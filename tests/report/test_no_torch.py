"""The report imports no torch: each test runs in a fresh process, because the other tests have imported it already."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from helpers.grid_folders import write_grid
from helpers.report_home import make_home

ROOT = Path(__file__).parents[2]
IMPORT_ALL_MODULES = """
import importlib, pkgutil, sys
from pathlib import Path
import pipeline.report
for module in pkgutil.iter_modules(pipeline.report.__path__, "pipeline.report."):
    importlib.import_module(module.name)
"""
PRINT_TORCH_MODULES = "print(sorted(name for name in sys.modules if name.partition('.')[0] == 'torch'))"


def assert_imports_no_torch(statement: str) -> None:
    """Run a statement in a fresh process that has imported every module of the report, and check that torch is not loaded."""
    code = "\n".join([IMPORT_ALL_MODULES, statement, PRINT_TORCH_MODULES])
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_a_report_does_not_import_torch(tmp_path: Path) -> None:
    home = make_home(tmp_path, [f"class {k}" for k in range(8)])
    for method, strength in (("baseline", 1.5), ("ema", 2.0)):
        home.evaluate(home.train(home.config(method, {}), seed=0), home.logits(strength, seed=1))
    write_grid(tmp_path, {"tau": (0.1, 0.2)}, method="ema")
    assert_imports_no_torch(f"pipeline.report.write_report(Path({str(tmp_path)!r}), 'toy')")
    page = (tmp_path / "reports" / "toy" / "index.html").read_text(encoding="utf-8")
    assert "t-SNE of the same" in page
    assert "Grid of ema over tau" in page
    links = set(re.findall(r'href="(files/[^"]*)"', page))
    assert links == {f"files/{path.name}" for path in (tmp_path / "reports" / "toy" / "files").iterdir()}
    assert {name.rpartition(".")[2] for name in links} == {"csv", "tex", "svg", "pdf"}


def test_a_grid_page_does_not_import_torch(tmp_path: Path) -> None:
    folder = write_grid(tmp_path, {"w_ce_dst": (2.0, 0.5, 1.0), "num_steps": (900, 1200), "stage_step": (0, 300, 500, 700)})
    assert_imports_no_torch(f"pipeline.report.write_grid_page(Path({str(folder)!r}))")
    assert (folder / "index.html").is_file()
