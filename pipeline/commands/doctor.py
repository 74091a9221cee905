"""The command `doctor`: it checks whether this machine has what a run needs, and names the remedy for each problem."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from pipeline.commands.checks import check_dataset
from pipeline.commands.options import DEFAULT_HOME, Home, with_home
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, Place, caches_place
from pipeline.runtime.version import program_requirements, program_version

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest

USER_EXTRAS = ("demo", "search")  # optional dependencies in pyproject.toml; the others are for developers
MIN_FREE_BYTES = 2 * 1024**3
BYTES_PER_NUMBER = 2  # float16, the default on disk


def doctor(
    dataset: Annotated[
        str, typer.Option(help="A dataset whose files to look for; default: those that are prepared, else openmoji.")
    ] = "",
    home: Home = DEFAULT_HOME,
) -> None:
    """Check the machine, the packages and the files of datasets; one line each, with the remedy."""
    findings: list[Finding] = []
    for finding in run_checks(home, dataset):  # an object store that is away takes a minute
        print(with_home(str(finding), home), flush=True)
        findings.append(finding)
    if any(not finding.is_ok for finding in findings):
        raise typer.Exit(2)


class Finding(NamedTuple):
    """The result of one check."""

    is_ok: bool
    subject: str  # what was checked, and what was found
    remedy: str = ""  # shown when the check fails

    def __str__(self) -> str:
        return f"{'ok  ' if self.is_ok else 'BAD '} {self.subject}" + ("" if self.is_ok else f": {self.remedy}")


def run_checks(home: Path, dataset: str = "") -> Iterator[Finding]:
    """Yield the findings on Python, the packages, the home folder, the device, and datasets' files, encoders and caches.

    The device and the datasets are only checked when all packages are installed, because these checks import them.

    Args:
        home: the home folder.
        dataset: the dataset to check; "": those that are prepared in the home, or openmoji where none is.

    Raises:
        UserError: there is no such dataset.
    """
    if dataset:  # an unknown name is a mistake in the command, not a problem of the machine
        check_dataset(dataset, home)
    yield Finding(sys.version_info >= (3, 11), f"Python {platform.python_version()}", "install Python 3.11 or newer")
    packages = list(_check_packages())
    yield from packages
    yield _check_writable(home)
    yield _check_free_space(home)
    if all(package.is_ok for package in packages):
        yield _check_device()
        names = [dataset] if dataset else _prepared_datasets(home) or ["openmoji"]
        for name in names:
            yield from _check_dataset_files(home, name)
        yield from _check_caches(home, names)


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


def _prepared_datasets(home: Path) -> list[str]:
    return sorted(path.stem for path in (home / "manifests").glob("*.parquet"))


def _check_dataset_files(home: Path, dataset: str) -> Iterator[Finding]:
    """Check what a dataset has: prepared, its media and its encoders; else the files to prepare it from."""
    if dataset in _prepared_datasets(home) or dataset not in plugins.names("datasets"):
        yield from _check_prepared(home, dataset)
    else:
        yield from _check_source_files(home, dataset)


def _check_source_files(home: Path, dataset: str) -> Iterator[Finding]:
    """Check that a dataset's official files are where `prepare` looks for them; where a user has his own is not known."""
    from pipeline.data.fetch import download_folder
    from pipeline.data.spec import load_spec

    spec, root = load_spec(dataset), download_folder(dataset, home)
    if "image_root" in spec["layout"]:
        whose = "your media" if dataset == "table" else "the official files"
        yield Finding(
            False, f"{dataset} is not prepared", f"give the folder of {whose}: diffalign prepare {dataset} --root FOLDER"
        )
        return
    try:
        manifest = plugins.get("datasets", dataset)().build(spec, root if root.is_dir() else None)
    except (UserError, OSError) as error:
        yield Finding(False, f"the files of {dataset} are not complete", str(error))
    else:
        yield Finding(True, f"the files of {dataset}: {len(manifest.samples)} samples")
        yield Finding(False, f"{dataset} is not prepared", f"run: diffalign prepare {dataset}")


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
    """Check the dataset's manifest, its media, and its default encoders."""
    from pipeline.data.manifest_files import read_manifest
    from pipeline.extraction.inputs import default_encoders

    try:
        manifest = read_manifest(home, dataset)
    except UserError as error:
        yield Finding(False, f"{dataset} is not prepared", str(error))
        return
    yield Finding(True, f"{dataset} is prepared: {len(manifest.samples)} samples")
    subject = f"the media of {dataset} in {manifest.media_root}"
    try:
        problem = _missing_media(manifest)
    except (UserError, OSError) as error:
        yield Finding(False, f"{subject} cannot be read", _describe(error))
    else:
        yield Finding(not problem, f"{subject}{problem}", f"bring them back, or run: {manifest.prepare_command}")
    for name in default_encoders(home, manifest):
        yield check_encoder(home, manifest, name)


def _missing_media(manifest: Manifest) -> str:
    """Return how many media are not there any more, for a message; "": all are."""
    from pipeline.data.media_copies import changed_tars
    from pipeline.data.readers import find_missing_media
    from pipeline.data.tar_members import find_member

    if isinstance(manifest.media_root, Address):
        changed = changed_tars(manifest)
        num_tars = len(manifest.media_stamps)
        return f": {len(changed)} of {num_tars} shards are gone or changed, the first is {changed[0]}" if changed else ""
    media = manifest.columns.strings("media")
    missing = find_missing_media(manifest.media_root, media, manifest.source_location, find_member=find_member)
    first = manifest.samples[missing[0]].media.as_posix() if missing else ""
    return f": {len(missing)} of {len(media)} files are missing, the first is {first}" if missing else ""


def _check_caches(home: Path, datasets: Sequence[str]) -> Iterator[Finding]:
    from pipeline.cache import find_caches

    try:
        paths = [path for dataset in datasets for path in find_caches(home, dataset)]
    except (UserError, OSError) as error:
        yield Finding(False, f"the caches in {caches_place(home)} cannot be read", _describe(error))
        return
    yield from map(_check_cache, paths)


def _check_cache(path: Place) -> Finding:
    from pipeline.cache import info

    try:
        facts = info(path)
    except (UserError, OSError) as error:
        if isinstance(path, Address) and isinstance(error, OSError):  # of the store
            return Finding(False, f"cache {path.name} cannot be read", _describe(error))
        return Finding(False, f"cache {path.name} is damaged", f"{error}; run: diffalign cache repair {path}")
    return Finding(facts["complete"], f"cache {path.name}: {facts['rows']} rows", f"run: {facts['provenance']['command']}")


def _describe(error: UserError | OSError) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
