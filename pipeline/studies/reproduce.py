"""Reproduce the tables and figures of the papers on any prepared dataset; see docs/reproduce.md.

Every row is an ordinary run, so nothing is trained twice, and the same command goes on after any interruption.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.cache.reader import Cache
from pipeline.data.artefacts import Artefact
from pipeline.data.manifest_files import read_manifest
from pipeline.evaluation.evaluate import evaluate, read_metrics
from pipeline.extraction.extract import extract
from pipeline.report.blocks import Table
from pipeline.report.comparison import METRIC_LABELS
from pipeline.report.grid_page import write_grid_page
from pipeline.report.paper_table import RowResult, compare_rows, describe_order, paper_table, table_metrics, write_table_files
from pipeline.report.results import describe_uninformative, read_groups, read_sample_metrics
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.runtime.executor import num_processes, open_executor
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.version import code_version
from pipeline.studies.grid import plan_grid, read_axes
from pipeline.studies.paper_figures import FIGURES, write_robustness
from pipeline.studies.reproduce_cost import Cost, estimate_heads, estimate_joint
from pipeline.studies.reproduce_plan import (
    NamedBackbone,
    ReproduceOptions,
    RowPlan,
    TablePlan,
    choose_preset,
    find_joint_run,
    is_tuned,
    joint_config,
    plan_heads,
    plan_table,
    tune_encoders,
)
from pipeline.studies.search import run_grid
from pipeline.studies.search_worker import (
    GroupJob,
    RunFailure,
    SearchOptions,
    evaluate_run,
    group_job,
    is_brief,
    run_failure,
    train_group,
)
from pipeline.training.heads import HeadPlan
from pipeline.training.joint.ddp import check_single_process
from pipeline.training.text_controls import is_text_of_class
from pipeline.types import Split

logger = logging.getLogger(__name__)

JOINT_EPOCHS = 10  # the default of joint training, see `resolve_joint_settings`
QUICK_SEEDS = (0, 1)
QUICK_TRAINING = {"epochs": 2, "validate_every": 2}
QUICK_JOINT_TRAINING = {"epochs": 1}
QUICK_SAMPLING = {"sampler": "ddim", "sample_steps": 5, "draws": 1}
QUICK_SUFFIX = "-quick"  # of the names of files, so that a trial replaces no result


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What a reproduction has written."""

    files: Sequence[Path] = ()
    table: pd.DataFrame = field(default_factory=pd.DataFrame)  # what readers see; empty for a figure
    numbers: pd.DataFrame = field(default_factory=pd.DataFrame)  # the same as the CSV file has it
    failed: Mapping[str, str] = field(default_factory=dict)  # run -> reason
    bugs: frozenset[str] = frozenset()  # the runs among them that failed by a bug, whose tracebacks are in their `error.txt`


class _ScoredJob(NamedTuple):
    """Heads to train, and the split to evaluate them on; None: none."""

    group: GroupJob
    split: Split | None


def quick_options(options: ReproduceOptions) -> ReproduceOptions:
    """Return options for a trial that takes minutes: two seeds, and two epochs unless the user says otherwise."""
    return replace(
        options,
        seeds=options.seeds[: len(QUICK_SEEDS)],
        training={**QUICK_TRAINING, **options.training},
        joint_training={**QUICK_JOINT_TRAINING, **options.joint_training},
        sampling=QUICK_SAMPLING,
    )


def reproduce(
    home: Path, dataset: str, artefact: Artefact, options: ReproduceOptions, suffix: str = "", only_plan: bool = False
) -> Reproduction:
    """Say what an artefact of a paper costs on a dataset, train what is missing, and write it to `reports/<dataset>`.

    Args:
        home: The folder of all caches and runs.
        dataset: The name of a prepared and extracted dataset.
        artefact: The table, grid or figure.
        options: The user's decisions.
        suffix: What the names of the files end in.
        only_plan: Say what it costs, and do nothing.

    Raises:
        UserError: an option is wrong, the dataset is not prepared, or nothing can be compared with anything.
    """
    check_single_process("reproduce")
    if options.scheduler != "local" and options.workers >= 0:
        raise UserError("--workers are processes of this machine, --scheduler has its own: give one of them")
    if options.backbones and artefact.kind != "table":
        raise UserError(f"{artefact.name} has no rows of backbones: name its image features with --image")
    if artefact.kind == "figure" and artefact.name not in FIGURES:
        raise unknown_choice(artefact.name, f"nothing draws a figure {artefact.name!r}", list(FIGURES))
    for metric in (metric for own in artefact.datasets.values() for metric in own.metrics):
        if metric not in METRIC_LABELS:
            raise unknown_choice(metric, f"{artefact.name}: unknown metric {metric!r}", list(METRIC_LABELS))
    home = home.absolute()
    make = {"table": _reproduce_table, "grid": _reproduce_grid, "figure": _reproduce_figure}[artefact.kind]
    return make(home, dataset, artefact, options, f"{artefact.name}{suffix}", only_plan)


