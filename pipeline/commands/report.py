"""The command `report`. It imports the modules that it uses when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.checks import check_dataset
from pipeline.commands.options import DEFAULT_HOME, AsJson, Dataset, Home, show


def report(
    dataset: Dataset,
    across: Annotated[str, typer.Option(help="More datasets, a,b: adds a table of the methods over all of them.")] = "",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """One HTML page and one Markdown table of a dataset's runs on the test split."""
    others = [name.strip() for name in across.split(",") if name.strip()]
    for name in (dataset, *others):
        check_dataset(name, home)

    from pipeline.workspace import Workspace

    page, table = Workspace(home).report(dataset, across=others)
    show({"html": str(page), "markdown": str(table)}, as_json)
