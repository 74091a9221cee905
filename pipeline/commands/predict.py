"""`diffalign predict`: classify new pictures or clips with a trained run."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.checks import check_split
from pipeline.commands.options import DEFAULT_HOME, ONE_RUN_HELP, AsJson, Home, Processes
from pipeline.runtime.errors import UserError
from pipeline.runtime.logs import inert

if TYPE_CHECKING:
    from pipeline.evaluation.classify import ClassifiedRows, Classifier

logger = logging.getLogger(__name__)

STANDARD_INPUT = "-"  # in place of a path: a list of paths, one on each line or, of `find -print0`, between zero bytes
MOST_FILE_WIDTH = 60  # characters of a name in the table
Write = Callable[[Sequence[Mapping[str, Any]]], None]


def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help=f"{ONE_RUN_HELP} A folder may be a copy, without its home.")],
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH…", help="Pictures or clips: files, folders, patterns such as 'photos/**/*.jpg'; -: a list on stdin."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File of the results, .csv, .jsonl or .parquet. Default: a table on the screen.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Most probable classes that are told of each picture.")] = 5,
    cache: Annotated[
        str, typer.Option(help="Classify the samples of a feature cache instead: its folder, DATASET/NAME or name.")
    ] = "",
    split: Annotated[str, typer.Option(help="With --cache: train, val or test; default: all samples.")] = "",
    workers: Processes = -1,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Classify pictures or clips, or the samples of a cache, with calibrated probabilities; what cannot be read is listed."""
    from pipeline.evaluation.prediction_files import check_suffix, open_prediction_file, prediction_columns, prediction_rows
    from pipeline.runtime.head_names import find_run

    folder = find_run(home, run)
    if out:
        check_suffix(out)
    if bool(paths) == bool(cache):
        raise UserError("give the pictures to classify, or --cache NAME, and not both")
    if split and not cache:
        raise UserError("--split is one of a --cache")

    from pipeline.evaluation.classify import Classifier

    chosen = check_split(split) if split else None
    named = list(_read_paths(paths or []))
    classifier = Classifier.of(folder, home)
    if cache:
        from pipeline.evaluation.classify import find_any_cache

        found = find_any_cache(home, cache, classifier.spec)
        results, width = classifier.classify_cache(found, home, chosen), max(map(len, found.ids))
    else:
        from pipeline.data.media_files import find_media

        files = find_media(named)
        results, width = classifier.classify_files(files, workers), max(map(len, files))
    class_names = classifier.spec.class_names
    columns = prediction_columns("sample_id" if cache else "file", len(class_names), top)
    kept: list[Mapping[str, Any]] = []
    counts = _Counts()
    with ExitStack() as stack:
        if out:
            write: Write = stack.enter_context(open_prediction_file(out, columns))
        else:
            write = kept.extend if as_json else _table_writer(columns, class_names, width)
        for classified in results:
            write(prediction_rows(classified, class_names, columns))
            counts.add(classified)
    if as_json:
        about = {"run": str(folder.path), "calibration": classifier.calibration.describe(), **counts.facts()}
        print(json.dumps({**about, **({"file": str(out)} if out else {"rows": kept})}, indent=1))
    elif out:
        print(f"file: {inert(str(out))}")
    counts.report(classifier)


def _read_paths(paths: Sequence[str]) -> Iterator[str]:
    """Yield the paths, with those of standard input in the place of -."""
    for path in paths:
        if path != STANDARD_INPUT:
            yield path
            continue
        data = sys.stdin.buffer.read()
        names = data.split(b"\0") if b"\0" in data else [line.rstrip(b"\r") for line in data.split(b"\n")]
        yield from (name.decode(sys.getfilesystemencoding(), "surrogateescape") for name in names if name)


class _Counts:
    """How many items there were, how many failed, and the first that did."""

    def __init__(self) -> None:
        self.num_items = self.num_failed = 0
        self.first = ""

    def add(self, classified: ClassifiedRows) -> None:
        """Count some results."""
        self.num_items += len(classified.names)
        failed = [(name, error) for name, error in zip(classified.names, classified.errors, strict=True) if error]
        self.num_failed += len(failed)
        if failed and not self.first:
            self.first = f"{failed[0][0]}: {failed[0][1]}"

    def facts(self) -> dict[str, int]:
        """Return both numbers."""
        return {"items": self.num_items, "failed": self.num_failed}

    def report(self, classifier: Classifier) -> None:
        """Log the summary.

        Raises:
            UserError: all items failed.
        """
        if self.num_failed == self.num_items:
            raise UserError(f"none of {self.num_items} could be classified; the first: {self.first}")
        probabilities = inert(classifier.calibration.describe())
        logger.info("%d classified; probabilities: %s", self.num_items - self.num_failed, probabilities)
        if self.num_failed:
            logger.warning("%d of %d failed; the first: %s", self.num_failed, self.num_items, inert(self.first))


def _table_writer(columns: Mapping[str, type], class_names: Sequence[str], name_width: int) -> Write:
    """Return a function that prints rows as lines of a table."""
    name, *cells, _ = columns
    width, class_width = min(max(name_width, len(name)), MOST_FILE_WIDTH), max(len(inert(each)) for each in class_names)
    is_started = False

    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        nonlocal is_started
        if not is_started:
            print(f"{name:{width}}  most probable classes, in percent")
            is_started = True
        for row in rows:
            best = zip(cells[::2], cells[1::2], strict=True)
            shown = [f"{inert(row[label]):{class_width}} {100 * row[share]:5.1f}" for label, share in best if not row["error"]]
            said = "  ".join(shown) or f"failed: {inert(row['error'])}"
            print(f"{inert(row[name]):{width}}  {said}", flush=True)

    return write
