"""The version of this program and the packages that it requires, with or without installed metadata."""

from __future__ import annotations

import importlib.metadata
import subprocess
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

DISTRIBUTION = "diffalign"  # the name of the package in pip
SOURCE_VERSION = "source"  # the version of a source tree that has neither installed metadata nor a pyproject.toml


def program_version() -> str:
    """Return the version of the installed package, else that in pyproject.toml beside the source, else "source"."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return str(_source_project().get("version", SOURCE_VERSION))


@cache
def program_commit() -> str:
    """Return the git commit of the source tree that this program runs from, "<40 digits>" or "<40 digits>-dirty".

    "dirty" says that files have changed since. Without a git repository, such as in an installed package, it is "".
    """
    if not _source_project():
        return ""
    folder = Path(str(resources.files("pipeline"))).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return ""


def code_version() -> str:
    """Return the version and, where there is one, the commit of this program: "0.1.0" or "0.1.0 4ce28549…"."""
    return f"{program_version()} {program_commit()}".strip()


def program_requirements() -> list[str]:
    """Return the required packages as in the metadata of a package: 'pillow>=11', 'optuna>=4; extra == "search"'.

    They come from the installed package, else from pyproject.toml beside the source; without both the list is empty.
    """
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        project = _source_project()
    extras = project.get("optional-dependencies", {})
    return [
        *project.get("dependencies", []),
        *(f'{requirement}; extra == "{extra}"' for extra, required in extras.items() for requirement in required),
    ]


def _source_project() -> dict[str, Any]:
    """Return the table [project] of the pyproject.toml beside this package; empty if it is not there, or of another project."""
    path = Path(str(resources.files("pipeline"))).parent / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}) if path.is_file() else {}
    return project if project.get("name") == DISTRIBUTION else {}