def _reproduce_table(
    home: Path, dataset: str, artefact: Artefact, options: ReproduceOptions, name: str, only_plan: bool
) -> Reproduction:
    plan = plan_table(home, dataset, artefact, options)
    _announce(home, plan, name, options)
    if only_plan:
        return Reproduction()
    failed: dict[Path, RunFailure] = {}
    for backbone in plan.to_extract:
        _extract(home, plan, backbone)
    for _ in range(2):  # rows on tuned encoders can be planned when these are there
        plan = plan_table(home, dataset, artefact, options)
        scored = {head.run.path for row in plan.rows if not row.joint for head in row.heads.values()}
        failed |= _train([head for head in plan.heads() if head.run.path not in failed], scored, options)
        failed |= _tune(home, plan, options, failed)
        if not any(row.is_waiting for row in plan.rows):
            break
    results = [_collect(home, row, options, failed) for row in plan.rows]
    manifest = plan.manifest
    frame = compare_rows(artefact, results, read_groups(home, dataset), table_metrics(manifest))
    table, printed = (paper_table(artefact, frame, dataset, options.split, is_narrow) for is_narrow in (False, True))
    notes = [*_describe_setting(plan, options), *artefact.notes, *describe_order(artefact, frame)]
    notes += [f"Not had: {result.row.title}: {result.reason}." for result in results if result.reason]
    notes += describe_uninformative(len(manifest.class_names))
    if is_text_of_class(manifest):
        notes.append(
            f"The texts of {dataset} are a function of the class: they say nothing of a single picture, so a control that "
            "shuffles texts within a class is void here."
        )
    title = f"{artefact.title}, on {dataset}"
    introduction = _introduce(dataset, plan, options)
    files = write_table_files(home / "reports" / dataset, name, title, table, frame, introduction, notes, printed)
    reasons = {str(path): failure.reason for path, failure in failed.items()}
    bugs = frozenset(str(path) for path, failure in failed.items() if failure.is_bug)
    return Reproduction(files=files, table=_as_frame(table), numbers=frame, failed=reasons, bugs=bugs)


def _as_frame(table: Table) -> pd.DataFrame:
    """Return a table as it is read; its columns may have equal names."""
    return pd.DataFrame(list(table.rows), columns=list(table.columns))


def _announce(home: Path, plan: TablePlan, name: str, options: ReproduceOptions) -> None:
    """Log what a table costs, and which rows cannot be had."""
    missing = [row for row in plan.rows if row.reason]
    for row in missing:
        logger.debug("not had: %s: %s", row.row.title, row.reason)
    if missing:
        titles = ", ".join(row.row.title for row in missing)
        logger.info(
            "not had: %s of %s rows, %s; --verbose says why, and so does the page", len(missing), len(plan.rows), titles
        )
    for backbone in plan.to_extract:
        size = len(plan.manifest.samples)
        logger.info("first, features for %s are extracted with %s: %s samples", backbone.name, backbone.encoder, size)
    heads, jobs = plan.heads(), plan.joint_jobs()
    left = [(head, unfreeze) for head, unfreeze in jobs if not is_tuned(home, head, unfreeze, options)]
    epochs = int(options.joint_training.get("epochs", JOINT_EPOCHS))
    sizes = len(plan.manifest.split("train")), len(plan.manifest.samples)
    joint = sum(estimate_joint(_trained_caches(head, unfreeze), *sizes, epochs) for head, unfreeze in left)
    waiting = len(options.seeds) * sum(row.is_waiting for row in plan.rows)
    cost = Cost(
        num_runs=len(heads) + len(jobs) + waiting,
        num_done=sum(head.run.is_done for head in heads) + len(jobs) - len(left),
        num_waiting=waiting,
        seconds=estimate_heads(home, heads, options.workers) + joint,
    )
    logger.info(cost.describe(name, plan.manifest.dataset))


def _trained_caches(head: HeadPlan, unfreeze: str) -> list[Cache]:
    """Return the caches of the encoders that joint training of a head tunes."""
    caches = head.features.caches
    return [caches[key] for key in joint_config(unfreeze).trained_keys if key in caches]


