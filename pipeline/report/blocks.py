"""What a report is made of, free of any markup; the renderers escape every string they find here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heading:
    """The start of a section."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """One sentence per item."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of strings; its first `words` columns hold words, the others numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    words: int = 1


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing with what it says for those who cannot see it."""

    svg: bytes
    alt: str
    caption: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The best classes of one method for one example, best first."""

    method: str
    classes: tuple[tuple[str, float, bool], ...]  # class name, confidence 0..1, whether it is a label of the example


@dataclass(frozen=True, slots=True)
class Example:
    """One test example: its thumbnail as PNG, its labels and what the methods said."""

    id: str
    thumbnail: bytes  # empty when the file cannot be shown
    labels: tuple[str, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples of one kind."""

    title: str
    items: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Folded:
    """Details that few readers want to see."""

    summary: str
    blocks: tuple[Block, ...]


Block = Heading | Text | Bullets | Grid | Picture | Examples | Folded
