"""The command `report`. It imports the modules that it uses when it runs."""

from __future__ import annotations

from pathlib import Path
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
        command = f"diffalign evaluate {' '.join(best_heads(home, dataset))} --split test"
        print(with_home(f"nothing is evaluated on test yet; to read it for the best head of each method: {command}", home))
    else:
        show_table(format_results(results), as_json)
    show(files, as_json)


def best_heads(home: Path, dataset: str) -> list[str]:
    """Return the head of each method that is best on validation, "<dataset>/<folder>": of those on real texts and all data."""
    from pipeline.report.results import collect_results
    from pipeline.runtime.runs import REAL_TEXT

    heads = sorted(collect_results(home, dataset, "test").heads, key=lambda head: head.val_metric)
    plain = [
        head
        for head in heads
        if (head.config.text_control, head.config.train_fraction) == (REAL_TEXT, 1) and not head.config.is_continued
    ]
    best = {head.config.method: f"{dataset}/{head.runs[0].path.parent.name}" for head in plain or heads}
    return sorted(best.values())
