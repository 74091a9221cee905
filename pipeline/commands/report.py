"""The command `report`. It imports the modules that it uses when it runs."""

from __future__ import annotations

from pipeline.commands.options import DEFAULT_HOME, AsJson, Dataset, Home, show


def report(dataset: Dataset, home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """One HTML page and one Markdown table of a dataset's runs on the test split."""
    from pipeline.report import write_report

    page, table = write_report(home, dataset)
    show({"html": str(page), "markdown": str(table)}, as_json)
