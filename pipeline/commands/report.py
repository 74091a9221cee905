"""The command `report`. It imports the modules that it uses when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.checks import check_reported_dataset
from pipeline.commands.options import DEFAULT_HOME, AsJson, Dataset, Home, show, show_table, with_home


def report(
    dataset: Dataset,
    across: Annotated[str, typer.Option(help="More datasets, a,b: adds a table of the methods over all of them.")] = "",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """One HTML page and one Markdown table of a dataset's runs on the test split, and their numbers: mean ± std over seeds."""
    others = [name.strip() for name in across.split(",") if name.strip()]
    for name in (dataset, *others):
        check_reported_dataset(name, home)

    from pipeline.report.comparison import format_results
    from pipeline.report.document import read_results
    from pipeline.workspace import Workspace

    page, table = Workspace(home).report(dataset, across=others)
    files, results = {"html": str(page), "markdown": str(table)}, read_results(page)
    if as_json:
        rows = results.astype(object).where(results.notna(), None).to_dict(orient="records")
        show({**files, "results": rows}, as_json)
        return
    if results.empty:
        command = f"diffalign evaluate {home / 'runs' / dataset / '*'} --split test"
        print(with_home(f"nothing is evaluated on test yet; to read it for all runs: {command}", home))
    else:
        show_table(format_results(results), as_json)
    show(files, as_json)
