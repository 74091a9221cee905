"""The commands of stage 2: `train-head`, `evaluate`, `methods`. They import the modules that they use when they run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.commands.checks import (
    check_dataset,
    check_given_settings,
    check_method,
    check_method_settings,
    check_split,
    check_unused,
)
from pipeline.commands.options import (
    DEFAULT_HOME,
    NO_PAIRS,
    RUN_HELP,
    AsJson,
    Home,
    ImageCache,
    Log,
    PreparedDataset,
    Seeds,
    SettingOptions,
    Text,
    parse_integers,
    show,
    show_runs,
    show_table,
)
from pipeline.commands.plugin_table import show_plugin, show_settings
from pipeline.commands.robustness import choose_corruptions, is_corruption, print_robustness
from pipeline.runtime.assignments import parse_assignments
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from pipeline.runtime.runs import RunFolder
    from pipeline.types import Split

logger = logging.getLogger(__name__)

ALL_STRENGTHS = "1,2,3,4,5"


def train_head(
    method: Annotated[str, typer.Option(help="Name of a method; `diffalign methods` lists them.")],
    dataset: PreparedDataset = "openmoji",
    settings: SettingOptions = NO_PAIRS,
    training: Annotated[
        list[str],
        typer.Option("--train", help="A training setting, KEY=VALUE, e.g. lr=1e-3; `diffalign methods --training` lists them."),
    ] = NO_PAIRS,
    preset: Annotated[
        str,
        typer.Option(
            help="head (lr 1e-3), paper (lr 1e-4, the paper's settings), or tuned (of `diffalign tune`, else the dataset's)."
        ),
    ] = "head",
    seeds: Seeds = "0",
    image: ImageCache = "",
    text: Text = "",
    aggregate: Annotated[
        Literal["", "mean", "first", "random"],
        typer.Option(help="How several texts of a sample become one vector; random: another one each epoch."),
    ] = "",
    fraction: Annotated[
        float, typer.Option(help="Share of each class of the training split to train on, above 0 and at most 1.")
    ] = 1.0,
    name: Annotated[
        str,
        typer.Option(help="A name for the head, which commands take in place of its folder; `diffalign runs tag` gives more."),
    ] = "",
    log: Log = NO_PAIRS,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Stage 2: train a head on cached features and score it on validation; finished runs are not repeated."""
    from pipeline.training.config import TrainConfig

    check_method(method, preset)
    check_dataset(dataset, home)
    chosen, given, given_training = (
        parse_integers(seeds, "--seeds"),
        parse_assignments(settings),
        parse_assignments(training, "--train"),
    )
    check_given_settings(TrainConfig, given_training)
    check_method_settings(method, given)

    from pipeline.workspace import Workspace

    caches: dict[str, Any] = {"image": image, "text": text, "aggregate": aggregate, "fraction": fraction}
    runs = Workspace(home).train_heads(
        dataset, method, seeds=chosen, preset=preset, train=given_training, name=name, log=log, **caches, settings=given
    )
    show_runs([{"run": str(run.path), "split": "val", **run.evaluate("val")} for run in runs], as_json)


def evaluate(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help=f"{RUN_HELP} May be given several times.")],
    split: Annotated[
        str,
        typer.Option(help="train, val or test; every read of test is logged in the run. Default: val; with --corrupt test."),
    ] = "",
    settings: SettingOptions = NO_PAIRS,
    sampler_curve: Annotated[
        bool, typer.Option("--sampler-curve", help="Metrics and time against the steps and draws of a method that samples.")
    ] = False,
    points: Annotated[
        str,
        typer.Option(
            help="Points of --sampler-curve: all, or a list of S, SxK and ancestral (1,5,20x8,ancestral). Default: those of "
            "few steps, and the ancestral chain with one draw."
        ),
    ] = "",
    corrupt: Annotated[
        bool,
        typer.Option(
            "--corrupt",
            help="Metrics on corrupted copies of the pictures: of all kinds, or of those that are named after it, some of "
            "noise, blur, brightness, contrast, jpeg, occlusion (--corrupt noise,blur). See docs/robustness.md.",
        ),
    ] = False,
    strengths: Annotated[str, typer.Option(help="Strengths of --corrupt, some of 1 to 5.")] = ALL_STRENGTHS,
    workers: Annotated[
        int, typer.Option(min=-1, help="Processes of --corrupt that read pictures; -1: one per core, 0: only this process.")
    ] = -1,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Metrics of finished runs on a split, from image features alone; --set changes settings of prediction (draws=8)."""
    from pipeline.runtime.head_names import find_head_runs

    if not sampler_curve:
        check_unused({"--points": bool(points)}, "belongs to --sampler-curve: give that too, or leave it out")
    chosen, given = check_split(split or ("test" if corrupt else "val")), parse_assignments(settings)
    if corrupt:
        if sampler_curve:
            raise UserError("--corrupt and --sampler-curve are two questions: ask one at a time")
        kinds = [word for word in runs if is_corruption(home, word)]  # the others are runs
        folders = [run for word in runs if word not in kinds for run in find_head_runs(home, word)]
        asked = choose_corruptions(kinds, parse_integers(strengths, "--strengths"))
        print_robustness(home, folders, chosen, asked, given, workers, as_json)
        return
    given_besides = {"--strengths": strengths != ALL_STRENGTHS, "--workers": workers != -1}
    check_unused(given_besides, "belongs to --corrupt: give that too, or leave it out")
    folders = [run for word in runs for run in find_head_runs(home, word)]
    if sampler_curve:
        _print_sampler_curves(home, folders, chosen, given, points, as_json)
        return

    from pipeline.evaluation.evaluate import evaluate as run_evaluate
    from pipeline.report.results import name_head

    results = []
    left_out: set[str] = set()  # one warning for all runs that leave out as many samples
    for run in folders:
        record = run_evaluate(home, run, chosen, given)
        facts = {"run": str(run.path), "method": name_head(home, run.config()), "split": chosen, "n": record["n"]}
        results.append({**facts, **record["metrics"]})
        if excluded := record.get("excluded", 0):
            total = record["n"] + excluded
            left_out.add(f"{record['dataset']}, {chosen}: {excluded} of {total} samples without an image feature are left out")
    for warning in sorted(left_out):
        logger.warning(warning)
    show_runs(results, as_json)


def _print_sampler_curves(
    home: Path, runs: list[RunFolder], split: Split, settings: dict[str, str], points: str, as_json: bool
) -> None:
    """Write the sampler curve of every run, and print the points and the paths of the files."""
    from pipeline.studies.sampler_curve import write_sampler_curve

    curves = [write_sampler_curve(home, run, split, settings, points=points) for run in runs]
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


def methods(
    name: Annotated[str, typer.Argument(help="A method, to see its settings.")] = "",
    training: Annotated[bool, typer.Option("--training", help="Show the settings of training instead, for --train.")] = False,
    as_json: AsJson = False,
) -> None:
    """The methods, or one method's settings, letters and grid; --training: the settings of training, which all share."""
    if training:
        from pipeline.training.config import TrainConfig

        if name:
            raise UserError(f"--training shows the settings that all methods share: leave out {name!r}")
        show_settings(TrainConfig, as_json)
    else:
        show_plugin("methods", name, as_json)
