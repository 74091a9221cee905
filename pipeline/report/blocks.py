"""The building blocks of a report: headings, paragraphs, tables, figures.

Blocks hold plain text and no markup. The HTML and Markdown renderers escape every string that they find in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT_HEADS = ("verdict", "state", "reason")  # heads of columns that hold text wherever they stand


@dataclass(frozen=True, slots=True)
class Heading:
    """The heading of a section."""

    text: str


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

    def is_text(self, column: int) -> bool:
        """Whether a column holds text, by its number from 0."""
        return column < self.num_text_columns or self.columns[column] in TEXT_HEADS


@dataclass(frozen=True, slots=True)
class SvgFigure:
    """An SVG figure with a caption, and a text (`alt`) for readers who cannot see the figure."""

    svg: bytes
    alt: str
    caption: str


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
class CollapsibleSection:
    """Details that few readers need; on the HTML page they are hidden until the reader opens them."""

    summary: str
    blocks: tuple[Block, ...]


Block = Heading | Paragraph | BulletList | Table | SvgFigure | ExampleGroup | CollapsibleSection
