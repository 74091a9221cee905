"""The commands of `diffalign runs`, and `diffalign compare`. They import the modules that they use when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.checks import check_reported_dataset
from pipeline.commands.options import DEFAULT_HOME, AsJson, CommandGroup, EvaluatedSplit, Home, show, show_table
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.runtime.head_names import HeadFolder
    from pipeline.studies.head_comparison import HeadComparison

runs_commands = CommandGroup("List, show, name and remove trained heads.")

Head = Annotated[
    str,
    typer.Argument(
        metavar="HEAD",
        help="A trained head: latest, a name or tag, the name of its folder or the beginning of that (diffalign runs ls), or a "
        "path; DATASET/HEAD where several datasets have one.",
    ),
]


@runs_commands.command()
def ls(
    dataset: Annotated[str, typer.Argument(help="Only the heads of this dataset.")] = "",
    tag: Annotated[str, typer.Option(help="Only the heads that have this tag.")] = "",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """All trained heads, the latest first: tags, seeds, metrics on validation and, where it was read, on test.

    `differs` has the settings in which the heads of one method and dataset that are listed differ from each other.
    """
    from pipeline.report.head_facts import describe_heads
    from pipeline.runtime.head_names import list_heads

    if dataset:
        check_reported_dataset(dataset, home)
    heads = [head for head in list_heads(home, dataset) if tag in ("", *head.tags)]
    rows = describe_heads(sorted(heads, key=lambda head: -head.finished))
    if as_json:
        show(rows, as_json)
    elif not rows:
        print(f"no heads in {home}" + (f" with the tag {tag!r}" if tag else "; train one with: diffalign train-head"))
    else:
        import pandas as pd

        joined = [{**row, "tags": ", ".join(row["tags"])} for row in rows]
        show_table(pd.DataFrame(joined).drop(columns=["path", "metric"]), as_json)


@runs_commands.command(name="show")
def show_head(head: Head, home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """What a head is: its settings, first those that are no defaults, its features, and all its evaluations."""
    from dataclasses import asdict

    from pipeline.report.head_facts import explain_head
    from pipeline.runtime.head_names import HeadFolder, find_head_runs
    from pipeline.training.config import TrainConfig

    facts = explain_head(HeadFolder(find_head_runs(home, head)[0].path.parent), asdict(TrainConfig()))
    if as_json:
        show(facts, as_json)
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:" + ("" if value else " -"))
            for name, item in value.items():
                print(f"  {name}: {item}")
        else:
            print(f"{key}: {', '.join(map(str, value)) or '-' if isinstance(value, list) else value}")


@runs_commands.command()
def rm(
    heads: Annotated[list[str], typer.Argument(metavar="HEAD", help="Heads, or single runs HEAD/seed<k>, as in runs show.")],
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove them; without this option, only show what would be removed.")
    ] = False,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Remove trained heads, or single seeds of them. Caches stay. --yes takes no beginning of a name: say the whole name."""
    from pipeline.runtime.files import read_lines
    from pipeline.runtime.head_names import HeadFolder, find_head_runs, is_whole_name
    from pipeline.runtime.runs import TEST_READS, check_removable, disk_usage, remove_runs

    found = {head: find_head_runs(home, head) for head in heads}
    for head, (first, *_) in found.items():
        if yes and not is_whole_name(head, first):
            name = HeadFolder(first.path.parent).full_name
            raise UserError(f"{head} is the beginning of a name, too little to remove anything: say the whole name, {name}")
    chosen = list(dict.fromkeys(run.path for runs in found.values() for run in runs))
    for path in chosen:
        check_removable(home, path)
    size, reads = disk_usage(chosen), sum(len(read_lines(path / TEST_READS)) for path in chosen)
    if yes:
        remove_runs(home, chosen)
    if as_json:
        show({"runs": [str(path) for path in chosen], "bytes": size, "removed": yes, "test_reads": reads}, as_json)
        return
    for path in chosen:
        print(path)
    what = f"{len(chosen)} run{'' if len(chosen) == 1 else 's'}, {size / 2**20:.1f} MiB"
    if reads:
        what += f" (they read the test split {reads} times, which stays on record)"
    print(f"removed {what}" if yes else f"would remove {what}; to do it, say --yes")


