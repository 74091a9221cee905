"""Sort the rows of a results table into methods and what is no method: ablations, controls, heads that were trained on.

Rows of a group are called by what they differ in from each other; rows with other settings by what they differ in from their
method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.report.results import DatasetResults, HeadRuns, ResultRow, cache_folders, distinguishing_settings, label_configs
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
    name: str  # unlike the names of all other rows of the group


def name_rows(results: DatasetResults) -> list[NamedRow]:
    """Return the group and the name of every row, in the order of the rows."""
    best = _best_rows(results)
    groups = [_find_group(row, results, best) for row in results.rows]
    names = [""] * len(groups)
    for group in ROW_GROUPS:
        indices = [index for index, own in enumerate(groups) if own == group]
        rows = [results.rows[index] for index in indices]
        own_names = _name_by_method(rows, results, best) if group == "settings" else _name_by_group(rows, results)
        for index, name in zip(indices, own_names, strict=True):
            names[index] = name
    return [NamedRow(*each) for each in zip(groups, names, strict=True)]


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


def _name_by_group(rows: Sequence[ResultRow], results: DatasetResults) -> list[str]:
    """Name each row by its method and what the rows of one method differ in."""
    heads = {id(row.head): row.head for row in rows}
    is_text = [head.feature_kind == "text" for head in heads.values()]
    labels = dict(zip(heads, label_configs([each.config for each in heads.values()], is_text, results.caches), strict=True))
    return [" · ".join([labels[id(row.head)], *([row.overrides] if row.overrides else [])]) for row in rows]


def _name_by_method(rows: Sequence[ResultRow], results: DatasetResults, best: Mapping[tuple[Any, ...], ResultRow]) -> list[str]:
    """Name each row by its method and what it differs in from the best row of this method."""
    names = []
    for row in rows:
        config, own = row.head.config, distinguishing_settings(row.head.config, cache_folders(results.caches))
        usual = distinguishing_settings(best[_method_key(row.head)].head.config, cache_folders(results.caches))
        changes = [f"{key}={value}" for key, value in own.items() if usual.get(key, value) != value]
        names.append(" · ".join([config.method, ", ".join(changes) or config.fingerprint()[:8]]))
    repeated = Counter(names)
    return [
        f"{name} · {row.head.config.fingerprint()[:8]}" if repeated[name] > 1 else name
        for name, row in zip(names, rows, strict=True)
    ]