def _extract(home: Path, plan: TablePlan, backbone: NamedBackbone) -> None:
    logger.info("features of %s for %s", backbone.encoder, backbone.name)
    extract(plan.manifest, backbone.encoder, backbone.settings, home)


def _train(heads: Sequence[HeadPlan], scored: set[Path], options: ReproduceOptions) -> dict[Path, RunFailure]:
    """Train heads that are not done, evaluate those of `scored`, and return the runs that failed."""
    split = options.split
    left = [head for head in heads if not head.run.is_done or (head.run.path in scored and split not in read_metrics(head.run))]
    if not left:
        return {}
    failed: dict[Path, RunFailure] = {}
    number = num_processes(options.workers, len(left), max(head.features.num_bytes for head in left))
    starts_late = options.workers < 0 and number > 1 and all(map(is_brief, left))
    with open_executor(options.scheduler, number, starts_late) as executor:
        how = SearchOptions(max_ensemble_size=1, num_local_workers=executor.num_workers, progress=False)
        jobs = [_ScoredJob(group_job([head], math.inf, how), split if head.run.path in scored else None) for head in left]
        with ProgressBar(label="heads", total=len(heads), initial=len(heads) - len(left), unit="run") as bar:
            for index, get_result in executor.map(train_and_score, jobs):
                try:
                    failed |= get_result()
                except UserError as error:
                    failed[left[index].run.path] = RunFailure(str(error))
                bar.update()
    return failed


def train_and_score(job: _ScoredJob) -> dict[Path, RunFailure]:
    """Train heads, evaluate them, and return those that failed; a worker calls this."""
    failed = train_group(job.group)
    for run in job.group.runs:
        if run.path not in failed and job.split:
            outcome = evaluate_run((job.group.features_ref.home, run.path), job.split)
            if isinstance(outcome, RunFailure):
                failed[run.path] = outcome
    return failed


def _tune(home: Path, plan: TablePlan, options: ReproduceOptions, failed: Mapping[Path, RunFailure]) -> dict[Path, RunFailure]:
    """Train the encoders of all rows that need it, one after the other, and return the joint runs that failed.

    One head may be trained on with its image encoder and with both encoders: the joint runs are two.
    """
    found: dict[Path, RunFailure] = {}
    runs = [(head, unfreeze, find_joint_run(home, head, unfreeze, options)) for head, unfreeze in plan.joint_jobs()]
    jobs = [(head, unfreeze, run) for head, unfreeze, run in runs if run and not run.is_done and run.path not in failed]
    for number, (head, unfreeze, run) in enumerate(jobs, start=1):
        logger.info("joint training %d of %d: %s, seed %d, %s", number, len(jobs), head.config.method, head.run.seed, unfreeze)
        try:
            tune_encoders(home, head, unfreeze, options)
        except Exception as error:
            if isinstance(error, OSError):
                raise
            failure = RunFailure(str(error)) if isinstance(error, UserError) else run_failure(run, error)
            found[run.path] = failure._replace(reason=f"joint training of {unfreeze}: {failure.reason}")
    return found


def _collect(home: Path, plan: RowPlan, options: ReproduceOptions, failed: Mapping[Path, RunFailure]) -> RowResult:
    """Return what became of a row: the values of its finished runs on the split, and why there are no more."""
    result = RowResult(row=plan.row, features=plan.features, preset=plan.preset, reason=plan.reason)
    runs: list[RunFolder] = []
    reasons = [plan.reason] if plan.reason else []
    for head in plan.heads.values():
        run = (find_joint_run(home, head, plan.joint, options) if plan.joint else None) or head.run
        if not run.is_done or (plan.joint and not head.run.is_done):
            reasons.append(failed[run.path].reason if run.path in failed else f"{run.path} is not trained")
        else:
            runs.append(tune_encoders(home, head, plan.joint, options) if plan.joint else head.run)
    if plan.is_waiting:
        reasons.append("the encoder that it reads is not tuned")
    reason = "; ".join(dict.fromkeys(reasons))
    if not runs:
        return replace(result, reason=reason)
    records = [evaluate(home, run, options.split, {}) for run in runs]
    samples = read_sample_metrics(runs, records, options.split)
    metrics = {key: np.array([record["metrics"][key] for record in records]) for key in records[0]["metrics"]}
    return replace(result, samples=samples, metrics=metrics, reason=reason)


