"""Heads side by side: evaluated where that is missing, then compared in settings, metrics, classes and samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cache import find_caches
from pipeline.data.manifest_files import read_manifest
from pipeline.report.head_changes import (
    HeadPredictions,
    changed_samples,
    class_differences,
    differing_settings,
    read_head_predictions,
)
from pipeline.report.pairs import compare_pairs
from pipeline.report.results import read_groups
from pipeline.runtime.errors import UserError
from pipeline.runtime.head_names import HeadFolder
from pipeline.studies.runs import Runs, list_runs

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.types import Split

MAX_HEADS = 26  # heads of one comparison: each has a letter


@dataclass(frozen=True)
class PairChanges:
    """How classes and samples change from the first head to another one."""

    letters: tuple[str, str]
    class_metric: str  # "accuracy", or "average precision" of multi-label data
    classes: pd.DataFrame  # see `class_differences`
    samples: pd.DataFrame  # see `changed_samples`


@dataclass(frozen=True)
class HeadComparison:
    """Heads of a dataset, compared on a split: the first with each of the others."""

    dataset: str
    split: Split
    num_samples: int
    letters: dict[str, HeadFolder]  # "A", "B", … in the order in which the heads were given
    settings: pd.DataFrame  # see `differing_settings`
    metrics: pd.DataFrame  # see `compare_pairs`; a and b are letters
    pairs: tuple[PairChanges, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values; numbers that there are not are null."""
        heads = {
            letter: {
                "head": head.full_name,
                "tags": list(head.tags),
                "seeds": [run.seed for run in head.runs if run.is_done],
                "path": str(head.path),
            }
            for letter, head in self.letters.items()
        }
        pairs = [
            {
                "heads": pair.letters,
                "class_metric": pair.class_metric,
                "classes": _as_rows(pair.classes),
                "changed_samples": _as_rows(pair.samples),
            }
            for pair in self.pairs
        ]
        facts = {"dataset": self.dataset, "split": self.split, "samples": self.num_samples, "heads": heads}
        settings = self.settings.rename(columns=dict(enumerate(self.letters)))
        return {**facts, "settings": _as_rows(settings), "metrics": _as_rows(self.metrics), "pairs": pairs}


def compare_heads(home: Path, heads: Sequence[HeadFolder], split: Split) -> HeadComparison:
    """Compare heads of one dataset: the first with each of the others; finished runs are evaluated where that is missing.

    Args:
        home: the folder of all artifacts.
        heads: two heads or more of one dataset in this home.
        split: the split; every evaluation on "test" is logged.

    Raises:
        UserError: a head is given twice, has no finished run, or was evaluated on other samples.
    """
    if not 2 <= len(heads) <= MAX_HEADS:
        raise UserError(f"a comparison takes 2 to {MAX_HEADS} heads, not {len(heads)}")
    letters = {chr(ord("A") + index): head for index, head in enumerate(heads)}
    names = [head.name for head in heads]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{repeated[0]} stands twice among the heads: compare it with another one")
    dataset = heads[0].dataset
    _evaluate_missing(list_runs(home, dataset), names, split)
    metrics = compare_pairs(home, dataset, names, split)
    named = {head.name: letter for letter, head in letters.items()}
    metrics = metrics.assign(a=metrics["a"].map(named), b=metrics["b"].map(named))
    predictions = [read_head_predictions([run for run in head.runs if run.is_done], split) for head in heads]
    digests = {digest for head in heads for digest in head.runs[0].config().caches.values()}
    folders = {
        digest: path.name for path in find_caches(home, dataset) for digest in digests if path.name.endswith(f"-{digest[:12]}")
    }
    return HeadComparison(
        dataset=dataset,
        split=split,
        num_samples=len(predictions[0].ids),
        letters=letters,
        settings=differing_settings([head.runs[0] for head in heads], folders),
        metrics=metrics,
        pairs=_compare_with_first(home, dataset, dict(zip(letters, predictions, strict=True))),
    )


def _evaluate_missing(runs: Runs, names: Sequence[str], split: Split) -> None:
    """Evaluate the finished runs of heads on a split, where that has not been done."""
    done = [run for run in runs if run.is_done]
    for name in names:
        if name not in {run.name for run in done}:
            raise UserError(f"{name} has no finished run; run its command again to complete it")
    for run in done:
        if run.name in names:
            run.evaluate(split)


def _compare_with_first(home: Path, dataset: str, predictions: dict[str, HeadPredictions]) -> tuple[PairChanges, ...]:
    """Compare classes and samples of the first head with those of each other one; the keys are letters."""
    class_names, groups = read_manifest(home, dataset).class_names, read_groups(home, dataset)
    (letter, first), *others = predictions.items()
    metric = "accuracy" if first.label.ndim == 1 else "average precision"
    return tuple(
        PairChanges(
            letters=(letter, other_letter),
            class_metric=metric,
            classes=class_differences(first, other, class_names, groups),
            samples=changed_samples(first, other, class_names),
        )
        for other_letter, other in others
    )


def _as_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records"))
