"""What a trained head is, from the files of its runs: one line for a list, and everything about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import cache
from typing import Any

from pipeline.evaluation.statistics import format_seeds
from pipeline.report.comparison import METRIC_LABELS, deciding_metric
from pipeline.report.results import distinguishing_settings, kept_val_metric, read_evaluations
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json
from pipeline.runtime.head_names import HeadFolder
from pipeline.runtime.runs import REAL_TEXT, RunConfig, RunFolder, disk_usage
from pipeline.runtime.settings import flatten


def describe_heads(heads: Sequence[HeadFolder]) -> list[dict[str, Any]]:
    """Return `describe_head` of each head, with `differs`: what tells it from the other ones of its method and dataset."""
    configs = [head.runs[0].config() for head in heads]
    return [{**describe_head(head), "differs": differs} for head, differs in zip(heads, _tell_apart(configs), strict=True)]


def _tell_apart(configs: Sequence[RunConfig]) -> list[str]:
    """Return for each config the settings, "lr=0.001, tau=0.1", in which those of its method and dataset differ; "" if none."""
    settings = [distinguishing_settings(config, {}) for config in configs]
    values: dict[tuple[str, str, str], set[str]] = defaultdict(set)  # dataset, method, setting -> all values
    for config, own in zip(configs, settings, strict=True):
        for key, value in own.items():
            values[config.dataset, config.method, key].add(canonical_json(value))
    return [
        ", ".join(f"{key}={value}" for key, value in own.items() if len(values[config.dataset, config.method, key]) > 1)
        for config, own in zip(configs, settings, strict=True)
    ]


def describe_head(head: HeadFolder) -> dict[str, Any]:
    """Return one line about a head.

    Returns:
        head ("<dataset>/<name>"); tags, a list; training ("real text", "no text term", a control, a share of the data, joint);
        seeds ("5", or "4 of 5" when one has not finished); metric, the one that decides between heads; val and test, means ±
        deviation in percent of the metric that training selects by, and of the deciding one ("-" where it was not read);
        trained, the local time at which the last seed finished; MiB; path.
    """
    runs = head.runs
    done = [run for run in runs if run.is_done]
    records = [read_evaluations(run) for run in done]
    known = {name for record in records for entry in record.values() for name in entry["metrics"]}
    metric = deciding_metric(sorted(known)) if known else ""
    return {
        "head": head.full_name,
        "tags": list(head.tags),
        "training": _describe_training(runs[0].config()),
        "seeds": str(len(runs)) if len(done) == len(runs) else f"{len(done)} of {len(runs)}",
        "metric": metric,
        "val": _mean(records, "val", "map" if "map" in known else metric) or _kept_on_validation(done),
        "test": _mean(records, "test", metric) or "-",
        "trained": datetime.fromtimestamp(head.finished).strftime("%Y-%m-%d %H:%M") if done else "-",
        "MiB": round(disk_usage([run.path for run in runs]) / 2**20, 1),
        "path": str(head.path),
    }


def explain_head(head: HeadFolder, training_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything about a head: what `describe_head` says, its settings, features, evaluations and versions.

    Args:
        head: the head.
        training_defaults: the defaults of the settings of training.

    Returns:
        The keys of `describe_head`, then not_default (the settings of the method that differ from its defaults),
        training_not_default (those of training that do), settings (the others of the method), training_settings (all), features
        (fingerprints of caches by key), evaluations (mean ± deviation of each metric in percent by evaluation), alignment (of
        generated texts), train_seconds, code (versions that trained the seeds).

    Raises:
        UserError: a file of a run is damaged.
    """
    runs = head.runs
    config = runs[0].config()
    done = [run for run in runs if run.is_done]
    settings = flatten(config.settings)
    defaults = _default_settings(config)
    changed = {name: value for name, value in settings.items() if name not in defaults or defaults[name] != value}
    facts = [run.read_done() for run in done]
    return {
        **describe_head(head),
        "not_default": changed,
        "training_not_default": {
            name: value for name, value in config.training.items() if training_defaults.get(name, value) != value
        },
        "settings": {name: value for name, value in settings.items() if name not in changed},
        "training_settings": dict(config.training),
        "features": {**config.caches, "texts of a sample": config.text_aggregate},
        "evaluations": _summarise_evaluations(done),
        "alignment": _means([run.read_alignment() for run in done]),
        "train_seconds": _means([{"seconds": each["seconds"]} for each in facts]).get("seconds", "-"),
        "code": sorted({each["code"] or "unknown" for each in facts}),
    }


