"""Measure on the spot how fast an extraction is: the real batches, workers and store, on a small part of the rows.

What is written goes to a place of its own beside the caches, which is removed afterwards.
"""

from __future__ import annotations

import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.cache import layout
from pipeline.cache.layout import StoreDtype
from pipeline.cache.shard_media import ShardMedia
from pipeline.cache.shards import StoredFeatures
from pipeline.cache.writer import Writer
from pipeline.data.manifest import Manifest
from pipeline.data.remote_tars import stamps_of
from pipeline.data.tar_members import find_member
from pipeline.extraction.extract import ExtractionTask, ExtractOptions, plan_extraction
from pipeline.extraction.inputs import EncodedBatch
from pipeline.extraction.throughput import ThroughputMeter
from pipeline.extraction.workers import BATCHES_PER_WORKER, choose_workers, encode_batches
from pipeline.runtime.claims import hold
from pipeline.runtime.device import default_device
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.places import Place, caches_at, caches_place
from pipeline.runtime.stores import map_objects, remove_objects, store_of

GOLDEN = (5**0.5 - 1) / 2
PROBED_SHARDS = 32  # from which batches are taken, evenly over all shards
ROUND_BATCHES = 8  # of each worker, that are encoded in the order in which an extraction would encode them
MAX_ROUNDS = 64
TIMED_FILES = 512  # whose sizes, times and digests are looked at
WRITES = 3  # of a shard
ASKED_TARS = 32  # whose stamps are looked at
ASKED_RECORDS = 256  # that are looked for, to time it
TILED_ROWS = 50_000  # of a manifest, at least, whose reading is timed


class Spent(NamedTuple):
    """Seconds of the clock, and of the processor in this process and its children that have ended."""

    seconds: float
    processor_seconds: float

    @staticmethod
    def now() -> Spent:
        """Return the readings of both, from which `until_now` counts."""
        spent = os.times()
        return Spent(time.perf_counter(), spent.user + spent.system + spent.children_user + spent.children_system)

    def until_now(self) -> Spent:
        """Return what was spent since these readings."""
        now = Spent.now()
        return Spent(now.seconds - self.seconds, now.processor_seconds - self.processor_seconds)


