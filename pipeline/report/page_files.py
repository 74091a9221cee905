"""Write the tables and figures of a page as files beside it: CSV and LaTeX, SVG and PDF.

A file is called after its kind, tab-… or fig-…, and its key, or the section that it is from. It has no number, so that papers
may refer to it: what is new on the page moves no name.

Cells of a CSV file are inert in spreadsheets: a text that these would read as a formula gets an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

from pipeline.report.blocks import Block, CollapsibleSection, Heading, SvgFigure, Table, on_one_line
from pipeline.report.latex import render_latex
from pipeline.report.printed import PRINT_STYLE, to_pdf
from pipeline.runtime.files import write_atomic
from pipeline.runtime.logs import ProgressBar

FILES_FOLDER = "files"  # beside the page
_OWN_FILE = re.compile(r"(tab|fig|\d\d+)-[a-z0-9-]+\.(csv|tex|svg|pdf)")  # with a number: of earlier versions
_FORMULA = re.compile(r"[=+\-@|%]")  # how a cell begins that a spreadsheet may run
_NUMBERS = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?( ± [\d.]+)?( \([-+\d.]+ to [-+\d.]+\))?|-")  # what our own cells hold


def write_page_files(folder: Path, blocks: Sequence[Block], progress: bool = False) -> list[Block]:
    """Write every table and figure among the blocks into the folder `files` of a page, and delete what an earlier page left.

    Args:
        folder: The folder of the page.
        blocks: The blocks of the page; sections may hold more of them.
        progress: Whether to show what is done.

    Returns:
        The same blocks; each table and figure names its files.
    """
    files = _Files()
    bar = ProgressBar(blocks, label="files of its tables and figures", unit="block", show=progress)
    named = [files.name(block) for block in bar]
    for name, content in files.contents.items():
        write_atomic(folder / name, content)
    for path in (folder / FILES_FOLDER).glob("*.*"):
        if _OWN_FILE.fullmatch(path.name) and f"{FILES_FOLDER}/{path.name}" not in files.contents:
            path.unlink()
    return named


class _Files:
    """The files of one page."""

    def __init__(self) -> None:
        self.contents: dict[str, str | bytes] = {}
        self._section = "page"
        self._heading = ""
        self._uses: Counter[str] = Counter()

    def name(self, block: Block) -> Block:
        """Take in a block and what is inside it, and return it with the names of its files."""
        match block:
            case Heading(text):
                self._heading = text
                self._section = _slug(text)[:40].strip("-") or "section"
            case CollapsibleSection(summary, blocks):
                heading, self._heading = self._heading, summary
                named = tuple(self.name(each) for each in blocks)
                self._heading = heading
                return replace(block, blocks=named)
            case Table():
                stem = self._stem("tab", block.key)
                caption = block.print_caption or ". ".join(filter(None, [self._heading, block.caption]))
                latex = render_latex(replace(block, caption=caption), stem.removeprefix("tab-"))
                return replace(block, files=self._add(stem, {"csv": render_csv(block), "tex": latex}))
            case SvgFigure(svg=drawing):
                with mpl.rc_context(PRINT_STYLE):
                    pdf = to_pdf(drawing.figure)
                return replace(block, files=self._add(self._stem("fig", block.key), {"svg": drawing.plain, "pdf": pdf}))
        return block

    def _stem(self, kind: str, key: str) -> str:
        """Return the name of a block's files without their endings; a name that is there already gets a number."""
        stem = f"{kind}-{_slug(key) or self._section}"
        self._uses[stem] += 1
        return stem if self._uses[stem] == 1 else f"{stem}-{self._uses[stem]}"

    def _add(self, stem: str, contents: Mapping[str, str | bytes]) -> tuple[str, ...]:
        named = {f"{FILES_FOLDER}/{stem}.{suffix}": content for suffix, content in contents.items()}
        self.contents |= named
        return tuple(named)


def _slug(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def render_csv(table: Table) -> str:
    """Return a table as CSV with a line of column names."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(
        [escape_csv(cell) for cell in row] for row in (table.columns, *table.rows)
    )
    return buffer.getvalue()


def escape_csv(text: str) -> str:
    """Return a cell on one line without control characters; one that spreadsheets may run begins with an apostrophe."""
    line = on_one_line(text)
    return f"'{line}" if _FORMULA.match(line) and not _NUMBERS.fullmatch(line) else line
