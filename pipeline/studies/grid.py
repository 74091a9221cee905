"""A grid of settings: fields of a method and of its training, each with the values to try. Every cell is an ordinary run.

A cell is the same run, in the same folder, as `train-head` makes from the same settings. Precision is one of these settings;
both commands have the same default. A cell that cannot be trained is refused here, before any training starts.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from pipeline.data.spec import parse_spec
from pipeline.runtime import plugins
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.device import default_device, resolve_dtype
from pipeline.runtime.errors import UserError, describe_error, is_bug
from pipeline.runtime.files import fingerprint, write_atomic
from pipeline.runtime.runs import check_seed
from pipeline.runtime.settings import aliases_of, field_types, find_settings, flatten, parse_setting
from pipeline.training.config import SHARED_SETTINGS, TrainConfig
from pipeline.training.earlier_runs import log_earlier_runs
from pipeline.training.ensemble import structure_key
from pipeline.training.features import FeatureSet, cache_names, open_features
from pipeline.training.heads import HeadPlan, plan_head_on, resolve_head_settings

MAX_CELLS = 10_000  # of one grid
MAX_REAL_BUILDS = 500  # loading torch's support for the meta device takes as long as building this many methods on the CPU
EARLIER_PRECISION = "mixed"  # what grids of earlier versions took by default where bfloat16 is native
PAPERS_GRID = "papers"  # word in --grid for the grid of the method's paper, its GRID
Axes = Mapping[str, tuple[Any, ...]]  # field, or alias of several fields -> values, in the order of the grid
PrecisionChoice = Literal["auto", "float32", "mixed"]
SearchKind = Literal["all", "optuna"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of the values of a grid."""

    point: Mapping[str, Any]  # the values by field, in the order of the axes
    label: str  # what users see: "T=900 t=0 gamma=0.5"
    settings: Any  # the method's Config
    training: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells of one method on the features of one dataset; each cell is trained with every seed."""

    features: FeatureSet
    method: str
    axes: Axes
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    search: SearchKind  # all: train every cell to its end; optuna: only the better cells

    @property
    def metric(self) -> str:
        """The name of the metric that ranks cells: acc1, or map for multi-label data."""
        return "acc1" if self.features.manifest.label_kind == "single" else "map"

    @cached_property
    def heads(self) -> dict[tuple[int, int], HeadPlan]:
        """The runs by (cell, seed), finished or not, in the order of the grid."""
        return {
            (number, seed): plan_head_on(self.features, self.method, cell.settings, cell.training, seed)
            for number, cell in enumerate(self.cells)
            for seed in self.seeds
        }

    @cached_property
    def structures(self) -> dict[int, Hashable]:
        """A key by cell, for cells with unfinished runs; runs with equal keys can be trained as one model.

        They have one seed, except where `heads.can_stack_seeds` allows several.

        Raises:
            UserError: the method of a cell cannot be built; the message names the cell.
        """
        build = plugins.get("methods", self.method)
        keys: dict[int, Hashable] = {}
        keys_by_settings: dict[Any, Hashable] = {}
        for number, cell in enumerate(self.cells):
            if not all(self.heads[number, seed].run.is_done for seed in self.seeds):
                if cell.settings not in keys_by_settings:
                    try:
                        with torch.device("meta" if len(self.cells) > MAX_REAL_BUILDS else "cpu"):
                            keys_by_settings[cell.settings] = structure_key(build(cell.settings, self.features.shapes))
                    except UserError as error:
                        raise UserError(f"cell {cell.label}: {error}") from error
                    except Exception as error:
                        if not is_bug(error):
                            raise UserError(f"cell {cell.label}: {describe_error(error)}") from error
                        keys_by_settings[cell.settings] = object()  # trained alone, where the bug is met again and recorded
                shared = tuple(getattr(cell.training, name) for name in SHARED_SETTINGS)
                keys[number] = keys_by_settings[cell.settings], shared
        return keys

    def identity(self) -> dict[str, Any]:
        """Return everything that defines this grid, as plain JSON values; its hash names the folder of the grid."""
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

    def create_folder(self) -> Path:
        """Create the grid's folder, `<home>/grids/<dataset>/<method>-<fingerprint12>`, with its grid.json, and return it."""
        identity = self.identity()
        folder = self.features.home / "grids" / identity["dataset"] / f"{self.method}-{fingerprint(identity)[:12]}"
        write_atomic(folder / "grid.json", json.dumps(identity, indent=1, sort_keys=True, allow_nan=False))
        return folder


