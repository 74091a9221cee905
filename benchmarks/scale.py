"""Simulate a cache of 10⁹ rows with the real code, and joins by id of 10⁶ and 10⁷; docs/scale.md has the figures.

    python benchmarks/scale.py [--parts disk,media,bucket,join,prepare] [--shards 122071] [--folder DIR]

disk      a cache of 122,071 shards whose features are a few bytes each, in a folder: writing its commit records, listing them,
          looking which shards are missing, checking every shard, opening, and the claims
media     the same with records that hold the digests of 8,192 media files each, for --media-shards
bucket    the same in an S3 endpoint (moto, in a process of its own), for two numbers of shards
join      opening a cache and reading the features of all training samples by their ids (`rows.py`), for two numbers of rows
prepare   `diffalign prepare table` (`rows.py`), for --prepared-rows

Memory is the peak of what the process itself holds, see `rows.py`. "per" is per shard or per row.
"""

from __future__ import annotations

import argparse
import base64
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rows

from pipeline.cache import layout, open_cache
from pipeline.cache.layout import SHARD_ROWS, Commit
from pipeline.cache.writer import Writer
from pipeline.runtime.claims import hold
from pipeline.runtime.files import sha256
from pipeline.runtime.places import Place, parse_place
from pipeline.runtime.stores import map_objects, store_of

NUM_SAMPLES = 1000  # which share the rows: a cache of texts has any number of them per sample
WIDTH = 8
PAYLOAD = b"a shard of features"
MISSING_EVERY = 1000  # shards, of which one has no record when the missing ones are looked for
IDENTITY = {"dataset": "scale", "encoder": {"name": "scale", "modality": "text"}, "store_dtype": "float16", "text": {}}


def open_writer(place: Place, num_shards: int) -> Writer:
    """Return the writer of a new cache with this many full shards."""
    ids = [f"{number:04d}" for number in range(NUM_SAMPLES)]
    offsets = np.linspace(0, num_shards * SHARD_ROWS, NUM_SAMPLES + 1).astype(np.int64)
    path = place / "scale" / layout.cache_path(Path(), "scale", "scale", IDENTITY).name
    return Writer.open(path, ids, offsets, (WIDTH,), IDENTITY, {"command": "python benchmarks/scale.py"})


def record_of(shard: int, with_media: bool) -> Commit:
    """Return the commit record of a shard; each has digests of its own."""
    digests = base64.b64encode(os.urandom(8 * SHARD_ROWS)).decode() if with_media else ""
    norms = {"norm_min": 0.5, "norm_mean": 1.0, "norm_max": 1.5}
    facts: dict[str, Any] = {"seconds": 1.0, "batch_size": 16, "device": "cpu", "failures": (), "media_digests": digests}
    digest = sha256(PAYLOAD)
    return Commit(shard=shard, rows=SHARD_ROWS, num_bytes=len(PAYLOAD), sha256=digest, finite=SHARD_ROWS, **norms, **facts)


@contextmanager
def timed(what: str, number: int, unit: str = "shard") -> Iterator[None]:
    """Print seconds and memory of a block, in all and per shard or row."""
    before, wall, processor = rows.own_bytes(), time.perf_counter(), time.process_time()
    with rows.peak_bytes() as peak:
        yield
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(
        f"{what}, {number:,} {unit}s: {wall:.1f} s, of the processor {processor:.1f} s "
        f"({processor / number * 1e6:,.1f} µs per {unit}), peak {(peak[0] - before) / 1e6:,.0f} MB",
        flush=True,
    )


