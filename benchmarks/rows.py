"""Measure what millions of rows cost: bytes a row of a manifest, seconds and memory of each stage; results are in RESULTS.md.

    python benchmarks/rows.py [--rows 10000000] [--parts prepare,prepare-parquet,manifest,resume,join,verify] [--folder DIR]

prepare    `diffalign prepare table` of a CSV file with ids, media, labels, captions and groups; a picture has a hundred rows
prepare-parquet  the same of a Parquet file
manifest   reading the manifest, and the bytes a row that it keeps in memory
resume     reading the manifest, and finding that every shard of its cache is complete and undamaged
join       opening the cache, and reading the features of all training samples by their ids
verify     `diffalign cache verify`

Every part runs in a process of its own. Memory is the peak of what the process itself holds: pages of mapped files, which the
system takes back when it needs them, are not counted, and what it took to import the libraries is not, either. Seconds of the
processor count all threads.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.cache.reader import open_cache
from pipeline.cache.verify import verify
from pipeline.data.columns import BATCH_ROWS, ColumnWriter
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest, write_manifest
from pipeline.data.prepare import prepare
from pipeline.data.sample_columns import SAMPLE_SCHEMA, SampleColumns
from pipeline.extraction.extract import ExtractionTarget, ExtractOptions, start_or_resume

WIDTH = 8  # of a feature: the rows are measured, not the features
ROWS_PER_PICTURE = 100
NUM_CLASSES = 100
ROWS_PER_READ = 2**16
META = {"media_type": "image", "text": {"aggregate": "join", "sep": " "}, "options": {}, "val_remedy": ""}
MAX_SECONDS, MAX_BYTES, MAX_ROW_BYTES = 60, 10**9, 80  # of ten million rows, and of one


def ids_of(rows: range) -> list[str]:
    return [f"photo-{row:09d}" for row in rows]


def captions_of(rows: range) -> list[str]:
    return [f"a photo of thing number {row}" for row in rows]


def blocks(num_rows: int) -> Iterator[range]:
    return (range(start, min(start + BATCH_ROWS, num_rows)) for start in range(0, num_rows, BATCH_ROWS))


def write_table(folder: Path, num_rows: int) -> None:
    """Write a table of captions, and the files that it names; nothing looks into them."""
    (folder / "pictures").mkdir(parents=True)
    for picture in range(-(-num_rows // ROWS_PER_PICTURE)):
        (folder / "pictures" / f"{picture}.jpg").write_bytes(b"%d" % picture)
    schema = pa.schema([(name, pa.string()) for name in ("sample_id", "media_path", "label", "text", "group_id")])
    with (
        pyarrow.csv.CSVWriter(folder / "captions.csv", schema) as text,
        pq.ParquetWriter(folder / "captions.parquet", schema) as table,
    ):
        for rows in blocks(num_rows):
            pictures = [row // ROWS_PER_PICTURE for row in rows]
            paths, labels = ([f"pictures/{of}.jpg" for of in pictures], [f"class{of % NUM_CLASSES}" for of in pictures])
            columns = (ids_of(rows), paths, labels, captions_of(rows), [f"g{of}" for of in pictures])
            batch = pa.RecordBatch.from_arrays(list(map(pa.array, columns)), schema=schema)
            text.write_batch(batch)
            table.write_batch(batch)


def write_rows(home: Path, num_rows: int) -> ExtractionTarget:
    """Write a manifest of rows, and the cache of their texts."""
    writer = ColumnWriter(SAMPLE_SCHEMA)
    for rows in blocks(num_rows):
        ids, labels = ids_of(rows), [[row % NUM_CLASSES] for row in rows]
        media = [f"pictures/{id}.jpg" for id in ids]
        splits = [("train", "val", "test")[min(row % 10, 2)] for row in rows]
        writer.add_lists(ids, splits, media, [[text] for text in captions_of(rows)], labels, [""] * len(rows))
    names = tuple(f"class{number}" for number in range(NUM_CLASSES))
    write_manifest(Manifest("rows", "single", names, SampleColumns(writer.finish()), META, home), home)
    target = cache_target(home)
    cache, _ = start_or_resume(target)
    block = np.random.default_rng(0).standard_normal((cache.shard_rows, WIDTH), dtype=np.float32)
    parts = (
        cache.commit(shard, block[: len(cache.rows(shard))], [], seconds=1.0, batch_size=1, device="cpu")
        for shard in range(cache.num_shards)
    )
    cache.finish({commit.shard: commit for commit in parts})
    return target


def cache_target(home: Path) -> ExtractionTarget:
    manifest = read_manifest(home, "rows")
    encoder = {"name": "text", "modality": "text"}
    identity = {
        "dataset": "rows",
        "manifest": manifest.fingerprint(),
        "encoder": encoder,
        "store_dtype": "float16",
        "text": META["text"],
    }
    provenance = {"command": "python benchmarks/rows.py", "batch_size": 1, "shard_rows": 0}
    return ExtractionTarget.from_identity(home, manifest, identity, provenance, (WIDTH,), ExtractOptions())


def run_prepare(folder: Path, ending: str = "csv") -> None:
    prepare("table", folder / "table", folder / f"prepared-{ending}", {"file": f"captions.{ending}"})


def run_resume(folder: Path) -> None:
    writer, commits = start_or_resume(cache_target(folder / "home"))
    assert len(commits) == writer.num_shards


def run_join(folder: Path) -> None:
    target = cache_target(folder / "home")
    cache = open_cache(target.path)
    for ids in target.input_rows.manifest.split("train").ids.parts(ROWS_PER_READ):
        assert cache.read(ids).shape == (len(ids), WIDTH)


def run_verify(folder: Path) -> None:
    assert verify(next((folder / "home" / "caches" / "rows").iterdir())) == []


def run_manifest(folder: Path) -> Manifest:
    return read_manifest(folder / "home", "rows")


PARTS: dict[str, Callable[[Path], object]] = {
    "prepare": run_prepare,
    "prepare-parquet": functools.partial(run_prepare, ending="parquet"),
    "manifest": run_manifest,
    "resume": run_resume,
    "join": run_join,
    "verify": run_verify,
}


def own_bytes() -> int:
    """Return the memory of this process without the pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """Give a list whose first number becomes the most memory of this process, looked at twenty times a second."""
    peak, done = [own_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], own_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()
    peak[0] = max(peak[0], own_bytes())


