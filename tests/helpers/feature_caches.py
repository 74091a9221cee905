"""Write caches of given features for tests: a manifest without media, and caches of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.cache import Writer, layout
from pipeline.cache.layout import Failure, read_record
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.runtime.files import lock
from pipeline.types import Sample

COMMAND = "diffalign extract toy --encoder toy"
PROVENANCE_FIELDS = {"seconds", "device", "batch_size", "check"}  # of a commit record; they differ between runs


def make_manifest(home: Path, num_samples: int, labels: Sequence[tuple[int, ...]] = (), seed: int = 0) -> Manifest:
    """Write and return the manifest of a dataset `toy` of five classes: 60 % train, 20 % val, 20 % test, in random order."""
    rng = np.random.default_rng(seed)
    splits = rng.choice(["train", "val", "test"], num_samples, p=[0.6, 0.2, 0.2]).tolist()
    labels = labels or [(int(label),) for label in rng.integers(0, 5, num_samples)]
    samples = tuple(
        Sample(f"ä/{row:05d}", splits[row], Path(f"{row}.png"), (f"text {row}",), labels[row], "") for row in range(num_samples)
    )
    meta = {"media_type": "image", "text": {"kind": "caption", "aggregate": "mean", "sep": " "}, "licence": "generated"}
    kind = "single" if all(len(sample_labels) == 1 for sample_labels in labels) else "multi"
    manifest = Manifest("toy", kind, tuple("abcde"), samples, meta, home)
    write_manifest(manifest, home)
    return manifest


def make_cache(
    home: Path,
    manifest: Manifest,
    features: np.ndarray,
    *,
    offsets: np.ndarray | None = None,
    store_dtype: str = "float16",
    name: str = "toy",
    shard_rows: int = 0,
    shards: Sequence[int] | None = None,
) -> Path:
    """Write a cache of these features, and return its folder. Rows that are not finite are failures.

    Args:
        shards: the shards to write; None: all of them, so that the cache is complete.
    """
    encoder = {"name": name, "modality": "image", "weights": "0" * 64}
    identity = {"dataset": "toy", "manifest": manifest.fingerprint(), "encoder": encoder, "store_dtype": store_dtype}
    path = layout.cache_path(home, "toy", name, identity)
    ids = [sample.id for sample in manifest.samples]
    row_ends = offsets if offsets is not None else np.arange(len(ids) + 1)
    failed_rows = np.flatnonzero(~np.isfinite(features).reshape(len(features), -1).all(axis=1)).tolist()
    failed_samples = [ids[int(np.searchsorted(row_ends, row, "right")) - 1] for row in failed_rows]
    failures = [
        Failure(row, sample_id, "prepare", "cut off") for row, sample_id in zip(failed_rows, failed_samples, strict=True)
    ]
    provenance = {"command": COMMAND, "versions": {"toy": "1"}}
    with lock(path):
        writer_offsets = offsets if offsets is not None else np.zeros(0, np.int64)
        writer = Writer.open(path, ids, writer_offsets, features.shape[1:], identity, provenance, shard_rows)
        for shard in range(writer.num_shards) if shards is None else shards:
            rows = writer.rows(shard)
            shard_failures = [failure for failure in failures if failure.row in rows]
            writer.commit(shard, features[rows.start : rows.stop], shard_failures, seconds=1.5, batch_size=8, device="cpu")
        if shards is None:
            writer.finish(writer.verified_commits())
    return path


def stored_numbers(rng: np.random.Generator, shape: tuple[int, ...], store_dtype: str) -> np.ndarray:
    """Return float32 numbers that the store dtype holds exactly, from its whole range: subnormal, negative zero, huge."""
    kind = {"float32": np.uint32}.get(store_dtype, np.uint16)
    bits = rng.integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)
    values = layout.from_stored(bits if store_dtype == "bfloat16" else bits.view(store_dtype), store_dtype)
    values = np.where(np.isfinite(values), values, np.float32(-0.0))
    values[3] = np.nan
    return values


def assert_same_cache(first: Path, second: Path) -> None:
    """Assert that two caches have the same files with the same bytes, except the provenance in commit records."""
    files = [sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file()) for path in (first, second)]
    assert files[0] == files[1]
    for file in files[0]:
        if file.parent.name == "commits" and file.stem.isdigit():
            records = [
                {k: v for k, v in read_record(path / file).items() if k not in PROVENANCE_FIELDS} for path in (first, second)
            ]
            assert records[0] == records[1]
        else:
            assert (first / file).read_bytes() == (second / file).read_bytes(), file
