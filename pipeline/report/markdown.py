"""Render the blocks of a report as Markdown. Every string is escaped, so that no text from the data can become markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.report.blocks import (
    Block,
    BulletList,
    CollapsibleSection,
    ExampleGroup,
    Heading,
    Paragraph,
    SampleMap,
    SvgFigure,
    Table,
    on_one_line,
)


def render_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Return the report as a Markdown document; each figure is replaced by its caption."""
    return "\n\n".join([f"# {escape_markdown(title)}", *(_render_block(block) for block in blocks)]) + "\n"


def escape_markdown(text: str) -> str:
    """Return plain text as Markdown on one line: nothing in it is read as markup, as HTML or as the border of a table cell."""
    line = on_one_line(text)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)


def _render_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape_markdown(text)}"
        case Paragraph(text):
            return escape_markdown(text)
        case BulletList(items):
            return "\n".join(f"- {escape_markdown(item)}" for item in items)
        case Table():
            return _render_table(block)
        case SvgFigure():
            return f"*{escape_markdown(block.caption)} (The picture is in index.html.)*"
        case SampleMap():
            return f"*{escape_markdown(block.caption)} (The map is in index.html.)*"
        case ExampleGroup(title, cards):
            return f"{escape_markdown(title)}: " + ", ".join(escape_markdown(card.id) for card in cards)
        case CollapsibleSection(summary, blocks):
            return "\n\n".join([f"### {escape_markdown(summary)}", *(_render_block(inner) for inner in blocks)])


def _render_table(table: Table) -> str:
    alignment = ["---" if table.is_text(column) else "---:" for column in range(len(table.columns))]
    rows = [table.columns, *table.rows]
    lines = [f"| {' | '.join(escape_markdown(cell) for cell in row)} |" for row in rows]
    lines.insert(1, f"| {' | '.join(alignment)} |")
    return "\n".join(lines) + (f"\n\n*{escape_markdown(table.caption)}*" if table.caption else "")
