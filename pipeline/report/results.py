"""Read the finished runs of a dataset and group them: runs by configuration, then one table row per evaluation.

A configuration is one method with one set of settings; its runs differ only in the seed.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from pipeline.cache import find_caches, info
from pipeline.cache.reader import is_of_text, read_zarr_attributes
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json
from pipeline.runtime.runs import REAL_TEXT, RunConfig, RunFolder, find_runs, removed_test_reads
from pipeline.runtime.settings import flatten

FeatureKind = Literal["image", "text", "unknown"]

BASELINE = "baseline"
TEXT_ONLY_LABEL = "text only (diagnostic: reads test text)"
NUM_BEST = 5  # classes that the metrics acc5, pre5 and rec5 are of
HISTORY_COLUMNS = ["phase", "epoch", "candidate", "loss", "val_metric", "val_loss"]
# Arrays of predictions-<evaluation>.npz that are no metric; every other array is a metric's value of each sample.
NON_METRIC_ARRAYS = {"ids", "logits", "label", "feature"}


@dataclass(frozen=True, slots=True)
class HeadRuns:
    """One configuration of a method with its finished runs, at least one; the runs differ in their seed."""

    config: RunConfig
    runs: tuple[RunFolder, ...]
    feature_kind: FeatureKind  # what its "image" features were made from; "unknown" when their cache is gone
    label: str
    val_metric: float  # of the epoch that training kept, mean over seeds


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One evaluation of a head, over its seeds; `runs` and `records` have the same order."""

    head: HeadRuns
    evaluation_name: str  # "<split>", or "<split>@<settings that were changed for this evaluation>"
    label: str
    runs: tuple[RunFolder, ...]  # the runs of the head that have this evaluation
    records: tuple[Mapping[str, Any], ...]  # the entry of this evaluation in each run's metrics.json

    @property
    def overrides(self) -> str:
        """The settings that were changed for this evaluation, "a=1, b=2"; "" when none were."""
        return self.evaluation_name.partition("@")[2].replace(",", ", ")

    @property
    def folder(self) -> str:
        """The name of the head's folder, "<method>-<fingerprint12>"."""
        return self.runs[0].path.parent.name

    def metric_values(self, metric: str) -> np.ndarray:
        """Return a metric in percent, one value per seed; NaN where an older evaluation does not have it."""
        return np.array([record["metrics"].get(metric, np.nan) for record in self.records])

    def sample_metrics(self) -> SampleMetrics:
        """Return the values of each sample, see `read_sample_metrics`."""
        return read_sample_metrics(self.runs, self.records, self.evaluation_name)


class SampleMetrics(NamedTuple):
    """One evaluation of a head: S seeds, N samples."""

    seeds: tuple[int, ...]
    ids: list[str]  # of the samples
    by_metric: Mapping[str, np.ndarray]  # [S,N] in percent, by metric that is a mean over samples


@dataclass(frozen=True, slots=True)
class DatasetResults:
    """Everything that the report on a dataset is made from."""

    dataset: str
    split: str
    heads: tuple[HeadRuns, ...]  # those with a row; all of them when no head has one
    rows: tuple[ResultRow, ...]
    caches: tuple[Mapping[str, Any], ...]  # `cache.info` of every readable cache of the dataset
    notes: tuple[str, ...]  # what is missing, one sentence each
    groups: Mapping[str, str]  # sample id -> group, of the samples that have a group
    num_classes: int
    not_evaluated: tuple[RunFolder, ...] = ()  # finished runs that are left out, because other runs are evaluated on the split
    removed_test_reads: tuple[Mapping[str, str], ...] = ()  # see `runtime.runs.removed_test_reads`


def predictions_path(run: RunFolder, evaluation_name: str) -> Path:
    """Return the file with the per-sample results of an evaluation."""
    return run.path / f"predictions-{evaluation_name}.npz"