def read_axes(method: str, pairs: Sequence[str] | Mapping[str, Any], file: Path | None = None) -> Axes:
    """Return the axes of a grid. Without pairs and file, they are those of the method's paper.

    Args:
        method: The name of a method.
        pairs: FIELD=VALUE,VALUE, or "papers" for the axes of the method's paper; or a mapping {FIELD: [VALUE, VALUE]}. A field
            is one of the method, by its name, an alias or the papers' letter, or one of training. An alias of several fields
            gives them one value.
        file: A YAML file {FIELD: [VALUE, VALUE]} with more axes.

    Raises:
        UserError: a field is unknown, empty or given twice.
    """
    module = plugins.get("methods", method)
    hints = {**field_types(module.Config), **field_types(TrainConfig)}
    letters = {field: letter for letter, field in module.symbols.items()}
    axes: dict[str, tuple[Any, ...]] = {}
    taken: set[str] = set()
    for key, values in _raw_axes(module.grid, pairs, file):
        names = find_settings(module.Config, key, module.symbols) or tuple({key} & hints.keys())
        if not names:
            symbols = [f"{letter} (= {name})" for letter, name in module.symbols.items()]
            also = [*aliases_of(module.Config), *module.symbols]
            raise unknown_choice(key, f"unknown grid field {key!r}", hints, symbols, also=also)
        for name in taken.intersection(names):
            raise UserError(f"grid field {name!r} is given twice; {letters.get(name, key)!r} is the same field")
        if not values:
            raise UserError(f"grid field {key!r} has no values: the grid is empty")
        taken.update(names)
        field = names[0] if len(names) == 1 else key
        owner = module.Config if names[0] in field_types(module.Config) else TrainConfig
        axes[field] = tuple(parse_setting(owner, names[0], value, key) for value in values)
        ((value, count),) = Counter(axes[field]).most_common(1)
        if count > 1:
            raise UserError(f"grid field {key!r} has the value {value} {count} times")
    if not axes:
        raise UserError(f"the papers have no grid of {method}: name fields, --grid FIELD=VALUE,VALUE")
    return axes


