"""What commands share: the options of folders and of JSON, and how results are printed."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pipeline.runtime.logs import set_up_logging

if TYPE_CHECKING:
    import pandas as pd

Function = TypeVar("Function", bound=Callable[..., Any])
Home = Annotated[Path, typer.Option("--home", envvar="DIFFALIGN_HOME", help="Folder of manifests, caches, runs and reports.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _address(scheduler: str) -> str:
    """The option's value; `ValueError` for what cannot be an address, before half a minute is spent looking for it."""
    if scheduler != "local" and not re.fullmatch(r"(tcp|tls|ucx|ws|wss)://[^\s/]+:\d+/?", scheduler):
        raise ValueError(f"--scheduler takes local or tcp://host:port, not {scheduler!r}")
    return scheduler


Scheduler = Annotated[
    str,
    typer.Option(
        "--scheduler",
        callback=_address,
        help="local, or the address of a dask scheduler, tcp://host:port; its workers see the same files.",
    ),
]
Dataset = Annotated[str, typer.Argument(help="Name of a dataset; `diffalign datasets` lists them.")]
SettingOptions = Annotated[list[str], typer.Option("--set", help="A setting, KEY=VALUE; may be given often.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what is going on.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only warnings and results.")]
HOME = Path("artifacts")
NONE: list[str] = []


class CommandGroup(typer.Typer):
    """Commands that all take --verbose and --quiet."""

    def __init__(self, help: str) -> None:
        super().__init__(
            help=help, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
        )

    def command(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]:
        """Register a function as a command; the function itself is not changed."""
        register = super().command(name, **options)

        def decorate(function: Function) -> Function:
            register(_with_verbosity(function))
            return function

        return decorate


def _with_verbosity(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with two more arguments, which decide what is logged while it runs."""

    @wraps(function)
    def run(verbose: bool = False, quiet: bool = False, **arguments: Any) -> Any:
        set_up_logging(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
        return function(**arguments)

    signature = inspect.signature(function, eval_str=True)
    named = inspect.Parameter.KEYWORD_ONLY
    options = {"verbose": Verbose, "quiet": Quiet}
    added = [inspect.Parameter(name, named, default=False, annotation=hint) for name, hint in options.items()]
    parameters = [parameter.replace(kind=named) for parameter in signature.parameters.values()]
    setattr(run, "__signature__", signature.replace(parameters=[*parameters, *added]))  # noqa: B010 - no attribute for pyright
    return run


def show(value: Any, as_json: bool) -> None:
    """The result on stdout: one JSON value, or `key: value` lines."""
    if as_json:
        print(json.dumps(value, indent=1))
    else:
        print("\n".join(f"{key}: {item}" for key, item in value.items()))


def show_table(table: pd.DataFrame, as_json: bool) -> None:
    """A table on stdout, or its rows as JSON."""
    print(table.to_json(orient="records", indent=1) if as_json else table.to_string(index=False))


def to_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows).round(2)


def describe_plugin(kind: str, name: str) -> dict[str, Any]:
    """First lines of the plug-ins' documentation, or the settings of one."""
    from dataclasses import asdict

    from pipeline.runtime import plugins

    if not name:
        return {each: plugins.first_line(kind, each) for each in plugins.names(kind)}
    module = plugins.get(kind, name)
    described: dict[str, Any] = {"about": " ".join((module.__doc__ or "").split()), **asdict(module.Config())}
    if kind == "methods":
        described |= {"letters": dict(module.SYMBOLS), "grid": {key: list(values) for key, values in module.GRID.items()}}
    return described


def assignments(pairs: Iterable[str]) -> dict[str, str]:
    """{"lr": "1e-3"} from ["lr=1e-3"]; `ValueError` for a key that is given twice."""
    result: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"--set takes KEY=VALUE, not {pair!r}")
        if key in result:
            raise ValueError(f"{key!r} is given twice: {result[key]!r} and {value!r}")
        result[key] = value
    return result


def parse_integers(text: str, option: str) -> list[int]:
    """[0, 1, 2] from "0,1,2", each once; `ValueError` names the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) < 2**63 for part in parts):
        raise ValueError(f"{option} takes numbers such as 0,1,2, not {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))
