"""The command `diffalign tune`. It imports the modules that it uses when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.commands.checks import check_dataset, check_file, check_method, check_unused
from pipeline.commands.options import (
    DEFAULT_HOME,
    AsJson,
    Home,
    ImageCache,
    PreparedDataset,
    Processes,
    Scheduler,
    TextCache,
    parse_integers,
    show,
    show_table,
    with_home,
)
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_POINTS, DEFAULT_SEEDS = 12, "0"
SAME_SCORE = 0.005  # points; two scores that are printed with two decimals are the same


def tune(
    dataset: PreparedDataset = "openmoji",
    methods: Annotated[
        str, typer.Option(help="Comma-separated names of methods; `diffalign methods` lists them.")
    ] = "baseline,ema,cdr,marnet,seda",
    points: Annotated[
        int,
        typer.Option(
            min=1,
            help="Points for each method: its defaults, then random points of its space; more include fewer.",
        ),
    ] = DEFAULT_POINTS,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds; each point is trained with all of them.")] = DEFAULT_SEEDS,
    folds: Annotated[
        int,
        typer.Option(
            min=0,
            help="0: a point is scored on the validation split. K: on each of K folds of the training and validation samples, "
            "K times the work; for small validation splits. Groups of samples are not divided.",
        ),
    ] = 0,
    space: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with the values to try; default: data_manifests/spaces/heads.yaml, which says how it is written. A "
            "method without an entry gets the grid of its paper, lr, weight_decay, and dropout if it has it."
        ),
    ] = None,
    search: Annotated[
        Literal["all", "optuna"],
        typer.Option(
            help="all: random search, every point is trained to its end. optuna: successive halving, the better half goes on "
            "from rung to rung, on the first fold."
        ),
    ] = "all",
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Search nothing: train the tuned settings again with the code as it stands, in a scratch folder, and compare "
            "their scores with those that were recorded.",
        ),
    ] = False,
    workers: Processes = -1,
    scheduler: Scheduler = "local",
    image: ImageCache = "",
    text: TextCache = "",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Choose settings of methods on validation, with equal budgets: the same number of points, seeds and epochs for each.

    The epochs are those of train-head, with which --preset tuned trains: what is best after a few epochs often is not after all
    of them. To have less to do, take fewer --points, or --search optuna.

    The best settings become the home's own, HOME/tuned/DATASET.yaml, which --preset tuned reads before those that ship with the
    dataset; they are printed, too, in the form that data_manifests/DATASET.yaml holds. Every trial is listed in
    HOME/reports/DATASET/tune-….csv and .md, with the code that trained it. The test split is never read: read it once, with
    `diffalign evaluate --split test`, when all choices are made. The same command goes on after an interruption.
    """
    names = list(dict.fromkeys(name.strip() for name in methods.split(",")))
    for name in names:
        check_method(name)
    check_dataset(dataset, home)
    check_file(space, "--space")
    chosen_seeds = tuple(parse_integers(seeds, "--seeds"))

    from pipeline.studies import tune as study
    from pipeline.studies.tuning_space import DEFAULT_SPACE, read_space
    from pipeline.training.tuned import format_tuned

    if check:
        of_a_search = {
            "--points": points != DEFAULT_POINTS, "--seeds": seeds != DEFAULT_SEEDS, "--folds": folds > 0,
            "--space": space is not None, "--search": search != "all", "--scheduler": scheduler != "local",
            "--image": bool(image), "--text": bool(text),
        }  # fmt: skip
        check_unused(of_a_search, "belongs to a search, and --check repeats one as it was recorded: give one of them")
        table = study.reproduce_scores(home, dataset, names, workers)
        show_table(table, as_json)
        _check_scores(table)
        return
    budget = study.Budget(points=points, seeds=chosen_seeds, folds=folds, search=search)
    result = study.tune(
        home, dataset, names, read_space(space or DEFAULT_SPACE), budget,
        image=image, text=text, scheduler=scheduler, workers=workers,
    )  # fmt: skip
    files = {"tuned_file": str(result.tuned_file), "trials": str(result.trials)}
    if as_json:
        show({"tuned": result.entries, **files, "failed": result.failed}, as_json)
    else:
        print(format_tuned(result.entries), end="")
        print("".join(f"# {key}: {path}\n" for key, path in files.items()), end="")
        for name in [name for name in names if name in result.entries][:1]:
            print(with_home(f"# next: diffalign train-head --dataset {dataset} --method {name} --preset tuned", home))
    if result.failed:
        run, reason = next(each for each in result.failed.items() if each[0] in result.bugs or not result.bugs)
        message = f"{len(result.failed)} trials failed, the first is {run}: {reason}"
        if not result.bugs:
            raise UserError(message)
        print(f"diffalign: {message}; please report the bugs ({len(result.bugs)} of these trials)", file=sys.stderr)
        raise typer.Exit(1)


def _check_scores(table: pd.DataFrame) -> None:
    """Raise a `UserError` that names the methods whose score today is not the recorded one."""
    differs = ~((table["recorded"] - table["today"]).abs() < SAME_SCORE)
    if differs.any():
        changed = ", ".join(table["method"][differs])
        raise UserError(f"this code does not reproduce the recorded score of {changed}: tune again, or take that code back")
