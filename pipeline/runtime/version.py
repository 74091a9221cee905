"""The version of this program and the packages that it requires, with or without installed metadata."""

from __future__ import annotations

import importlib.metadata
import tomllib
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
