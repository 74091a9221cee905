"""Is everything here that a run needs? One finding per line, each with its remedy."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from pipeline.commands.options import HOME, Home
from pipeline.runtime import plugins

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest

EXTRAS = ("demo", "search")  # of pyproject.toml; the others are for developers
MIN_FREE_BYTES = 2 * 1024**3
BYTES_PER_NUMBER = 2  # float16, the default on disk


def doctor(
    dataset: Annotated[str, typer.Option(help="A dataset whose files to look for.")] = "openmoji", home: Home = HOME
) -> None:
    """Check the machine, the packages and a dataset's files; one line each, with the remedy."""
    lines = list(findings(home, dataset))
    print("\n".join(str(line) for line in lines))
    if any(not line.good for line in lines):
        raise typer.Exit(2)


class Finding(NamedTuple):
    """One thing that was looked at."""

    good: bool
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{'ok  ' if self.good else 'BAD '} {self.what}" + ("" if self.good else f": {self.remedy}")


def findings(home: Path, dataset: str) -> Iterator[Finding]:
    """The machine, the packages, the home folder, the dataset's files, its encoders and caches, in this order.

    What comes after the packages is looked at only when all are there: it needs them.
    """
    plugins.get("datasets", dataset)  # an unknown name is a mistake of the command, not of the machine
    yield Finding(sys.version_info >= (3, 11), f"Python {platform.python_version()}", "install Python 3.11 or newer")
    packages = list(_packages())
    yield from packages
    yield _writable(home)
    yield _free_space(home)
    if all(package.good for package in packages):
        yield _device()
        yield _source_files(home, dataset)
        yield from _prepared(home, dataset)


def _packages() -> Iterator[Finding]:
    """Everything the project's own metadata requires, in the versions it requires; extras are told when they are here."""
    try:
        required = importlib.metadata.requires("diffalign") or []
        from packaging.requirements import Requirement
    except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError) as error:
        yield Finding(False, f"{error.name} is not installed", "run: make setup")
        return
    for requirement in map(Requirement, required):
        extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": name}) for name in ("", *EXTRAS)):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not extra:
                yield Finding(False, f"{requirement.name} is not installed", "run: make setup")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Finding(
            fits, f"{requirement.name} {version}", f"{requirement.name}{requirement.specifier} is needed; run: make setup"
        )


def _device() -> Finding:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} processors, no GPU"
    return Finding(True, f"device: {name}")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return folder if folder.is_dir() else _existing(folder.parent)


def _writable(home: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=_existing(home)):
            return Finding(True, f"{home} can be written")
    except OSError as error:
        return Finding(False, f"{home} cannot be written ({error.strerror})", "choose another folder with --home")


def _free(home: Path) -> int:
    return shutil.disk_usage(_existing(home)).free


def _free_space(home: Path) -> Finding:
    free = _free(home)
    return Finding(
        free >= MIN_FREE_BYTES, f"{free / 1024**3:.1f} GiB free for {home}", "free 2 GiB, or choose another disk with --home"
    )


def _source_files(home: Path, dataset: str) -> Finding:
    """Whether the dataset's official files are where it looks without --root."""
    from pipeline.data.fetch import folder
    from pipeline.data.manifest import load_spec

    root = folder(dataset, home)
    try:
        manifest = plugins.get("datasets", dataset).build(load_spec(dataset), root if root.is_dir() else None)
    except (ValueError, OSError) as error:
        return Finding(False, f"the files of {dataset} are not complete", str(error))
    return Finding(True, f"the files of {dataset}: {len(manifest.samples)} samples")


def encoder_finding(home: Path, manifest: Manifest, name: str) -> Finding:
    """Whether a default encoder is here with its weights, and its cache will find room."""
    from pipeline.encoders._factory import build_encoder
    from pipeline.extraction.inputs import make_items

    try:
        _, encoder = build_encoder(name, {})
        items, _ = make_items(manifest, encoder, "float16")
    except ValueError as error:
        return Finding(False, f"encoder {name} cannot run", str(error))
    needed = len(items) * math.prod(encoder.feature_shape) * BYTES_PER_NUMBER
    what = f"encoder {name}: a cache of {len(items)} x {encoder.feature_shape} takes {needed / 1024**2:.0f} MiB"
    remedy = f"{needed - _free(home):,} bytes are lacking: choose another disk with --home"
    return Finding(needed <= _free(home), what, remedy)


def _prepared(home: Path, dataset: str) -> Iterator[Finding]:
    """The dataset's manifest, what its encoders need, and its caches."""
    from pipeline.cache import find_caches
    from pipeline.data import manifest as manifests

    try:
        manifest = manifests.read_manifest(home, dataset)
    except ValueError as error:
        yield Finding(False, f"{dataset} is not prepared", str(error))
    else:
        yield Finding(True, f"{dataset} is prepared")
        for name in manifests.load_spec(dataset)["encoders"].values():
            yield encoder_finding(home, manifest, name)
    for path in find_caches(home, dataset):
        yield _cache(path)


def _cache(path: Path) -> Finding:
    from pipeline.cache import info

    try:
        facts = info(path)
    except (ValueError, OSError) as error:
        return Finding(False, f"cache {path.name} is damaged", f"{error}; run: diffalign cache repair {path}")
    return Finding(facts["complete"], f"cache {path.name}: {facts['rows']} rows", f"run: {facts['provenance']['command']}")
