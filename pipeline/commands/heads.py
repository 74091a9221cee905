"""The commands of stage 2: `train-head`, `evaluate`, `methods`. They import the modules that they use when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.commands.options import (
    DEFAULT_HOME,
    NO_PAIRS,
    AsJson,
    Home,
    SettingOptions,
    describe_plugin,
    parse_assignments,
    parse_integers,
    show,
    show_table,
    to_frame,
)

if TYPE_CHECKING:
    from pipeline.types import Split


def train_head(
    method: Annotated[str, typer.Option(help="Name of a method; `diffalign methods` lists them.")],
    dataset: Annotated[str, typer.Option(help="Name of a prepared and extracted dataset.")] = "openmoji",
    settings: SettingOptions = NO_PAIRS,
    training: Annotated[
        list[str], typer.Option("--train", help="A training setting, KEY=VALUE, e.g. lr=1e-3, epochs=20.")
    ] = NO_PAIRS,
    preset: Annotated[
        str, typer.Option(help="head (lr 1e-3), paper (lr 1e-4), or tuned (the dataset's, chosen on validation).")
    ] = "head",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0",
    image: Annotated[str, typer.Option(help="Cache of the image features; default: the dataset's image encoder.")] = "",
    text: Annotated[str, typer.Option(help="Cache of the text features; default: the dataset's text encoder.")] = "",
    aggregate: Annotated[
        Literal["", "mean", "first", "random"],
        typer.Option(help="How several texts of a sample become one vector; random: another one each epoch."),
    ] = "",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Stage 2: train a head on cached features and score it on validation; finished runs are not repeated."""
    from pipeline.evaluation.evaluate import evaluate as run_evaluate
    from pipeline.training.features import cache_names, open_features
    from pipeline.training.heads import plan_head_on, resolve_head_settings
    from pipeline.training.heads import train_head as run_train_head

    config, train_config = resolve_head_settings(
        dataset, method, preset, parse_assignments(settings), parse_assignments(training)
    )
    chosen = parse_integers(seeds, "--seeds")
    features = open_features(home, dataset, method, cache_names(dataset, image, text), aggregate)
    results = []
    for seed in chosen:
        run = run_train_head(plan_head_on(features, method, config, train_config, seed), progress=True)
        results.append({"run": str(run.path), "split": "val", **run_evaluate(home, run, "val", {})["metrics"]})
    show_table(to_frame(results), as_json)


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, …/seed<k>, or the folder of all its seeds.")],
    split: Annotated[str, typer.Option(help="train, val or test; every read of test is logged in the run.")] = "val",
    settings: SettingOptions = NO_PAIRS,
    sampler_curve: Annotated[
        bool, typer.Option("--sampler-curve", help="Metrics and time against the steps and draws of a method that samples.")
    ] = False,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Metrics of finished runs on a split, from image features alone; --set changes settings of prediction (draws=8)."""
    from pipeline.evaluation.evaluate import evaluate as run_evaluate
    from pipeline.runtime.runs import RunFolder
    from pipeline.types import SPLITS

    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
    folders = [run] if (run / "config.json").is_file() else sorted(run.glob("seed*")) or [run]
    if sampler_curve:
        _print_sampler_curves(home, folders, split, parse_assignments(settings), as_json)
        return
    results = []
    for folder in folders:
        record = run_evaluate(home, RunFolder.at(folder), split, parse_assignments(settings))
        results.append({"run": str(folder), "split": split, "n": record["n"], **record["metrics"]})
    show_table(to_frame(results), as_json)


def _print_sampler_curves(home: Path, folders: list[Path], split: Split, settings: dict[str, str], as_json: bool) -> None:
    """Write the sampler curve of every run, and print the points and the paths of the files."""
    from pipeline.runtime.runs import RunFolder
    from pipeline.studies.sampler_curve import write_sampler_curve

    curves = [write_sampler_curve(home, RunFolder.at(folder), split, settings) for folder in folders]
    if as_json:
        described = [
            {"run": str(curve.run), "split": split, "table": str(curve.table), "picture": str(curve.picture)}
            | {"points": curve.rows.to_dict(orient="records")}
            for curve in curves
        ]
        show({"curves": described}, as_json)
        return
    for curve in curves:
        show_table(curve.rows.round(3), as_json)
        print(f"files: {curve.table}, {curve.picture}")


def methods(name: Annotated[str, typer.Argument(help="A method, to see its settings.")] = "", as_json: AsJson = False) -> None:
    """The methods, or one method's settings, letters and grid."""
    show(describe_plugin("methods", name), as_json)
