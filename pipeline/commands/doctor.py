"""The command `doctor`: it checks whether this machine has what a run needs, and names the remedy for each problem."""

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

from pipeline.commands.options import DEFAULT_HOME, Home
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.version import program_requirements, program_version

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest

USER_EXTRAS = ("demo", "search")  # optional dependencies in pyproject.toml; the others are for developers
MIN_FREE_BYTES = 2 * 1024**3
BYTES_PER_NUMBER = 2  # float16, the default on disk


def doctor(
    dataset: Annotated[str, typer.Option(help="A dataset whose files to look for.")] = "openmoji", home: Home = DEFAULT_HOME
) -> None:
    """Check the machine, the packages and a dataset's files; one line each, with the remedy."""
    findings = list(run_checks(home, dataset))
    print("\n".join(str(finding) for finding in findings))
    if any(not finding.is_ok for finding in findings):
        raise typer.Exit(2)


class Finding(NamedTuple):
    """The result of one check."""

    is_ok: bool
    subject: str  # what was checked, and what was found
    remedy: str = ""  # shown when the check fails

    def __str__(self) -> str:
        return f"{'ok  ' if self.is_ok else 'BAD '} {self.subject}" + ("" if self.is_ok else f": {self.remedy}")


def run_checks(home: Path, dataset: str) -> Iterator[Finding]:
    """Yield the findings on Python, the packages, the home folder, the device and the dataset's files, encoders and caches.

    The device and the dataset are only checked when all packages are installed, because these checks import them.

    Raises:
        UserError: there is no such dataset.
    """
    # an unknown name is a mistake in the command, not a problem of the machine
    plugin = _find_plugin(home, dataset)
    yield Finding(sys.version_info >= (3, 11), f"Python {platform.python_version()}", "install Python 3.11 or newer")
    packages = list(_check_packages())
    yield from packages
    yield _check_writable(home)
    yield _check_free_space(home)
    if all(package.is_ok for package in packages):
        yield _check_device()
        yield _check_source_files(home, dataset) if plugin == dataset else _check_media_folder(home, dataset)
        yield from _check_prepared(home, dataset)


def _check_packages() -> Iterator[Finding]:
    """Check the packages that the project's metadata requires, and their versions; extras only when they are installed."""
    yield Finding(True, f"diffalign {program_version()}")
    required = program_requirements()
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError as error:
        yield Finding(False, f"{error.name} is not installed", "run: make setup")
        return
    for requirement in map(Requirement, required):
        is_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": name}) for name in ("", *USER_EXTRAS)):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not is_extra:
                yield Finding(False, f"{requirement.name} is not installed", "run: make setup")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Finding(
            fits, f"{requirement.name} {version}", f"{requirement.name}{requirement.specifier} is needed; run: make setup"
        )


def _check_device() -> Finding:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} processors, no GPU"
    return Finding(True, f"device: {name}")


def _nearest_existing(folder: Path) -> Path:
    """Return the folder, or the nearest folder above it that exists."""
    folder = folder.absolute()
    return folder if folder.is_dir() else _nearest_existing(folder.parent)


def _check_writable(home: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=_nearest_existing(home)):
            return Finding(True, f"{home} can be written")
    except OSError as error:
        return Finding(False, f"{home} cannot be written ({error.strerror})", "choose another folder with --home")


def _free_bytes(home: Path) -> int:
    return shutil.disk_usage(_nearest_existing(home)).free


def _check_free_space(home: Path) -> Finding:
    free = _free_bytes(home)
    return Finding(
        free >= MIN_FREE_BYTES, f"{free / 1024**3:.1f} GiB free for {home}", "free 2 GiB, or choose another disk with --home"
    )


def _check_source_files(home: Path, dataset: str) -> Finding:
    """Check that the dataset's official files are where `prepare` looks for them without --root."""
    from pipeline.data.fetch import download_folder
    from pipeline.data.spec import load_spec

    root = download_folder(dataset, home)
    try:
        manifest = plugins.get("datasets", dataset)().build(load_spec(dataset), root if root.is_dir() else None)
    except (UserError, OSError) as error:
        return Finding(False, f"the files of {dataset} are not complete", str(error))
    return Finding(True, f"the files of {dataset}: {len(manifest.samples)} samples")


def _find_plugin(home: Path, dataset: str) -> str:
    """Return the plug-in that builds a dataset; one that has another name than its plug-in is looked up in its manifest."""
    if dataset in plugins.names("datasets"):
        return dataset
    from pipeline.data.manifest_files import read_plugin

    plugin = read_plugin(home, dataset)
    plugins.get("datasets", plugin)  # refuses one that is not there
    return plugin


def _check_media_folder(home: Path, dataset: str) -> Finding:
    """Check that the media folder of a dataset with a name of its own is there; where its official files were is not known."""
    from pipeline.data.manifest_files import read_manifest

    try:
        manifest = read_manifest(home, dataset)
    except UserError as error:
        return Finding(False, f"{dataset} is not prepared", str(error))
    subject = f"the media folder of {dataset}: {manifest.media_root}"
    return Finding(manifest.media_root.is_dir(), subject, f"bring it back, or run: {manifest.prepare_command}")


def check_encoder(home: Path, manifest: Manifest, name: str) -> Finding:
    """Check that an encoder can be built with its weights, and that the disk has room for its cache."""
    from pipeline.encoders._factory import build_encoder
    from pipeline.extraction.inputs import make_encoder_inputs

    try:
        encoder = build_encoder(name, {})
        items = make_encoder_inputs(manifest, encoder, "float16")
    except UserError as error:
        return Finding(False, f"encoder {name} cannot run", str(error))
    needed = len(items) * math.prod(encoder.feature_shape) * BYTES_PER_NUMBER
    subject = f"encoder {name}: a cache of {len(items)} x {encoder.feature_shape} takes {needed / 1024**2:.0f} MiB"
    remedy = f"{needed - _free_bytes(home):,} bytes are lacking: choose another disk with --home"
    return Finding(needed <= _free_bytes(home), subject, remedy)


def _check_prepared(home: Path, dataset: str) -> Iterator[Finding]:
    """Check the dataset's manifest, its default encoders and its caches."""
    from pipeline.cache import find_caches
    from pipeline.data.manifest_files import load_dataset_spec, read_manifest

    try:
        manifest = read_manifest(home, dataset)
    except UserError as error:
        yield Finding(False, f"{dataset} is not prepared", str(error))
    else:
        yield Finding(True, f"{dataset} is prepared")
        for name in load_dataset_spec(home, dataset)["encoders"].values():
            yield check_encoder(home, manifest, name)
    for path in find_caches(home, dataset):
        yield _check_cache(path)


def _check_cache(path: Path) -> Finding:
    from pipeline.cache import info

    try:
        facts = info(path)
    except (UserError, OSError) as error:
        return Finding(False, f"cache {path.name} is damaged", f"{error}; run: diffalign cache repair {path}")
    return Finding(facts["complete"], f"cache {path.name}: {facts['rows']} rows", f"run: {facts['provenance']['command']}")
