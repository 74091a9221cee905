"""A grid: fields of a method and of its training with the values to try; its cells are ordinary runs.

A cell is what `train-head` makes of the same settings, in the same folder; the precision is one of these, and where bfloat16 is
native the two commands have different defaults for it. Everything that cannot be trained is refused here, before anything is.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.data.spec import parse_spec
from pipeline.runtime import plugins
from pipeline.runtime.device import default_device, resolve_dtype
from pipeline.runtime.files import fingerprint, write_atomic
from pipeline.training.config import SHARED, TrainConfig
from pipeline.training.ensemble import structure
from pipeline.training.features import FeatureSet, cache_names, open_features
from pipeline.training.heads import HeadPlan, plan_head_on, resolve_settings

MAX_CELLS = 10_000  # of one grid
MANY_CELLS = 500  # to load what torch needs for methods without numbers takes as long as to build so many with numbers
PAPERS = "papers"  # the method's own grid, its GRID
Axes = Mapping[str, tuple[Any, ...]]  # field -> values, in the order of the grid
Precision = Literal["auto", "float32", "mixed"]
Search = Literal["all", "optuna"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of values."""

    point: Mapping[str, Any]  # by field, in the order of the axes
    label: str  # for people: "T=900 t=0 gamma=0.5"
    settings: Any  # the method's Config
    training: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells of one method on one dataset's features, each trained with every seed."""

    features: FeatureSet
    method: str
    axes: Axes
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    search: Search  # all: every cell is trained to its end; optuna: the better ones

    @cached_property
    def heads(self) -> dict[tuple[int, int], HeadPlan]:
        """The runs by cell and seed, finished or not, in the order of the grid."""
        return {
            (number, seed): plan_head_on(self.features, self.method, cell.settings, cell.training, seed)
            for number, cell in enumerate(self.cells)
            for seed in self.seeds
        }

    @cached_property
    def structures(self) -> dict[int, Hashable]:
        """What cells with runs to train have in common with those they can be trained with, besides the seed.

        `ValueError` names a cell whose method cannot be built.
        """
        build = plugins.get("methods", self.method).build
        found: dict[int, Hashable] = {}
        known: dict[Any, Hashable] = {}  # by settings of the method
        for number, cell in enumerate(self.cells):
            if not all(self.heads[number, seed].run.is_done for seed in self.seeds):
                if cell.settings not in known:
                    try:
                        with torch.device("meta" if len(self.cells) > MANY_CELLS else "cpu"):
                            known[cell.settings] = structure(build(cell.settings, self.features.shapes))
                    except (ValueError, RuntimeError) as error:
                        raise ValueError(f"cell {cell.label}: {error}") from error
                found[number] = known[cell.settings], tuple(getattr(cell.training, name) for name in SHARED)
        return found

    def asked(self) -> dict[str, Any]:
        """What was asked for, as plain JSON values; the hash of it names the grid."""
        heads = [self.heads[cell, self.seeds[0]] for cell in range(len(self.cells))]
        return {
            "dataset": self.features.manifest.dataset,
            "method": self.method,
            "manifest": self.features.manifest.fingerprint(),
            "caches": dict(heads[0].config.caches),
            "text_aggregate": self.features.aggregate,
            "axes": {field: list(values) for field, values in self.axes.items()},
            "cells": [dict(cell.point) for cell in self.cells],
            "configs": [head.config.fingerprint() for head in heads],
            "seeds": list(self.seeds),
            "search": self.search,
        }

    def create(self) -> Path:
        """The grid's folder, `<home>/grids/<dataset>/<method>-<fingerprint12>`, with its grid.json."""
        asked = self.asked()
        folder = self.features.home / "grids" / asked["dataset"] / f"{self.method}-{fingerprint(asked)[:12]}"
        write_atomic(folder / "grid.json", json.dumps(asked, indent=1, sort_keys=True, allow_nan=False))
        return folder


def read_axes(method: str, pairs: Sequence[str], file: Path | None = None) -> Axes:
    """The axes of FIELD=VALUE,VALUE pairs, of "papers", and of a YAML file {FIELD: [VALUE, VALUE]}; of nothing: the papers'.

    Fields are the method's, by name or by the papers' letter, and those of training. `ValueError` for what is unknown, empty or
    given twice.
    """
    module = plugins.get("methods", method)
    hints = {**plugins.field_types(module.Config), **plugins.field_types(TrainConfig)}
    letters = {field: letter for letter, field in module.SYMBOLS.items()}
    axes: dict[str, tuple[Any, ...]] = {}
    for key, values in _given(module.GRID, pairs, file):
        field = module.SYMBOLS.get(key, key)
        if field not in hints:
            named = [f"{letter} (= {name})" for letter, name in module.SYMBOLS.items()]
            raise ValueError(f"unknown grid field {key!r}; choose one of: {', '.join([*hints, *named])}")
        if field in axes:
            raise ValueError(f"grid field {field!r} is given twice; {letters.get(field, field)!r} is the same field")
        if not values:
            raise ValueError(f"grid field {key!r} has no values: the grid is empty")
        axes[field] = tuple(plugins.parse_value(key, value, hints[field]) for value in values)
        ((value, count),) = Counter(axes[field]).most_common(1)
        if count > 1:
            raise ValueError(f"grid field {key!r} has the value {value} {count} times")
    if not axes:
        raise ValueError(f"the papers have no grid of {method}: name fields, --grid FIELD=VALUE,VALUE")
    return axes


