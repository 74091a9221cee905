"""The command `diffalign grid`. It imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.commands.options import HOME, NONE, AsJson, Home, Scheduler, assignments, parse_integers, show, show_table

if TYPE_CHECKING:
    from pipeline.studies.search import Swept


def grid(
    method: Annotated[str, typer.Option(help="Name of a method; `diffalign methods` lists them.")] = "seda",
    dataset: Annotated[str, typer.Option(help="Name of a prepared and extracted dataset.")] = "openmoji",
    fields: Annotated[
        list[str],
        typer.Option(
            "--grid",
            help="A setting of the method or of training with the values to try, FIELD=VALUE,VALUE; may be given often. "
            "papers: the grid of the method's paper, the default.",
        ),
    ] = NONE,
    grid_file: Annotated[Path | None, typer.Option(help="The same as YAML, one line per field: T: [900, 1200].")] = None,
    points: Annotated[int, typer.Option(min=0, help="Try so many random cells; 0: all. More points hold the fewer.")] = 0,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
    settings: Annotated[list[str], typer.Option("--set", help="A setting of all cells, KEY=VALUE; may be given often.")] = NONE,
    training: Annotated[list[str], typer.Option("--train", help="A training setting of all cells, KEY=VALUE.")] = NONE,
    preset: Annotated[str, typer.Option(help="head, paper or tuned, as in train-head.")] = "head",
    precision: Annotated[
        Literal["auto", "float32", "mixed"],
        typer.Option(help="Of matrix products; mixed: bfloat16. auto: mixed where this machine has it."),
    ] = "auto",
    search: Annotated[
        Literal["all", "optuna"], typer.Option(help="Train all cells to the end, or the better ones (successive halving).")
    ] = "all",
    workers: Annotated[int, typer.Option(min=-1, help="Processes; -1: one per core, 0: this one does everything.")] = -1,
    scheduler: Scheduler = "local",
    strategy: Annotated[
        Literal["auto", "processes", "stacked"],
        typer.Option(
            help="processes: train every cell alone. stacked: train cells of one structure, which differ in numbers such as T, "
            "t, gamma or lr, as one model. auto: stacked where there are GPUs."
        ),
    ] = "auto",
    lanes: Annotated[int, typer.Option(min=0, help="Cells of one model at most, when stacked; 0: as memory allows.")] = 0,
    no_test: Annotated[bool, typer.Option("--no-test", help="Do not evaluate the winner on the test split.")] = False,
    image: Annotated[str, typer.Option(help="Cache of the image features; default: the dataset's image encoder.")] = "",
    text: Annotated[str, typer.Option(help="Cache of the text features; default: the dataset's text encoder.")] = "",
    aggregate: Annotated[
        Literal["", "mean", "first", "random"], typer.Option(help="How several texts of a sample become one vector.")
    ] = "",
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Train all combinations of some settings, rank them on validation, and test the winner; finished runs are not repeated."""
    from pipeline.report import write_grid_page
    from pipeline.studies.grid import plan_grid, read_axes
    from pipeline.studies.search import sweep

    planned = plan_grid(
        home,
        dataset,
        method,
        read_axes(method, fields, grid_file),
        parse_integers(seeds, "--seeds"),
        preset=preset,
        settings=assignments(settings),
        training=assignments(training),
        points=points,
        precision=precision,
        search=search,
        image=image,
        text=text,
        aggregate=aggregate,
    )
    swept = sweep(planned, scheduler, workers, read_test=not no_test, strategy=strategy, lanes=lanes)
    _print(swept, write_grid_page(swept.folder), as_json)
    if swept.failed:
        run, reason = next(iter(swept.failed.items()))
        total = len(planned.heads)
        raise ValueError(f"{len(swept.failed)} of {total} runs failed, the first is {run}: {reason}")


def _print(swept: Swept, page: Path, as_json: bool) -> None:
    """The ranking, the winner and where everything is."""
    if as_json:
        cells = swept.ranking.astype(object).where(swept.ranking.notna(), None).to_dict(orient="records")
        show({"grid": str(swept.folder), "page": str(page), "winner": swept.winner, "cells": cells}, as_json)
        return
    fields = {field: str for field in swept.axes}  # a learning rate of 1e-6 is not to be rounded
    show_table(swept.ranking.astype(fields).round(3), as_json)
    if swept.winner:
        point = " ".join(f"{field}={value}" for field, value in swept.winner["cell"].items())
        print(f"winner: {point}")
        print(f"val:    {_spread(swept.winner['val'])}")
        print(f"test:   {_spread(swept.winner['test']) or 'not read'}")
    print(f"files:  {swept.folder}")
    print(f"page:   {page}")


def _spread(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Means, with their deviations where there are several seeds."""
    from pipeline.evaluation.statistics import format_seeds

    return ", ".join(f"{name} {format_seeds(value['values'])}" for name, value in metrics.items())
