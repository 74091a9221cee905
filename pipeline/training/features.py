"""The features that heads are trained on: a manifest and its caches, opened once for any number of heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pipeline.cache import Cache
from pipeline.cache.near_duplicates import near_duplicate_warning
from pipeline.cache.reader import find_cache
from pipeline.cache.streaming import bytes_per_sample, open_split
from pipeline.cache.table import FeatureSource, FeatureTable, load_split
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import load_dataset_spec, read_manifest
from pipeline.runtime import plugins
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.device import default_device
from pipeline.runtime.errors import UserError
from pipeline.types import Split

logger = logging.getLogger(__name__)

AGGREGATES = ("mean", "first", "random")
SourceT = TypeVar("SourceT", bound=FeatureSource)


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """A manifest and the opened caches that a method needs.

    Opening reads only the manifest and the identities of the caches. A split is loaded at its first use and then kept.
    """

    home: Path
    manifest: Manifest
    caches: Mapping[str, Cache]  # by batch key
    aggregate: str  # how several texts of a sample become one vector: mean, first or random

    @cached_property
    def train(self) -> FeatureTable:
        """The training split in memory, with everything that a method may read in training."""
        return _log_excluded("train", load_split(self.manifest, self.caches, "train", default_device(), self.aggregate))

    @cached_property
    def val(self) -> FeatureTable:
        """The validation split in memory, without texts."""
        return _log_excluded("val", load_split(self.manifest, self._images, "val", default_device(), self.aggregate))

    @cached_property
    def _images(self) -> Mapping[str, Cache]:
        return {"image": self.caches["image"]}

    def splits(self, window: int) -> tuple[FeatureSource, FeatureSource]:
        """Return the training and the validation split.

        Args:
            window: The largest number of samples in memory at a time; 0: all.
        """
        if not window:
            return self.train, self.val
        if window not in self._splits_by_window:
            device, aggregate = default_device(), self.aggregate
            train = open_split(self.manifest, self.caches, "train", device, aggregate, window)
            val = open_split(self.manifest, self._images, "val", device, aggregate, window)
            self._splits_by_window[window] = _log_excluded("train", train), _log_excluded("val", val)
        return self._splits_by_window[window]

    @cached_property
    def _splits_by_window(self) -> dict[int, tuple[FeatureSource, FeatureSource]]:
        return {}

    def warn_about_near_duplicates(self) -> None:
        """Log how many validation and test images look almost like a training image; they are searched once per cache."""
        if warning := near_duplicate_warning(self.caches["image"]):
            logger.warning(warning)

    @property
    def num_bytes(self) -> int:
        """The memory that all samples need, in bytes."""
        return bytes_per_sample(self.caches, self.aggregate) * len(self.caches["image"].ids)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the columns of a batch, see `types.Shapes`."""
        classes = (len(self.manifest.class_names),)
        label = () if self.manifest.label_kind == "single" else classes
        return {**{key: cache.feature_shape for key, cache in self.caches.items()}, "label": label, "classes": classes}


def _log_excluded(split: Split, source: SourceT) -> SourceT:
    """Log the samples that a split leaves out, and return the split."""
    if source.excluded:
        count, first = len(source.excluded), source.excluded[0]
        logger.warning("%s: %d samples without an image feature are left out: %s …", split, count, first)
    return source


def open_features(home: Path, dataset: str, method: str, encoders: Mapping[str, str], aggregate: str = "") -> FeatureSet:
    """Open the features that a method needs.

    Args:
        home: The folder of all caches and runs.
        dataset: The name of a prepared dataset.
        method: The name of a method.
        encoders: The names of the caches by batch key ("image", "text"). Only the keys that the method needs are opened.
        aggregate: How several texts of a sample become one vector: "mean", "first" or "random" (a new one in each epoch);
            "" is the choice of the dataset.

    Raises:
        UserError: the dataset is not prepared, there is no such cache or aggregate, or a cache holds tokens instead of vectors.
    """
    if aggregate not in ("", *AGGREGATES):
        raise unknown_choice(aggregate, f"unknown aggregate {aggregate!r}", AGGREGATES)
    manifest = read_manifest(home, dataset)
    needs = plugins.get("methods", method).needs
    caches = {key: find_cache(home, manifest, name) for key, name in encoders.items() if key in needs}
    if not getattr(plugins.get("methods", method), "reads_tokens", False):
        for cache in caches.values():
            _check_vectors(cache, method)
    return FeatureSet(home=home, manifest=manifest, caches=caches, aggregate=aggregate or manifest.meta["text"]["aggregate"])


def _check_vectors(cache: Cache, method: str) -> None:
    """Refuse a cache of tokens, [T,D] for each sample or text, of which the method reads one vector each."""
    if len(cache.feature_shape) > 1:
        size = "×".join(map(str, cache.feature_shape))
        raise UserError(
            f"{cache.path} holds tokens, {size} of each item, and {method} wants one vector of each: extract without "
            "--set tokens=true, and name that cache with --image or --text; the cache of tokens was made by: "
            f"{cache.provenance['command']}"
        )


def cache_names(home: Path, dataset: str, image: str, text: str) -> dict[str, str]:
    """Return the cache names by batch key: those given, or the default encoders of the home's dataset where a name is ""."""
    given = {"image": image, "text": text}
    if image and text:
        return given
    defaults = load_dataset_spec(home, dataset)["encoders"]
    return {key: name or defaults[key] for key, name in given.items()}