def _introduce(dataset: str, plan: TablePlan, options: ReproduceOptions) -> str:
    count = len(plan.manifest.split(options.split))
    seeds = ", ".join(map(str, options.seeds))
    training = "".join(f" {key}={value}" for key, value in options.training.items())
    changed = f" Training settings of all rows:{training}." if training else ""
    return f"{dataset}, {count} samples of the {options.split} split, seeds {seeds}. Code: {code_version()}.{changed}"


def _describe_setting(plan: TablePlan, options: ReproduceOptions) -> list[str]:
    """Return one sentence each about the features and the settings of the rows."""
    by_features: dict[str, list[str]] = {}
    by_preset: dict[str, set[str]] = {}
    for row in plan.rows:
        if row.features:
            by_features.setdefault(row.features, []).append(row.row.title)
            by_preset.setdefault(row.preset, set()).add(row.row.method)
    common = max(by_features, key=lambda name: len(by_features[name]))
    texts = {cache.path.name for head in plan.heads() for key, cache in head.features.caches.items() if key == "text"}
    sentences = [f"Image features: {common}; the paper's are of {plan.artefact.backbone}."]
    sentences += [f"Text features: {', '.join(sorted(texts))}."] if texts else []
    sentences += [f"Other image features: {name} ({', '.join(rows)})." for name, rows in by_features.items() if name != common]
    presets = "; ".join(f"{name} for {', '.join(sorted(methods))}" for name, methods in sorted(by_preset.items()))
    return [*sentences, f"Settings, where a row names none: {presets}."]


def _reproduce_grid(
    home: Path, dataset: str, artefact: Artefact, options: ReproduceOptions, name: str, only_plan: bool
) -> Reproduction:
    preset = choose_preset(home, dataset, artefact.method, options.preset)
    axes = read_axes(artefact.method, artefact.axes)
    grid = plan_grid(
        home,
        dataset,
        artefact.method,
        axes,
        options.seeds,
        preset=preset,
        settings=options.settings_of(artefact.method, artefact.settings),
        training=options.training,
        image=options.image,
        text=options.text,
    )
    heads = list(grid.heads.values())
    seconds = estimate_heads(home, heads, options.workers, is_alike=True)
    done = sum(head.run.is_done for head in heads)
    logger.info(Cost(num_runs=len(heads), num_done=done, num_waiting=0, seconds=seconds).describe(name, dataset))
    if only_plan:
        return Reproduction()
    result = run_grid(grid, options.scheduler, options.workers, read_test=options.split == "test")
    write_grid_page(result.folder)
    folder = home / "reports" / dataset
    rounded = result.ranking.astype({field: str for field in result.axes}).round(2).astype(object)
    shown = rounded.where(rounded.notna(), "-").map(str)
    caption = f"{artefact.title}, on {dataset}: the cells by rank on validation; the verdict compares them with the best."
    table = Table(tuple(shown.columns), tuple(tuple(row) for row in shown.itertuples(index=False)), caption)
    introduction = f"{dataset}, seeds {', '.join(map(str, grid.seeds))}, preset {preset}. Page: {result.folder / 'index.html'}."
    files = write_table_files(folder, name, artefact.title, table, result.ranking, introduction, artefact.notes)
    files += write_robustness(result.folder, folder / name, artefact.name)
    return Reproduction(files=files, table=shown, numbers=result.ranking, failed=result.failed, bugs=result.bugs)


def _reproduce_figure(
    home: Path, dataset: str, artefact: Artefact, options: ReproduceOptions, name: str, only_plan: bool
) -> Reproduction:
    figure = FIGURES[artefact.name]
    read_manifest(home, dataset)
    first = replace(options, seeds=options.seeds[:1])
    heads = {
        method: next(iter(plan_heads(home, dataset, method, {}, options.image, first).values())) for method in figure.methods
    }
    seconds = estimate_heads(home, list(heads.values()), options.workers)
    done = sum(head.run.is_done for head in heads.values())
    logger.info(Cost(num_runs=len(heads), num_done=done, num_waiting=0, seconds=seconds).describe(name, dataset))
    if only_plan:
        return Reproduction()
    failed = _train(list(heads.values()), {head.run.path for head in heads.values()}, options)
    if failed:
        path, failure = next(iter(failed.items()))
        raise UserError(f"{name} needs a head that failed, {path}: {failure.reason}")
    runs = {method: head.run for method, head in heads.items()}
    files = figure.write(home, dataset, runs, home / "reports" / dataset / name, options.split)
    return Reproduction(files=files)