def _raw_axes(papers: Axes, pairs: Sequence[str] | Mapping[str, Any], file: Path | None) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield fields and values as the user has written them; a value that is no list stands for a list of it."""
    lists: dict[str, Any] = dict(pairs) if isinstance(pairs, Mapping) else {}
    for pair in list(pairs if not lists else ()) or ([] if file or lists else [PAPERS_GRID]):
        key, equals, values = pair.partition("=")
        if pair == PAPERS_GRID:
            yield from papers.items()
        elif key and equals:
            yield key, values.split(",") if values else []
        else:
            raise UserError(f"--grid takes FIELD=VALUE,VALUE or {PAPERS_GRID}, not {pair!r}")
    for key, values in (*lists.items(), *(parse_spec(file).items() if file else ())):
        yield str(key), list(values) if isinstance(values, list | tuple | range | np.ndarray) else [values]


def read_cells(
    dataset: str,
    method: str,
    preset: str,
    axes: Axes,
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    points: int = 0,
    home: Path | None = None,
    defaults_first: bool = False,
) -> tuple[Cell, ...]:
    """Return all combinations of the axes' values, or some of them at random. The last axis varies fastest.

    Args:
        dataset: The name of a dataset, which has the tuned preset.
        method: The name of a method.
        preset: The values of fields that are given nowhere else: "head", "paper" or "tuned".
        axes: The values to combine, by field.
        settings: Fields of the method with one value for all cells, by name, alias or the papers' letter.
        training: Fields of training with one value for all cells.
        points: How many cells to draw without replacement; 0: all. A larger number includes the cells of a smaller one.
        home: See `resolve_head_settings`.
        defaults_first: The first cell has the preset's values in all axes of several values; it is one of `points`, which may
            then be more than there are.

    Raises:
        UserError: the settings of a cell are impossible (the message names the first such cell), a field is given twice, or
            there are more than `MAX_CELLS` cells.
    """
    module = plugins.get("methods", method)
    on_grid, besides = (
        {name: key for key in keys for name in find_settings(module.Config, key, module.symbols) or (key,)}
        for keys in (axes, [*flatten(settings), *training])
    )
    for field in sorted(on_grid.keys() & besides.keys()):
        raise UserError(f"{besides[field]!r} is on the grid and set besides: give it once")
    total = math.prod(len(values) for values in axes.values())
    if points > total and not defaults_first:
        raise UserError(f"--points {points} of a grid of {total} cells: give fewer, or none for all")
    if (points or total) > MAX_CELLS:
        remedy = "give fewer --points" if points else "give fewer values, or try some of them, --points"
        raise UserError(f"a grid has at most {MAX_CELLS} cells, not {points or total}: {remedy}")
    letters = {field: letter for letter, field in module.symbols.items()}
    drawn = [_point(axes, number) for number in (_draw_numbers(total, min(points, total)) if points else range(total))]
    if defaults_first:
        first = _preset_point(axes, module.Config, *resolve_head_settings(dataset, method, preset, settings, training, home))
        drawn = [first, *(point for point in drawn if point != first)][: points or None]
    else:
        drawn.sort(key=lambda point: [axes[field].index(value) for field, value in point.items()])
    cells = []
    for point in drawn:
        label = " ".join(f"{letters.get(field, field)}={value}" for field, value in point.items())
        of_method = {letters.get(field, field): value for field, value in point.items() if find_settings(module.Config, field)}
        of_training = {field: value for field, value in point.items() if not find_settings(module.Config, field)}
        try:
            config, train_config = resolve_head_settings(
                dataset, method, preset, {**settings, **of_method}, {**training, **of_training}, home
            )
        except UserError as error:
            raise UserError(f"cell {label}: {error}") from error
        cells.append(Cell(point=point, label=label, settings=config, training=train_config))
    return tuple(cells)


def _draw_numbers(total: int, points: int) -> list[int]:
    """Return `points` different random numbers below `total`; more numbers begin with fewer."""
    rng = random.Random(0)
    if total <= MAX_CELLS:
        numbers = list(range(total))
        rng.shuffle(numbers)
        return numbers[:points]
    drawn: dict[int, None] = {}  # too many numbers to list and shuffle: draw one at a time, and again when it is a duplicate
    while len(drawn) < points:
        drawn[rng.randrange(total)] = None
    return list(drawn)


def _point(axes: Axes, number: int) -> dict[str, Any]:
    """Return the values of a cell, given its number among all combinations."""
    point: dict[str, Any] = {}
    for field in reversed(list(axes)):
        number, index = divmod(number, len(axes[field]))
        point[field] = axes[field][index]
    return {field: point[field] for field in axes}


def _preset_point(axes: Axes, config_type: type[Any], config: Any, training: TrainConfig) -> dict[str, Any]:
    """Return the values that a preset has in the axes; an axis of one value keeps it."""
    preset = {**flatten(asdict(config)), **asdict(training)}
    return {
        field: values[0] if len(values) == 1 else preset[(find_settings(config_type, field) or (field,))[0]]
        for field, values in axes.items()
    }


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
    defaults_first: bool = False,
    precision: PrecisionChoice | None = None,
    search: SearchKind = "all",
    image: str = "",
    text: str = "",
    aggregate: str = "",
) -> Grid:
    """Return a grid of which every cell can be trained.

    Args:
        home: The folder of all caches and runs.
        dataset: The name of a prepared dataset.
        method: The name of a method.
        axes: The values to combine, by field; see `read_axes`.
        seeds: The seeds of every cell.
        preset: See `read_cells`.
        settings: See `read_cells`.
        training: See `read_cells`.
        points: See `read_cells`.
        defaults_first: See `read_cells`.
        precision: The training setting of this name, for every cell. "auto" is "mixed" where this machine multiplies bfloat16
            natively, else "float32". None is the default of `train_head`: that of the preset, else "float32".
        search: "all" trains every cell to its end, "optuna" only the better cells.
        image: The cache of the image features; "": that of the dataset's image encoder.
        text: The cache of the text features; "": that of the dataset's text encoder.
        aggregate: How several texts of a sample become one vector; see `open_features`.

    Raises:
        UserError: a cell cannot be trained (the message names it), a field is given twice, an argument is out of its range,
            or files are missing.
    """
    if search not in get_args(SearchKind):
        raise unknown_choice(search, f"unknown search {search!r}", get_args(SearchKind))
    if points < 0:
        raise UserError(f"the number of points must be at least 0, not {points}")
    chosen_seeds = tuple(dict.fromkeys(map(check_seed, seeds)))
    if not chosen_seeds:
        raise UserError("a grid needs at least one seed")
    if "precision" in {*axes, *training}:
        if precision not in (None, "auto"):
            raise UserError("'precision' is given twice: by --precision, and by --grid or --train")
    elif precision:
        training = {**training, "precision": resolve_dtype(precision, default_device(), "mixed")}
    cells = read_cells(dataset, method, preset, axes, settings, training, points, home, defaults_first)
    features = open_features(home.absolute(), dataset, method, cache_names(home, dataset, image, text), aggregate)
    grid = Grid(features=features, method=method, axes=axes, cells=cells, seeds=chosen_seeds, search=search)
    _ = grid.structures  # builds the methods of unfinished cells, so that a bad cell is found now
    is_default = precision is None and "precision" not in {*axes, *training}
    log_earlier_runs(grid.heads.values(), EARLIER_PRECISION if is_default else "")
    return grid
