"""What a worker of a grid does: train a group of runs as one model, or evaluate one run on a split.

A worker is this process, another process of this machine, or a dask worker. It gets only names, settings and paths, opens the
features itself, and writes its results into the folders of the runs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from pipeline.evaluation.evaluate import evaluate
from pipeline.runtime.errors import UserError, describe_error, is_bug, is_out_of_memory
from pipeline.runtime.runs import RunFolder
from pipeline.training.config import TrainConfig
from pipeline.training.features import FeatureSet, open_features
from pipeline.training.heads import HeadPlan, head_capacity, out_of_memory_error, plan_head_on, train_heads
from pipeline.types import Split

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
BRIEF_SAMPLES = 100_000  # that a brief training reads
_ONE_JOB = Lock()  # the generator that initialises weights and the number of threads belong to the whole process


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How the runs of a grid are trained. These options do not change which runs they are."""

    max_ensemble_size: int  # runs trained as one model at most; 0: as many as fit in memory
    num_local_workers: int  # worker processes that share this machine's memory
    progress: bool  # show a progress bar of epochs


@dataclass(frozen=True, slots=True)
class FeatureRef:
    """Names and fingerprints of features, from which another process opens the same features."""

    home: Path
    dataset: str
    manifest: str  # fingerprint
    caches: tuple[tuple[str, str], ...]  # batch key, fingerprint; see `FeatureSet.references`
    aggregate: str


class PlannedRun(NamedTuple):
    """One run of a group."""

    settings: Any  # the method's Config
    training: TrainConfig
    seed: int
    path: Path  # folder of the run


class RunFailure(NamedTuple):
    """Why a run failed, as one line."""

    reason: str
    is_bug: bool = False


@dataclass(frozen=True, slots=True)
class GroupJob:
    """Runs of one structure to train together, of one seed unless `can_stack_seeds` says otherwise."""

    features_ref: FeatureRef
    method: str
    runs: tuple[PlannedRun, ...]
    last_epoch: float  # training pauses when this epoch of the last phase is validated; inf: train to the end
    options: SearchOptions


def is_brief(head: HeadPlan) -> bool:
    """Whether training a head takes seconds, so that starting a process for it may take longer."""
    return head.training.epochs * head.features.num_train <= BRIEF_SAMPLES


def group_job(heads: Sequence[HeadPlan], last_epoch: float, options: SearchOptions) -> GroupJob:
    """Return the job that trains heads of one structure on the same features until an epoch; see `GroupJob`."""
    features = heads[0].features
    features_ref = FeatureRef(
        home=features.home,
        dataset=features.manifest.dataset,
        manifest=features.manifest.fingerprint(),
        caches=tuple(features.references.items()),
        aggregate=features.aggregate,
    )
    runs = tuple(PlannedRun(head.settings, head.training, head.run.seed, head.run.path) for head in heads)
    return GroupJob(features_ref, heads[0].config.method, runs, last_epoch, options)


def train_group(job: GroupJob) -> dict[Path, RunFailure]:
    """Train or continue the runs of a job.

    Returns:
        The folders of the runs that failed, with the failure of each. The traceback of a bug is in `error.txt` of the folder.

    Raises:
        UserError: this machine has other files than the process that made the job, or its memory is too small to start.
    """
    with _ONE_JOB:
        try:
            heads = _plan_heads(job)
            size = job.options.max_ensemble_size or _ensemble_size(heads[0], job.options)
        except Exception as error:
            if isinstance(error, (UserError, OSError)):
                raise
            return {run.path: run_failure(RunFolder(run.path, run.seed), error) for run in job.runs}
        return _train_ensembles(split_evenly(heads, size), job)


