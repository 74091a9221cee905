"""A trained head with its run, for studies that look inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cache.reader import find_cache
from pipeline.cache.table import FeatureTable, read_table
from pipeline.data.manifest import Manifest
from pipeline.evaluation.evaluate import apply_overrides, load_method, log_test_read
from pipeline.nn.method import Method
from pipeline.runtime.device import Precision, default_device, reproducible
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.types import Sample


@dataclass(frozen=True, slots=True)
class TrainedHead:
    """A trained head with the run that it comes from."""

    run: RunFolder
    config: RunConfig
    settings: Any  # an object of the method's `Config`
    method: Method

    @staticmethod
    def of(run: RunFolder) -> TrainedHead:
        """Load the head of a finished run, with the run's own settings of prediction."""
        config = run.config()
        settings, _ = apply_overrides(config, {})
        method = load_method(run, config, settings)
        method.train(False)
        return TrainedHead(run, config, settings, method)

    def read(
        self, home: Path, manifest: Manifest, samples: Sequence[Sample], keys: tuple[str, ...], reason: str
    ) -> FeatureTable:
        """Read features of samples from the caches that the head was trained on.

        Args:
            home: The folder of all artifacts.
            manifest: The dataset.
            samples: The samples, of one split; those without image are left out.
            keys: Of the features: "image", "text".
            reason: What reads them; it is logged in the run for samples of the test split.
        """
        if samples[0].split == "test":
            log_test_read(self.run, reason)
        caches = {key: find_cache(home, manifest, self.config.caches[key]) for key in keys}
        aggregate = "first" if self.config.text_aggregate == "first" else "mean"
        return read_table(manifest, caches, samples, default_device(), aggregate)

    @torch.no_grad()
    def feature(self, table: FeatureTable) -> Tensor:
        """Return the vectors [N,D] that the classifier reads, on the CPU.

        Raises:
            UserError: they are not finite.
        """
        image, rng = table.columns["image"], KeyedRNG.seeded(self.run.seed, table.columns["key"]).at("predict")
        precision: Precision = self.config.training.get("precision", "float32")
        with reproducible(image.device, precision):
            feature = self.method.feature(image, rng).float().cpu()
        if not feature.isfinite().all():
            raise UserError(f"{self.run.path} has features that are not finite: it diverged in training; train with a lower lr")
        return feature