def _describe_training(config: RunConfig) -> str:
    """Return what a head was trained on and how, in a few words."""
    words = ["real text" if config.text_control == REAL_TEXT else f"text={config.text_control}"]
    words = ["no text term"] if config.text_control == REAL_TEXT and _is_without_text(config) else words
    words = words if "text" in config.caches or config.text_control != REAL_TEXT else ["no text"]
    if config.train_fraction != 1:
        words.append(f"{100 * config.train_fraction:g} % of the data")
    if config.is_continued:
        words.append(f"--unfreeze {config.training.get('train')}")
    return ", ".join(words)


def _is_without_text(config: RunConfig) -> bool:
    """Return whether the settings are those with which the method has no loss against the text."""
    without, settings = _without_text(config.method), flatten(config.settings)
    return bool(without) and all(settings.get(name) == value for name, value in without.items())


@cache
def _without_text(method: str) -> Mapping[str, Any]:
    """Return `Method.without_text` of a method; none for a method whose file is not at hand."""
    return (plugins.literal("methods", method, "without_text") or {}) if method in plugins.names("methods") else {}


def _default_settings(config: RunConfig) -> Mapping[str, Any]:
    """Return the defaults of a method's settings by name; none for a method whose file is not at hand."""
    try:
        return flatten(asdict(plugins.get("methods", config.method).Config()))
    except (UserError, TypeError):  # a plug-in that was not given with --plugin, or whose settings have no defaults
        return {}


def _mean(records: Sequence[Mapping[str, Any]], evaluation: str, metric: str) -> str:
    """Return a metric's mean ± deviation over the seeds that have an evaluation, "Acc-1 45.10 ± 0.30"; "" if none has."""
    values = [
        record[evaluation]["metrics"][metric] for record in records if metric in record.get(evaluation, {}).get("metrics", ())
    ]
    return f"{METRIC_LABELS[metric]} {format_seeds(values)}" if values else ""


def _kept_on_validation(runs: Sequence[RunFolder]) -> str:
    """Return the validation metric of the epochs that training kept, for runs that have not been evaluated."""
    configs = [run.config() for run in runs]
    if not configs:
        return "-"
    values = [kept_val_metric(run, config.training["select"]) for run, config in zip(runs, configs, strict=True)]
    return f"{METRIC_LABELS['map' if configs[0].shapes.get('label') else 'acc1']} {format_seeds(values)}"


def _summarise_evaluations(runs: Sequence[RunFolder]) -> dict[str, str]:
    """Return the metrics of each evaluation that a seed has, in one line each."""
    by_name: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for run in runs:
        for name, record in read_evaluations(run).items():
            by_name[name].append(record["metrics"])
    lines = {}
    for name, metrics in sorted(by_name.items()):
        known = [metric for metric in METRIC_LABELS if all(metric in each for each in metrics)]
        means = ", ".join(f"{METRIC_LABELS[metric]} {format_seeds([each[metric] for each in metrics])}" for metric in known)
        lines[name] = f"{means} ({len(metrics)} of {len(runs)} seeds)"
    return lines


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return mean ± deviation of the values that all rows have, by name."""
    shared = [name for name in (rows[0] if rows else {}) if all(name in row for row in rows)]
    return {name: format_seeds([row[name] for row in rows]) for name in shared}
