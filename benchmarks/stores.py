"""Compare the speed of feature caches with that of plain files; results are in RESULTS.md. `extract.py` has these parts.

    python benchmarks/extract.py --parts store,opening --images 0

store     MB/s of writing a cache, and of reading all of it over numpy.fromfile on the same bytes, from the disk and from memory
opening   seconds of opening a cache of ten million rows, and of the first look at its ids
"""

from __future__ import annotations

import base64
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import Cache, Writer, layout, open_cache
from pipeline.cache.layout import Commit
from pipeline.extraction.extract import SHARDS_IN_WRITING

ROUNDS = 9
STORES = {"pooled": ((768,), 16 * layout.SHARD_ROWS), "tokens": ((197, 768), 4 * layout.CHUNK_ROWS)}  # shape of a row, rows
OPENED_ROWS = 10_000_000
OPENED_WIDTH = 8


def store(folder: Path, home: Path, count: int) -> None:
    """Print the rates of writing pooled features and tokens, and of reading the former over numpy.fromfile."""
    for label, (shape, rows) in STORES.items():
        writer = print_writing(home, label, shape, rows)
        if label == "pooled":
            print_reading(open_cache(writer.path), home / "plain.bin")
        shutil.rmtree(writer.path)


def print_writing(home: Path, label: str, shape: tuple[int, ...], rows: int) -> Writer:
    """Write a cache, print the rate, and return its writer."""
    writer = open_writer(home, label, shape, [str(row) for row in range(rows)])
    block = np.random.default_rng(0).standard_normal((writer.shard_rows, *shape), dtype=np.float32)
    stored, plain_file = layout.to_stored(block, "float16"), home / "plain.bin"
    commits: dict[int, Commit] = {}

    def commit(shard: int) -> None:
        part = block[: len(writer.rows(shard))]
        commits[shard] = writer.commit(shard, part, [], seconds=1.0, batch_size=1, device="cpu")

    def write() -> None:
        with ThreadPoolExecutor(SHARDS_IN_WRITING) as threads:  # as an extraction does
            list(threads.map(commit, range(writer.num_shards)))

    def write_plain() -> None:
        for _ in range(writer.num_shards):
            with plain_file.open("wb") as file:
                file.write(stored.data)
                file.flush()
                os.fsync(file.fileno())

    ours, plain = in_turns(write, write_plain)
    rates = [writer.num_shards * stored.nbytes / each / 1e6 for each in ours]
    ratios = [theirs / own for own, theirs in zip(ours, plain, strict=True)]
    print(
        f"store, write {label}: MB/s {spread(rates, '.0f')} (wanted >= 500); "
        f"over write and fsync alone {spread(ratios, '.2f')}",
        flush=True,
    )
    writer.finish(commits)
    return writer


def open_writer(home: Path, name: str, shape: tuple[int, ...], ids: Sequence[str]) -> Writer:
    """Return the writer of a new cache of float16 features."""
    identity = {"encoder": {"name": name}, "store_dtype": "float16"}
    path = layout.cache_path(home, "bench", name, identity)
    return Writer.open(path, ids, np.zeros(0, np.int64), shape, identity, {"command": "none"})


def print_reading(cache: Cache, plain: Path) -> None:
    """Print the rates of reading a whole cache over those of numpy.fromfile, from the disk and from memory.

    Args:
        cache: the cache.
        plain: the file to write with the same bytes.
    """
    rows = np.arange(cache.stored.shape[0])
    cache.stored.read(rows).tofile(plain)
    cache.read(cache.ids[:1])  # from now on the ids are in memory

    def read_plain() -> None:
        np.fromfile(plain, np.float16).reshape(cache.stored.shape)

    for place in ("disk", "memory"):
        cold_files = [plain, *cache.path.rglob("*")] if place == "disk" else []
        for kind, read in (("as stored", lambda: cache.stored.read(rows)), ("by id as float32", lambda: cache.read(cache.ids))):
            ours, theirs = in_turns(read, read_plain, cold_files)
            ratios = [plain_seconds / own for own, plain_seconds in zip(ours, theirs, strict=True)]
            rate, plain_rate = (plain.stat().st_size / statistics.median(each) / 1e6 for each in (ours, theirs))
            wanted = " (wanted >= 0.6)" if kind == "as stored" else ""
            print(
                f"store, read from {place} {kind} over numpy.fromfile: ratio {spread(ratios, '.2f')}{wanted}; "
                f"{rate:.0f} MB/s over {plain_rate:.0f}",
                flush=True,
            )
    plain.unlink()


def opening(folder: Path, home: Path, count: int) -> None:
    """Print the seconds of opening a cache of ten million rows with digests of their media, and of its ids."""
    ids = [f"train/{row // 1000:05d}/{row:08d}.jpg" for row in range(OPENED_ROWS)]
    writer = open_writer(home, "opened", (OPENED_WIDTH,), ids)
    block = np.random.default_rng(0).standard_normal((writer.shard_rows, OPENED_WIDTH), dtype=np.float32)
    commits: dict[int, Commit] = {}
    for shard in range(writer.num_shards):
        rows, file = len(writer.rows(shard)), layout.shard_path(writer.path, shard, 2)
        digests = base64.b64encode(os.urandom(8 * rows)).decode()
        if shard in (0, writer.num_shards - 1):
            commits[shard] = writer.commit(
                shard, block[:rows], [], seconds=1.0, batch_size=1, device="cpu", media_digests=digests
            )
        else:  # the same features as the first
            file.parent.mkdir()
            os.link(layout.shard_path(writer.path, 0, 2), file)
            commits[shard] = replace(commits[0], shard=shard, media_digests=digests)
            layout.write_commit(writer.path, commits[shard])
    writer.finish(commits)
    walls, processor = [], []
    for _ in range(ROUNDS):
        started, cpu_started = time.perf_counter(), time.process_time()
        cache = open_cache(writer.path)
        walls.append(time.perf_counter() - started)
        processor.append(time.process_time() - cpu_started)
    print(
        f"opening {OPENED_ROWS:,} rows: seconds {spread(walls, '.2f')} (wanted < 2); "
        f"of the processor {spread(processor, '.2f')}",
        flush=True,
    )
    cache = open_cache(writer.path)
    started, cpu_started = time.perf_counter(), time.process_time()
    cache.read(ids[:1])
    print(
        f"opening, the first look at the ids: {time.perf_counter() - started:.1f} s, "
        f"of the processor {time.process_time() - cpu_started:.1f} s",
        flush=True,
    )


def in_turns(
    ours: Callable[[], Any], plain: Callable[[], Any], cold_files: Sequence[Path] = (), rounds: int = ROUNDS
) -> tuple[list[float], list[float]]:
    """Return the seconds of two calls, which begin by turns, after one of each that does not count.

    Args:
        ours: one call.
        plain: the other.
        cold_files: dropped from the system's page cache before each call.
        rounds: calls of each.
    """
    elapsed: dict[Callable[[], Any], list[float]] = {ours: [], plain: []}
    for round_number in range(rounds + 1):
        for call in (ours, plain) if round_number % 2 else (plain, ours):
            drop_from_page_cache(cold_files)
            started = time.perf_counter()
            call()
            elapsed[call].append(time.perf_counter() - started)
    return elapsed[ours][1:], elapsed[plain][1:]


def spread(values: Sequence[float], form: str) -> str:
    """Return the median of values, with the smallest and the largest."""
    low, middle, high = (format(each, form) for each in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high}, {len(values)} rounds)"


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Ask the system to drop files from its page cache."""
    for file in files:
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
