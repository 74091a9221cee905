"""The building blocks of a report: headings, paragraphs, tables, figures.

Blocks hold plain text and no markup. The HTML and Markdown renderers escape every string that they find in a block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.report.figures import SvgDrawing

TEXT_HEADS = ("verdict", "state", "reason")  # heads of columns that hold text wherever they stand


@dataclass(frozen=True, slots=True)
class Heading:
    """The heading of a section (level 2), or of a part of one (level 3)."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True, slots=True)
class BulletList:
    """A list with one sentence per item."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of strings: the first `num_text_columns` columns and those of `TEXT_HEADS` hold text, the others numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    num_text_columns: int = 1
    groups: tuple[str, ...] = ()  # for print: the head above each column, shared by neighbours; "": none
    row_details: tuple[str, ...] = ()  # of each row, what the HTML page shows when its first cell is opened
    key: str = ""  # what its files are called, see `page_files`
    print_caption: str = ""  # for a paper; "": the heading above it and the caption
    files: tuple[str, ...] = ()  # the same table in files beside the page, relative to it

    def is_text(self, column: int) -> bool:
        """Whether a column holds text, by its number from 0."""
        return column < self.num_text_columns or self.columns[column] in TEXT_HEADS


@dataclass(frozen=True, slots=True)
class SvgFigure:
    """An SVG figure with a caption, and a text (`alt`) for readers who cannot see the figure."""

    svg: SvgDrawing
    alt: str
    caption: str
    key: str = ""  # what its files are called, see `page_files`
    files: tuple[str, ...] = ()  # the same figure in files beside the page, relative to it


@dataclass(frozen=True, slots=True)
class ClassPredictions:
    """The classes that one method finds most likely for one example, the most likely first."""

    method: str
    top_classes: tuple[tuple[str, float, bool], ...]  # class name, confidence 0..1, whether it is a label of the example


@dataclass(frozen=True, slots=True)
class ExampleCard:
    """One test example: its thumbnail as PNG, its labels, and the predictions of each method."""

    id: str
    thumbnail: bytes  # empty when the file cannot be shown
    labels: tuple[str, ...]
    predictions: tuple[ClassPredictions, ...]


@dataclass(frozen=True, slots=True)
class ExampleGroup:
    """Examples for which the methods are right or wrong in the same way, under one title."""

    title: str
    cards: tuple[ExampleCard, ...]


@dataclass(frozen=True, slots=True)
class MappedMethod:
    """What one method predicts for the n examples of a map."""

    name: str
    predicted: np.ndarray  # [n] class numbers
    confidence: np.ndarray  # [n] 0..1
    is_right: np.ndarray  # [n] bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleMap:
    """n test examples in the plane with their pictures and the predictions of every method, for readers to explore."""

    ids: tuple[str, ...]
    pictures: tuple[bytes, ...]  # small JPEG files; empty when a file cannot be shown
    labels: tuple[tuple[int, ...], ...]  # class numbers
    class_names: tuple[str, ...]
    spaces: Mapping[str, Mapping[str, np.ndarray]]  # name of the features -> name of the projection -> positions [n,2]
    methods: tuple[MappedMethod, ...]
    baseline: str  # the name of the method that others are compared with; "" when there is none
    shown_first: str  # the name of the method whose predictions are shown at first
    caption: str


@dataclass(frozen=True, slots=True)
class CollapsibleSection:
    """Details that few readers need; on the HTML page they are hidden until the reader opens them."""

    summary: str
    blocks: tuple[Block, ...]


Block = Heading | Paragraph | BulletList | Table | SvgFigure | ExampleGroup | SampleMap | CollapsibleSection

# Control characters, and marks that turn the direction of the text around them.
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def without_controls(text: str) -> str:
    """Return a text without control characters, but for tabs and ends of lines, and without marks of direction."""
    return _INVISIBLE.sub(" ", text)


def on_one_line(text: str) -> str:
    """Return a text on one line, without control characters and marks of direction."""
    return " ".join(without_controls(text).split())
