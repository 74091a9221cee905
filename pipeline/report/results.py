"""The runs of a dataset as rows of a table: one row per configuration and evaluation, over its seeds."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from pipeline.cache import find_caches, info
from pipeline.runtime.files import canonical_json
from pipeline.runtime.runs import RunConfig, RunFolder, find_runs

Kind = Literal["image", "text", "unknown"]

BASELINE = "baseline"
TEXT_ONLY = "text only (diagnostic: reads test text)"
NOT_TERMS = {"ids", "logits", "label", "feature"}  # in predictions-<name>.npz; every other array is a metric's terms


@dataclass(frozen=True, slots=True)
class Head:
    """One configuration of a method with its finished seeds, at least one."""

    config: RunConfig
    runs: tuple[RunFolder, ...]
    kind: Kind  # what its "image" features were made from; unknown when their cache is gone
    label: str
    score: float  # validation metric of the kept epoch, mean over seeds


@dataclass(frozen=True, slots=True)
class Row:
    """One evaluation of a head: the seeds that have it and their records, in the same order."""

    head: Head
    evaluation: str
    label: str
    runs: tuple[RunFolder, ...]
    records: tuple[Mapping[str, Any], ...]

    def values(self, metric: str) -> np.ndarray:
        """The metric in percent, one value per seed."""
        return np.array([record["metrics"][metric] for record in self.records])

    def terms(self) -> tuple[list[str], dict[str, np.ndarray]]:
        """Sample ids and, for each metric that is a mean over samples, its terms [N] averaged over seeds."""
        ids: list[str] = []
        sums: dict[str, np.ndarray] = {}
        for run, record in zip(self.runs, self.records, strict=True):
            own_ids, terms = _read_terms(predictions_path(run, self.evaluation), record)
            assert ids in ([], own_ids), f"the seeds of {run.path.parent} were evaluated on different samples"
            ids = own_ids
            sums = {name: values + sums.get(name, 0.0) for name, values in terms.items()}
        return ids, {name: values / len(self.runs) for name, values in sums.items()}


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that a report is made from."""

    dataset: str
    split: str
    heads: tuple[Head, ...]  # those with a row; all of them when no head has one
    rows: tuple[Row, ...]
    caches: tuple[Mapping[str, Any], ...]  # `cache.info` of every readable cache of the dataset
    notes: tuple[str, ...]  # what is missing, one sentence each


def predictions_path(run: RunFolder, evaluation: str) -> Path:
    """The per-example results of an evaluation."""
    return run.path / f"predictions-{evaluation}.npz"


