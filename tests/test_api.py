"""The public names of the package: quick to import, documented, and written down in docs/api.md."""

from __future__ import annotations

import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pipeline as da

ROOT = Path(__file__).parents[1]
WRITER = runpy.run_path(str(ROOT / "docs" / "write_api.py"))
OWN_CLASSES = ("Workspace", "Run", "Runs", "Features")


def members() -> list[tuple[str, Any]]:
    found = [("load_run", da.load_run)]
    for name in da.__all__:
        value = getattr(da, name)
        if inspect.isclass(value):
            found += [(name, value), *((f"{name}.{member}", each) for member, each in WRITER["public_members"](value))]
    return found


def test_the_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == WRITER["page"](), "run: make docs"


def test_importing_the_package_and_opening_a_home_imports_no_stage() -> None:
    program = """
import sys, time
start = time.process_time()
import pipeline
workspace = pipeline.Workspace("nowhere")
heavy = {"torch", "numpy", "pandas", "zarr", "dask", "transformers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert time.process_time() - start < 0.5
from pipeline import *
assert "torch" in sys.modules  # Method is a torch module
assert set(pipeline.__all__) <= set(dir(pipeline))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_an_unknown_name_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match="no attribute 'workspaces'; its public names: Cache, "):
        _ = da.workspaces  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("name", "member"), members(), ids=lambda each: each if isinstance(each, str) else "")
def test_every_public_name_says_what_it_is(name: str, member: Any) -> None:
    docstring = inspect.getdoc(member) or ""
    assert re.match(r"[A-Z].*[.:…]", docstring), f"{name} has no sentence of contract"
    if name.startswith(tuple(f"{each}." for each in OWN_CLASSES)) and not isinstance(member, property):
        documented = set(re.findall(r"^    (\w+): ", docstring, re.MULTILINE)) - {"UserError"}
        parameters = set(inspect.signature(member).parameters) - {"self"}
        assert documented <= parameters, f"{name} documents arguments that it does not have"
        if "Args:" in docstring and "As in `train_head`" not in docstring:
            assert documented >= parameters, f"{name} does not say what {parameters - documented} mean"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Workspace.features", ["int64 [N]", "float32 [N,C]", "float32 [N, *shape]", "bool [N]", "Several texts"]),
        ("Features.to_torch", ["float32 [*shape]", "int64"]),
        ("Run.predictions", ["float32", "[N,C]"]),
        ("Run.evaluate", ["percent"]),
        ("Run.metrics", ["percent"]),
        ("Run.history", ["percent"]),
        ("Runs.table", ["percent"]),
        ("Runs.compare", ["percent", "points", "95 % interval"]),
        ("Workspace.evaluate", ["percent"]),
        ("Workspace.finetune", ["percent"]),
        ("Cache.read", ["float32 [len(ids), *shape]"]),
    ],
)
def test_shapes_and_units_are_named(name: str, words: list[str]) -> None:
    docstring = dict(members())[name].__doc__ or ""
    assert [word for word in words if word not in docstring] == []
