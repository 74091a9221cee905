"""Classify media that belong to no dataset, or the samples of a cache, with a trained run. Nothing here can read a text.

The random numbers of heads that sample are keyed by the content of a file: neither its name nor the other files change them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.reader import (
    Cache,
    is_of_text,
    list_caches,
    open_cache,
    read_attributes,
    read_commits,
    read_failures,
)
from pipeline.data.manifest_files import read_manifest
from pipeline.data.media_digests import NO_DIGEST
from pipeline.evaluation.calibration import Calibration, read_calibration
from pipeline.evaluation.evaluate import apply_overrides, load_method, log_test_read
from pipeline.evaluation.inference_spec import InferenceSpec, read_inference_spec
from pipeline.extraction.new_media import encode_files
from pipeline.nn.method import Method
from pipeline.runtime.device import Precision, default_device, reproducible
from pipeline.runtime.errors import UserError
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.places import parse_place
from pipeline.runtime.rng import KeyedRNG, content_keys, sample_keys
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.stores import exists
from pipeline.types import Split

ROWS_AT_ONCE = 256  # items whose classes are predicted together, and then written
PROGRESS_DELAY = 2.0  # seconds after which progress is shown


class ClassifiedRows(NamedTuple):
    """Some items with the probabilities of their classes."""

    names: Sequence[str]  # files, or ids of samples
    probabilities: NDArray[np.float64]  # [B,C]; NaN where an item failed
    errors: Sequence[str]  # why it failed; "": it did not


class _Block(NamedTuple):
    """Items with their features, not yet classified."""

    names: Sequence[str]
    features: NDArray[np.float32]
    keys: Tensor
    errors: list[str]


@dataclass(frozen=True)
class Classifier:
    """A trained run, ready to classify."""

    run: RunFolder
    spec: InferenceSpec
    calibration: Calibration
    method: Method
    precision: Precision

    @staticmethod
    def of(run: RunFolder, home: Path) -> Classifier:
        """Load a finished run; `home` is where the data of a run of an earlier version are.

        Raises:
            UserError: the run has not finished, is damaged, or lacks something; see `read_inference_spec`.
        """
        run.check_done()
        config, spec = run.config(), read_inference_spec(run, home)
        settings, _ = apply_overrides(config, {})
        method = load_method(run, config, settings)
        method.train(False)
        calibration = read_calibration(run, spec.is_multi_label)
        return Classifier(run, spec, calibration, method, config.training.get("precision", "float32"))

    @torch.no_grad()
    def logits(self, features: NDArray[np.float32], keys: Tensor) -> NDArray[np.float32]:
        """Return the logits [B,C] of finite image features [B, *shape], whose random numbers have these keys [B]."""
        device = default_device()
        image = torch.from_numpy(features).to(device)
        with reproducible(device, self.precision):
            rng = KeyedRNG.seeded(self.run.seed, keys.to(device)).at("predict")
            logits = self.method.predict(image, rng).float().cpu().numpy()
        if not np.isfinite(logits).all():
            raise UserError(
                f"{self.run.path} predicts numbers that are not finite: it diverged in training; train with a lower lr"
            )
        return logits

    def classify_files(self, files: Sequence[str], workers: int = -1) -> Iterator[ClassifiedRows]:
        """Yield the classes of files in their order, as they are computed.

        Args:
            files: at least one path, see `find_media`.
            workers: processes that decode; -1: one per core, 0: only this process.
        """
        encoder = self.spec.build_encoder(self.run)
        batches = encode_files(files, encoder, self.spec.store_dtype, workers)
        blocks = (_Block(list(each.files), each.features, content_keys(each.digests), each.errors) for each in batches)
        yield from self._classify(blocks, len(files))

    def classify_cache(self, cache: Cache, home: Path, split: Split | None = None) -> Iterator[ClassifiedRows]:
        """Yield the classes of the samples of a cache; a read of the run's test split is logged.

        Args:
            cache: features by the encoder of the run, of any dataset.
            home: the folder that has the manifest of the cache.
            split: whose samples are classified; None: all.
        """
        ids = self._chosen_ids(cache, home, split)
        errors = _failures(cache)
        digests = _content_digests(cache)

        def read(start: int) -> _Block:
            chosen = ids[start : start + ROWS_AT_ONCE]
            known = [digests.get(each, NO_DIGEST) for each in chosen]
            keys = torch.where(content_keys(known) == 0, sample_keys(chosen), content_keys(known))
            return _Block(chosen, cache.read(chosen), keys, [errors.get(each, "") for each in chosen])

        yield from self._classify(map(read, range(0, len(ids), ROWS_AT_ONCE)), len(ids))

    def _classify(self, blocks: Iterator[_Block], total: int) -> Iterator[ClassifiedRows]:
        with ProgressBar(total=total, label="predicting", unit=" items", delay=PROGRESS_DELAY) as bar:
            for block in _joined(blocks):
                probabilities = np.full((len(block.names), len(self.spec.class_names)), np.nan)
                is_there = np.asarray(np.isfinite(block.features).reshape(len(block.names), -1).all(axis=1))
                if is_there.any():
                    logits = self.logits(block.features[is_there], block.keys[torch.from_numpy(is_there)])
                    probabilities[is_there] = self.calibration.probabilities(logits)
                pairs = zip(block.errors, is_there.tolist(), strict=True)
                errors = [error or ("" if there else "it has no features") for error, there in pairs]
                bar.update(len(block.names))
                yield ClassifiedRows(block.names, probabilities, errors)

    def _chosen_ids(self, cache: Cache, home: Path, split: Split | None) -> Sequence[str]:
        """Return the samples to classify; reads of the test split of the run's own dataset are logged."""
        shape = self.run.config().shapes["image"]
        if tuple(shape) != cache.feature_shape:
            raise UserError(
                f"{cache.path} has features of shape {list(cache.feature_shape)}, and {self.run.path} reads {shape}"
            )
        if is_of_text(cache.identity):
            raise UserError(
                f"{cache.path} has features of texts, and texts cannot be classified: give a cache of pictures or clips"
            )
        for field, wanted, found in self.spec.differences(cache.identity["encoder"]):
            raise UserError(f"{cache.path} was made with {field} = {found!r}, and {self.run.path} was trained with {wanted!r}")
        dataset, ids = cache.identity["dataset"], cache.ids
        if split:
            manifest = read_manifest(home, dataset)
            if manifest.features_of != (dataset, cache.identity["manifest"]):
                raise UserError(
                    f"{cache.path} was made from another manifest than that of {dataset} in {home}; "
                    f"extract a cache of it: diffalign extract {dataset}"
                )
            ids = manifest.split(split).ids
        if not ids:
            raise UserError(f"the {split} split of {dataset} is empty")
        if split in (None, "test") and (dataset == self.spec.dataset or dataset == self._whole_dataset(home)):
            log_test_read(self.run, f"predict {cache.path.name}")
        return ids

    def _whole_dataset(self, home: Path) -> str:
        """Return the dataset whose features the run's dataset has: of a fold, the whole; "" where the home does not know it."""
        with suppress(UserError):
            return read_manifest(home, self.spec.dataset).features_of[0]
        return ""


