"""The commands of `diffalign cache`. They import the modules that they use when they run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.commands.checks import check_dataset, check_unused
from pipeline.commands.options import DEFAULT_HOME, AsJson, CommandGroup, Home, Processes, show, show_table, with_home
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import HOME_VARIABLE, Place, caches_place, parse_place, place_with_home

cache_commands = CommandGroup("List, check, repair, compare, move and remove feature caches.")

CacheName = Annotated[
    str,
    typer.Argument(metavar="CACHE", help="A cache's folder or address, or DATASET/NAME as `diffalign cache ls` shows them."),
]
CachesHome = Annotated[
    Path,
    typer.Option(
        "--home", envvar=HOME_VARIABLE, help="Of DATASET/NAME: the home with the cache; of an address: that with its manifest."
    ),
]


def _find_cache(cache: str, home: Path) -> Place:
    """Return the place of a cache that a user has written; DATASET/NAME is looked for among those of the home."""
    is_path = any(map(os.path.exists, (cache, f"{cache}.removed")))  # the latter is one that `rm` has begun to remove
    is_name = not is_path and re.fullmatch(r"[^/:.][^/:]*/[^/]+-[0-9a-f]{12}", cache)
    return caches_place(home) / cache if is_name else place_with_home(cache, home)


@cache_commands.command()
def info(cache: CacheName, home: CachesHome = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """What a cache holds and where it came from."""
    from pipeline.cache import info as cache_info

    show(cache_info(_find_cache(cache, home)), as_json)


@cache_commands.command()
def verify(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="[CACHE]", help="Folders, addresses or DATASET/NAME of caches; none: all of the home."),
    ] = [],  # noqa: B006 - typer makes a list of its own
    home: Home = DEFAULT_HOME,
) -> None:
    """Check every shard against its commit record; exit code 2 when something is wrong."""
    from pipeline.cache import verify as cache_verify
    from pipeline.cache.reader import describe_failures, list_caches

    chosen = [_find_cache(path, home) for path in paths] or list_caches(home)
    if not chosen:
        print(f"no caches in {caches_place(home)}; make one with: diffalign extract DATASET")
    found = {path: cache_verify(path) for path in chosen}
    for path in (path for path, problems in found.items() if not problems):
        failed = describe_failures(path)
        print(f"{path}: every shard agrees with its commit record{f'; {failed}' if failed else ''}")
    if any(found.values()):
        wrong = ((path, "; ".join(problems)) for path, problems in found.items() if problems)
        raise UserError("; ".join(text if text.startswith(str(path)) else f"{path}: {text}" for path, text in wrong))


@cache_commands.command()
def repair(
    cache: CacheName,
    workers: Processes = -1,
    home: CachesHome = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Extract again what is damaged or missing, and nothing else."""
    from pipeline.extraction.extract import ExtractOptions
    from pipeline.extraction.repair import repair as repair_cache

    path = _find_cache(cache, home)
    mended = repair_cache(path, ExtractOptions(workers=workers))
    if as_json:
        show({"path": str(path), "mended": mended}, as_json)
    else:
        print("\n".join([f"{path}: {len(mended)} problems mended", *mended]) if mended else f"{path}: nothing to mend")


