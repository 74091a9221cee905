"""Turn the samples of a manifest into encoder inputs: one item per row of features, in batches of a fixed order.

How a shard is cut into batches depends only on the shard and the batch size, so that every machine cuts it alike.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.layout import Failure, from_stored, to_stored
from pipeline.data.corruptions import Corruption, corrupt
from pipeline.data.manifest import Manifest, is_blank, text_counts
from pipeline.data.manifest_files import load_dataset_spec
from pipeline.encoders._encoder import Encoder
from pipeline.encoders._factory import with_absolute_paths
from pipeline.runtime import plugins
from pipeline.runtime.device import default_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import configure
from pipeline.types import Sample

logger = logging.getLogger(__name__)


class PreparedBatch(NamedTuple):
    """A batch that is decoded or tokenized, but not yet encoded.

    The items are a NumPy array and no tensor: workers would send a tensor through /dev/shm, which is small in containers.
    """

    rows: np.ndarray  # row numbers of the features [B]
    items: np.ndarray  # the items that could be prepared, stacked [G, ...] with G <= B
    errors: list[str | None]  # [B]: why an item could not be prepared; None when it could
    seconds: float


class EncodedBatch(NamedTuple):
    """The features of a batch and the seconds that they took."""

    rows: np.ndarray  # row numbers of the features [B]
    features: np.ndarray  # float32 [B, *feature_shape], NaN where an item failed
    failures: list[Failure]
    prepare_seconds: float
    encode_seconds: float


@dataclass(frozen=True)
class InputRows(Sequence[tuple[Sample, str]]):
    """The item behind each row of a cache: (sample, text), or (sample, "") for the sample's media.

    No encoder is needed to know it. Items are made when they are asked for.
    """

    manifest: Manifest
    modality: str
    offsets: np.ndarray  # [N+1]: the texts of sample i have rows offsets[i] to offsets[i+1]; [0] for media

    def __len__(self) -> int:
        return int(self.offsets[-1]) if len(self.offsets) else len(self.manifest.samples)

    @overload
    def __getitem__(self, row: int) -> tuple[Sample, str]: ...
    @overload
    def __getitem__(self, row: slice) -> list[tuple[Sample, str]]: ...
    def __getitem__(self, row: int | slice) -> tuple[Sample, str] | list[tuple[Sample, str]]:
        if not isinstance(row, slice):
            position = range(len(self))[row]
            return self[position : position + 1][0]
        rows = range(len(self))[row]
        if not len(self.offsets) or not rows:
            return [(sample, "") for sample in self.manifest.samples[rows.start : rows.stop]] if rows else []
        first, last = (int(at) for at in np.searchsorted(self.offsets, [rows.start, rows.stop - 1], side="right") - 1)
        own = self.manifest.samples[first : last + 1]
        items = [(sample, text) for sample in own for text in texts_to_encode(sample, self.manifest.meta["text"])]
        return items[rows.start - int(self.offsets[first]) :][: len(rows)]


@dataclass(frozen=True)
class EncoderInputs:
    """Cuts the rows of a cache into batches, prepares the items for an encoder, and collects its features."""

    manifest: Manifest
    encoder: Encoder
    rows: Sequence[tuple[Sample, str]]  # `InputRows`
    store_dtype: str
    corruption: Corruption | None = None  # what is done to every picture before it is preprocessed

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, rows: range, batch_size: int) -> list[np.ndarray]:
        """Return the rows of a shard as batches of row numbers.

        Media stay in order. Texts are sorted by length, so that a batch needs little padding.
        """
        order = np.arange(rows.start, rows.stop)
        if self.encoder.modality == "text":
            lengths = [len(text) for _, text in self.rows[rows.start : rows.stop]]
            order = order[np.argsort(lengths, kind="stable")]
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def prepare(self, rows: np.ndarray) -> PreparedBatch:
        """Decode or tokenize the items of a batch."""
        started = time.perf_counter()
        results = [self._prepare(row) for row in rows]
        items = [result for result in results if not isinstance(result, str)]
        errors = [result if isinstance(result, str) else None for result in results]
        return PreparedBatch(rows, np.stack(items) if items else np.zeros(0), errors, time.perf_counter() - started)

    def _prepare(self, row: int) -> np.ndarray | str:
        """Return the prepared item, or the reason why it cannot be prepared: with the file's name, but without its folder."""
        sample, text = self.rows[row]
        name = sample.media.name
        try:
            raw = text if self.encoder.modality == "text" else self.manifest.media_path(sample)
            return self._corrupt_and_prepare(Path(raw), sample.id) if self.corruption else self.encoder.prepare(raw).numpy()
        except OSError as error:  # e.g. the name is too long, or the folder may not be read
            reason = error.strerror or str(error) or type(error).__name__
        except (RuntimeError, ValueError) as error:  # RuntimeError: from a loop of links, or from Pillow's AVIF reader
            reason = str(error).replace(f"{self.manifest.media_root}/", "") or type(error).__name__
        return reason if text or name in reason else f"{name}: {reason}"

    def _corrupt_and_prepare(self, path: Path, sample_id: str) -> np.ndarray:
        assert self.corruption
        side = getattr(self.encoder, "drawing_side", 0)  # encoders of clips may have none
        pictures = corrupt(self.encoder.open_pictures(path), self.corruption, sample_id, side)
        return self.encoder.prepare_pictures(pictures).numpy()

    def collect_features(self, prepared: PreparedBatch, encoded: np.ndarray, seconds: float) -> EncodedBatch:
        """Return the features of a whole batch, and a failure for every item without features.

        An item fails when it could not be prepared, or when its features are not finite in the store dtype.

        Args:
            prepared: the batch.
            encoded: features float32 [G, *feature_shape] of `prepared.items`.
            seconds: how long encoding took.
        """
        features = np.full((len(prepared.rows), *self.encoder.feature_shape), np.nan, dtype=np.float32)
        reasons = [("prepare", error) for error in prepared.errors]
        positions = np.array([position for position, error in enumerate(prepared.errors) if error is None], dtype=np.int64)
        if len(positions):
            stored = from_stored(to_stored(encoded, self.store_dtype), self.store_dtype)
            finite = np.isfinite(stored).reshape(len(positions), -1).all(axis=1)
            features[positions[finite]] = encoded[finite]
            for position in positions[~finite]:
                reasons[position] = ("encode", f"a feature is not finite as {self.store_dtype}")
        failures = [
            Failure(int(row), self.rows[row][0].id, stage, error)
            for row, (stage, error) in zip(prepared.rows, reasons, strict=True)
            if error is not None
        ]
        return EncodedBatch(prepared.rows, features, failures, prepared.seconds, seconds)


