"""Small grids on the tiny dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings
from pipeline.studies.grid import Grid, plan_grid, read_axes

SHORT = {"epochs": 2}


def tiny_grid(home: Path, method: str = "seda", pairs: tuple[str, ...] = ("T=20,30", "t=0,5"), **options: Any) -> Grid:
    """A grid on the tiny dataset; settings that are no axis have the small values of the other tests."""
    axes = read_axes(method, pairs)
    settings = {key: value for key, value in small_settings(method).items() if key not in axes}
    training = {key: value for key, value in {"precision": "float32", **FAST_TRAINING}.items() if key not in axes}
    training |= options.pop("training", {})
    caches = caches_by_key(home)
    seeds = options.pop("seeds", (0,))
    return plan_grid(
        home,
        "tiny",
        method,
        axes,
        seeds,
        settings=settings,
        training=training,
        image=caches["image"],
        text=options.pop("text", caches["text"]),
        **options,
    )


def short_grid(home: Path, method: str, pairs: tuple[str, ...], **options: Any) -> Grid:
    """A grid of two epochs; an axis may set the number of epochs instead."""
    given = {pair.partition("=")[0] for pair in pairs}
    training = {key: value for key, value in SHORT.items() if key not in given}
    return tiny_grid(home, method, pairs, training={**training, **options.pop("training", {})}, **options)
