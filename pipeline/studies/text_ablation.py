"""Ablation of the text: a method on real texts, on the four controls of `training.text_controls`, and without its text term."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from pipeline.data.manifest_files import read_manifest
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.statistics import MIN_SEEDS_FOR_VERDICT, Estimate, format_seeds, paired_bootstrap
from pipeline.report.comparison import METRIC_LABELS, format_difference, pair_scores
from pipeline.report.pairs import Judged, judge_against
from pipeline.report.results import SampleMetrics, read_groups, read_sample_metrics
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import REAL_TEXT
from pipeline.runtime.settings import name_settings
from pipeline.training.features import cache_names, open_features
from pipeline.training.heads import plan_head_on, resolve_head_settings, train_head
from pipeline.training.text_controls import TEXT_CONTROLS, is_text_of_class, join_text, parse_text
from pipeline.types import Split

logger = logging.getLogger(__name__)
NO_TEXT_TERM = "no text term"
WITHIN, ACROSS = "shuffled-within", "shuffled-across"
ABOVE, BELOW = f"above {REAL_TEXT}", f"below {REAL_TEXT}"  # the verdicts on a control


class TextAblation(NamedTuple):
    """The table of the study, and what it shows in plain words."""

    table: pd.DataFrame
    conclusion: str


class _Scored(NamedTuple):
    metrics: list[Mapping[str, float]]  # of each seed
    samples: SampleMetrics


def compare_texts(
    home: Path,
    dataset: str,
    method: str,
    preset: str,
    seeds: Sequence[int],
    caches: Mapping[str, str],
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    split: Split = "test",
    progress: bool = True,
) -> TextAblation:
    """Train and test a method on real texts and on each control, with the same settings and seeds.

    Args:
        home: The folder of all caches and runs.
        dataset: The name of a prepared and extracted dataset.
        method: The name of a method that reads texts.
        preset: See `resolve_head_settings`.
        seeds: The seeds of every row.
        caches: The names of the caches that the heads read, by batch key; "" or missing: the dataset's encoder.
        settings: Settings of the method.
        training: Settings of `TrainConfig`.
        split: The split that is evaluated; every read of "test" is logged.
        progress: Whether to show progress bars.

    Returns:
        One row per text with the mean and standard deviation over seeds of the metrics, what real texts have more than it, in
        points with its 95 % interval, and a verdict; and a conclusion. Where the text is a function of the class, texts
        shuffled within a class are the real ones: this control is void, and its row says so. If the method says what it is
        `without_text`, one more row has those settings.

    Raises:
        UserError: the method reads no text, or a control is named in `caches`.
    """
    plugin = plugins.get("methods", method)
    if "text" not in plugin.needs:
        raise UserError(f"{method} reads no text, so there is nothing to compare; choose a method that does")
    text, control = parse_text(caches.get("text", ""))
    if control != REAL_TEXT:
        raise UserError(f"this study trains on every control: name the text cache alone, not {caches['text']!r}")
    void = {WITHIN} if is_text_of_class(read_manifest(home, dataset)) else set()
    variants = {name: (name, settings) for name in (REAL_TEXT, *TEXT_CONTROLS) if name not in void}
    if without_text := getattr(plugin, "without_text", {}):
        variants[NO_TEXT_TERM] = (REAL_TEXT, {**name_settings(plugin.Config, settings, plugin.symbols), **without_text})
    scored = {}
    for title, (control, own) in variants.items():
        logger.info("ablation of texts: %s, %d heads", title, len(seeds))
        names = cache_names(home, dataset, caches.get("image", ""), join_text(text, control))
        features = open_features(home, dataset, method, names)
        config, train_config = resolve_head_settings(dataset, method, preset, own, training, home)
        heads = [plan_head_on(features, method, config, train_config, seed) for seed in seeds]
        runs = [train_head(head, progress) for head in heads]
        records = [evaluate(home, run, split, {}) for run in runs]
        samples = read_sample_metrics(runs, records, split)
        scored[title] = _Scored([record["metrics"] for record in records], samples)
    return _summarise(method, scored, read_groups(home, dataset))


def _summarise(method: str, scored: Mapping[str, _Scored], groups: Mapping[str, str]) -> TextAblation:
    """Compare the other rows with the first one, which has real texts."""
    real, *others = (each.samples for each in scored.values())
    titles = list(scored)[1:]
    judged = dict(zip(titles, judge_against(real, others, groups, ABOVE, BELOW), strict=True))
    metric = METRIC_LABELS[judged[titles[0]].metric]
    shown = [name for name in scored[REAL_TEXT].metrics[0] if not name.startswith(("overall_", "per_class_"))]
    besides = {}  # differences in mAP, on which no verdict is based
    if "map" in real.by_metric:
        pairs = [pair_scores(real, other, groups)["map"] for other in others]
        besides = {title: paired_bootstrap(pair) for title, pair in zip(titles, pairs, strict=True)}
    table = pd.DataFrame(
        {
            "text": title,
            **{name: format_seeds([metrics[name] for metrics in each.metrics]) for name in shown},
            **({"mAP: real - it": format_difference(*besides[title][:3]) if title in besides else "-"} if besides else {}),
            f"{metric}: real - it": format_difference(*_gain(judged[title])[:3]) if title in judged else "-",
            "verdict": judged[title].verdict if title in judged else REAL_TEXT,
        }
        for title, each in scored.items()
    )
    if WITHIN not in scored:
        void = {"text": WITHIN, "verdict": "void: the text is a function of the class"}
        table = pd.concat([table, pd.DataFrame([void])], ignore_index=True).fillna("-")
    return TextAblation(table, explain(method, metric, judged, len(real.seeds)))


def _gain(judged: Judged) -> Estimate:
    """Return what real texts have more than a control; the judged difference is the control's."""
    value, low, high, p = judged.difference
    return Estimate(-value, -high, -low, p)