@dataclass
class MemorySafeEncoder:
    """Runs an encoder within the memory of the device.

    When a batch does not fit, it is cut in half. All later batches are cut to the size that was found to fit.
    """

    encoder: Callable[[Tensor], Tensor]
    max_items: int = sys.maxsize  # items that are encoded at once

    def __call__(self, batch: Tensor) -> Tensor:
        """Return the features float32 [B, *feature_shape] of stacked items.

        Raises:
            UserError: a single item does not fit into memory.
        """
        parts: list[Tensor] = []
        start = 0
        while start < len(batch):
            items = batch[start : start + self.max_items]
            part = self._encode(items)
            if part is not None:
                parts.append(part)
                start += len(items)
            elif len(items) == 1:
                raise UserError("one item alone does not fit into memory; take --set compute_dtype=bfloat16")
            else:
                self.max_items = len(items) // 2
                logger.debug("a batch of %d items does not fit into memory; %d from now on", len(items), self.max_items)
                torch.cuda.empty_cache()
        return torch.cat(parts)

    def _encode(self, items: Tensor) -> Tensor | None:
        """Return the features on the encoder's device, or None when the items do not fit.

        It is a method of its own so that a failed attempt has released its tensors before the memory cache is emptied.
        """
        try:
            return self.encoder(items.to(default_device(), non_blocking=True)).float()
        except torch.OutOfMemoryError:
            return None


