"""Caches of corrupted copies: the pictures of one split, each with the same corruption, through the encoder of a clean cache.

Such a cache lies in a folder of its own, <home>/caches/<dataset>~<split>~<kind><strength>/, and its identity names the
corruption. No dataset can have that name (see `manifest.DATASET_NAME`), and no clean cache is looked for there, so nothing can
be trained on it. The copies are nowhere on disk: a picture is corrupted when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.cache import Cache, layout, open_cache, verify
from pipeline.cache.reader import identity_differences, is_of_text
from pipeline.data.corruptions import Corruption
from pipeline.data.manifest import Manifest
from pipeline.data.sample_columns import SampleColumns
from pipeline.extraction.extract import ExtractionTask, ExtractOptions, plan_extraction, run_extraction
from pipeline.extraction.inputs import EncoderInputs
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Place
from pipeline.types import Split

SEPARATOR = "~"  # a character that names of datasets do not have


@dataclass(frozen=True)
class CorruptedCopies:
    """The corrupted copies of one split for the encoder of one cache; nothing is extracted yet."""

    home: Path
    cache: Cache  # of the clean pictures
    manifest: Manifest  # of the split alone and without texts; its dataset is "<dataset>~<split>"

    @staticmethod
    def of_split(home: Path, manifest: Manifest, split: Split, cache: Cache) -> CorruptedCopies:
        """Return the copies of a split for the encoder of a cache.

        Raises:
            UserError: the split is empty, or the cache was not made here from pictures.
        """
        if is_of_text(cache.identity):
            raise UserError(f"{cache.path} has features of texts: there is no picture to corrupt")
        encoder = cache.identity["encoder"]["name"]
        if encoder not in plugins.names("encoders") or "settings" not in cache.provenance:
            raise UserError(f"{cache.path} was computed elsewhere: without its encoder there are no features of other pictures")
        positions = manifest.split_positions(split)
        if not len(positions):
            raise UserError(f"{manifest.dataset} has no samples in split {split!r}")
        copies = manifest.select(
            positions,
            dataset=f"{manifest.dataset}{SEPARATOR}{split}",
            samples=SampleColumns.of(replace(sample, texts=()) for sample in manifest.split(split)),
            extra={},
            media_ok={},
        )
        return CorruptedCopies(home, cache, copies)

    def identity(self, corruption: Corruption) -> dict[str, Any]:
        """Return the identity of the cache of one corruption; no encoder is needed to know it."""
        return {**self._clean_identity(self._dataset(corruption)), "corruption": corruption.identity()}

    def find(self, corruption: Corruption) -> Cache | None:
        """Open the cache of one corruption; None if it is not there, not complete, or damaged."""
        try:
            cache = self.open(corruption)
        except UserError:
            return None
        return None if verify(cache.path) else cache

    def open(self, corruption: Corruption) -> Cache:
        """Open the cache of one corruption.

        Raises:
            UserError: it is not there, or not complete.
        """
        return open_cache(self._path(corruption))

    def extract(self, corruptions: Sequence[Corruption], options: ExtractOptions) -> None:
        """Fill the caches of these corruptions, one after the other, or complete those that were begun.

        A sample that failed in the clean cache may fail again.

        Args:
            corruptions: What is done to the pictures.
            options: How the extractions run; the size of batches is that of the clean cache.

        Raises:
            UserError: the encoder is not the one that made the clean cache any more, or as in `extract.extract`.
        """
        if not corruptions:
            return
        plain = self._plan_clean(options)
        _check_pictures(plain.inputs, self.cache)
        for number, corruption in enumerate(corruptions, 1):
            part = f"copies with {corruption.name}, {number} of {len(corruptions)}"
            run_extraction(replace(self._corrupt(plain, corruption), part=part), self.cache.failed_ids)

    def _dataset(self, corruption: Corruption) -> str:
        return f"{self.manifest.dataset}{SEPARATOR}{corruption.name}"

    def _path(self, corruption: Corruption) -> Place:
        encoder = self.cache.identity["encoder"]["name"]
        return layout.cache_path(self.home, self._dataset(corruption), encoder, self.identity(corruption))

    def _clean_identity(self, dataset: str) -> Mapping[str, Any]:
        """Return the identity that the cache of the uncorrupted split would have under the name of a dataset."""
        return {**self.cache.identity, "dataset": dataset, "manifest": self.manifest.fingerprint()}

    def _plan_clean(self, options: ExtractOptions) -> ExtractionTask:
        """Return the extraction of the uncorrupted split, of which those of its copies are variants."""
        identity, provenance = self.cache.identity, self.cache.provenance
        recorded = {"batch_size": provenance.get("batch_size", 0), "shard_rows": provenance.get("shard_rows", 0)}
        task = plan_extraction(
            self.manifest,
            identity["encoder"]["name"],
            provenance["settings"],
            self.home,
            identity["store_dtype"],
            identity.get("compiled", False),
            replace(options, **recorded),
        )
        for field, wanted, found in identity_differences(self._clean_identity(self.manifest.dataset), task.target.identity):
            raise UserError(f"{self.cache.path} was made with {field} = {wanted!r}, which is {found!r} now; bring that back")
        return task

    def _corrupt(self, plain: ExtractionTask, corruption: Corruption) -> ExtractionTask:
        """Return the extraction of the copies with one corruption."""
        split = self.manifest.dataset.rpartition(SEPARATOR)[2]
        kind, strength = corruption.kind, corruption.strength
        command = f"diffalign evaluate RUN --split {split} --corrupt {kind} --strengths {strength}"
        target = replace(
            plain.target,
            path=self._path(corruption),
            identity=self.identity(corruption),
            provenance={**plain.target.provenance, "command": command},
        )
        return replace(plain, target=target, inputs=replace(plain.inputs, corruption=corruption))


def _check_pictures(inputs: EncoderInputs, cache: Cache) -> None:
    """Refuse an encoder that reads media in a way of its own: its pictures cannot be changed before it prepares them."""
    encoder = inputs.encoder
    samples = (sample for sample, _ in inputs.rows if sample.id not in cache.failed_ids)
    for path in map(inputs.manifest.media_path, samples):
        try:
            is_same = torch.equal(encoder.prepare_pictures(encoder.open_pictures(path)), encoder.prepare(path))
        except (NotImplementedError, AttributeError):
            is_same = False
        if not is_same:
            name = cache.identity["encoder"]["name"]
            raise UserError(f"{name} opens media in its own way: to corrupt what it reads, define open_pictures in it, too")
        return