@cache_commands.command()
def ls(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """All caches, complete or not: rows, number format, bytes, failed rows, and the command that makes them."""
    import pandas as pd

    from pipeline.cache.housekeeping import ls as list_caches

    lines = list_caches(home)
    if as_json:
        show(lines, as_json)
    elif not lines:
        print(f"no caches in {caches_place(home)}; make one with: diffalign extract DATASET")
    else:
        names = ("dataset", "name", "rows", "feature_shape", "store_dtype", "bytes", "failed", "complete")
        rows = [
            {name: line.get(name, "") for name in names} | {"made by": line["problem"] or line["command"]} for line in lines
        ]
        show_table(pd.DataFrame(rows), as_json)


@cache_commands.command()
def stats(
    cache: CacheName,
    threshold: Annotated[
        float,
        typer.Option(min=-1, max=1, help="Cosine from which a training row and one of another split are near duplicates."),
    ] = 0.95,
    top: Annotated[int, typer.Option(min=1, help="Number of near duplicates to list.")] = 10,
    home: CachesHome = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Mean, deviation, norms, class centres, and near duplicates between training and other rows; needs little memory."""
    from pipeline.cache.stats import stats as cache_stats

    found = cache_stats(_find_cache(cache, home), threshold, top)
    show(found if as_json else _flatten(found), as_json)


@cache_commands.command()
def drift(
    first: CacheName,
    second: CacheName,
    top: Annotated[int, typer.Option(min=1, help="Number of samples to list, those that have moved most.")] = 10,
    home: CachesHome = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """How far a dataset's features lie apart in two caches: cosines of the same samples."""
    from pipeline.cache.drift import drift as cache_drift

    found = cache_drift(_find_cache(first, home), _find_cache(second, home), top)
    show(found if as_json else _flatten(found), as_json)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested results as one level: {"norms": {"min": 0.5}} becomes {"norms.min": 0.5}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


@cache_commands.command()
def export(
    cache: CacheName,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write: .h5, .npy, .parquet or .safetensors.")],
    order: Annotated[
        Literal["cache", "manifest"],
        typer.Option(help="Order of the samples; manifest: that of the rows of manifests/DATASET.csv."),
    ] = "cache",
    home: CachesHome = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Write features, ids, splits, labels and identity of a cache into one file."""
    from pipeline.cache.transfer import export_cache as export_cache

    show({"file": str(export_cache(_find_cache(cache, home), target, order))}, as_json)


@cache_commands.command("import")
def import_file(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="Features: .h5, .npy, .parquet or .safetensors.")],
    dataset: Annotated[str, typer.Option(help="For features computed elsewhere: their prepared dataset.")] = "",
    name: Annotated[str, typer.Option(help="For features computed elsewhere: a name, used like that of an encoder.")] = "",
    modality: Annotated[
        Literal["media", "text"], typer.Option(help="What they were computed from: the samples' media, or their text.")
    ] = "media",
    store_dtype: Annotated[
        Literal["same", "float16", "float32", "bfloat16"], typer.Option(help="Number format on disk; same: the file's.")
    ] = "same",
    max_failures: Annotated[
        float, typer.Option(min=0, max=1, help="Stop above this share of samples without finite features.")
    ] = 0.05,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Make a cache from a file of `export`, or from features computed elsewhere; rows and samples are joined by id."""
    from dataclasses import asdict

    if dataset:
        check_dataset(dataset, home)
    given = {"--modality": modality != "media", "--store-dtype": store_dtype != "same", "--max-failures": max_failures != 0.05}
    check_unused({} if name else given, "is for features computed elsewhere: give their --name, too, or leave it out")

    from pipeline.cache import open_cache
    from pipeline.cache.transfer import import_features
    from pipeline.commands.features import next_command

    done = import_features(
        source, home, dataset=dataset, name=name, modality=modality, store_dtype=store_dtype, max_failures=max_failures
    )
    if as_json:
        show({**asdict(done), "path": str(done.path)}, as_json)
        return
    show({"path": done.path, "samples": done.samples, "failed": done.failed}, as_json)
    if done.unknown:
        print(f"unknown: {done.unknown} rows of the file, of no sample; the first is {done.first_unknown!r}")
    dataset, cache = done.path.parent.name, open_cache(done.path)
    command = next_command(home, dataset, {cache.identity["encoder"]["name"]: cache})
    print(with_home(f"next: {command}", home))


@cache_commands.command()
def rm(
    cache: CacheName,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove it; without this option, only show what would be removed.")
    ] = False,
    home: CachesHome = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Remove a cache."""
    from dataclasses import asdict

    from pipeline.cache.housekeeping import preview_removal
    from pipeline.cache.housekeeping import rm as remove

    path = _find_cache(cache, home)
    what = remove(path) if yes else preview_removal(path)
    if as_json:
        show({**asdict(what), "path": str(what.path), "removed": yes}, as_json)
    else:
        size = f"{what.path}: {what.files} files, {what.bytes / 2**20:.1f} MiB"
        print(f"removed {size}" if yes else f"would remove {size}; to do it, say --yes")


@cache_commands.command()
def copy(
    cache: CacheName,
    target: Annotated[
        str,
        typer.Argument(
            metavar="CACHES", help="Where caches lie: HOME/caches of a home, or an address such as s3://bucket/prefix."
        ),
    ],
    home: CachesHome = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Copy a complete cache, from a disk or an object store to another one; what is there already stays."""
    from pipeline.cache.housekeeping import copy as copy_cache

    show({"path": str(copy_cache(_find_cache(cache, home), parse_place(target)))}, as_json)
