"""Runs of earlier versions that lie in other folders than today's: they were trained otherwise, or a setting was."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RECIPE, RunConfig, RunFolder, find_runs
from pipeline.runtime.settings import configure, configure_run, describe_settings, flatten, old_defaults_of, recorded_settings
from pipeline.training.config import TrainConfig
from pipeline.training.heads import HeadPlan

logger = logging.getLogger(__name__)


def log_earlier_runs(heads: Iterable[HeadPlan], earlier_precision: str = "") -> None:
    """Log one line if heads that are to be trained were trained by an earlier version: the same command makes other runs now.

    Args:
        heads: Plans of one home, dataset and method.
        earlier_precision: The default precision of an earlier version, if `heads` have today's default and it is another.
    """
    new = [head for head in heads if not head.run.path.exists()]
    if not new:
        return
    earlier = dict(_read_runs(new[0].features.home, new[0].config))
    for head in new if earlier else ():
        for changes, config in _earlier_forms(head, earlier_precision):
            run = earlier.get((config.fingerprint(), head.run.seed))
            if run and (why := _difference(run, changes)):
                logger.warning("%s has these settings (%s); this command makes another run, %s", run.path, why, head.run.path)
                return


def _earlier_forms(head: HeadPlan, earlier_precision: str) -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """Yield what the settings of a head were when defaults were others, and what differs: first nothing, then more."""
    config = head.config
    defaults = {setting.name: setting.default for setting in describe_settings(type(head.settings))}
    own = flatten(asdict(head.settings))
    old = {name: value for name, value in old_defaults_of(type(head.settings)).items() if own[name] == defaults[name]}
    precision = {"precision": earlier_precision} if earlier_precision else {}
    subsets = chain.from_iterable(combinations(old.items(), size) for size in range(len(old) + 1))
    for settings in map(dict, subsets):
        for training in ({}, precision) if precision else ({},):
            changed_settings = recorded_settings(configure(type(head.settings), {**own, **settings}))
            changed = {"settings": changed_settings, "training": {**config.training, **training}}
            yield {**settings, **training}, replace(config, **changed)


def _difference(run: RunFolder, changes: Mapping[str, Any]) -> str:
    """Return why a run of an earlier version, or of an earlier default, is not the run of today; "" if the user chose so."""
    listed = ", ".join(f"{name}={value}" for name, value in changes.items())
    if run.config().recipe < RECIPE:
        what = "random numbers" if run.config().recipe == 1 else "rounding"
        return f"an earlier version trained it, with other {what}{' and its default ' * bool(listed)}{listed}"
    precision = changes.get("precision")
    return f"its precision is {precision}, once the default here: --precision {precision} takes it" if len(changes) == 1 else ""


def _read_runs(home: Path, planned: RunConfig) -> Iterator[tuple[tuple[str, int], RunFolder]]:
    """Yield the finished runs of a method by the fingerprint that their settings have today, and the seed."""
    for run in find_runs(home, planned.dataset):
        if run.is_done and run.path.parent.name.startswith(f"{planned.method}-"):
            try:
                yield (_as_today(run.config()).fingerprint(), run.seed), run
            except UserError:
                continue  # damaged, of joint training, or with settings that today's version refuses


def _as_today(config: RunConfig) -> RunConfig:
    """Return the config of a run with the names and defaults that settings have today."""
    settings = configure_run(plugins.get("methods", config.method).Config, config.settings)
    return replace(
        config, settings=recorded_settings(settings), training=asdict(configure(TrainConfig, config.training)), recipe=RECIPE
    )
