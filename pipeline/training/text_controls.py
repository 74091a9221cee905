"""Controls of the claim that text helps: what a head is trained on in place of the texts of its own samples.

A control stands where the text cache stands when the training split is read, so it works with windows and with texts that are
drawn anew in every epoch. It is a function of the seed of the run and of the training split. A sample without a text keeps
none; of tokens, each word is replaced and the padding stays. Validation, test and prediction read no text, with a control or
without.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.cache.reader import samples_per_read
from pipeline.cache.table import FeatureReader, label_tensor, split_samples
from pipeline.data.manifest import Manifest
from pipeline.nn.tokens import word_mask
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG, sample_keys
from pipeline.runtime.runs import REAL_TEXT
from pipeline.types import Sample

logger = logging.getLogger(__name__)

TEXT_CONTROLS: Mapping[str, str] = {
    "shuffled-within": "each sample gets the text of another sample with the same labels",
    "shuffled-across": "each sample gets the text of any other sample",
    "noise": "Gaussian noise with the mean and variance of the texts in every dimension",
    "label": "the labels as text: an upper control",
}
MakeTexts = Callable[[Sequence[str], Sequence[int]], Tensor]  # ids, numbers of the texts of each -> [len(ids), *shape]


def parse_text(text: str) -> tuple[str, str]:
    """Return the name of the text cache, "" for the dataset's, and the control: "CACHE", "CONTROL" or "CACHE:CONTROL".

    Raises:
        UserError: there is no such control.
    """
    choices = [REAL_TEXT, *TEXT_CONTROLS]
    name, colon, control = text.rpartition(":")
    if not colon:
        return ("", text) if text in choices else (text, REAL_TEXT)
    if control not in choices:
        raise unknown_choice(control, f"unknown text control {control!r}", choices)
    return name, control


def join_text(name: str, control: str) -> str:
    """Return what `parse_text` reads: the name of the text cache with the control."""
    return name if control == REAL_TEXT else f"{name}:{control}"


def shuffle(keys: Tensor, groups: Sequence[Hashable], seed: int) -> list[int]:
    """Return for each sample the row of the sample whose text it gets: in its group a random cycle, so nobody keeps its own.

    Args:
        keys: The samples' random stream keys [N].
        groups: The group of each sample, N of them. A sample that is alone in its group keeps its text.
        seed: The seed of the run.
    """
    order = torch.argsort(KeyedRNG.seeded(seed, keys).at("text control").bits(), stable=True).tolist()
    members: dict[Hashable, list[int]] = defaultdict(list)
    for row in order:
        members[groups[row]].append(row)
    donors = list(range(len(groups)))
    for rows in members.values():
        for row, donor in zip(rows, [*rows[1:], rows[0]], strict=True):
            donors[row] = donor
    return donors


def draw_noise(mean: Tensor, std: Tensor, keys: Tensor, seed: int) -> Tensor:
    """Return Gaussian noise [N, *shape] of this mean and standard deviation [*shape], for samples with these keys [N]."""
    return mean + std * KeyedRNG.seeded(seed, keys).at("text control").normal(*mean.shape)


def draw_class_vectors(num_classes: int, width: int, seed: int) -> Tensor:
    """Return a random unit vector for each class [C,width]; they are orthogonal if there are at most `width` classes."""
    gaussian = KeyedRNG.seeded(seed, torch.arange(num_classes)).at("text control").normal(width).double()
    rows = torch.linalg.qr(gaussian.T).Q.T if num_classes <= width else gaussian
    return F.normalize(rows, dim=1).float()


def project_labels(label: Tensor, vectors: Tensor) -> Tensor:
    """Return for class indices [N], or indicators [N,C], the sum of the vectors [C,width] of a sample's classes, [N,width]."""
    return vectors[label] if label.ndim == 1 else label @ vectors


def is_text_of_class(manifest: Manifest) -> bool:
    """Whether the texts of the training split are a function of the labels: the same for all samples with the same labels.

    Then a text says nothing of its own sample, and to shuffle texts within a class changes nothing.
    """
    texts_by_labels: dict[Hashable, set[tuple[str, ...]]] = defaultdict(set)
    num_texts = 0
    for sample in split_samples(manifest, "train"):
        if sample.texts:
            texts_by_labels[sample.labels].add(sample.texts)
            num_texts += 1
    return num_texts > len(texts_by_labels) and all(len(texts) == 1 for texts in texts_by_labels.values())