def _joined(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """Yield blocks of ROWS_AT_ONCE items or a little more, so that the head is not called for every small batch."""
    waiting: list[_Block] = []
    for block in blocks:
        waiting.append(block)
        if sum(len(each.names) for each in waiting) >= ROWS_AT_ONCE:
            yield _join(waiting)
            waiting = []
    if waiting:
        yield _join(waiting)


def _join(blocks: Sequence[_Block]) -> _Block:
    names, errors = ([item for block in blocks for item in getattr(block, field)] for field in ("names", "errors"))
    features = np.concatenate([block.features for block in blocks])
    return _Block(names, features, torch.cat([block.keys for block in blocks]), errors)


def find_any_cache(home: Path, name: str, spec: InferenceSpec) -> Cache:
    """Open a cache for a run by its folder, by DATASET/NAME, by its name, or by its encoder.

    Where several fit, it is the one of the run's dataset that was made by the run's encoder.

    Raises:
        UserError: no cache fits, or several do; the message names the choices.
    """
    given = parse_place(name)
    if exists(given / "zarr.json"):
        return open_cache(given)
    found = list_caches(home)
    short = {path: {path.name, path.name.rpartition("-")[0]} for path in found}
    fitting = [path for path in found if name in short[path] | {f"{path.parent.name}/{each}" for each in short[path]}]
    by_encoder = [path for path in fitting if not spec.differences(read_attributes(path)["identity"]["encoder"])]
    own = [path for path in by_encoder if path.parent.name == spec.dataset]
    chosen = next((each for each in (own, by_encoder) if len(each) == 1), fitting)
    if len(chosen) == 1:
        return open_cache(chosen[0])
    choices = ", ".join(f"{path.parent.name}/{path.name}" for path in chosen or found) or "none"
    raise UserError(f"{'several caches fit' if chosen else 'no cache fits'} --cache {name!r}; in {home} there are: {choices}")


def _failures(cache: Cache) -> dict[str, str]:
    """Return why samples of a cache have no features, by id."""
    return {failure["id"]: failure["error"] for failure in read_failures(cache.path)}


def _content_digests(cache: Cache) -> dict[str, bytes]:
    """Return the digests of the contents of a cache's media by sample id; of imported and of the oldest caches, none."""
    size, digests = len(NO_DIGEST), {}
    commits, _ = read_commits(cache.path)
    start = 0
    for commit in sorted(commits, key=lambda each: each.shard):
        joined = base64.b64decode(commit.media_digests)
        for row in range(len(joined) // size):
            digests[cache.ids[start + row]] = joined[row * size : (row + 1) * size]
        start += commit.rows
    return digests