def measure(part: str, folder: Path, num_rows: int) -> None:
    """Run a part and print its figures; goals stand beside those of ten million rows."""
    before, wall, processor = own_bytes(), time.perf_counter(), time.process_time()
    with peak_bytes() as peak:
        kept = PARTS[part](folder)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    is_full = num_rows >= 10**7
    seconds_goal, bytes_goal = (f" (wanted < {MAX_SECONDS})", f" (wanted < {MAX_BYTES // 10**6})") if is_full else ("", "")
    print(f"{part} of {num_rows:,} rows: seconds {wall:.1f}{seconds_goal}; of the processor {processor:.1f}")
    print(f"{part} of {num_rows:,} rows: peak MB {(peak[0] - before) / 1e6:.0f}{bytes_goal}", flush=True)
    if part == "manifest":
        print(
            f"a manifest in memory: bytes a row {(own_bytes() - before) / num_rows:.0f} (wanted <= {MAX_ROW_BYTES})", flush=True
        )
    del kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--folder", type=Path, help="where the rows are written; several gigabytes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, parts = Path(name), options.parts.split(",")
        context = multiprocessing.get_context("spawn")
        work = [(write_table, (folder / "table", options.rows))] if {"prepare", "prepare-parquet"} & set(parts) else []
        work += [(write_rows, (folder / "home", options.rows))] if {"manifest", "resume", "join", "verify"} & set(parts) else []
        for function, arguments in (*work, *((measure, (part, folder, options.rows)) for part in parts)):
            process = context.Process(target=function, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{function.__name__} failed")


if __name__ == "__main__":
    main()
