"""Blocks -> Markdown; every string is escaped, so that nothing in the data can become markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.report.blocks import Block, Bullets, Examples, Folded, Grid, Heading, Picture, Text


def render_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report as Markdown; pictures are replaced by their captions."""
    return "\n\n".join([f"# {escape(title)}", *(_block(block) for block in blocks)]) + "\n"


def escape(text: str) -> str:
    """Plain text as Markdown on one line: no markup, no HTML, no cell border."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)


def _block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {escape(text)}"
        case Text(text):
            return escape(text)
        case Bullets(items):
            return "\n".join(f"- {escape(item)}" for item in items)
        case Grid():
            return _grid(block)
        case Picture():
            return f"*{escape(block.caption)} (The picture is in index.html.)*"
        case Examples(title, items):
            return f"{escape(title)}: " + ", ".join(escape(item.id) for item in items)
        case Folded(summary, blocks):
            return "\n\n".join([f"### {escape(summary)}", *(_block(inner) for inner in blocks)])


def _grid(grid: Grid) -> str:
    rule = ["---" if column < grid.words else "---:" for column in range(len(grid.columns))]
    rows = [grid.columns, *grid.rows]
    lines = [f"| {' | '.join(escape(cell) for cell in row)} |" for row in rows]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines) + (f"\n\n*{escape(grid.caption)}*" if grid.caption else "")
