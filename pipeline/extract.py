"""Stage 1: run an encoder over a manifest and keep what it says in a feature cache."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipeline.cache.layout import STORE_DTYPES, Commit, Failure, StoreDtype, cache_path, from_stored, to_stored
from pipeline.cache.writer import Writer
from pipeline.devices import default_device
from pipeline.encoding import build_encoder
from pipeline.manifest import Manifest
from pipeline.runs import lock
from pipeline.types import Encoder, Sample

LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pillow",
    "resvg-py",
    "av",
    "zarr",
)


@dataclass(frozen=True)
class Items:
    """What an encoder is asked, one item per row of features; items are prepared in worker processes."""

    manifest: Manifest
    encoder: Encoder
    rows: tuple[tuple[Sample, str], ...]  # (sample, text), or (sample, "") for its media

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> np.ndarray | str:
        """The prepared item, or the reason why there is none."""
        sample, text = self.rows[row]
        try:
            raw = text if self.encoder.modality == "text" else self.manifest.media_path(sample)
            return self.encoder.prepare(raw).numpy()
        except ValueError as error:
            return str(error)


class Loaded(NamedTuple):
    """A batch of prepared items: arrays, because workers would send tensors through /dev/shm, which is small in containers."""

    good: np.ndarray  # the items that could be prepared, stacked
    errors: list[str]  # for every item of the batch: why it could not be prepared, or ""


def extract(
    manifest: Manifest,
    encoder_name: str,
    settings: Mapping[str, Any],
    home: Path,
    *,
    batch_size: int = 16,
    workers: int = 0,
    max_failures: float = 0.05,
    progress: bool = True,
    store_dtype: StoreDtype = "float16",
    retry_failed: bool = False,
) -> Path:
    """Fill the cache of a manifest and an encoder, from where it stands, and return its folder.

    What is committed and undamaged stays and the rest is done, so one command starts, resumes and repairs. `workers`
    processes decode media (0: this process does). More than the share `max_failures` (0..1) of failed items is an error.
    `retry_failed` redoes the shards in which items failed. `ValueError` for settings, media or files that do not fit.
    """
    if batch_size < 1 or workers < 0 or not 0 <= max_failures <= 1:
        raise ValueError("batch size must be >= 1, workers >= 0 and max failures a share of the items, from 0 to 1")
    if store_dtype not in STORE_DTYPES:
        raise ValueError(f"unknown store dtype {store_dtype!r}; choose one of: {', '.join(STORE_DTYPES)}")
    config, encoder = build_encoder(encoder_name, settings)
    items, offsets = plan(manifest, encoder)
    identity = _identity(manifest, encoder_name, encoder, store_dtype)
    path = cache_path(home, manifest.dataset, encoder_name, identity)
    provenance = {"command": _command(manifest.dataset, encoder_name, config, store_dtype), "versions": _versions()}
    ids = [sample.id for sample in manifest.samples]
    with lock(path):
        writer = Writer.open(path, ids, offsets, encoder.feature_shape, identity, provenance)
        commits = writer.committed()
        if retry_failed:
            commits = {shard: commit for shard, commit in commits.items() if not commit.failures}
        if len(commits) < writer.num_shards:
            fill(writer, commits, items, batch_size, workers, max_failures, progress)
        writer.finish(commits)
    return path


def plan(manifest: Manifest, encoder: Encoder) -> tuple[Items, np.ndarray]:
    """The items in row order, and for texts the offsets [N+1] of each sample's rows (for media: empty)."""
    media_type = manifest.meta["media_type"]
    if encoder.modality not in ("text", media_type):
        raise ValueError(f"dataset {manifest.dataset!r} has {media_type} media, the encoder reads {encoder.modality}")
    if encoder.modality != "text":
        if not manifest.media_root.is_dir():
            raise ValueError(f"the media folder {manifest.media_root} is gone; run: diffalign prepare {manifest.dataset}")
        return Items(manifest, encoder, tuple((sample, "") for sample in manifest.samples)), np.zeros(0, np.int64)
    texts = [texts_of(sample, manifest.meta["text"]) for sample in manifest.samples]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    if not offsets[-1]:
        raise ValueError(f"dataset {manifest.dataset!r} has no texts to encode")
    rows = tuple((sample, text) for sample, own in zip(manifest.samples, texts, strict=True) for text in own)
    return Items(manifest, encoder, rows), offsets


def texts_of(sample: Sample, rule: Mapping[str, str]) -> tuple[str, ...]:
    """The texts that are encoded for a sample: all units joined by `sep`, or each of them; a blank one is no text.

    Without any text, `empty` decides: "skip" leaves the sample without text features, "error" is a `ValueError` that names it,
    and anything else is the text that stands in.
    """
    units = tuple(text for text in sample.texts if text.strip())
    empty = rule.get("empty", "skip")
    if not units and empty != "skip":
        if empty == "error":
            raise ValueError(f"sample {sample.id!r} has no text, and the dataset's yaml says text.empty: error")
        return (empty,)
    return (rule["sep"].join(units),) if rule["aggregate"] == "join" and units else units