@runs_commands.command()
def tag(
    head: Head,
    tags: Annotated[list[str], typer.Argument(metavar="TAG", help="Words of letters, digits and . _ + -")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the tags away instead.")] = False,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Give a head tags; a tag that no other head has can be used in place of its name."""
    from pipeline.runtime.head_names import HeadFolder, find_head_runs

    found = HeadFolder(find_head_runs(home, head)[0].path.parent)
    now = found.change_tags(remove=tags) if remove else found.change_tags(add=tags)
    show({"head": found.full_name, "tags": list(now) if as_json else ", ".join(now) or "-"}, as_json)


def compare(
    heads: Annotated[
        list[str], typer.Argument(metavar="HEAD", help="Two heads or more, as in runs show: the first with each of the others.")
    ],
    split: EvaluatedSplit = "val",
    top: Annotated[int, typer.Option(min=1, help="Classes and samples to list for each pair.")] = 10,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """What differs between heads: settings, metrics with paired intervals, classes, and the samples that changed."""
    if len(heads) < 2:
        raise UserError("a comparison takes at least two heads: `diffalign compare A B`; `diffalign runs ls` shows them")
    found = [_whole_head(home, word) for word in heads]
    datasets = sorted({head.dataset for head in found})
    if len(datasets) > 1:
        raise UserError(f"heads of one dataset can be compared, and these are of {' and '.join(datasets)}")

    from pipeline.studies.head_comparison import compare_heads

    comparison = compare_heads(home, found, split)
    if as_json:
        show(comparison.as_json(), as_json)
    else:
        _print_comparison(comparison, top)


def _whole_head(home: Path, word: str) -> HeadFolder:
    """Return the head that a word means; a path to it or to one of its seeds is taken, too."""
    from pipeline.runtime.head_names import HeadFolder, find_head, find_head_runs
    from pipeline.runtime.runs import SEED_FOLDER

    head, _, last = word.rpartition("/")
    if head and SEED_FOLDER.fullmatch(last) and not Path(word).is_dir():
        find_head_runs(home, word)  # what is misspelt is said first
        raise UserError(f"compare takes whole heads, with all their seeds: say {head}")
    return HeadFolder(find_head_runs(home, word)[0].path.parent) if Path(word).is_dir() else find_head(home, word)


def _print_comparison(comparison: HeadComparison, top: int) -> None:
    """Print a comparison as tables, each under one line that says what it is."""
    names = comparison.letters
    for letter, head in names.items():
        tags = f" ({', '.join(head.tags)})" if head.tags else ""
        print(f"{letter} = {head.full_name}{tags}, {len(head.runs)} seeds")
    print(f"\nOn {comparison.split}, {comparison.num_samples} samples. What differs in their settings:")
    _print_table(comparison.settings.rename(columns=dict(enumerate(names))), "nothing but their features' values")
    print("\nMetrics in percent; the difference in points with its 95 % interval (three seeds) and verdict (five seeds):")
    _print_table(
        comparison.metrics.round({"p_holm": 4}).round(dict.fromkeys(("a_mean", "b_mean", "difference", "low", "high"), 2))
    )
    for pair in comparison.pairs:
        a, b = pair.letters
        named = {"a": a, "b": b, "a_right": f"{a} right", "b_right": f"{b} right", "difference": f"{a} - {b}"}
        changed = pair.samples.assign(right=pair.samples["right"].map({"a": a, "b": b}))
        counts = changed["right"].value_counts()
        print(f"\n{a} and {b}, {pair.class_metric} of the classes that change most ({len(pair.classes)} classes in all):")
        _print_table(pair.classes.head(top).round(2).rename(columns=named))
        print(f"\n{counts.get(a, 0)} samples are right with {a} alone, {counts.get(b, 0)} with {b} alone (share of seeds):")
        _print_table(changed.head(top).round(2).rename(columns=named), "none")


def _print_table(table: pd.DataFrame, empty: str = "") -> None:
    if table.empty:
        print(empty)
    else:
        show_table(table, False)
