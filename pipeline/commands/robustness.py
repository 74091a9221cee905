"""`diffalign evaluate --corrupt`: which corruptions were asked for, and the tables that are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.options import show, show_table
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.corruptions import Corruption
    from pipeline.runtime.runs import RunFolder
    from pipeline.studies.corruption import CorruptedRun
    from pipeline.types import Split


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
    from pipeline.studies.corruption import evaluate_corrupted

    done = evaluate_corrupted(home, runs, split, corruptions, settings, ExtractOptions(workers=workers))
    if as_json:
        files = [{"run": str(each.run.path), "table": str(each.table)} for each in done]
        show({"split": split, "runs": files, "heads": _print_heads(home, done, split, False)}, as_json)
    else:
        _print_heads(home, done, split, True)
        print("\n".join(f"file: {each.table}" for each in done))


def _print_heads(home: Path, done: Sequence[CorruptedRun], split: Split, shown: bool) -> list[dict]:
    """Return the rows of `robustness_results` of these heads, and print them and the table of each if they are `shown`."""
    import json

    from pipeline.report import corruption as report
    from pipeline.report.results import collect_results

    wanted = {(each.run.path.parent.name, each.evaluation) for each in done}
    rows: list[dict] = []
    for dataset in dict.fromkeys(each.run.config().dataset for each in done):
        results = collect_results(home, dataset, split)
        heads = report.collect_corrupted(results)
        is_wanted = [(head.row.folder, head.row.evaluation_name) in wanted for head in heads]
        frame = report.robustness_results(heads, results)[is_wanted] if any(is_wanted) else None
        if frame is None:  # copies of runs that lie elsewhere
            continue
        rows += json.loads(frame.to_json(orient="records"))
        for head in [head for head, own in zip(heads, is_wanted, strict=True) if own and shown]:
            print(f"{head.row.label} on {dataset}, {split}, {head.metric} in percent:")
            baseline = report.find_corrupted_baseline(head, heads, results)
            show_table(report.head_table(head, baseline, results.groups), False)
            print()
        if shown:
            print(f"mean over all corruptions, {dataset}, {split}:")
            show_table(report.format_robustness(frame), False)
    return rows
