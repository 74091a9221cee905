"""The features that heads are trained on: a manifest and its caches, opened once for any number of heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from pipeline.cache import Cache
from pipeline.cache.near_duplicates import near_duplicate_warning
from pipeline.cache.reader import find_cache, is_of_text
from pipeline.cache.streaming import bytes_per_sample, open_split
from pipeline.cache.table import FeatureSource, FeatureTable, load_split, read_table, split_samples
from pipeline.data.manifest import Manifest, text_counts
from pipeline.data.manifest_files import load_dataset_spec, read_manifest
from pipeline.data.splits import by_fraction
from pipeline.runtime import plugins
from pipeline.runtime.choices import MIN_SIMILARITY, unknown_choice
from pipeline.runtime.device import default_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256
from pipeline.runtime.runs import REAL_TEXT
from pipeline.training.text_controls import TEXT_CONTROLS, control_texts, join_text, parse_text
from pipeline.types import Split

logger = logging.getLogger(__name__)

NUM_VALIDATION_PAIRS = 2000  # at most, of the validation samples whose texts are compared with those that a head generates
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
    text_control: str = REAL_TEXT  # what `splits` gives in place of the training texts
    fraction: float = 1.0  # share of each class of the training split that is read; see `by_fraction`

    @cached_property
    def train(self) -> FeatureTable:
        """The training split in memory, with the real texts and everything else that a method may read in training."""
        return _log_excluded("train", load_split(self._train_manifest, self.caches, "train", default_device(), self.aggregate))

    @cached_property
    def val(self) -> FeatureTable:
        """The validation split in memory, without texts."""
        return _log_excluded("val", load_split(self.manifest, self._images, "val", default_device(), self.aggregate))

    @cached_property
    def validation_pairs(self) -> FeatureTable:
        """Some validation samples with their texts, for `measure_alignment` alone: no prediction reads these texts.

        They are those whose ids have the smallest hashes, because a manifest may be ordered by class.
        """
        by_hash = sorted(split_samples(self.manifest, "val"), key=lambda sample: sha256(sample.id.encode()))
        samples = by_hash[:NUM_VALIDATION_PAIRS]
        aggregate = "mean" if self.aggregate == "random" else self.aggregate
        return read_table(self.manifest, self.caches, samples, default_device(), aggregate)

    @cached_property
    def _train_manifest(self) -> Manifest:
        """The samples of the training split that are read; with all of them, the manifest itself."""
        if self.fraction == 1:
            return self.manifest
        return replace(self.manifest, samples=by_fraction(self.manifest.split("train"), self.fraction), rows=())

    @property
    def num_train(self) -> int:
        """The number of samples of the training split that are read, those without features among them."""
        return len(self._train_manifest.split("train"))

    @cached_property
    def _images(self) -> Mapping[str, Cache]:
        return {"image": self.caches["image"]}

    @property
    def references(self) -> dict[str, str]:
        """Names by batch key, by which `open_features` opens the same caches with the same control on any machine."""
        names = {key: cache.fingerprint for key, cache in self.caches.items()}
        return names | ({"text": join_text(names["text"], self.text_control)} if "text" in names else {})

    def splits(self, window: int, seed: int) -> tuple[FeatureSource, FeatureSource]:
        """Return the training and the validation split.

        Args:
            window: The largest number of samples in memory at a time; 0: all.
            seed: The seed of the run, which decides what a text control does.
        """
        is_real = self.text_control == REAL_TEXT
        train = self._open("train", window) if is_real else self._open_controlled(window, seed)
        return train, self._open("val", window)

    def _open(self, split: Literal["train", "val"], window: int) -> FeatureSource:
        if not window:
            return self.train if split == "train" else self.val
        if (split, window) not in self._opened:
            manifest, caches = (self._train_manifest, self.caches) if split == "train" else (self.manifest, self._images)
            source = open_split(manifest, caches, split, default_device(), self.aggregate, window)
            self._opened[split, window] = _log_excluded(split, source)
        return self._opened[split, window]

    def _open_controlled(self, window: int, seed: int) -> FeatureSource:
        """Return the training split with the text control; only that of the latest seed is kept."""
        if (window, seed) not in self._controlled:
            self._controlled.clear()
            texts = control_texts(self.text_control, self._train_manifest, self.caches, self.aggregate, seed)
            caches = {**self.caches, "text": texts}
            source = open_split(self._train_manifest, caches, "train", default_device(), self.aggregate, window)
            self._controlled[window, seed] = _log_excluded("train", source)
        return self._controlled[window, seed]

    @cached_property
    def _opened(self) -> dict[tuple[str, int], FeatureSource]:
        return {}

    @cached_property
    def _controlled(self) -> dict[tuple[int, int], FeatureSource]:
        return {}

    def warn_about_images(self) -> None:
        """Log what a user should know of the image features: that they are features of texts, or that test images recur.

        Validation and test images that look almost like a training image are searched once per cache.
        """
        if is_of_text(self.caches["image"].identity):
            name = self.caches["image"].path.name
            logger.warning("%s holds features of texts: this head reads test texts, a diagnostic and no method", name)
        if warning := near_duplicate_warning(self.caches["image"]):
            logger.warning(warning)

    @property
    def num_bytes(self) -> int:
        """The memory that all samples need, in bytes."""
        return bytes_per_sample(self.caches, self.aggregate) * self.caches["image"].num_samples

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


def open_features(
    home: Path, dataset: str, method: str, encoders: Mapping[str, str], aggregate: str = "", fraction: float = 1.0
) -> FeatureSet:
    """Open the features that a method needs.

    Args:
        home: The folder of all caches and runs.
        dataset: The name of a prepared dataset.
        method: The name of a method.
        encoders: The names of the caches by batch key ("image", "text"). Only the keys that the method needs are opened. That
            of the texts may end in a control, see `parse_text`.
        aggregate: How several texts of a sample become one vector: "mean", "first" or "random" (a new one in each epoch);
            "" is the choice of the dataset.
        fraction: The share of each class of the training split that is read.

    Raises:
        UserError: the dataset is not prepared, there is no such cache, control or aggregate, a cache holds tokens instead of
            vectors, or several texts of a sample as tokens, or the method reads no texts that a control could replace.
    """
    manifest = read_manifest(home, dataset)
    if aggregate not in ("", *AGGREGATES, manifest.meta["text"]["aggregate"]):
        raise unknown_choice(aggregate, f"unknown aggregate {aggregate!r}", AGGREGATES)
    by_fraction((), fraction)  # refuses an impossible fraction before a cache is opened
    needs = plugins.get("methods", method).needs
    text, control = parse_text(encoders.get("text", ""))
    if control != REAL_TEXT and "text" not in needs:
        raise UserError(f"{method} reads no text, so there is none to replace by {control!r}; choose a method that does")
    names = {**encoders, "text": text}
    caches = {key: _find_cache(home, manifest, key, names[key], method) for key in encoders if key in needs}
    if not getattr(plugins.get("methods", method), "reads_tokens", False):
        for cache in caches.values():
            _check_vectors(cache, method)
    chosen = aggregate or manifest.meta["text"]["aggregate"]
    if "text" in caches:
        _check_aggregate(caches["text"], chosen)
    return FeatureSet(home=home, manifest=manifest, caches=caches, aggregate=chosen, text_control=control, fraction=fraction)


def _find_cache(home: Path, manifest: Manifest, key: str, name: str, method: str) -> Cache:
    """Return the cache of a batch key; the error says if there are no texts, and suggests the control that was meant."""
    try:
        return find_cache(home, manifest, name)
    except UserError as error:
        if key == "text" and not text_counts(manifest.columns).any():
            raise UserError(
                f"{manifest.dataset}: this data set has no texts, and {method} learns from texts; choose a method that reads "
                "images alone, such as baseline or mlp, or prepare the data with a column of texts"
            ) from error
        meant = get_close_matches(name, TEXT_CONTROLS, n=1, cutoff=MIN_SIMILARITY) if key == "text" else []
        if not meant:
            raise
        raise UserError(f"{error}; did you mean the control {meant[0]!r}?") from error


def _check_vectors(cache: Cache, method: str) -> None:
    """Refuse a cache of tokens, [T,D] for each sample or text, of which the method reads one vector each."""
    if len(cache.feature_shape) > 1:
        size = "×".join(map(str, cache.feature_shape))
        raise UserError(
            f"{cache.path} holds tokens, {size} of each item, and {method} wants one vector of each: extract without "
            "--set tokens=true, and name that cache with --image or --text; the cache of tokens was made by: "
            f"{cache.provenance['command']}"
        )


def _check_aggregate(texts: Cache, aggregate: str) -> None:
    """Refuse a mean of several texts whose features are tokens: the first words of two texts have nothing in common."""
    if len(texts.feature_shape) > 1 and aggregate not in ("first", "random") and np.diff(texts.offsets).max() > 1:
        raise UserError(
            f"{texts.path} holds tokens of several texts of a sample, which have no mean: give --aggregate first or random"
        )


def cache_names(home: Path, dataset: str, image: str, text: str) -> dict[str, str]:
    """Return the cache names by batch key: those given, or the default encoders of the home's dataset where a name is "".

    The text may be a control, or have one behind its name, see `parse_text`; the returned name has it too.
    """
    text_name, control = parse_text(text)
    defaults = {} if image and text_name else load_dataset_spec(home, dataset)["encoders"]
    return {"image": image or defaults["image"], "text": join_text(text_name or defaults["text"], control)}