@dataclass(frozen=True, slots=True)
class ShuffledTexts:
    """A reader that gives a sample the texts of its donor."""

    texts: FeatureReader
    donors: Mapping[str, str]  # id -> id; a sample that is missing keeps what it has

    def read(self, ids: Sequence[str], aggregate: Any = "mean") -> np.ndarray:
        return self.texts.read([self.donors.get(each, each) for each in ids], aggregate)

    def read_rows(self, ids: Sequence[str], first_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
        return self.texts.read_rows([self.donors.get(each, each) for each in ids], first_only)


@dataclass(frozen=True, slots=True)
class MadeTexts:
    """A reader that puts made vectors in the place of texts or of their words; what is missing stays missing."""

    texts: FeatureReader
    make: MakeTexts

    def read(self, ids: Sequence[str], aggregate: Any = "mean") -> np.ndarray:
        return self._replace(self.texts.read(ids, aggregate), ids, [0] * len(ids))

    def read_rows(self, ids: Sequence[str], first_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
        rows, counts = self.texts.read_rows(ids, first_only)
        owners = [each for each, count in zip(ids, counts.tolist(), strict=True) for _ in range(count)]
        numbers = 1 + np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # 1, 2, … in each sample
        return self._replace(rows, owners, numbers.tolist()), counts

    def _replace(self, real: np.ndarray, ids: Sequence[str], numbers: Sequence[int]) -> np.ndarray:
        made, block_size = np.full_like(real, np.nan), samples_per_read(real.shape[1:])
        for start in range(0, len(ids), block_size):
            block = slice(start, start + block_size)
            has_text, is_padding = _is_finite(real[block]), ~_is_word(real[block])
            made[block][has_text] = self.make(ids[block], numbers[block]).numpy()[has_text]
            made[block][is_padding] = 0.0
        return made


def control_texts(
    control: str, manifest: Manifest, caches: Mapping[str, FeatureReader], aggregate: str, seed: int
) -> FeatureReader:
    """Return what stands in the place of the text cache when the training split is read.

    Args:
        control: A key of `TEXT_CONTROLS`.
        manifest: The dataset.
        caches: The caches "image" and "text". All training samples are read once.
        aggregate: How several texts of a sample become one vector.
        seed: The seed of the run.

    Raises:
        UserError: the control would leave every sample its own text.
    """
    texts, samples = caches["text"], split_samples(manifest, "train")
    shape = texts.read([samples[0].id]).shape[1:]
    if control == "label":
        row_of = {sample_id: row for row, sample_id in enumerate(samples.ids)}
        label = label_tensor(samples, manifest)
        vectors = draw_class_vectors(len(manifest.class_names), shape[-1], seed)

        def make_labels(ids: Sequence[str], numbers: Sequence[int]) -> Tensor:
            projected = project_labels(label[[row_of[each] for each in ids]], vectors)
            return projected.reshape(len(ids), *(1 for _ in shape[:-1]), -1).expand(-1, *shape)  # the same for every word

        return MadeTexts(texts, make_labels)
    real = _read_real_texts(samples, caches, aggregate)
    if control == "noise":

        def make_noise(ids: Sequence[str], numbers: Sequence[int]) -> Tensor:
            keys = sample_keys(f"{each}\n{number}" for each, number in zip(ids, numbers, strict=True))
            return draw_noise(real.mean.expand(shape), real.std.expand(shape), keys, seed)

        return MadeTexts(texts, make_noise)
    groups = [sample.labels if control == "shuffled-within" else () for sample in real.samples]
    donors = shuffle(sample_keys(sample.id for sample in real.samples), groups, seed)
    num_changed = sum(real.hashes[row] != real.hashes[donor] for row, donor in enumerate(donors))
    if not num_changed:
        raise UserError(
            f"--text {control} changes nothing: no two training samples of {manifest.dataset} with "
            f"{'equal labels' if control == 'shuffled-within' else 'a text'} have different texts"
        )
    logger.info("text %s, seed %d: %d of %d training samples get another text", control, seed, num_changed, len(donors))
    return ShuffledTexts(texts, {real.samples[row].id: real.samples[donor].id for row, donor in enumerate(donors)})


class _RealTexts(NamedTuple):
    """The training samples that have an image feature and a text, and facts about these texts."""

    samples: list[Sample]
    hashes: list[int]  # of the text of each sample
    mean: Tensor  # of every dimension; of words or of single texts, if the batches have these, else of the samples' vectors
    std: Tensor


def _read_real_texts(samples: Sequence[Sample], caches: Mapping[str, FeatureReader], aggregate: str) -> _RealTexts:
    kept: list[Sample] = []
    hashes: list[int] = []
    num_rows, total, square = 0, np.zeros(()), np.zeros(())
    block_size = samples_per_read(*(cache.read([samples[0].id]).shape[1:] for cache in caches.values()))
    for start in range(0, len(samples), block_size):
        block = samples[start : start + block_size]
        ids = [sample.id for sample in block]
        image, text = caches["image"].read(ids), caches["text"].read(ids, "first" if aggregate == "first" else "mean")
        usable = np.flatnonzero(_is_finite(image) & _is_finite(text)).tolist()
        kept += [block[row] for row in usable]
        hashes += [hash(text[row].tobytes()) for row in usable]
        rows = caches["text"].read_rows([ids[row] for row in usable])[0] if aggregate == "random" else text[usable]
        finite = rows[_is_finite(rows)]
        finite = finite[_is_word(finite)].astype(np.float64)
        num_rows, total, square = num_rows + len(finite), total + finite.sum(axis=0), square + (finite**2).sum(axis=0)
    mean = total / max(1, num_rows)
    std = np.sqrt(np.maximum(0.0, square / max(1, num_rows) - mean**2))
    return _RealTexts(kept, hashes, torch.from_numpy(mean).float(), torch.from_numpy(std).float())


def _is_word(texts: np.ndarray) -> np.ndarray:
    """Return which tokens of texts [N,T,D] are words and no padding, bool [N,T]; of vectors [N,D], all [N]."""
    mask = word_mask(torch.from_numpy(texts))
    return np.ones(len(texts), dtype=bool) if mask is None else mask.numpy()


def _is_finite(array: np.ndarray) -> np.ndarray:
    return np.asarray(np.isfinite(array).reshape(len(array), -1).all(axis=1))
