"""The command `diffalign reproduce`. It imports the modules that it uses when it runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.checks import check_dataset, check_given_settings, check_unused
from pipeline.commands.options import (
    DEFAULT_HOME,
    NO_PAIRS,
    AsJson,
    EvaluatedSplit,
    Home,
    ImageCache,
    PreparedDataset,
    Processes,
    Scheduler,
    TextCache,
    TrainingOptions,
    VerdictSeeds,
    parse_integers,
    show,
    show_table,
)
from pipeline.runtime.assignments import parse_assignments
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from pipeline.studies import reproduce as study

PRESETS = ("head", "paper", "tuned")


def reproduce(
    artefact: Annotated[
        str, typer.Argument(help="A table or figure of the papers; --list names them. Or a YAML file of your own.")
    ] = "",
    dataset: PreparedDataset = "openmoji",
    list_artefacts: Annotated[bool, typer.Option("--list", help="List the tables and figures, and exit.")] = False,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Say what it costs and which rows cannot be had, and exit.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A trial: two seeds and two epochs, in files of their own (…-quick); its numbers say nothing."
        ),
    ] = False,
    seeds: VerdictSeeds = "0,1,2,3,4",
    preset: Annotated[
        str,
        typer.Option(
            help="head, paper or tuned, of all methods. Default: tuned for methods that have such settings, else head."
        ),
    ] = "",
    training: TrainingOptions = NO_PAIRS,
    joint_training: Annotated[
        list[str], typer.Option("--joint-train", help="A setting of joint training, KEY=VALUE, such as epochs=3.")
    ] = NO_PAIRS,
    backbones: Annotated[
        list[str],
        typer.Option(
            "--backbone",
            metavar="NAME=WEIGHTS|CACHE|ENCODER[,KEY=VALUE…]",
            help="The image encoder for a backbone of the paper: a file of its weights, or pretrained; a cache of this "
            "dataset; or another encoder with its settings, such as resnet50=timm,model=resnet50d. Rows whose backbone is not "
            "named are left out. It is tuned with a baseline first, for every seed. May be given several times.",
        ),
    ] = NO_PAIRS,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="Do not tune the backbones; read their features as they are.")
    ] = False,
    split: EvaluatedSplit = "test",
    workers: Processes = -1,
    scheduler: Scheduler = "local",
    image: ImageCache = "",
    text: TextCache = "",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """A table or figure of the papers, with your own runs beside the paper's numbers; nothing is trained twice.

    The files are HOME/reports/DATASET/ARTEFACT.md, .tex and .csv; of figures SVG and PDF. The same command goes on after an
    interruption.
    """
    from pipeline.data.artefacts import artefact_names, read_artefact

    if list_artefacts:
        titles = {name: read_artefact(name).title for name in artefact_names()}
        show(titles, as_json)
        return
    if not artefact:
        raise UserError(f"which table or figure? choose one of: {', '.join(artefact_names())}")
    chosen = read_artefact(artefact)
    check_dataset(dataset, home)
    if preset and preset not in PRESETS:
        raise unknown_choice(preset, f"unknown preset {preset!r}", PRESETS)
    chosen_seeds = tuple(parse_integers(seeds, "--seeds"))
    given, given_joint = parse_assignments(training, "--train"), parse_assignments(joint_training, "--joint-train")
    places = parse_assignments(backbones, "--backbone")
    check_unused({"--frozen": frozen and not places}, "keeps backbones as they are: name one, --backbone, or leave it out")
    is_joint = any(row.unfreeze for row in chosen.rows) or (places and not frozen)
    check_unused({"--joint-train": bool(given_joint) and not is_joint}, f"changes nothing: no encoder is trained in {artefact}")

    from pipeline.training.config import TrainConfig

    check_given_settings(TrainConfig, given)
    check_given_settings(TrainConfig, given_joint)

    from pipeline.studies import reproduce as study

    options = study.ReproduceOptions(
        seeds=chosen_seeds, preset=preset, training=given, joint_training=given_joint, image=image, text=text,
        backbones=places, tunes_backbones=not frozen, split=split, workers=workers, scheduler=scheduler,
    )  # fmt: skip
    if quick:
        options = study.quick_options(options)
    result = study.reproduce(home, dataset, chosen, options, study.QUICK_SUFFIX if quick else "", only_plan)
    files = [str(path) for path in result.files]
    if as_json:
        rows = result.numbers.astype(object).where(result.numbers.notna(), None).to_dict(orient="records")
        show({"files": files, "rows": rows, "failed": dict(result.failed)}, as_json)
    else:
        if len(result.table):
            show_table(result.table, as_json)
        print("".join(f"file: {path}\n" for path in files), end="")
    _report_failures(result)


def _report_failures(result: study.Reproduction) -> None:
    """Raise a `UserError` if runs failed; exit with 1 after a bug."""
    if result.bugs:
        message = f"{len(result.bugs)} runs failed by a bug, please report it; the first is {min(result.bugs)}"
        print(f"diffalign: {message}", file=sys.stderr)
        raise typer.Exit(1)
    if result.failed:
        run, reason = next(iter(result.failed.items()))
        raise UserError(f"{len(result.failed)} runs failed, the first is {run}: {reason}")
