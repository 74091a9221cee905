"""Robustness to visual noise: evaluate finished runs on corrupted copies of a split's pictures, without training anything.

The copies are extracted once for each encoder, and all runs on that encoder share them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipeline.cache.reader import find_cache, info
from pipeline.data.corruptions import Corruption
from pipeline.data.manifest_files import read_manifest
from pipeline.evaluation.evaluate import apply_overrides, evaluate, evaluation_name
from pipeline.extraction.corrupted import CorruptedCopies
from pipeline.extraction.extract import ExtractOptions
from pipeline.report.corruption import corruption_filename, run_frame
from pipeline.report.results import plural
from pipeline.runtime.files import lock, write_atomic
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.runs import RunFolder
from pipeline.types import Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CorruptedRun:
    """A run that was evaluated on corrupted copies, and the file with all its evaluations on them."""

    run: RunFolder
    evaluation: str  # the name of the one on clean pictures
    table: Path  # CSV, see `run_frame`


def evaluate_corrupted(
    home: Path,
    runs: Sequence[RunFolder],
    split: Split,
    corruptions: Sequence[Corruption],
    overrides: Mapping[str, Any],
    options: ExtractOptions,
) -> list[CorruptedRun]:
    """Evaluate runs on clean pictures and on corrupted copies, and write `corruption-<split>.csv` into their folders.

    What it costs is logged before it starts. What is there already, copies and evaluations, is not computed again, so the same
    call goes on after an interruption. Every read of "test" is logged in the run, also those of copies of it.

    Args:
        home: The folder of all caches and runs.
        runs: Finished runs.
        split: The split whose pictures are corrupted.
        corruptions: What is done to them.
        overrides: Changed settings of prediction, see `apply_overrides`.
        options: How the copies are extracted.

    Raises:
        UserError: a run is not finished, an encoder is not the one that made the run's cache any more, or as in `extract`.
    """
    for run in runs:  # refuses what is wrong before the first extraction
        run.check_done()
        apply_overrides(run.config(), overrides)
    copies = {key: _copies_of(home, *key, split) for key in dict.fromkeys(map(_pictures_of, runs))}
    missing = {key: [each for each in corruptions if own.find(each) is None] for key, own in copies.items()}
    _log_costs(copies, missing, len(corruptions), len(runs))
    for key, own in copies.items():
        own.extract(missing[key], options)
    caches = {(key, each): own.open(each) for key, own in copies.items() for each in corruptions}
    with ProgressBar(
        label="evaluating copies", total=len(runs) * len(corruptions), unit=" evaluations", show=options.progress
    ) as bar:
        for run in runs:
            evaluate(home, run, split, overrides)
            for corruption in corruptions:
                evaluate(home, run, split, overrides, caches[_pictures_of(run), corruption])
                bar.update()
    return [_write_table(run, split, overrides) for run in runs]


def _pictures_of(run: RunFolder) -> tuple[str, str]:
    """Return the dataset of a run and the fingerprint of its image features: runs with the same share their copies."""
    config = run.config()
    return config.dataset, config.caches["image"]


def _copies_of(home: Path, dataset: str, image: str, split: Split) -> CorruptedCopies:
    manifest = read_manifest(home, dataset)
    return CorruptedCopies.of_split(home, manifest, split, find_cache(home, manifest, image))


def _log_costs(
    copies: Mapping[tuple[str, str], CorruptedCopies],
    missing: Mapping[tuple[str, str], Sequence[Corruption]],
    num_corruptions: int,
    num_runs: int,
) -> None:
    """Log how many pictures will be encoded, at what speed that was done before, and the space that their features take."""
    for key, own in copies.items():
        cache, num_copies = own.cache, len(missing[key])
        num_pictures = num_copies * len(own.manifest.samples)
        facts = info(cache.path)
        seconds = num_pictures / facts["rows_per_second"] if facts["rows_per_second"] else 0.0
        size = num_pictures * prod(cache.feature_shape) * (4 if facts["store_dtype"] == "float32" else 2) / 1e6
        there = f"{num_corruptions - num_copies} of {num_corruptions} are there already"
        work = f"{plural(num_copies, 'extraction')} of {plural(len(own.manifest.samples), 'picture')}"
        costs = f"about {seconds / 60:.1f} minutes at the speed of that cache, {size:.1f} MB"
        logger.info("corrupted copies of %s for %s: %s; %s: %s", own.manifest.dataset, cache.path.name, there, work, costs)
    logger.info("then %s of each of %s; nothing is trained", plural(num_corruptions, "evaluation"), plural(num_runs, "run"))


def _write_table(run: RunFolder, split: Split, overrides: Mapping[str, Any]) -> CorruptedRun:
    name = evaluation_name(split, apply_overrides(run.config(), overrides)[1])
    path = run.path / corruption_filename(name)
    with lock(run.path, wait=True):
        write_atomic(path, run_frame(run, name).to_csv(index=False))
    return CorruptedRun(run, name, path)
