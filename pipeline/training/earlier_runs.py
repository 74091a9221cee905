"""Runs of earlier versions that lie in other folders than today's: they were trained otherwise, or a setting was."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RECIPE, RunConfig, RunFolder, find_runs
from pipeline.runtime.settings import configure
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
        run = earlier.get((head.config.fingerprint(), head.run.seed))
        why = "an earlier version trained it, with other random numbers"
        if not run and earlier_precision:
            training = {**head.config.training, "precision": earlier_precision}
            run = earlier.get((replace(head.config, training=training).fingerprint(), head.run.seed))
            why = f"its precision is {earlier_precision}, once the default here: --precision {earlier_precision} takes it"
        if run:
            logger.warning("%s has these settings (%s); this command makes another run, %s", run.path, why, head.run.path)
            return


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
    settings = configure(plugins.get("methods", config.method).Config, config.settings)
    return replace(config, settings=asdict(settings), training=asdict(configure(TrainConfig, config.training)), recipe=RECIPE)