def read_sample_metrics(runs: Sequence[RunFolder], records: Sequence[Mapping[str, Any]], evaluation_name: str) -> SampleMetrics:
    """Read the values of each sample in an evaluation of several seeds.

    Args:
        runs: One run per seed.
        records: The entry of the evaluation in each run's metrics.json.
        evaluation_name: The name of the evaluation.

    Raises:
        UserError: A file with predictions is missing or does not fit metrics.json.
    """
    read = [
        _read_per_sample_metrics(predictions_path(run, evaluation_name), record)
        for run, record in zip(runs, records, strict=True)
    ]
    ids, first = read[0]
    assert all(own == ids for own, _ in read), f"the seeds of {runs[0].path.parent} were evaluated on different samples"
    shared = [name for name in first if all(name in own for _, own in read)]  # an earlier evaluation may have fewer
    return SampleMetrics(
        tuple(run.seed for run in runs), ids, {name: np.stack([own[name] for _, own in read]) for name in shared}
    )


def _read_per_sample_metrics(path: Path, record: Mapping[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return sample ids and values [N] by metric; `UserError` when their means are not those of the record."""
    if not path.is_file():
        raise UserError(f"{path} is missing; delete metrics.json beside it and evaluate the run again")
    with np.load(path) as arrays:
        ids = [str(sample_id) for sample_id in arrays["ids"]]
        metrics = {name: np.asarray(arrays[name], dtype=np.float64) for name in arrays.files if name not in NON_METRIC_ARRAYS}
    for name, values in metrics.items():
        if not np.isclose(values.mean(), record["metrics"][name], atol=1e-3):
            raise UserError(f"{path} does not fit metrics.json ({name}); delete both and evaluate the run again")
    return ids, metrics


def collect_results(home: Path, dataset: str, split: str) -> DatasetResults:
    """Read the finished runs of a dataset with their evaluations on a split.

    Raises:
        UserError: The dataset has no run or no manifest.
    """
    runs = find_runs(home, dataset)
    if not runs:
        command = f"diffalign train-head --dataset {dataset} --method {BASELINE}"
        raise UserError(f"{home / 'runs' / dataset} has no runs; train one with: {command}")
    caches, notes = _read_cache_infos(home, dataset)
    done = [run for run in runs if run.is_done]
    if len(done) < len(runs):
        notes.append(f"Left out as not finished: {plural(len(runs) - len(done), 'run')}; the same command goes on.")
    evaluated = [run for run in done if _evaluation_names(run, split)]
    left_out = tuple(run for run in done if run not in evaluated) if evaluated else ()
    if left_out:
        missing = plural(len(left_out), "finished run")
        notes.append(f"Left out as not evaluated on {split}: {missing}; searches are judged on validation alone.")
    heads = _group_by_config(evaluated or done, caches)
    rows = tuple(row for head in heads for row in _result_rows(head, split))
    manifest = read_manifest(home, dataset)
    num_classes = len(manifest.class_names)
    notes += describe_uninformative(num_classes)
    groups, removed = _groups_of(manifest), tuple(removed_test_reads(home, dataset))
    return DatasetResults(dataset, split, heads, rows, tuple(caches), tuple(notes), groups, num_classes, left_out, removed)


def read_groups(home: Path, dataset: str) -> dict[str, str]:
    """Return the group of each sample that has one, by sample id.

    Raises:
        UserError: The dataset has no manifest.
    """
    return _groups_of(read_manifest(home, dataset))


def _groups_of(manifest: Manifest) -> dict[str, str]:
    return {sample.id: sample.group for sample in manifest.samples if sample.group}


def is_informative(metric: str, num_classes: int) -> bool:
    """Whether a metric can differ between methods: one of the five best classes cannot where these are all classes."""
    return num_classes > NUM_BEST or not metric.endswith(str(NUM_BEST))


def describe_uninformative(num_classes: int) -> list[str]:
    """Return a sentence for the notes of a table that leaves metrics out, see `is_informative`; empty if it has all."""
    if num_classes > NUM_BEST:
        return []
    classes = plural(num_classes, "class", "classes")
    return [f"Metrics of the {NUM_BEST} best classes are left out: of {classes} in all, they are the same for every method."]


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return a count with its noun: "1 run", "2 runs"; `nouns` is a plural of another form."""
    return f"{count} {noun if count == 1 else nouns or f'{noun}s'}"


def _read_cache_infos(home: Path, dataset: str) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Return `cache.info` of every readable cache, and one sentence for each cache that cannot be read."""
    caches, notes = [], []
    for folder in find_caches(home, dataset):
        try:
            caches.append(info(folder))
        except UserError as error:
            notes.append(f"A feature cache cannot be read: {error}.")
    return caches, notes


def count_parameters(run: RunFolder) -> float:
    """Return how many numbers the checkpoint of a run holds, statistics of its features included; NaN without a checkpoint."""
    path = run.path / "checkpoint.safetensors"
    if not path.is_file():
        return np.nan
    with path.open("rb") as file:
        tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return float(sum(math.prod(each["shape"]) for name, each in tensors.items() if name != "__metadata__"))


def read_evaluations(run: RunFolder) -> dict[str, Any]:
    """Return the entries of a run's metrics.json by evaluation; empty when nothing is evaluated."""
    path = run.path / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _evaluation_names(run: RunFolder, split: str) -> list[str]:
    """Return the run's evaluations on a split; the one with the run's own settings is the first."""
    return sorted(name for name in read_evaluations(run) if name.partition("@")[0] == split)


def read_history(run: RunFolder) -> pd.DataFrame:
    """Return the run's epochs in order; values that an epoch does not have are NaN.

    An epoch of training has a loss; one that tried a candidate (see `Phase.candidates`) has the candidate's number instead.
    `val_metric` and `val_loss` are those of validated epochs.
    """
    return pd.read_csv(run.path / "history.csv").reindex(columns=HISTORY_COLUMNS)


def kept_val_metric(run: RunFolder, select: str) -> float:
    """Return the validation metric of the epoch that training kept under the rule `select`, or of the best candidate."""
    epochs = read_history(run).dropna(subset=["val_metric"])
    if epochs["candidate"].notna().any():
        select = "metric"
    if select == "loss":
        return float(epochs["val_metric"].to_numpy()[epochs["val_loss"].to_numpy().argmin()])
    return float(epochs["val_metric"].iloc[-1] if select == "last" else epochs["val_metric"].max())


def _group_by_config(runs: Sequence[RunFolder], caches: Sequence[Mapping[str, Any]]) -> tuple[HeadRuns, ...]:
    """Group runs by configuration: image heads first, the baseline before the other methods, then by label."""
    kinds: dict[str, FeatureKind] = {
        cache["fingerprint"]: "text" if is_of_text(cache["identity"]) else "image" for cache in caches
    }
    groups: dict[str, list[RunFolder]] = defaultdict(list)
    for run in runs:
        groups[str(run.path.parent)].append(run)
    configs = [group[0].config() for group in groups.values()]
    labels = label_configs(configs, [kinds.get(config.caches["image"], "unknown") == "text" for config in configs], caches)
    heads = [
        HeadRuns(
            config,
            tuple(group),
            kinds.get(config.caches["image"], "unknown"),
            label,
            float(np.mean([kept_val_metric(run, config.training["select"]) for run in group])),
        )
        for config, group, label in zip(configs, groups.values(), labels, strict=True)
    ]
    return tuple(sorted(heads, key=lambda head: (head.feature_kind == "text", head.config.method != BASELINE, head.label)))


def label_configs(configs: Sequence[RunConfig], is_text_only: Sequence[bool], caches: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one label per configuration, all different, for the tables and figures.

    A label is the name of the method, with the control if it was trained on other texts than the real ones, with the share of
    the training split if it was trained on a part, and with --unfreeze if joint training has trained it on. Where several
    configurations have the same name, the settings in which they differ are added, and the start of the config's fingerprint
    where that is not enough. A setting of the method that a configuration lacks is no difference: runs of earlier versions
    have fewer settings, or call them otherwise.

    Args:
        configs: The configurations.
        is_text_only: For each configuration, whether its "image" features were made from text.
        caches: `cache.info` of the caches, which gives names to the features.
    """
    names = name_configs(configs, is_text_only)
    settings = [distinguishing_settings(config, cache_folders(caches)) for config in configs]
    labels = [
        " · ".join([name, ", ".join(f"{key}={own[key]}" for key in varying)]) if varying else name
        for name, own, varying in zip(names, settings, find_varying(names, configs, settings), strict=True)
    ]
    repeated = Counter(labels)
    return [
        f"{label} · {config.fingerprint()[:8]}" if repeated[label] > 1 else label
        for config, label in zip(configs, labels, strict=True)
    ]


def name_configs(configs: Sequence[RunConfig], is_text_only: Sequence[bool]) -> list[str]:
    """Return the names of configurations without their settings; the arguments are those of `label_configs`."""
    names = [TEXT_ONLY_LABEL if text else config.method for config, text in zip(configs, is_text_only, strict=True)]
    return [
        name
        + ("" if config.text_control == REAL_TEXT else f" · text={config.text_control}")
        + _describe_fraction(config)
        + (f" · trained on with --unfreeze {config.training.get('train')}" if config.is_continued else "")
        for name, config in zip(names, configs, strict=True)
    ]


def find_varying(names: Sequence[str], configs: Sequence[RunConfig], settings: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return for each configuration the settings in which those of its name differ; see `distinguishing_settings`."""
    found = []
    for name, config, settings_of_it in zip(names, configs, settings, strict=True):
        peers = [other for other_name, other in zip(names, settings, strict=True) if other_name == name]
        of_method = flatten(config.settings)
        found.append(
            [
                key
                for key in settings_of_it
                if len({canonical_json(peer.get(key)) for peer in peers if key in peer or key not in of_method}) > 1
            ]
        )
    return found


def cache_folders(caches: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the name of the folder of each cache, by fingerprint; `caches` are `cache.info` of each."""
    return {cache["fingerprint"]: Path(cache["path"]).name for cache in caches}


def name_head(home: Path, config: RunConfig) -> str:
    """Return the method of a run; of a diagnostic, whose "image" features were made from text, the words that say so."""
    folders = [path for path in find_caches(home, config.dataset) if path.name.endswith(f"-{config.caches['image'][:12]}")]
    return TEXT_ONLY_LABEL if any(is_of_text(read_zarr_attributes(path)["identity"]) for path in folders) else config.method


def _describe_fraction(config: RunConfig) -> str:
    return "" if config.train_fraction == 1 else f" · {100 * config.train_fraction:g} % of the training data"


def distinguishing_settings(config: RunConfig, folders: Mapping[str, str]) -> dict[str, Any]:
    """Return everything in which a configuration can differ from another, under names that readers know."""
    caches = {f"{key} features": folders.get(digest, digest[:12]) for key, digest in config.caches.items()}
    settings = flatten(config.settings)
    training = name_training(config.training, config)
    for pair in str(settings.pop("head_settings", "")).split():  # of `stacked`: those of the head, in one text
        name, _, value = pair.partition("=")
        settings[f"head.{name}"] = value
    rest = {"method": config.method, "text_aggregate": config.text_aggregate, "manifest": config.manifest[:8]}
    return {**settings, **training, **caches, **rest}


def name_training(training: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return settings of training under the names that they have beside the settings of a configuration's method."""
    of_method = flatten(config.settings)
    return {f"training {key}" if key in of_method else key: value for key, value in training.items()}


def _result_rows(head: HeadRuns, split: str) -> list[ResultRow]:
    """Return one row per evaluation that at least one seed has."""
    records = {run: read_evaluations(run) for run in head.runs}
    rows = []
    for name in sorted({name for run in head.runs for name in _evaluation_names(run, split)}):
        runs = tuple(run for run in head.runs if name in records[run])
        row = ResultRow(head, name, head.label, runs, tuple(records[run][name] for run in runs))
        rows.append(replace(row, label=f"{head.label} · {row.overrides}") if row.overrides else row)
    return rows
