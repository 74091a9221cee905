"""Tests of the commit of the program: git says the same of a source tree, and there is none without a repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRINT_COMMIT = (
    "from pipeline.runtime.version import code_version, program_commit; print(f'{program_commit()}|{code_version()}')"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a source tree that is just large enough to say its version, inside of no repository."""
    shutil.copytree(ROOT / "pipeline" / "runtime", tmp_path / "tree" / "pipeline" / "runtime")
    shutil.copy(ROOT / "pipeline" / "__init__.py", tmp_path / "tree" / "pipeline")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "tree")
    return tmp_path / "tree"


def git(tree: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    done = subprocess.run(["git", *identity, *arguments], cwd=tree, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def printed_commit(tree: Path, path: str = os.environ["PATH"]) -> tuple[str, str]:
    """Return the commit, and the version with it, that a program prints which runs from the tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_COMMIT], cwd=tree, env=environment, capture_output=True, text=True, check=True
    )
    commit, _, version = done.stdout.strip("\n").partition("|")
    return commit, version


def test_the_commit_is_the_one_that_git_names(tree: Path) -> None:
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "first")
    git(tree, "tag", "v1")  # a tag is no commit
    head = git(tree, "rev-parse", "HEAD")
    commit, version = printed_commit(tree)
    assert commit == head
    assert version.split()[1:] == [head]
    (tree / "pipeline" / "runtime" / "files.py").open("a").write("\n")
    assert printed_commit(tree)[0] == f"{head}-dirty"


def test_without_a_repository_or_git_there_is_no_commit(tree: Path, tmp_path: Path) -> None:
    assert printed_commit(tree)[0] == ""
    git(tree, "init", "-q")
    commit, version = printed_commit(tree, path=str(tmp_path))
    assert commit == ""
    assert len(version.split()) == 1


def test_another_project_s_repository_is_not_asked(tree: Path) -> None:
    """An installed package may lie in the repository of whoever uses it."""
    (tree / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "first")
    assert printed_commit(tree)[0] == ""