def _plan_heads(job: GroupJob) -> list[HeadPlan]:
    """Open the features of a job and plan its runs.

    Raises:
        UserError: this machine has other files than the process that made the job.
    """
    features = _open_features(job.features_ref, job.method)
    heads = [plan_head_on(features, job.method, run.settings, run.training, run.seed) for run in job.runs]
    for head, run in zip(heads, job.runs, strict=True):
        if head.run.path != run.path:
            raise UserError(f"a worker would train {head.run.path} instead of {run.path}: its files are not the same")
    return heads


def _ensemble_size(head: HeadPlan, options: SearchOptions) -> int:
    """Return how many heads like this one fit in the memory of a worker; 1 after a bug, which each run then meets by itself."""
    try:
        return max(1, head_capacity(head) // options.num_local_workers)
    except Exception as error:
        if is_bug(error):
            return 1
        raise


def _train_ensembles(ensembles: Sequence[Sequence[HeadPlan]], job: GroupJob) -> dict[Path, RunFailure]:
    """Train each ensemble as one model and return the runs that failed.

    After a bug, or when memory runs out, the ensemble is split by seed, then into halves: the method may do what several seeds
    cannot do together, memory may be too small for all, or one run may cause the error.
    """
    failed: dict[Path, RunFailure] = {}
    pending = list(ensembles)
    while pending:
        heads = pending.pop(0)
        try:
            errors = train_heads(heads, job.options.progress, lambda epoch, metric: epoch >= job.last_epoch)
            failed |= {run.path: RunFailure(str(error)) for run, error in errors.items()}
        except Exception as error:
            if isinstance(error, (UserError, OSError)):
                raise
            if by_seed := _split_by_seed(heads):
                how = f"{len(heads)} runs of {len(by_seed)} seeds cannot be trained as one model, so each seed is by itself"
                logger.warning("%s: %s", how, describe_error(error))
                pending[:0] = by_seed
            elif len(heads) > 1:
                pending[:0] = split_evenly(heads, math.ceil(len(heads) / 2))
            else:
                failed[heads[0].run.path] = run_failure(heads[0].run, error)
    return failed


def _split_by_seed(heads: Sequence[HeadPlan]) -> list[list[HeadPlan]]:
    """Return the heads of each seed; nothing if there is only one."""
    seeds = dict.fromkeys(head.run.seed for head in heads)
    return [[head for head in heads if head.run.seed == seed] for seed in seeds] if len(seeds) > 1 else []


def run_failure(run: RunFolder, error: Exception) -> RunFailure:
    """Return the failure of a run as one line; the traceback of a bug is written to `error.txt` of the run."""
    if is_out_of_memory(error):
        return RunFailure(str(out_of_memory_error(run, error)))
    return RunFailure(f"{describe_error(error)}; a bug, its traceback is in {run.write_traceback(error)}", is_bug=True)


def split_evenly(items: Sequence[ItemT], max_size: int) -> list[Sequence[ItemT]]:
    """Split items, in order, into as few parts of at most `max_size` as possible; all but the last are equally large."""
    size = math.ceil(len(items) / math.ceil(len(items) / max_size))
    return [items[start : start + size] for start in range(0, len(items), size)]


@lru_cache(maxsize=1)
def _open_features(features_ref: FeatureRef, method: str) -> FeatureSet:
    """Open the features; the latest ones stay in memory for the next job of this process."""
    return open_features(features_ref.home, features_ref.dataset, method, dict(features_ref.caches), features_ref.aggregate)


def evaluate_run(job: tuple[Path, Path], split: Split = "test") -> dict[str, float] | RunFailure:
    """Return the metrics of a run on a split, or why there are none.

    Args:
        job: The home folder, and the folder of the run.
        split: The split; every read of "test" is logged.
    """
    home, path = job
    with _ONE_JOB:
        try:
            metrics = evaluate(home, RunFolder.at(path), split, {})["metrics"]
        except Exception as error:
            if isinstance(error, (UserError, OSError)):
                raise
            return run_failure(RunFolder.at(path), error)
        RunFolder.at(path).delete_traceback()
        return metrics