NO_TIME = Spent(0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class StoreProbe:
    """How fast the place of the caches takes and gives a shard, while nothing else is done."""

    shard_rows: int
    shard_bytes: int
    write_seconds: float  # of a shard and its record
    write_processor_seconds: float
    read_seconds: float  # of all rows of a shard that was just written
    record_seconds: float  # of looking for one record, with many requests in flight
    record_bytes: int  # of a record with the digests of its media

    @property
    def write_rate(self) -> float:
        """Bytes per second of writing."""
        return self.shard_bytes / self.write_seconds

    @property
    def read_rate(self) -> float:
        """Bytes per second of reading."""
        return self.shard_bytes / self.read_seconds


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured with one encoder on this machine. Seconds are those of the clock where they do not say otherwise."""

    encoder: str
    modality: str
    verdict: str  # that an extraction would have logged, see `ThroughputMeter`
    device: str
    num_processes: int  # that decoded, and on a processor also encoded, at the same time
    num_cores: int
    num_rows: int  # that were encoded while the clock ran
    seconds: float  # that they took
    load: Spent  # until the encoder was there
    first_seconds: float  # from then on until the first batch was encoded
    processor_seconds: float  # of all processes and threads, per row
    prepare_seconds: float  # per row, in one process
    encode_seconds: float  # per row, in one process or on the GPU
    failed: float  # share of the rows
    stamp_seconds: float  # per row: the size and times of its file; 0 for texts
    digest_seconds: float  # per row: the digest of its file, several threads at a time; 0 for texts
    digest_processor_seconds: float
    input_bytes: float  # per row: its file, or its text
    manifest_seconds: float  # per sample: of reading the manifest
    rows_per_sample: float
    tars_per_sample: float  # tar files in an object store, from which media are read
    id_bytes: float  # per sample
    store: StoreProbe

    @property
    def rate(self) -> float:
        """Rows per second of this machine, without the writing."""
        return self.num_rows / self.seconds


def probe_extraction(
    manifest: Manifest,
    encoder: str,
    settings: Mapping[str, Any],
    home: Path,
    store_dtype: StoreDtype,
    options: ExtractOptions,
    num_samples: int,
    seconds: float,
) -> Probe:
    """Encode rows of a data set for some seconds as `extract` does, and write a shard three times.

    Args:
        manifest: the samples.
        encoder: an encoder.
        settings: its settings.
        home: folder of all artifacts.
        store_dtype: number format on disk.
        options: as those of the extraction that is planned.
        num_samples: samples of that extraction, which may be more than the manifest has.
        seconds: for which rows are encoded.

    Raises:
        UserError: as in `extract`.
    """
    loading = Spent.now()
    task = plan_extraction(manifest, encoder, settings, home, store_dtype, False, options)
    load = loading.until_now()
    rows_per_sample = len(task.inputs) / len(manifest.samples)
    num_rows = max(1, round(num_samples * rows_per_sample))
    run = _encode(task, num_rows, seconds)
    with scratch_place(home) as caches:
        media = _time_media(task, run.rows[:TIMED_FILES], caches / "scratch" / "probe")
        shard = time_store(caches / "scratch" / "probe", task, run.features, num_rows)
    num_done, meter, is_text = len(run.rows), run.meter, task.target.input_rows.modality == "text"
    num_begun = num_done + meter.num_workers * num_done / run.num_batches  # the processor was at those of the workers, too
    return Probe(
        encoder=encoder,
        modality=task.target.input_rows.modality,
        verdict=run.verdict,
        device=meter.device,
        num_processes=max(1, meter.num_workers),
        num_cores=meter.num_cores,
        num_rows=run.timed_rows,
        seconds=run.seconds,
        load=load,
        first_seconds=run.first_seconds,
        processor_seconds=run.processor_seconds / num_begun,
        prepare_seconds=meter.prepare_seconds / num_done,
        encode_seconds=meter.encode_seconds / num_done,
        failed=run.num_failed / num_done,
        **media,
        manifest_seconds=_manifest_seconds(manifest),
        rows_per_sample=rows_per_sample,
        tars_per_sample=0.0 if is_text else len(manifest.media_stamps) / len(manifest.samples),
        id_bytes=float(np.mean([len(each.encode()) + 4 for each in manifest.columns.ids[:TIMED_FILES]])),
        store=shard,
    )


@dataclass
class _Run:
    """Rows that were encoded, and what it took."""

    meter: ThroughputMeter
    verdict: str
    rows: np.ndarray  # all of them, in the order in which they were encoded
    features: np.ndarray  # of some of them
    num_batches: int
    num_failed: int
    timed_rows: int
    seconds: float
    first_seconds: float
    processor_seconds: float


def _encode(task: ExtractionTask, num_rows: int, seconds: float) -> _Run:
    """Encode batches from all over the rows; the clock starts when every worker is at work.

    Args:
        task: the extraction.
        num_rows: rows that are planned; where they are more than there are, these are encoded again and again.
        seconds: for which rows are encoded.
    """
    meter = ThroughputMeter(choose_workers(task.target.options.workers, num_rows), default_device().type)
    round_batches = ROUND_BATCHES * max(1, meter.num_workers)
    batches = spread_batches(task, round_batches)
    if num_rows > len(task.inputs):
        batches *= -(-MAX_ROUNDS * round_batches // len(batches))
    warm = min(BATCHES_PER_WORKER * meter.num_workers, (len(batches) - 1) // 2)
    done: list[EncodedBatch] = []
    begun = Spent.now()
    times: list[float] = []
    bar = ProgressBar(total=round(seconds), unit=" s", label=f"probing {task.target.path.name.rpartition('-')[0]}")
    with bar, closing(encode_batches(task.inputs, batches, task.encoder, meter)) as encoded:
        for batch in encoded:
            meter.add(batch)
            times.append(time.perf_counter())
            done.append(batch)
            elapsed = times[-1] - (times[warm] if len(times) > warm else begun.seconds)
            bar.update(max(0, min(round(seconds), int(times[-1] - begun.seconds)) - bar.n))
            if elapsed >= seconds and len(times) > warm + 1 and (len(times) % round_batches == 0 or elapsed >= 2 * seconds):
                break
    verdict = meter.verdict()
    start = times[warm] if len(times) > warm + 1 else begun.seconds
    timed = done[warm + 1 :] if len(times) > warm + 1 else done
    return _Run(
        meter=meter,
        verdict=verdict,
        rows=np.concatenate([batch.rows for batch in done]),
        features=np.concatenate([batch.features for batch in done[:round_batches]]),
        num_batches=len(done),
        num_failed=sum(len(batch.failures) for batch in done),
        timed_rows=sum(len(batch.rows) for batch in timed),
        seconds=times[-1] - start,
        first_seconds=times[0] - begun.seconds,
        processor_seconds=begun.until_now().processor_seconds,
    )


def spread_batches(task: ExtractionTask, round_batches: int) -> list[np.ndarray]:
    """Return batches of an extraction, in rounds of which each is spread evenly over all rows.

    Within a round they are in the order of the extraction, in which texts become longer: batches that are encoded at the same
    time are then alike, as they are there.

    Args:
        task: the extraction.
        round_batches: batches of a round.
    """
    num_rows = len(task.inputs)
    shard_rows = rows_per_shard_of(task, num_rows)
    num_shards = -(-num_rows // shard_rows)
    chosen = np.unique(np.linspace(0, num_shards - 1, min(num_shards, PROBED_SHARDS)).astype(np.int64)).tolist()
    found = [
        (place, batch)
        for shard in chosen
        for place, batch in enumerate(task.batches(range(shard * shard_rows, min((shard + 1) * shard_rows, num_rows))))
    ]
    order = np.argsort(np.arange(len(found)) * GOLDEN % 1.0).tolist()[: MAX_ROUNDS * round_batches]
    rounds = [order[start : start + round_batches] for start in range(0, len(order), round_batches)]
    return [found[number][1] for own in rounds for number in sorted(own, key=lambda number: (found[number][0], number))]


def rows_per_shard_of(task: ExtractionTask, num_rows: int) -> int:
    """Return the rows of a shard of a new cache with this many rows."""
    width = 4 if task.target.identity["store_dtype"] == "float32" else 2
    row_bytes = width * int(np.prod(task.target.feature_shape))
    return layout.rows_per_shard(num_rows, row_bytes, task.target.provenance["shard_rows"])


@contextmanager
def scratch_place(home: Path) -> Iterator[Place]:
    """Give a place for trial caches, on the disk or in the store that has those of a home; it is removed after the block."""
    caches = caches_place(home)
    is_folder = isinstance(caches, Path)
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=_nearest_folder(caches) if is_folder else None) as name:
        place = Path(name) / "caches" if is_folder else caches / f"probe-{secrets.token_hex(6)}"
        with caches_at(str(place)):
            try:
                yield caches_place(Path(name))
            finally:
                if not is_folder:
                    remove_objects(place)


def _nearest_folder(folder: Path) -> Path:
    """Return the nearest folder that exists: this one, or one above it."""
    folder = folder.absolute()
    return folder if folder.is_dir() else _nearest_folder(folder.parent)


def time_store(path: Place, task: ExtractionTask, features: np.ndarray, num_rows: int) -> StoreProbe:
    """Write and read a shard of an extraction of this many rows at a place, and look for records."""
    shard_rows = rows_per_shard_of(task, num_rows)
    rows = np.resize(np.nan_to_num(features), (min(shard_rows, num_rows), *features.shape[1:]))
    digests = "" if task.target.input_rows.modality == "text" else "A" * (4 * -(-8 * len(rows) // 3))
    identity = {**task.target.identity, "dataset": "scratch"}
    writes: list[Spent] = []
    with hold(path):
        ids, offsets = [str(row) for row in range(len(rows))], np.zeros(0, np.int64)
        writer = Writer.open(path, ids, offsets, rows.shape[1:], identity, task.target.provenance, shard_rows)
        for _ in range(WRITES):
            writing = Spent.now()
            writer.commit(0, rows, [], seconds=1.0, batch_size=1, device="cpu", media_digests=digests)
            writes.append(writing.until_now())
        started = time.perf_counter()
        StoredFeatures.open(path).read(np.arange(len(rows)))
        read_seconds = time.perf_counter() - started
        store = store_of(path)
        started = time.perf_counter()
        map_objects(path, lambda _: len(store.get(layout.commit_path(path, 0))), range(ASKED_RECORDS))
        record_seconds = (time.perf_counter() - started) / ASKED_RECORDS
        return StoreProbe(
            shard_rows=shard_rows,
            shard_bytes=store.size(layout.shard_path(path, 0, rows.ndim)),
            write_seconds=statistics.median(each.seconds for each in writes),
            write_processor_seconds=statistics.median(each.processor_seconds for each in writes),
            read_seconds=read_seconds,
            record_seconds=record_seconds,
            record_bytes=store.size(layout.commit_path(path, 0)),
        )


def _time_media(task: ExtractionTask, rows: np.ndarray, path: Place) -> dict[str, float]:
    """Return what is needed per row beside decoding: the stamp and the digest of its file; and the bytes of its input.

    Args:
        task: the extraction.
        rows: that were just read.
        path: the place of a trial cache.
    """
    items = [task.inputs.rows[int(row)] for row in rows]
    if task.target.input_rows.modality == "text":
        zero = dict.fromkeys(("stamp_seconds", "digest_seconds", "digest_processor_seconds"), 0.0)
        return {**zero, "input_bytes": float(np.mean([len(text.encode()) for _, text in items]))}
    manifest = task.inputs.manifest
    started = time.perf_counter()
    if isinstance(manifest.media_root, Path):
        tiled = list(manifest.columns.select(np.resize(rows, TIMED_FILES)))
        ShardMedia.of_rows(path, manifest, tiled, 0, []).stamp()
        stamp_seconds = (time.perf_counter() - started) / TIMED_FILES
    else:  # a tar has one stamp for all of its samples
        tars = list(manifest.media_stamps)
        asked = stamps_of(str(manifest.media_root / name) for name in tars[:ASKED_TARS])
        stamp_seconds = (time.perf_counter() - started) / len(asked) * len(tars) / len(manifest.samples)
    samples = [sample for sample, _ in items]
    media = ShardMedia.of_rows(path, manifest, samples, 0, [])
    digesting = Spent.now()
    media.digests()
    digested = digesting.until_now()
    return {
        "stamp_seconds": stamp_seconds,
        "digest_seconds": digested.seconds / len(samples),
        "digest_processor_seconds": digested.processor_seconds / len(samples),
        "input_bytes": float(np.mean([_file_bytes(file) for file in media.files])),
    }


def _file_bytes(path: str) -> int:
    """Return the size of a file or of a member of a tar; 0 if it is not there."""
    member = find_member(path)
    return member.size if member else os.path.getsize(path) if os.path.isfile(path) else 0


def _manifest_seconds(manifest: Manifest) -> float:
    """Return how long it takes per sample to hash a manifest, which is most of reading it; a small one is repeated."""
    positions = np.resize(np.arange(len(manifest.samples)), TILED_ROWS)
    started = time.perf_counter()
    manifest.select(positions).fingerprint()
    return (time.perf_counter() - started) / TILED_ROWS
