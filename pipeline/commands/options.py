"""What commands share: common options, the parsing of their values, and the printing of results."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from pipeline.commands.signatures import accept_dataset_both_ways
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.logs import inert, set_up_logging
from pipeline.runtime.places import CACHES_VARIABLE, DEFAULT_HOME, HOME_VARIABLE, caches_at, check_local

if TYPE_CHECKING:
    import pandas as pd

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _check_home(home: Path) -> Path:
    """Return the value of the option, which is no address."""
    return check_local(home, "--home")


Home = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar=HOME_VARIABLE,
        callback=_check_home,
        help="Folder of manifests, caches, runs and reports, on a disk of this machine or a mounted one.",
    ),
]


def _check_scheduler(scheduler: str) -> str:
    """Return the value of the option; refuse at once what cannot be an address, because a connection fails after half a minute.

    Raises:
        UserError: the value is neither "local" nor an address.
    """
    if scheduler != "local" and not re.fullmatch(r"(tcp|tls|ucx|ws|wss)://[^\s/]+:\d+/?", scheduler):
        raise UserError(f"--scheduler takes local or tcp://host:port, not {scheduler!r}")
    return scheduler


Scheduler = Annotated[
    str,
    typer.Option(
        "--scheduler",
        callback=_check_scheduler,
        help="local, or the address of a dask scheduler, tcp://host:port; its workers see the same files, "
        "or the caches are in a bucket.",
    ),
]
_HEAD_HELP = (
    "A trained head: latest, a name or tag, the name of its folder or the beginning of that (diffalign runs ls), or a path; "
)
RUN_HELP = f"{_HEAD_HELP}all its seeds, or with /seed<k> at the end that one."
ONE_RUN_HELP = f"{_HEAD_HELP}with /seed<k> at the end, unless it has one seed alone."
Dataset = Annotated[str, typer.Argument(help="Name of a dataset; `diffalign datasets` lists them.")]
PreparedDataset = Annotated[str, typer.Option(help="Name of a prepared and extracted dataset.")]
SettingOptions = Annotated[list[str], typer.Option("--set", help="A setting, KEY=VALUE; may be given several times.")]
TrainingOptions = Annotated[list[str], typer.Option("--train", help="A training setting of all runs, KEY=VALUE.")]
Preset = Annotated[str, typer.Option(help="head, paper or tuned, as in train-head.")]
Seeds = Annotated[str, typer.Option(help="Comma-separated seeds.")]
VerdictSeeds = Annotated[str, typer.Option(help="Comma-separated seeds; a verdict takes five.")]
EvaluatedSplit = Annotated[Literal["val", "test"], typer.Option(help="Evaluated split; every read of test is logged.")]
Processes = Annotated[int, typer.Option(min=-1, help="Processes; -1: one per core, 0: only this process.")]
Encoders = Annotated[
    list[str], typer.Option("--encoder", help="Encoder to run; default: the dataset's. May be given several times.")
]
EncoderWeights = Annotated[str, typer.Option(help="Weights of the encoder: a file or folder, e.g. of the joint stage.")]
BatchSize = Annotated[
    int,
    typer.Option(
        min=0, help="Items per batch of a new cache; 0: 16, or up to 256 on a GPU, where a batch is halved until it fits."
    ),
]
ShardRows = Annotated[
    int,
    typer.Option(
        min=0, help="Rows per shard, the unit of commit and of distribution, a multiple of 512; 0: 8192, of clips 512."
    ),
]
StoredNumbers = Annotated[Literal["float16", "float32", "bfloat16"], typer.Option(help="Number format on disk.")]
ImageCache = Annotated[str, typer.Option(help="Cache of the image features; default: the dataset's image encoder.")]
TextCache = Annotated[str, typer.Option(help="Cache of the text features; default: the dataset's text encoder.")]
Text = Annotated[
    str,
    typer.Option(
        help="Cache of the text features; default: the dataset's text encoder. Or a control that training reads in place of "
        "the texts: shuffled-within, shuffled-across, noise or label; real: none; CACHE:CONTROL names both."
    ),
]
Log = Annotated[
    list[str],
    typer.Option(
        "--log",
        help="Beside history.csv, tell the epochs to: tensorboard (tensorboard --logdir HOME/runs), or a class of your own, "
        "FILE.py:CLASS, whose code is run (examples/trackers.py has W&B and MLflow). May be given several times.",
    ),
]
Caches = Annotated[
    str,
    typer.Option(
        "--caches",
        envvar=CACHES_VARIABLE,
        help="Where caches lie, if not in the home: an object store, s3://bucket/prefix (or gs://, az://), or a folder.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show more messages.")]
PluginFiles = Annotated[
    list[Path],
    typer.Option(
        "--plugin",
        help="A Python file with a method, an encoder or a dataset of your own; its code is run. May be given several times.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only warnings and results.")]
_COMMAND = re.compile(  # one that takes --home, up to the end of its arguments
    r"\bdiffalign (?:ablate|cache (?:import|ls)|doctor|evaluate|extract|fetch|grid|plan|prepare|report|train-head|tune)\b"
    r"(?!.*--home)[^;)`]*"
)
_CACHES_AT_START = os.environ.get(CACHES_VARIABLE, "")  # of the user, so that his next command has it, too
NO_PAIRS: list[str] = []  # the default of options that may be given several times


class CommandGroup(typer.Typer):
    """A group of commands; each also takes --verbose, --quiet and --plugin, and its dataset as argument or as --dataset."""

    def __init__(self, help: str, add_completion: bool = False) -> None:
        super().__init__(
            help=help,
            no_args_is_help=True,
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            add_completion=add_completion,
            context_settings={"help_option_names": ["-h", "--help"]},
        )

    def command(self, name: str | None = None, **options: Any) -> Callable[[CommandT], CommandT]:
        """Return a decorator that registers a function as a command; the function itself does not change."""
        register = super().command(name, **options)

        def decorate(function: CommandT) -> CommandT:
            register(_add_verbosity(accept_dataset_both_ways(function)))
            return function

        return decorate


def _add_verbosity(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with more arguments: --verbose and --quiet set the level of logging, --plugin loads files.

    One that takes a home also takes the place of its caches.
    """

    @wraps(function)
    def run(verbose: bool = False, quiet: bool = False, plugin: Sequence[Path] = (), caches: str = "", **arguments: Any) -> Any:
        set_up_logging(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
        for path in plugin:
            plugins.load_file(path)
        with caches_at(caches):
            try:
                return function(**arguments)
            except UserError as error:
                raise UserError(with_home(str(error), arguments.get("home", DEFAULT_HOME))) from error

    signature = inspect.signature(function, eval_str=True)
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    options = {"verbose": (Verbose, False), "quiet": (Quiet, False), "plugin": (PluginFiles, [])}
    options |= {"caches": (Caches, "")} if "home" in signature.parameters else {}
    added = [inspect.Parameter(name, keyword_only, default=value, annotation=hint) for name, (hint, value) in options.items()]
    parameters = [parameter.replace(kind=keyword_only) for parameter in signature.parameters.values()]
    setattr(run, "__signature__", signature.replace(parameters=[*parameters, *added]))  # noqa: B010 - no attribute for pyright
    return run


def with_home(text: str, home: Path) -> str:
    """Return a message whose commands work in a home: they get its --home, unless it is the default or in the environment.

    They also get the --caches of the command that runs.
    """
    is_known = home in (DEFAULT_HOME, Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME))
    caches = os.environ.get(CACHES_VARIABLE, "")
    options = "" if is_known else f" --home {shlex.quote(str(home))}"
    options += f" --caches {shlex.quote(caches)}" if caches not in ("", _CACHES_AT_START) else ""
    return _COMMAND.sub(lambda found: f"{found[0].rstrip()}{options}", text) if options else text


