"""The command `diffalign grid`. It imports the modules that it uses when it runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.commands.checks import check_dataset, check_file, check_given_settings, check_method
from pipeline.commands.options import (
    DEFAULT_HOME,
    NO_PAIRS,
    AsJson,
    Home,
    ImageCache,
    PreparedDataset,
    Preset,
    Processes,
    Scheduler,
    Seeds,
    SettingOptions,
    Text,
    TrainingOptions,
    parse_integers,
    show,
    show_table,
)
from pipeline.runtime import plugins
from pipeline.runtime.assignments import parse_assignments
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from pipeline.studies.search import GridResult


def grid(
    method: Annotated[str, typer.Option(help="Name of a method; `diffalign methods` lists them.")] = "seda",
    dataset: PreparedDataset = "openmoji",
    fields: Annotated[
        list[str],
        typer.Option(
            "--grid",
            help="A setting of the method or of training with the values to try, FIELD=VALUE,VALUE; may be given several "
            "times. papers: the grid of the method's paper, the default.",
        ),
    ] = NO_PAIRS,
    grid_file: Annotated[Path | None, typer.Option(help="The same as YAML, one line per field: T: [900, 1200].")] = None,
    points: Annotated[
        int,
        typer.Option(min=0, help="Number of random cells to try; 0: all. A larger number includes the cells of a smaller one."),
    ] = 0,
    seeds: Seeds = "0,1,2",
    settings: SettingOptions = NO_PAIRS,
    training: TrainingOptions = NO_PAIRS,
    preset: Preset = "head",
    precision: Annotated[
        Literal["auto", "float32", "mixed"] | None,
        typer.Option(
            help="Precision of matrix products; mixed: bfloat16. auto: mixed where this machine has it. Default: float32, "
            "as in train-head."
        ),
    ] = None,
    search: Annotated[
        Literal["all", "optuna"], typer.Option(help="Train all cells to the end, or the better ones (successive halving).")
    ] = "all",
    workers: Processes = -1,
    scheduler: Scheduler = "local",
    strategy: Annotated[
        Literal["auto", "processes", "stacked"],
        typer.Option(
            help="processes: train every run alone. stacked: train runs of one structure, which differ in numbers such as T, "
            "t, gamma or lr, as one model. auto: stacked where there are GPUs."
        ),
    ] = "auto",
    max_ensemble_size: Annotated[
        int, typer.Option("--lanes", min=0, help="Runs of one model at most, when stacked; 0: as memory allows.")
    ] = 0,
    no_test: Annotated[bool, typer.Option("--no-test", help="Do not evaluate the winner on the test split.")] = False,
    image: ImageCache = "",
    text: Text = "",
    aggregate: Annotated[
        Literal["", "mean", "first", "random"], typer.Option(help="How several texts of a sample become one vector.")
    ] = "",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Train all combinations of some settings, rank them on validation, and test the winner; finished runs are not repeated."""
    from pipeline.training.config import TrainConfig

    check_method(method, preset)
    check_dataset(dataset, home)
    check_file(grid_file, "--grid-file")
    chosen, given, given_training = (
        parse_integers(seeds, "--seeds"),
        parse_assignments(settings),
        parse_assignments(training, "--train"),
    )
    check_given_settings(TrainConfig, given_training)
    plugin = plugins.get("methods", method)
    check_given_settings(plugin.Config, given, plugin.symbols)

    from pipeline.studies.grid import read_axes
    from pipeline.workspace import Workspace

    result = Workspace(home).grid(
        dataset,
        method,
        read_axes(method, fields, grid_file),
        seeds=chosen,
        points=points,
        preset=preset,
        train=given_training,
        search=search,
        precision=precision,
        read_test=not no_test,
        workers=workers,
        scheduler=scheduler,
        strategy=strategy,
        max_ensemble_size=max_ensemble_size,
        image=image,
        text=text,
        aggregate=aggregate,
        settings=given,
    )
    _print_result(result, result.folder / "index.html", as_json)
    if result.failed:
        run, reason = next(each for each in result.failed.items() if each[0] in result.bugs or not result.bugs)
        message = f"{len(result.failed)} of {len(result.ranking) * len(chosen)} runs failed, the first is {run}: {reason}"
        if not result.bugs:
            raise UserError(message)
        print(f"diffalign: {message}; please report the bugs ({len(result.bugs)} of these runs)", file=sys.stderr)
        raise typer.Exit(1)


def _print_result(result: GridResult, page: Path, as_json: bool) -> None:
    """Print the ranking, the winner and the paths of the results."""
    if as_json:
        cells = result.ranking.astype(object).where(result.ranking.notna(), None).to_dict(orient="records")
        show({"grid": str(result.folder), "page": str(page), "winner": result.winner, "cells": cells}, as_json)
        return
    fields = {field: str for field in result.axes}  # as text, so that a learning rate of 1e-6 is not rounded
    show_table(result.ranking.astype(fields).round(3), as_json)
    if result.winner:
        point = " ".join(f"{field}={value}" for field, value in result.winner["cell"].items())
        print(f"winner: {point}")
        print(f"val:    {_format_metrics(result.winner['val'])}")
        print(f"test:   {_format_metrics(result.winner['test']) or 'not read'}")
    print(f"files:  {result.folder}")
    print(f"page:   {page}")


def _format_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the means of metrics as text, with their deviations when there are several seeds."""
    from pipeline.evaluation.statistics import format_seeds

    return ", ".join(f"{name} {format_seeds(value['values'])}" for name, value in metrics.items())
