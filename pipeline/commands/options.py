"""What commands share: the options of folders and of JSON, and how results are printed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

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
Settings = Annotated[list[str], typer.Option("--set", help="A setting, KEY=VALUE; may be given often.")]
HOME = Path("artifacts")
NONE: list[str] = []


def show(value: Any, as_json: bool) -> None:
    """The result on stdout: one JSON value, or `key: value` lines."""
    if as_json:
        print(json.dumps(value, indent=1))
    else:
        print("\n".join(f"{key}: {item}" for key, item in value.items()))


def show_table(table: pd.DataFrame, as_json: bool) -> None:
    """A table on stdout, or its rows as JSON."""
    print(table.to_json(orient="records", indent=1) if as_json else table.to_string(index=False))


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows).round(2)


def describe(kind: str, name: str) -> dict[str, Any]:
    """First lines of the plug-ins' documentation, or the settings of one."""
    from dataclasses import asdict

    from pipeline.runtime import plugins

    if not name:
        return {each: plugins.summary(kind, each) for each in plugins.names(kind)}
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


def numbers(text: str, option: str) -> list[int]:
    """[0, 1, 2] from "0,1,2", each once; `ValueError` names the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) < 2**63 for part in parts):
        raise ValueError(f"{option} takes numbers such as 0,1,2, not {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))
