"""The command `report`. It imports the modules that it uses when it runs."""

from __future__ import annotations

from pipeline.commands.checks import check_dataset
from pipeline.commands.options import DEFAULT_HOME, AsJson, Dataset, Home, show


def report(dataset: Dataset, home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """One HTML page and one Markdown table of a dataset's runs on the test split."""
    check_dataset(dataset, home)

    from pipeline.workspace import Workspace

    page, table = Workspace(home).report(dataset)
    show({"html": str(page), "markdown": str(table)}, as_json)
