"""Sort the rows of a results table into methods and what is no method: ablations, controls, heads that were trained on.

A row is called by what it differs in from its method's row among the methods, and from the other rows of its name. A setting of
training in which it is unlike the baseline that it is compared with is always named, with the baseline's value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.report.results import (
    DatasetResults,
    HeadRuns,
    ResultRow,
    cache_folders,
    distinguishing_settings,
    find_varying,
    name_configs,
    name_training,
)
from pipeline.runtime.runs import REAL_TEXT

# Group -> its heading, in the order of a page.
ROW_GROUPS = {
    "methods": "Methods",
    "settings": "The same methods with other settings",
    "prediction": "Other settings of prediction",
    "controls": "Controls: trained on other texts than their own",
    "fractions": "Trained on a part of the training split",
    "continued": "Heads that joint training has trained on",
    "diagnostics": "Diagnostics, no methods: they read the text of each test example",
}


class NamedRow(NamedTuple):
    """Where a row of the results stands on a page."""

    group: str  # a key of `ROW_GROUPS`
    name: str  # unlike the names of all other rows


def name_rows(results: DatasetResults, baselines: Sequence[ResultRow | None]) -> list[NamedRow]:
    """Return the group and the name of every row, in the order of the rows.

    Args:
        results: The rows.
        baselines: The row that each of them is compared with; None where there is none.
    """
    best = _best_rows(results)
    groups = [_find_group(row, results, best) for row in results.rows]
    names = [""] * len(groups)
    for group in ROW_GROUPS:
        indices = [index for index, own in enumerate(groups) if own == group]
        pairs = [(results.rows[index], baselines[index]) for index in indices]
        for index, name in zip(indices, _name_group(group, pairs, results, best), strict=True):
            names[index] = name
    repeated = Counter(names)
    digests = [row.head.config.fingerprint()[:8] for row in results.rows]
    named = [f"{name} · {digest}" if repeated[name] > 1 else name for name, digest in zip(names, digests, strict=True)]
    return [NamedRow(*each) for each in zip(groups, named, strict=True)]


def _method_key(head: HeadRuns) -> tuple[Any, ...]:
    """What stays the same when only settings change: the method, what it is stacked on, its image features and its data."""
    config = head.config
    return config.method, config.settings.get("head"), config.caches["image"], config.manifest


def _is_plain(row: ResultRow, results: DatasetResults) -> bool:
    return _find_group(row, results, {}) in ("methods", "settings")


def _best_rows(results: DatasetResults) -> dict[tuple[Any, ...], ResultRow]:
    """Return for each method the row that is best on validation."""
    best: dict[tuple[Any, ...], ResultRow] = {}
    for row in results.rows:
        if _is_plain(row, results):
            key = _method_key(row.head)
            best[key] = max(best.get(key, row), row, key=lambda each: each.head.val_metric)
    return best


def _find_group(row: ResultRow, results: DatasetResults, best: Mapping[tuple[Any, ...], ResultRow]) -> str:
    config = row.head.config
    if row.head.feature_kind == "text":
        return "diagnostics"
    if config.is_continued:
        return "continued"
    if config.text_control != REAL_TEXT:
        return "controls"
    if config.train_fraction != 1:
        return "fractions"
    if row.evaluation_name != results.split:
        return "prediction"
    return "methods" if best.get(_method_key(row.head)) is row else "settings"


def _name_group(
    group: str,
    pairs: Sequence[tuple[ResultRow, ResultRow | None]],
    results: DatasetResults,
    best: Mapping[tuple[Any, ...], ResultRow],
) -> list[str]:
    """Return the names of the rows of a group; each row comes with its baseline."""
    configs = [row.head.config for row, _ in pairs]
    stems = name_configs(configs, [row.head.feature_kind == "text" for row, _ in pairs])
    folders = cache_folders(results.caches)
    settings = [distinguishing_settings(config, folders) for config in configs]
    varying = find_varying(stems, configs, settings)
    names = []
    for (row, baseline), stem, own, shown in zip(pairs, stems, settings, varying, strict=True):
        usual = best.get(_method_key(row.head))
        is_plain = group not in ("continued", "diagnostics")
        unlike = _unlike(own, distinguishing_settings(usual.head.config, folders)) if usual and is_plain else set()
        at_baseline = name_training(baseline.head.config.training, row.head.config) if baseline and is_plain else {}
        trained_otherwise = _unlike(own, at_baseline)
        named = unlike | trained_otherwise | (set() if group == "settings" else set(shown))
        words = [
            f"{key}={value}" + (f" (baseline {at_baseline[key]})" if key in trained_otherwise else "")
            for key, value in own.items()
            if key in named
        ]
        if group == "settings" and not words:  # they differ in what only one of them has
            words = [row.head.config.fingerprint()[:8]]
        names.append(" · ".join(filter(None, [stem, ", ".join(words), row.overrides])))
    return names


def _unlike(own: Mapping[str, Any], others: Mapping[str, Any]) -> set[str]:
    """Return the settings that two configurations have with different values."""
    return {key for key, value in own.items() if key in others and others[key] != value}