def make_encoder_inputs(manifest: Manifest, encoder: Encoder, store_dtype: str) -> EncoderInputs:
    """Return the encoder's inputs for all samples of a manifest; errors as in `make_input_rows`."""
    return EncoderInputs(manifest, encoder, make_input_rows(manifest, encoder.modality), store_dtype)


def default_encoders(home: Path, manifest: Manifest) -> list[str]:
    """Return the names of a dataset's encoders; one of texts is left out when there is no text to encode."""
    encoders = dict(load_dataset_spec(home, manifest.dataset)["encoders"])
    rule = manifest.meta["text"]
    if "text" in encoders and not text_counts(manifest.columns).any() and rule.get("empty", "skip") == "skip":
        logger.info(
            "%s: this data set has no texts; %s is left out, and no method that learns from texts can be trained",
            manifest.dataset,
            encoders.pop("text"),
        )
    return list(encoders.values())


def check_encoders(names: Sequence[str], settings: Mapping[str, str]) -> None:
    """Check the names of encoders and the settings for them, before the first one runs.

    Raises:
        UserError: there is no such encoder or setting, or settings are given for several encoders.
    """
    if settings and len(names) > 1:
        raise UserError("settings belong to one encoder: name it (--encoder)")
    for name in names:
        plugins.check_name("encoders", name)
    for name in names:
        configure(plugins.get("encoders", name).Config, with_absolute_paths(settings))


def make_input_rows(manifest: Manifest, modality: str) -> InputRows:
    """Return one row per media file, or one row per text.

    Raises:
        UserError: the dataset has nothing of this modality, or its media folder is missing.
    """
    media_type = manifest.meta["media_type"]
    if modality not in ("text", media_type):
        raise UserError(f"dataset {manifest.dataset!r} has {media_type} media, the encoder reads {modality}")
    if modality != "text":
        if isinstance(manifest.media_root, Path) and not manifest.media_root.is_dir():
            raise UserError(f"the media folder {manifest.media_root} is gone; run: {manifest.prepare_command}")
        return InputRows(manifest, modality, np.zeros(0, np.int64))
    counts, rule = text_counts(manifest.columns), manifest.meta["text"]
    empty = rule.get("empty", "skip")
    if empty == "error" and not counts.all():
        texts_to_encode(manifest.samples[int(np.argmin(counts))], rule)
    counts = np.minimum(counts, 1) if rule["aggregate"] == "join" else counts
    offsets = np.cumsum(np.concatenate([[0], counts if empty == "skip" else np.maximum(counts, 1)]))
    if not offsets[-1]:
        raise UserError(f"dataset {manifest.dataset!r} has no texts to encode")
    return InputRows(manifest, modality, offsets)


def texts_to_encode(sample: Sample, rule: Mapping[str, str]) -> tuple[str, ...]:
    """Return the texts of a sample that are encoded; blank texts are dropped.

    Args:
        sample: the sample.
        rule: the section `text` of the dataset's yaml. With `aggregate` "join" the texts are joined by `sep` into one text,
            otherwise each is encoded by itself. `empty` decides for a sample without text: "skip" (default) leaves it
            without text features, "error" refuses it, and any other value is the text that is used instead.

    Raises:
        UserError: the sample has no text, and `empty` is "error".
    """
    texts = tuple(text for text in sample.texts if not is_blank(text))
    empty = rule.get("empty", "skip")
    if not texts and empty != "skip":
        if empty == "error":
            raise UserError(f"sample {sample.id!r} has no text, and the dataset's yaml says text.empty: error")
        return (empty,)
    return (rule["sep"].join(texts),) if rule["aggregate"] == "join" and texts else texts
