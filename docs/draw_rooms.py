"""Draw docs/rooms.svg: the rooms of `pipeline/`, layer by layer, from the import contract in pyproject.toml.

Run by `make docs`; a test compares the picture with the contract.
"""

from __future__ import annotations

import ast
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).with_name("rooms.svg")
WIDTH, MARGIN, GAP = 1000, 20, 12
LINE, HEADING = 17, 20  # heights of text
CHARACTER_WIDTH = 6.9  # pixels, on average


def layers() -> list[list[str]]:
    """The rooms of every layer, from top to bottom."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (each for each in settings["tool"]["importlinter"]["contracts"] if each["type"] == "layers")
    return [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]


def purpose(room: str) -> str:
    """The first line of a room's docstring."""
    package = ROOT / "pipeline" / room / "__init__.py"
    file = package if package.is_file() else ROOT / "pipeline" / f"{room}.py"
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0]


def wrapped(text: str, width: float) -> list[str]:
    """Break a text into lines that are at most `width` pixels wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(longer) * CHARACTER_WIDTH > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def drawing() -> str:
    """The picture as SVG; the same contract gives the same bytes."""
    parts: list[str] = []
    top = MARGIN
    for rooms in layers():
        width = (WIDTH - 2 * MARGIN - GAP * (len(rooms) - 1)) / len(rooms)
        texts = [wrapped(purpose(room), width - 24) for room in rooms]
        height = HEADING + LINE * max(map(len, texts)) + 18
        for number, (room, lines) in enumerate(zip(rooms, texts, strict=True)):
            left = MARGIN + number * (width + GAP)
            parts.append(f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{height}" rx="6"/>')
            parts.append(f'<text class="name" x="{left + 12:.0f}" y="{top + 24}">{escape(room)}</text>')
            for row, line in enumerate(lines):
                parts.append(f'<text x="{left + 12:.0f}" y="{top + 24 + HEADING + row * LINE}">{escape(line)}</text>')
        top += height + GAP
    body = "\n".join(parts)
    style = (
        "rect{fill:#f4f6fa;stroke:#7a8699}text{font:13px sans-serif;fill:#333}.name{font-weight:bold;font-size:15px;fill:#111}"
    )
    title = "<title>The rooms of pipeline/: a room imports only from those below it</title>"
    size = f'viewBox="0 0 {WIDTH} {top + MARGIN - GAP}" width="{WIDTH}"'
    background = '<rect width="100%" height="100%" style="fill:#fff;stroke:none"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{title}\n<style>{style}</style>\n{background}\n{body}\n</svg>\n'


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
