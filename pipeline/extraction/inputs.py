"""What an encoder is asked: an item per row of features, in batches that depend on nothing but the shard and their size."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.layout import Failure, from_stored, to_stored
from pipeline.data.manifest import Manifest
from pipeline.runtime.device import default_device
from pipeline.types import Encoder, Sample

PROBES = 16  # items that are tried to find out how large one is


class Prepared(NamedTuple):
    """A batch on its way to the encoder: an array, because workers would send tensors through /dev/shm, small in containers."""

    rows: np.ndarray  # of features
    good: np.ndarray  # the items that could be prepared, stacked
    errors: list[str | None]  # for every item: why it could not be prepared, None when it could
    seconds: float


class Encoded(NamedTuple):
    """A batch of features float32 [B, *shape], NaN where an item failed, and where the time went."""

    rows: np.ndarray
    features: np.ndarray
    failures: list[Failure]
    prepare_seconds: float
    encode_seconds: float


@dataclass(frozen=True)
class InputRows:
    """What the rows of a cache are of; no encoder is needed to know it."""

    manifest: Manifest
    modality: str
    items: tuple[tuple[Sample, str], ...]  # (sample, text), or (sample, "") for its media
    offsets: np.ndarray  # [N+1] of each sample's rows of texts; [0] for media

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> tuple[Sample, str]:
        return self.items[row]

    def media_sizes(self, rows: range, failed: Collection[int]) -> str:
        """SHA-256 of how many bytes the media of these rows have, without those of `failed` rows.

        "" when that says nothing: of texts, which the manifest holds, and when a file is not there.
        """
        if self.modality == "text":
            return ""
        total, root = hashlib.sha256(), str(self.manifest.media_root)
        for row in rows:
            if row not in failed:
                try:
                    size = os.stat(os.path.join(root, self[row][0].media)).st_size
                except OSError:
                    return ""
                total.update(b"%d\n" % size)
        return total.hexdigest()


@dataclass(frozen=True)
class Items:
    """The rows of a cache and the encoder that fills them."""

    manifest: Manifest
    encoder: Encoder
    rows: tuple[tuple[Sample, str], ...]  # as in `InputRows`
    store_dtype: str

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, rows: range, batch_size: int) -> list[np.ndarray]:
        """The rows of a shard as batches: media in order, texts by length, so that a batch is padded little."""
        order = np.arange(rows.start, rows.stop)
        if self.encoder.modality == "text":
            lengths = [len(self.rows[row][1]) for row in rows]
            order = order[np.argsort(lengths, kind="stable")]
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def item_bytes(self) -> int:
        """How large an item is once it is prepared; 1 when none of the first can be."""
        tried = (self._prepare(row) for row in range(min(PROBES, len(self))))
        return next((item.nbytes for item in tried if not isinstance(item, str)), 1)

    def prepare(self, rows: np.ndarray) -> Prepared:
        """Decode or tokenize the items of a batch."""
        started = time.perf_counter()
        items = [self._prepare(row) for row in rows]
        good = [item for item in items if not isinstance(item, str)]
        errors = [item if isinstance(item, str) else None for item in items]
        return Prepared(rows, np.stack(good) if good else np.zeros(0), errors, time.perf_counter() - started)

    def _prepare(self, row: int) -> np.ndarray | str:
        """The prepared item, or the reason why there is none, which names the file, but not where it is."""
        sample, text = self.rows[row]
        name = sample.media.name
        try:
            raw = text if self.encoder.modality == "text" else self.manifest.media_path(sample)
            return self.encoder.prepare(raw).numpy()
        except OSError as error:  # of a name that is too long, or a folder that may not be entered
            reason = error.strerror or str(error) or type(error).__name__
        except (RuntimeError, ValueError) as error:  # RuntimeError: of a loop of links, or of Pillow's reader of AVIF
            reason = str(error).replace(f"{self.manifest.media_root}/", "") or type(error).__name__
        return reason if text or name in reason else f"{name}: {reason}"

    def settle(self, prepared: Prepared, encoded: np.ndarray, seconds: float) -> Encoded:
        """Put the encoder's features in their places; what could not be prepared, or is not finite as stored, is a failure."""
        features = np.full((len(prepared.rows), *self.encoder.feature_shape), np.nan, dtype=np.float32)
        reasons = [("prepare", error) for error in prepared.errors]
        good = np.array([position for position, error in enumerate(prepared.errors) if error is None], dtype=np.int64)
        if len(good):
            kept = from_stored(to_stored(encoded, self.store_dtype), self.store_dtype)
            finite = np.isfinite(kept).reshape(len(good), -1).all(axis=1)
            features[good[finite]] = encoded[finite]
            for position in good[~finite]:
                reasons[position] = ("encode", f"a feature is not finite as {self.store_dtype}")
        failures = [
            Failure(int(row), self.rows[row][0].id, stage, error)
            for row, (stage, error) in zip(prepared.rows, reasons, strict=True)
            if error is not None
        ]
        return Encoded(prepared.rows, features, failures, prepared.seconds, seconds)


@dataclass
class Forward:
    """An encoder within the memory there is: a batch that does not fit is halved, and so are all that follow."""

    encoder: Callable[[Tensor], Tensor]
    limit: int = sys.maxsize  # items at once

    def __call__(self, batch: Tensor) -> Tensor:
        """Features float32 [B, *shape] of stacked items; `ValueError` when not even one item fits."""
        parts: list[Tensor] = []
        start = 0
        while start < len(batch):
            items = batch[start : start + self.limit]
            part = self._encode(items)
            if part is not None:
                parts.append(part)
                start += len(items)
            elif len(items) == 1:
                raise ValueError("one item alone does not fit into memory; take --set compute_dtype=bfloat16")
            else:
                self.limit = len(items) // 2
                torch.cuda.empty_cache()
        return torch.cat(parts)

    def _encode(self, items: Tensor) -> Tensor | None:
        """Features on the encoder's device, or None when they do not fit; once it has returned, the attempt holds nothing."""
        try:
            return self.encoder(items.to(default_device(), non_blocking=True)).float()
        except torch.OutOfMemoryError:
            return None


def make_items(manifest: Manifest, encoder: Encoder, store_dtype: str) -> tuple[Items, np.ndarray]:
    """The items in row order, and for texts the offsets [N+1] of each sample's rows (for media: empty)."""
    rows = make_rows(manifest, encoder.modality)
    return Items(manifest, encoder, rows.items, store_dtype), rows.offsets


def make_rows(manifest: Manifest, modality: str) -> InputRows:
    """A row for every file, or for every text; `ValueError` when the dataset has none of the modality."""
    media_type = manifest.meta["media_type"]
    if modality not in ("text", media_type):
        raise ValueError(f"dataset {manifest.dataset!r} has {media_type} media, the encoder reads {modality}")
    if modality != "text":
        if not manifest.media_root.is_dir():
            raise ValueError(f"the media folder {manifest.media_root} is gone; run: diffalign prepare {manifest.dataset}")
        return InputRows(manifest, modality, tuple((sample, "") for sample in manifest.samples), np.zeros(0, np.int64))
    texts = [texts_of(sample, manifest.meta["text"]) for sample in manifest.samples]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    if not offsets[-1]:
        raise ValueError(f"dataset {manifest.dataset!r} has no texts to encode")
    items = tuple((sample, text) for sample, own in zip(manifest.samples, texts, strict=True) for text in own)
    return InputRows(manifest, modality, items, offsets)


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
