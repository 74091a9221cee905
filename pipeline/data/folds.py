"""Folds of cross-validation as datasets of their own: the training and validation samples with other splits, without test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest, write_manifest
from pipeline.data.sample_columns import SampleColumns
from pipeline.data.splits import by_fold
from pipeline.runtime.errors import UserError
from pipeline.types import SPLITS


def fold_manifest(manifest: Manifest, fold: int, num_folds: int) -> Manifest:
    """Return the manifest `<dataset>.fold<k>of<n>`, whose validation split is one fold of the training and validation samples.

    Its features are those of the whole dataset, whose caches it reads. It has no test samples, so that nothing that is
    trained or scored on it can read them. Groups of samples are not divided.

    Args:
        manifest: The whole dataset.
        fold: 0 .. num_folds - 1.
        num_folds: The number of folds.
    """
    positions = np.flatnonzero(manifest.columns.split_codes != SPLITS.index("test"))
    samples = list(manifest.columns.select(positions))
    folds = by_fold(samples, num_folds)
    ids = {sample.id for sample in samples}
    return manifest.select(
        positions,
        dataset=f"{manifest.dataset}.fold{fold}of{num_folds}",
        samples=SampleColumns.of(
            replace(sample, split="val" if own == fold else "train") for sample, own in zip(samples, folds, strict=True)
        ),
        meta={**manifest.meta, "plugin": manifest.plugin, "features_of": list(manifest.features_of)},
        extra={key: value for key, value in manifest.extra.items() if key in ids},
        media_ok={key: value for key, value in manifest.media_ok.items() if key in ids},
    )


def write_folds(home: Path, dataset: str, num_folds: int) -> list[str]:
    """Write the manifests of all folds of a prepared dataset into its home, and return their names.

    Raises:
        UserError: there are fewer than two folds, or more than groups of samples.
    """
    manifest = read_manifest(home, dataset)
    num_groups = len({sample.group or sample.id for sample in manifest.samples if sample.split != "test"})
    if not 2 <= num_folds <= num_groups:
        raise UserError(f"--folds must be in 2..{num_groups}, the groups of samples of {dataset}, not {num_folds}")
    folds = [fold_manifest(manifest, fold, num_folds) for fold in range(num_folds)]
    for each in folds:
        write_manifest(each, home)
    return [each.dataset for each in folds]