def fill(
    writer: Writer,
    commits: dict[int, Commit],
    items: Items,
    batch_size: int,
    workers: int,
    max_failures: float,
    progress: bool,
) -> None:
    """Encode and commit every shard that is not in `commits`; batches start anew with each shard, so a resume changes none."""
    shards = [shard for shard in range(writer.num_shards) if shard not in commits]
    num_done = sum(commit.rows for commit in commits.values())
    num_failed = sum(len(commit.failures) for commit in commits.values())
    loaded = _load(items, [rows for shard in shards for rows in _batches(writer.rows(shard), batch_size)], workers)
    with tqdm(total=len(items), initial=num_done, unit=" items", disable=not progress, file=sys.stderr) as bar:
        for shard in shards:
            started = time.monotonic()
            features: list[np.ndarray] = []
            failures: list[Failure] = []
            for rows in _batches(writer.rows(shard), batch_size):
                encoded, failed = _encode(items, rows, next(loaded), writer)
                features.append(encoded)
                failures += failed
                bar.update(len(rows))
                if num_failed + len(failures) > max_failures * len(items):
                    raise _hopeless(num_failed + len(failures), len(items), failures[-1], max_failures)
            num_failed += len(failures)
            commits[shard] = writer.commit(
                shard,
                np.concatenate(features),
                failures,
                seconds=time.monotonic() - started,
                batch_size=batch_size,
                device=default_device().type,
            )


def _batches(rows: range, batch_size: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, batch_size):
        yield range(start, min(start + batch_size, rows.stop))


def _load(items: Items, batches: list[range], workers: int) -> Iterator[Loaded]:
    """The prepared batches in order, decoded ahead by `workers` processes."""
    return iter(
        DataLoader(
            cast("Dataset[Any]", items),
            batch_sampler=[list(rows) for rows in batches],
            num_workers=0 if items.encoder.modality == "text" else workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # its own, so that nobody's random numbers move
        )
    )


def _collate(batch: list[np.ndarray | str]) -> Loaded:
    good = [item for item in batch if not isinstance(item, str)]
    return Loaded(np.stack(good) if good else np.zeros(0), [item if isinstance(item, str) else "" for item in batch])


def _encode(items: Items, rows: range, loaded: Loaded, writer: Writer) -> tuple[np.ndarray, list[Failure]]:
    """Features float32 [B, *shape] of a batch, NaN where an item failed, and the failures."""
    features = np.full((len(rows), *writer.feature_shape), np.nan, dtype=np.float32)
    reasons = [("prepare", error) for error in loaded.errors]
    good = [position for position, error in enumerate(loaded.errors) if not error]
    if good:
        with torch.inference_mode():
            encoded = items.encoder(torch.from_numpy(loaded.good)).float().cpu().numpy()
        kept = from_stored(to_stored(encoded, writer.store_dtype), writer.store_dtype)
        finite = np.isfinite(kept).reshape(len(good), -1).all(axis=1)
        features[np.array(good)[finite]] = encoded[finite]
        for position in np.array(good)[~finite]:
            reasons[position] = ("encode", f"a feature is not finite as {writer.store_dtype}")
    return features, [
        Failure(row, items.rows[row][0].id, stage, error) for row, (stage, error) in zip(rows, reasons, strict=True) if error
    ]


def _hopeless(num_failed: int, num_items: int, last: Failure, max_failures: float) -> ValueError:
    return ValueError(
        f"{num_failed} of {num_items} items failed, more than --max-failures {max_failures:g} allows; "
        f"the last one: sample {last.id!r}: {last.error}"
    )


def _identity(manifest: Manifest, encoder_name: str, encoder: Encoder, store_dtype: str) -> dict[str, Any]:
    """Everything that can change the features, as far as it is known: a manifest need not know its media's digest."""
    source = {"text": manifest.meta["text"]} if encoder.modality == "text" else {}
    digest = {"media_sha256": manifest.meta["media_sha256"]} if "media_sha256" in manifest.meta else {}
    return {
        "dataset": manifest.dataset,
        "manifest": manifest.fingerprint(),
        "encoder": {"name": encoder_name, "modality": encoder.modality, **encoder.identity()},
        "store_dtype": store_dtype,
        **(source or digest),
    }


def _command(dataset: str, encoder_name: str, config: Any, store_dtype: str) -> str:
    """The command that completes the cache."""
    values = asdict(config)
    settings = [f"{field.name}={values[field.name]}" for field in fields(config) if values[field.name] != field.default]
    options = [part for setting in settings for part in ("--set", setting)]
    options += ["--store-dtype", store_dtype] if store_dtype != "float16" else []
    return shlex.join(["diffalign", "extract", dataset, "--encoder", encoder_name, *options])


def _versions() -> dict[str, str]:
    """Versions of the installed libraries that turn bytes into features."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # drawings have a renderer of their own
            versions[name] = importlib.metadata.version(name)
    return versions
