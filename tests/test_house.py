"""The rules of the house that the import contracts cannot say: names, sizes, imports of libraries, the picture of the rooms."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "pipeline").rglob("*.py"))
MOST_LINES = 400
PLUGIN_NAMES = {"Config"}  # every plug-in has its own


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def public_names(path: Path) -> Iterator[str]:
    """What a module defines at its top, but for names that begin with _ and its logger."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found = [] if any(ast.unparse(each) == "overload" for each in node.decorator_list) else [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            found = []
        yield from (name for name in found if not name.startswith("_") and name != "logger")


def imported(path: Path) -> Iterator[str]:
    """The dotted names that a module imports, wherever the import stands; those for type checkers alone are left out."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def test_a_public_name_has_one_meaning() -> None:
    """Commands bear the names of the functions they call; plug-ins and file formats have attributes of the same name."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        if path.parent.name not in ("commands", "formats"):
            for name in public_names(path):
                places[name].append(name_of(path))
    twice = {name: found for name, found in places.items() if len(found) > 1 and name not in PLUGIN_NAMES}
    assert twice == {}


@pytest.mark.parametrize("folder", ["pipeline", "tests", "benchmarks", "docs"])
def test_files_fit_on_a_few_screens(folder: str) -> None:
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {name: length for name, length in lines.items() if length > MOST_LINES} == {}
    if folder == "pipeline":
        assert 80 <= median(length for name, length in lines.items() if not name.endswith("__init__.py")) <= 200


def test_dask_s_cluster_is_known_to_the_executor_alone() -> None:
    users = {
        name_of(path) for path in MODULES for name in imported(path) if name.startswith(("dask.distributed", "distributed"))
    }
    assert users == {"pipeline/runtime/executor.py"}


def test_importing_sets_nothing_in_the_environment() -> None:
    modules = [name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in MODULES]
    program = f"""
import importlib, os
def keep(environment):
    return {{name: value for name, value in environment.items() if not name.startswith("KMP_")}}  # of torch's own library
import torch, transformers, open_clip, timm, sklearn, dask.distributed, matplotlib, av  # libraries may do what they want
before = keep(os.environ)
for module in {modules!r}:
    if module != "pipeline.__main__":
        importlib.import_module(module)
assert keep(os.environ) == before, set(keep(os.environ).items()) ^ set(before.items())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=ROOT)


def test_every_room_says_what_it_is_for() -> None:
    for package in (ROOT / "pipeline").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))), name_of(package)


def test_the_picture_of_the_rooms_shows_the_contract() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_rooms.py"))
    assert (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8") == drawn["drawing"](), "run: make docs"
    rooms = {room for layer in drawn["layers"]() for room in layer}
    assert rooms == {path.stem for path in (ROOT / "pipeline").iterdir() if not path.stem.startswith("_")}


def test_the_contributors_guide_names_what_there_is() -> None:
    """Every path in backticks exists, but for placeholders."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("docs/contributing.md", "CONTRIBUTING.md"))
    paths = {word for word in text.split("`")[1::2] if "/" in word and " " not in word and "NAME" not in word}
    assert len(paths) > 15
    assert {path for path in paths if not any((folder / path).exists() for folder in (ROOT, ROOT / "pipeline"))} == set()