def _read_terms(path: Path, record: Mapping[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Ids and terms by metric, checked against the record; `ValueError` when the two files do not fit."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; delete metrics.json beside it and evaluate the run again")
    with np.load(path) as arrays:
        ids = [str(sample_id) for sample_id in arrays["ids"]]
        terms = {name: np.asarray(arrays[name], dtype=np.float64) for name in arrays.files if name not in NOT_TERMS}
    for name, values in terms.items():
        if not np.isclose(values.mean(), record["metrics"][name], atol=1e-3):
            raise ValueError(f"{path} does not fit metrics.json ({name}); delete both and evaluate the run again")
    return ids, terms


def collect(home: Path, dataset: str, split: str) -> Results:
    """The finished runs of a dataset with their evaluations on a split; `ValueError` when there is no run."""
    runs = find_runs(home, dataset)
    if not runs:
        command = f"diffalign train-head --dataset {dataset} --method {BASELINE}"
        raise ValueError(f"{home / 'runs' / dataset} has no runs; train one with: {command}")
    caches, notes = _caches(home, dataset)
    done = [run for run in runs if run.is_done]
    if len(done) < len(runs):
        notes.append(f"Left out as not finished: {plural(len(runs) - len(done), 'run')}; the same command goes on.")
    evaluated = [run for run in done if _names(run, split)]
    if evaluated and len(evaluated) < len(done):
        missing = plural(len(done) - len(evaluated), "finished run")
        notes.append(f"Left out as not evaluated on {split}: {missing}; searches are judged on validation alone.")
    heads = _heads(evaluated or done, caches)
    rows = tuple(row for head in heads for row in _rows(head, split))
    return Results(dataset, split, heads, rows, tuple(caches), tuple(notes))


def plural(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _caches(home: Path, dataset: str) -> tuple[list[Mapping[str, Any]], list[str]]:
    caches, notes = [], []
    for folder in find_caches(home, dataset):
        try:
            caches.append(info(folder))
        except ValueError as error:
            notes.append(f"A feature cache cannot be read: {error}.")
    return caches, notes


def _records(run: RunFolder) -> dict[str, Any]:
    path = run.path / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _names(run: RunFolder, split: str) -> list[str]:
    """The run's evaluations on a split, the one with its own settings first."""
    return sorted(name for name in _records(run) if name.partition("@")[0] == split)


def history(run: RunFolder) -> pd.DataFrame:
    """The run's epochs in order; `val_metric` and `val_loss` are NaN where nothing was validated."""
    return pd.read_csv(run.path / "history.csv").reindex(columns=["phase", "epoch", "loss", "val_metric", "val_loss"])


def _score(run: RunFolder, select: str) -> float:
    """The validation metric of the epoch that training kept."""
    epochs = history(run).dropna(subset=["val_metric"])
    if select == "loss":
        return float(epochs["val_metric"].to_numpy()[epochs["val_loss"].to_numpy().argmin()])
    return float(epochs["val_metric"].iloc[-1] if select == "last" else epochs["val_metric"].max())


def _heads(runs: Sequence[RunFolder], caches: Sequence[Mapping[str, Any]]) -> tuple[Head, ...]:
    """Runs by configuration: image heads first, the baseline before the others, then by label."""
    kinds: dict[str, Kind] = {cache["fingerprint"]: "text" if "text" in cache["identity"] else "image" for cache in caches}
    groups: dict[str, list[RunFolder]] = defaultdict(list)
    for run in runs:
        groups[str(run.path.parent)].append(run)
    configs = [group[0].config() for group in groups.values()]
    labels = label_configs(configs, [kinds.get(config.caches["image"], "unknown") == "text" for config in configs], caches)
    heads = [
        Head(
            config,
            tuple(group),
            kinds.get(config.caches["image"], "unknown"),
            label,
            float(np.mean([_score(run, config.training["select"]) for run in group])),
        )
        for config, group, label in zip(configs, groups.values(), labels, strict=True)
    ]
    return tuple(sorted(heads, key=lambda head: (head.kind == "text", head.config.method != BASELINE, head.label)))


def label_configs(configs: Sequence[RunConfig], text_only: Sequence[bool], caches: Sequence[Mapping[str, Any]]) -> list[str]:
    """The method's name, then the settings in which the configurations of that name differ; no two labels are equal."""
    names = [TEXT_ONLY if text else config.method for config, text in zip(configs, text_only, strict=True)]
    folders = {cache["fingerprint"]: Path(cache["path"]).name for cache in caches}
    facts = [_facts(config, folders) for config in configs]
    labels = []
    for name, own in zip(names, facts, strict=True):
        peers = [other for other_name, other in zip(names, facts, strict=True) if other_name == name]
        varying = [key for key in own if len({canonical_json(peer.get(key)) for peer in peers}) > 1]
        labels.append(" · ".join([name, ", ".join(f"{key}={own[key]}" for key in varying)]) if varying else name)
    repeated = Counter(labels)
    return [
        f"{label} · {config.fingerprint()[:8]}" if repeated[label] > 1 else label
        for config, label in zip(configs, labels, strict=True)
    ]


def _facts(config: RunConfig, folders: Mapping[str, str]) -> dict[str, Any]:
    """What a configuration can differ in, by the name a reader knows it by."""
    caches = {f"{key} features": folders.get(digest, digest[:12]) for key, digest in config.caches.items()}
    training = {f"training {key}" if key in config.settings else key: value for key, value in config.training.items()}
    rest = {"method": config.method, "text_aggregate": config.text_aggregate, "manifest": config.manifest[:8]}
    return {**config.settings, **training, **caches, **rest}


def _rows(head: Head, split: str) -> list[Row]:
    """One row per evaluation that any seed has."""
    records = {run: _records(run) for run in head.runs}
    rows = []
    for name in sorted({name for run in head.runs for name in _names(run, split)}):
        runs = tuple(run for run in head.runs if name in records[run])
        overrides = name.partition("@")[2].replace(",", ", ")
        label = f"{head.label} · {overrides}" if overrides else head.label
        rows.append(Row(head, name, label, runs, tuple(records[run][name] for run in runs)))
    return rows