def measure_cache(place: Place, num_shards: int, with_media: bool = False) -> None:
    """Write a cache of shards without content at a place, and print what each look at it takes."""
    where = (
        f"{'records with digests' if with_media else 'records'} {'in a folder' if isinstance(place, Path) else 'in a bucket'}"
    )
    writer = open_writer(place, num_shards)
    assert writer.num_shards == num_shards
    with timed(f"{where}: claiming and giving up a part", 1, "claim"), hold(writer.path, "driver"):
        pass
    with timed(f"{where}: writing", num_shards):
        map_objects(
            writer.path, lambda shard: layout.write_commit(writer.path, record_of(shard, with_media)), range(num_shards)
        )
    map_objects(writer.path, partial(write_payload, writer), range(num_shards))
    with timed(f"{where}: listing", num_shards):
        listed = layout.list_commits(writer.path)
    assert len(listed) == num_shards
    print(f"{where}: bytes {sum(store_of(each).size(each) for each in listed[:10]) / 10:,.0f} per record")
    missing = list(range(0, num_shards, MISSING_EVERY))
    map_objects(writer.path, store_of(writer.path).delete, [layout.commit_path(writer.path, shard) for shard in missing])
    with timed(f"{where}: which shards are missing", num_shards):
        commits = writer.read_records()
    assert sorted(commits.keys() ^ set(range(num_shards))) == missing
    for shard in missing:
        layout.write_commit(writer.path, record_of(shard, with_media))
    del commits
    with timed(f"{where}: the sha256 of every shard, without content", num_shards):
        assert len(writer.verified_commits()) == num_shards
    with hold(writer.path):
        writer.finish({shard: replace(record_of(0, False), shard=shard) for shard in range(num_shards)})
    with timed(f"{where}: opening", num_shards):
        cache = open_cache(writer.path)
    assert cache.stored.shape[0] == num_shards * SHARD_ROWS


def write_payload(writer: Writer, shard: int) -> None:
    """Put a few bytes in the place of a shard; in a folder without waiting for it."""
    place = layout.shard_path(writer.path, shard, 2)
    if isinstance(place, Path):
        place.parent.mkdir(parents=True)
        place.write_bytes(PAYLOAD)
    else:
        store_of(place).put(place, PAYLOAD)


def measure_bucket(numbers: list[int]) -> None:
    """Measure caches in an S3 endpoint on this machine."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from helpers.s3_endpoint import use_endpoint

    with use_endpoint():
        for number in numbers:
            measure_cache(parse_place(f"s3://bucket/{number}"), number)


def measure_join(folder: Path, num_rows: int) -> None:
    """Join the training samples of generated rows."""
    with timed("join: manifest, opening, features by id", num_rows, "row"):
        rows.run_join(folder)
    with timed("resume: manifest, and every byte of the cache", num_rows, "row"):
        rows.run_resume(folder)


def measure_prepare(folder: Path, num_rows: int) -> None:
    """Prepare a generated table."""
    with timed("prepare table", num_rows, "row"):
        rows.run_prepare(folder)


def in_a_process(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function in a process of its own, so that its memory is its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def run_part(part: str, folder: Path, options: argparse.Namespace) -> None:
    """Run a part of the program."""
    if part == "disk":
        in_a_process(measure_cache, folder, options.shards)
    elif part == "media":
        in_a_process(partial(measure_cache, with_media=True), folder, options.media_shards)
    elif part == "bucket":
        in_a_process(measure_bucket, [int(number) for number in options.bucket_shards.split(",")])
    elif part == "join":
        for number in map(int, options.rows.split(",")):
            in_a_process(rows.write_rows, folder / str(number) / "home", number)
            in_a_process(measure_join, folder / str(number), number)
    elif part == "prepare":
        in_a_process(rows.write_table, folder / "table", options.prepared_rows)
        in_a_process(measure_prepare, folder, options.prepared_rows)
    else:
        raise SystemExit(f"there is no part {part!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="disk,media,bucket,join,prepare")
    parser.add_argument("--shards", type=int, default=-(-(10**9) // SHARD_ROWS))
    parser.add_argument("--media-shards", type=int, default=5000)
    parser.add_argument("--bucket-shards", default="1000,5000")
    parser.add_argument("--rows", default="1000000,10000000")
    parser.add_argument("--prepared-rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where everything is written; a few gigabytes, and 500,000 small files")
    options = parser.parse_args()
    for part in options.parts.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            run_part(part, Path(name), options)


if __name__ == "__main__":
    main()
