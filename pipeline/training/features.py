"""What heads are trained on: a manifest and caches, opened once for any number of heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pipeline.cache import Cache
from pipeline.cache.reader import find_cache
from pipeline.cache.streaming import open_rows, sample_bytes
from pipeline.cache.table import FeatureSource, FeatureTable, load
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Manifest
from pipeline.runtime import plugins
from pipeline.runtime.device import default_device
from pipeline.types import Split

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=FeatureSource)


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """What heads are trained on: a manifest and caches, opened once for any number of heads.

    Nothing is read but the manifest and the caches' identities; a split is loaded when it is first asked for, and kept.
    """

    home: Path
    manifest: Manifest
    caches: Mapping[str, Cache]  # by batch key
    aggregate: str

    @cached_property
    def train(self) -> FeatureTable:
        """The training split with everything that methods may read, in memory."""
        return _told("train", load(self.manifest, self.caches, "train", default_device(), self.aggregate))

    @cached_property
    def val(self) -> FeatureTable:
        """The validation split without texts, in memory."""
        return _told("val", load(self.manifest, self._images, "val", default_device(), self.aggregate))

    @cached_property
    def _images(self) -> Mapping[str, Cache]:
        return {"image": self.caches["image"]}

    def splits(self, window: int) -> tuple[FeatureSource, FeatureSource]:
        """`train` and `val`, with at most `window` samples in memory; 0: all of them."""
        if not window:
            return self.train, self.val
        if window not in self._windows:
            device, aggregate = default_device(), self.aggregate
            train = open_rows(self.manifest, self.caches, "train", device, aggregate, window)
            val = open_rows(self.manifest, self._images, "val", device, aggregate, window)
            self._windows[window] = _told("train", train), _told("val", val)
        return self._windows[window]

    @cached_property
    def _windows(self) -> dict[int, tuple[FeatureSource, FeatureSource]]:
        return {}

    @property
    def num_bytes(self) -> int:
        """Memory of all samples."""
        return sample_bytes(self.caches, self.aggregate) * len(self.caches["image"].ids)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a batch's columns, `types.Shapes`."""
        classes = (len(self.manifest.class_names),)
        label = () if self.manifest.label_kind == "single" else classes
        return {**{key: cache.feature_shape for key, cache in self.caches.items()}, "label": label, "classes": classes}


def _told(split: Split, rows: Kind) -> Kind:
    """The rows of a split, after saying which samples are not among them."""
    if rows.excluded:
        count, first = len(rows.excluded), rows.excluded[0]
        logger.warning("%s: %d samples without an image feature are left out: %s …", split, count, first)
    return rows


def open_features(home: Path, dataset: str, method: str, encoders: Mapping[str, str], aggregate: str = "") -> FeatureSet:
    """The features that a method needs; `ValueError` when they are not there.

    `encoders` names the caches by batch key ("image", "text"); only the keys the method needs are opened. `aggregate` says how
    several texts of a sample become one vector: mean, first or random (another one each epoch); "" is the dataset's way.
    """
    manifest = manifests.read_manifest(home, dataset)
    needs = plugins.get("methods", method).NEEDS
    caches = {key: find_cache(home, manifest, name) for key, name in encoders.items() if key in needs}
    return FeatureSet(home=home, manifest=manifest, caches=caches, aggregate=aggregate or manifest.meta["text"]["aggregate"])


def cache_names(dataset: str, image: str, text: str) -> dict[str, str]:
    """Caches by batch key: those given, else those of the dataset's encoders."""
    given = {"image": image, "text": text}
    if image and text:
        return given
    defaults = manifests.load_spec(dataset)["encoders"]
    return {key: name or defaults[key] for key, name in given.items()}
