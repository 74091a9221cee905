"""Write the tables and figures of a page as files beside it: CSV and LaTeX, SVG and PDF.

Cells of a CSV file are inert in spreadsheets: a text that these would read as a formula gets an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

from pipeline.report.blocks import Block, CollapsibleSection, Heading, SvgFigure, Table, on_one_line
from pipeline.report.latex import render_latex
from pipeline.report.printed import PRINT_STYLE, to_pdf
from pipeline.runtime.files import write_atomic

FILES_FOLDER = "files"  # beside the page
_FORMULA = re.compile(r"[=+\-@|%]")  # how a cell begins that a spreadsheet may run
_NUMBERS = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?( ± [\d.]+)?( \([-+\d.]+ to [-+\d.]+\))?|-")  # what our own cells hold


def write_page_files(folder: Path, blocks: Sequence[Block]) -> list[Block]:
    """Write every table and figure among the blocks into the folder `files` of a page, and delete what an earlier page left.

    Args:
        folder: The folder of the page.
        blocks: The blocks of the page; sections may hold more of them.

    Returns:
        The same blocks; each table and figure names its files.
    """
    files = _Files()
    named = [files.name(block) for block in blocks]
    for name, content in files.contents.items():
        write_atomic(folder / name, content)
    for path in (folder / FILES_FOLDER).glob("[0-9][0-9]*-*.*"):
        if f"{FILES_FOLDER}/{path.name}" not in files.contents:
            path.unlink()
    return named


class _Files:
    """The files of one page: they are numbered, and named after the section that they are from."""

    def __init__(self) -> None:
        self.contents: dict[str, str | bytes] = {}
        self._section = "page"
        self._count = 0

    def name(self, block: Block) -> Block:
        """Take in a block and what is inside it, and return it with the names of its files."""
        match block:
            case Heading(text):
                self._section = re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "section"
            case CollapsibleSection(blocks=blocks):
                return replace(block, blocks=tuple(self.name(each) for each in blocks))
            case Table():
                stem = self._next_stem()
                return replace(block, files=self._add(stem, {"csv": render_csv(block), "tex": render_latex(block, stem)}))
            case SvgFigure(svg=drawing):
                with mpl.rc_context(PRINT_STYLE):
                    pdf = to_pdf(drawing.figure)
                return replace(block, files=self._add(self._next_stem(), {"svg": drawing.plain, "pdf": pdf}))
        return block

    def _next_stem(self) -> str:
        self._count += 1
        return f"{self._count:02d}-{self._section}"

    def _add(self, stem: str, contents: Mapping[str, str | bytes]) -> tuple[str, ...]:
        named = {f"{FILES_FOLDER}/{stem}.{suffix}": content for suffix, content in contents.items()}
        self.contents |= named
        return tuple(named)


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
