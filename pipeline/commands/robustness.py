"""`diffalign evaluate --corrupt`: which corruptions were asked for, and the tables that are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.options import show, show_table
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.corruptions import Corruption
    from pipeline.report.corruption import Robustness
    from pipeline.runtime.runs import RunFolder
    from pipeline.types import Split


def is_corruption(home: Path, word: str) -> bool:
    """Whether a word after --corrupt is meant to name kinds of corruption: it does, or it is neither a path nor a head."""
    from pipeline.data.corruptions import CORRUPTION_LEVELS
    from pipeline.runtime.head_names import find_head

    if any(kind.strip() in CORRUPTION_LEVELS for kind in word.split(",")):
        return True
    if "/" in word or Path(word).exists():
        return False
    try:
        find_head(home, word)
    except UserError:
        return True
    return False


def choose_corruptions(words: Sequence[str], strengths: Sequence[int]) -> list[Corruption]:
    """Return the corruptions that were asked for.

    Args:
        words: Names of kinds, each word with one or several, as in "noise,blur"; none: all kinds.
        strengths: Their strengths.

    Raises:
        UserError: there is no such kind or strength.
    """
    from pipeline.data.corruptions import all_corruptions

    return all_corruptions([kind.strip() for word in words for kind in word.split(",")], strengths)


def print_robustness(
    home: Path,
    runs: Sequence[RunFolder],
    split: Split,
    corruptions: Sequence[Corruption],
    settings: Mapping[str, str],
    workers: int,
    as_json: bool,
) -> None:
    """Evaluate runs on corrupted copies, and print one table per head, one of all heads, and the paths of the files."""
    if not runs:
        raise UserError("which runs? Give folders of runs, …/seed<k>, or of all seeds of a head, beside --corrupt")

    from pipeline.extraction.extract import ExtractOptions
    from pipeline.report.corruption import compare_corrupted
    from pipeline.report.results import collect_results
    from pipeline.studies.corruption import evaluate_corrupted

    done = evaluate_corrupted(home, runs, split, corruptions, settings, ExtractOptions(workers=workers))
    wanted = {(each.run.path.parent.name, each.evaluation) for each in done}
    rows = []
    for dataset in dict.fromkeys(run.config().dataset for run in runs):
        found = compare_corrupted(collect_results(home, dataset, split))
        is_wanted = [(head.row.folder, head.row.evaluation_name) in wanted for head in found.heads]
        if any(is_wanted):  # the files of runs that lie outside of the home are all that there is of them
            rows += json.loads(found.summary[is_wanted].to_json(orient="records"))
            if not as_json:
                _print_tables(found, is_wanted, f"{dataset}, {split}")
    if as_json:
        files = [{"run": str(each.run.path), "table": str(each.table)} for each in done]
        show({"split": split, "runs": files, "heads": rows}, as_json)
    else:
        print("\n".join(f"file: {each.table}" for each in done))


def _print_tables(found: Robustness, is_wanted: Sequence[bool], where: str) -> None:
    from pipeline.report.corruption import format_robustness

    for head, table, wanted in zip(found.heads, found.tables, is_wanted, strict=True):
        if wanted:
            print(f"{head.row.label} on {where}, {head.metric} in percent:")
            show_table(table, False)
            print()
    print(f"mean over all corruptions, {where}:")
    show_table(format_robustness(found.summary[list(is_wanted)]), False)