def explain(method: str, metric: str, judged: Mapping[str, Judged], num_seeds: int) -> str:
    """Return in plain words what the differences between real texts and the controls show.

    Real text helps if it is above the texts of other pictures, both of the same class and of any class.

    Args:
        method: The name of the method.
        metric: The name of the metric for readers.
        judged: What the controls are, compared with real texts; by control.
        num_seeds: The number of seeds of every row.
    """
    points = {name: f"{_gain(each).value:+.2f} points" for name, each in judged.items()}
    across = f"{points[ACROSS]} of {metric}"
    if WITHIN not in judged:
        first = _explain_class_texts(method, _place(judged[ACROSS], metric), judged, num_seeds)
        return first if num_seeds < MIN_SEEDS_FOR_VERDICT else f"{first}{_explain_text_term(method, metric, judged, points)}"
    within = f"{points[WITHIN]} of {metric}"
    if num_seeds < MIN_SEEDS_FOR_VERDICT:
        return (
            f"Nothing is claimed: there are {num_seeds} of {MIN_SEEDS_FOR_VERDICT} seeds. So far real texts are "
            f"{_place(judged[WITHIN], metric)} texts of other pictures of the same class, and "
            f"{_place(judged[ACROSS], metric)} texts of any other picture."
        )
    is_below = {name: each.verdict == BELOW for name, each in judged.items()}
    if is_below[WITHIN] and is_below[ACROSS]:
        first = (
            f"The texts help {method}: with each picture's own text it is {within} above the same head with texts of other "
            f"pictures of its class, and {across} above it with texts of any other picture."
        )
    elif is_below[ACROSS]:
        first = (
            f"{method} gains from the class that a text belongs to ({across} above texts of any other picture), but nothing "
            "shows that what a text says of its own picture helps: real texts are not shown to be better than texts of other "
            f"pictures of the class ({within})."
        )
    else:
        first = (
            f"Nothing shows that what the texts say helps {method}: real texts are not shown to be better than texts of any "
            f"other picture ({across}; than texts of other pictures of the same class: {within})."
        )
    return f"{first}{_explain_text_term(method, metric, judged, points)}"


def _place(judged: Judged, metric: str) -> str:
    """Return where real texts are, seen from a control: "+1.50 points of Acc-1 above", "1.50 points of Acc-1 below"."""
    points = _gain(judged).value
    return f"{-points:.2f} points of {metric} below" if points < 0 else f"{points:+.2f} points of {metric} above"


def _explain_class_texts(method: str, place: str, judged: Mapping[str, Judged], num_seeds: int) -> str:
    """Return what `explain` says where the text is a function of the class, but for the text term."""
    void = "The text is a function of the class, so it says nothing of its own picture: the control within a class is void."
    if num_seeds < MIN_SEEDS_FOR_VERDICT:
        claim = f"Nothing is claimed: there are {num_seeds} of {MIN_SEEDS_FOR_VERDICT} seeds. So far real texts are {place}"
    elif judged[ACROSS].verdict == BELOW:
        claim = f"{method} gains from the class that a text belongs to: real texts are {place}"
    else:
        claim = f"Nothing shows that what the texts say helps {method}: real texts are {place}"
    return f"{claim} texts of any other picture. {void}"


def _explain_text_term(method: str, metric: str, judged: Mapping[str, Judged], points: Mapping[str, str]) -> str:
    """Return a sentence about the head without text term, if there is one and it differs."""
    verdict = judged[NO_TEXT_TERM].verdict if NO_TEXT_TERM in judged else ""
    if verdict == BELOW and judged["noise"].verdict != BELOW:
        return (
            f" Its text term helps by {points[NO_TEXT_TERM]} of {metric}, but real texts are not shown to beat noise: "
            "the term can help as one more target, which regularises."
        )
    if verdict == BELOW:
        return f" Without its text term {method} loses {points[NO_TEXT_TERM]} of {metric}."
    if verdict == ABOVE:
        cost = f"{-_gain(judged[NO_TEXT_TERM]).value:.2f} points of {metric}"
        return f" Without its text term {method} is better: {cost} is what real texts cost."
    return ""