def show(value: Any, as_json: bool) -> None:
    """Print a result on stdout: as one JSON value, or as lines `key: value`."""
    if as_json:
        print(json.dumps(value, indent=1))
    else:
        print("\n".join(f"{key}: {item}" for key, item in value.items()))


def show_table(table: pd.DataFrame, as_json: bool) -> None:
    """Print a table on stdout, as text or with its rows as JSON; text stands at the left, numbers at the right."""
    if as_json:
        print(table.to_json(orient="records", indent=1))
        return
    shown = table.copy()
    for name in table.select_dtypes(exclude=["number", "bool"]):
        cells = [inert(str(cell)) for cell in table[name]]
        width = max(map(len, [str(name), *cells]))
        shown[name] = [cell.ljust(width) for cell in cells]
        shown = shown.rename(columns={name: str(name).ljust(width)})
    print(shown.to_string(index=False, na_rep="-"))


def show_runs(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print evaluations of runs, one row each, and under them the mean and deviation over the seeds of each head.

    The values of a row are texts and numbers; the numbers are metrics in percent, but for "n", the number of samples.
    """
    show_table(to_frame(rows), as_json)
    seeds_of: dict[Path, list[dict[str, Any]]] = {}
    for row in rows:
        seeds_of.setdefault(Path(row["run"]).parent, []).append(row)
    from pipeline.evaluation.statistics import format_seeds

    for folder, own in seeds_of.items() if not as_json else ():
        if len(own) > 1:
            metrics = [name for name, value in own[0].items() if isinstance(value, float)]
            means = ", ".join(f"{name} {format_seeds([row[name] for row in own])}" for name in metrics)
            print(f"{folder.name}, {len(own)} seeds, mean ± std: {means}")


def to_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return rows as a table, with numbers rounded to two decimals."""
    import pandas as pd

    return pd.DataFrame(rows).round(2)


def parse_integers(text: str, option: str) -> list[int]:
    """Return the numbers of a comma-separated list, without duplicates: [0, 1, 2] from "0,1,2".

    Args:
        text: The value of the option.
        option: The name of the option, for the error.

    Raises:
        UserError: the text has another form, or a number is 2^63 or larger.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and int(word) < 2**63 for word in words):
        raise UserError(f"{option} takes numbers such as 0,1,2, not {text!r}")
    return list(dict.fromkeys(int(word) for word in words))


def parse_numbers(text: str, option: str) -> list[float]:
    """Return the numbers of a comma-separated list, without duplicates: [0.25, 1.0] from "0.25,1".

    Args:
        text: The value of the option.
        option: The name of the option, for the error.

    Raises:
        UserError: the text has another form.
    """
    try:
        return list(dict.fromkeys(float(word) for word in text.split(",")))
    except ValueError:
        raise UserError(f"{option} takes numbers such as 0.25,0.5,1, not {text!r}") from None