def _given(papers: Axes, pairs: Sequence[str], file: Path | None) -> Iterator[tuple[str, Sequence[Any]]]:
    """Fields as they were named, with their values as they were written."""
    for pair in pairs or ([] if file else [PAPERS]):
        key, equals, values = pair.partition("=")
        if pair == PAPERS:
            yield from papers.items()
        elif key and equals:
            yield key, values.split(",") if values else []
        else:
            raise ValueError(f"--grid takes FIELD=VALUE,VALUE or {PAPERS}, not {pair!r}")
    for key, values in parse_spec(file).items() if file else ():
        yield str(key), values if isinstance(values, list) else [values]


def read_cells(
    dataset: str,
    method: str,
    preset: str,
    axes: Axes,
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    points: int = 0,
) -> tuple[Cell, ...]:
    """All combinations of the axes' values, the last axis running fastest, or `points` of them drawn without replacement.

    More points hold the fewer. Fields that are on no axis have the values of `settings` and `training`, else the preset's.
    `ValueError` names the first cell whose settings are impossible, and for more than `MAX_CELLS`.
    """
    module = plugins.get("methods", method)
    for field in chain((module.SYMBOLS.get(key, key) for key in settings), training):
        if field in axes:
            raise ValueError(f"{field!r} is on the grid and set besides: give it once")
    total = math.prod(len(values) for values in axes.values())
    if points > total:
        raise ValueError(f"--points {points} of a grid of {total} cells: give fewer, or none for all")
    if (points or total) > MAX_CELLS:
        remedy = "give fewer --points" if points else "give fewer values, or try some of them, --points"
        raise ValueError(f"a grid has at most {MAX_CELLS} cells, not {points or total}: {remedy}")
    letters, own_fields = {field: letter for letter, field in module.SYMBOLS.items()}, plugins.field_types(module.Config)
    cells = []
    for number in _drawn(total, points) if points else range(total):
        point = _point(axes, number)
        label = " ".join(f"{letters.get(field, field)}={value}" for field, value in point.items())
        own = {field: value for field, value in point.items() if field in own_fields}
        rest = {field: value for field, value in point.items() if field not in own}
        try:
            config, train_config = resolve_settings(dataset, method, preset, {**settings, **own}, {**training, **rest})
        except ValueError as error:
            raise ValueError(f"cell {label}: {error}") from error
        cells.append(Cell(point=point, label=label, settings=config, training=train_config))
    return tuple(cells)


def _drawn(total: int, points: int) -> list[int]:
    """So many different numbers below `total`, in order; of more than can be listed, duplicates are drawn again."""
    rng = random.Random(0)
    if total <= MAX_CELLS:
        numbers = list(range(total))
        rng.shuffle(numbers)
        return sorted(numbers[:points])
    found: set[int] = set()
    while len(found) < points:
        found.add(rng.randrange(total))
    return sorted(found)


def _point(axes: Axes, number: int) -> dict[str, Any]:
    """The values of the cell with this number among all."""
    point: dict[str, Any] = {}
    for field in reversed(list(axes)):
        number, index = divmod(number, len(axes[field]))
        point[field] = axes[field][index]
    return {field: point[field] for field in axes}


def plan_grid(
    home: Path,
    dataset: str,
    method: str,
    axes: Axes,
    seeds: Sequence[int],
    *,
    preset: str = "head",
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    points: int = 0,
    precision: Precision = "auto",
    search: Search = "all",
    image: str = "",
    text: str = "",
    aggregate: str = "",
) -> Grid:
    """A grid that can be trained; `ValueError` names the cell that cannot, or what is missing on disk.

    Precision "auto" is mixed where this machine multiplies bfloat16 natively; it becomes a training setting of every cell.
    """
    if "precision" not in {*axes, *training}:
        training = {**training, "precision": resolve_dtype(precision, default_device(), "mixed")}
    elif precision != "auto":
        raise ValueError("'precision' is given twice: by --precision, and by --grid or --train")
    cells = read_cells(dataset, method, preset, axes, settings, training, points)
    features = open_features(home.absolute(), dataset, method, cache_names(dataset, image, text), aggregate)
    grid = Grid(features=features, method=method, axes=axes, cells=cells, seeds=tuple(seeds), search=search)
    _ = grid.structures  # builds what is left to train
    return grid
