"""Render a table of a report as LaTeX, with the rules of the package booktabs. Every string is escaped.

A table that is wider than the text of a page is printed in parts, and long texts in it are wrapped.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from pipeline.report.blocks import Table, on_one_line

PAGE_WIDTH = 337.0  # points: the text of LaTeX's article has 345
MAX_TEXT = 110.0  # points: a longer text beside numbers is wrapped
GAP = 6.0  # points between two columns
MAX_LINES = 50  # of the tabulars of one float
MAX_ROWS = 40  # of one tabular
MAX_WORD = 16  # characters: a longer word may be broken in a column that is wrapped
SMALL = 9.0  # points: the size of small letters
_WIDTHS = {**dict.fromkeys(" .,:;()[]|'ijltfrI-/", 0.33), **dict.fromkeys("+±×=MWmw%", 0.8)}  # of characters; others: 0.52

_ESCAPED = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "|": r"\textbar{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"\textperiodcentered{}",
    "Δ": r"$\Delta$",
}
# What pdfLaTeX prints with the fonts that it has when no other is chosen.
_PRINTABLE = re.compile("[ -~¡-ª¬®-º¼-ÏÑ-Ýß-ïñ-ýÿ-ăĆ-ďĒ-ėĚ-ĥĨ-ĭİ-ķĹ-ľŁ-ňŌ-ťŨ-űŴ-ž–—‘’“”†-•…‰€№™←→]")
_UNSEEN = ("Cf", "Mn")  # categories of letters that only change their neighbours: joiners, variants, marks
_MINUS = re.compile(r"(?<![\w-])-(?=[\d.])")
_HEAD = r"""% \usepackage{booktabs}
% What LaTeX's own fonts lack is printed as its Unicode name or number. With fonts that have it, put before the first table:
% \newcommand{\otherletter}[2]{#1}
\providecommand{\otherletter}[2]{#2\allowbreak}
"""


def escape_latex(text: str) -> str:
    """Return plain text as LaTeX on one line: nothing in it is read as a command, and pdfLaTeX can print all of it."""
    return "".join(map(_escape_character, unicodedata.normalize("NFC", on_one_line(text))))


def _escape_character(character: str) -> str:
    if character in _ESCAPED:
        return _ESCAPED[character]
    if _PRINTABLE.fullmatch(character):
        return character
    if unicodedata.category(character) in _UNSEEN:
        return ""
    return f"\\otherletter{{{character}}}{{({_name_character(character)})}}"


def _name_character(character: str) -> str:
    """Return the name of a symbol, and the number of a letter: texts in another script are many letters."""
    number = f"U+{ord(character):04X}"
    return number if unicodedata.category(character).startswith("L") else unicodedata.name(character, number).lower()


def _escape_cell(text: str, is_text: bool) -> str:
    """Return a cell as LaTeX: numbers with a minus in place of their hyphen, and texts whose long words may be broken."""
    if not is_text:
        return _MINUS.sub("$-$", escape_latex(text)) if text != "-" else "--"
    words = [re.findall(f".{{1,{MAX_WORD}}}", word) for word in on_one_line(text).split(" ")]
    return " ".join(r"\allowbreak{}".join(map(escape_latex, parts)) for parts in words)


def _render_row(table: Table, cells: Sequence[str], columns: Sequence[int]) -> str:
    """Return a line of a `tabular`; after the end of the line before it, "[" or "*" would be read as its option."""
    line = " & ".join(_escape_cell(cells[column], table.is_text(column)) for column in columns)
    return f"    {'{}' if line.startswith(('[', '*')) else ''}{line} \\\\"


def render_latex(table: Table, label: str) -> str:
    """Return a table as a floating `table` with a `tabular`; it needs \\usepackage{booktabs}.

    A table that is wider than a page is printed in parts, one below the other, each with the names of the rows; so are tables
    of many rows. Parts that are too long for a page get a `table` of their own.

    Args:
        table: The table; its caption becomes that of the float.
        label: The name for \\ref; characters that have a meaning in LaTeX are left out.
    """
    name = re.sub(r"[^A-Za-z0-9.:-]+", "-", label).strip("-")
    chunks = [replace(table, rows=table.rows[start : start + MAX_ROWS]) for start in range(0, len(table.rows), MAX_ROWS)]
    parts = _split_columns(table)
    tabulars = [_render_tabular(chunk, table, part) for part in parts for chunk in chunks or [table]]
    floats = [tabulars[:1]]
    for tabular in tabulars[1:]:
        fits = sum(map(len, (*floats[-1], tabular))) <= MAX_LINES
        floats = [*floats[:-1], [*floats[-1], tabular]] if fits else [*floats, [tabular]]
    rendered = [_render_float(parts, table.caption, f"tab:{name}", number) for number, parts in enumerate(floats)]
    return _HEAD + "\n".join(rendered)


def _render_float(tabulars: Sequence[Sequence[str]], caption: str, label: str, number: int) -> str:
    """Return a `table` with one or several tabulars; `number` counts those of one table from 0, of which the first is named."""
    head = [f"  \\caption{{{escape_latex(caption)}}}", f"  \\label{{{label}}}"]
    body = "\n\n  \\medskip\n".join("\n".join(tabular) for tabular in tabulars)
    lines = [
        r"\begin{table}",
        r"  \centering\small\sloppy",
        r"  \setlength{\tabcolsep}{3pt}",
        *(head if not number else [f"  \\par Table~\\ref{{{label}}}, continued\\par\\medskip"]),
        body,
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _split_columns(table: Table) -> list[list[int]]:
    """Return the columns of each part of a table: whole groups, as many as fit on a page, and at least one.

    A table without groups has its first column in each part.
    """
    if len(table.columns) == 1:
        return [[0]]
    first, *others = range(table.num_text_columns - 1 if table.groups else 0, len(table.columns))
    parts: list[list[int]] = []
    room = -1.0
    for _, group in groupby(others, key=lambda column: table.groups[column] if table.groups else str(column)):
        columns = list(group)
        needed = sum(_column_width(table, column) for column in columns)
        if table.groups:
            needed = max(needed, GAP + _text_width(table.groups[columns[0]]))
        if needed > room:
            parts, room = [*parts, [first]], PAGE_WIDTH - _column_width(table, first)
        parts[-1] += columns
        room -= needed
    return parts


def _column_width(table: Table, column: int) -> float:
    """Return about the width of a column in points, with the space beside it; long texts are wrapped."""
    widest = max(map(_text_width, (table.columns[column], *(row[column] for row in table.rows))))
    return GAP + (min(widest, _max_text(table)) if table.is_text(column) else widest)


def _max_text(table: Table) -> float:
    """Return the width in points at which texts are wrapped; a table of nothing but text has all the room of a page for it."""
    count = len(table.columns)
    return MAX_TEXT if count > 3 or not all(map(table.is_text, range(count))) else PAGE_WIDTH / count - GAP


def _text_width(text: str) -> float:
    printed = "".join(each if _PRINTABLE.fullmatch(each) or each in _ESCAPED else f"({_name_character(each)})" for each in text)
    return SMALL * sum(_WIDTHS.get(character, 0.52) for character in printed)


def _render_tabular(table: Table, whole: Table, columns: Sequence[int]) -> list[str]:
    """Return the lines of a `tabular` with some columns, as wide as those of the whole table.

    If the columns have groups, columns of text before the first one become lines between the rows.
    """
    alignment = "".join(_align(whole, column) for column in columns)
    lines = [f"  \\begin{{tabular}}{{{alignment}}}", r"    \toprule"]
    if table.groups:
        lines += _render_groups([table.groups[column] for column in columns])
    lines += [_render_row(table, table.columns, columns), r"    \midrule"]
    section: tuple[str, ...] = ()
    for row in table.rows:
        if table.groups and row[: columns[0]] != section:
            section = row[: columns[0]]
            lines.append(f"    \\multicolumn{{{len(columns)}}}{{l}}{{\\emph{{{escape_latex(', '.join(section))}}}}} \\\\")
        lines.append(_render_row(table, row, columns))
    return [*lines, r"    \bottomrule", r"  \end{tabular}"]


def _align(table: Table, column: int) -> str:
    if not table.is_text(column):
        return "r"
    width = _max_text(table)
    return f"p{{{width:.0f}pt}}" if _column_width(table, column) >= GAP + width else "l"


def _render_groups(groups: Sequence[str]) -> list[str]:
    """Return the line of the heads above the columns, and the rules below them."""
    cells, rules, start = [], [], 1
    for name, members in groupby(groups):
        end = start + len(list(members)) - 1
        cells.append(f"\\multicolumn{{{end - start + 1}}}{{c}}{{{escape_latex(name)}}}" if name else " & " * (end - start))
        rules += [f"\\cmidrule(lr){{{start}-{end}}}"] if name else []
        start = end + 1
    return [f"    {' & '.join(cells)} \\\\", f"    {' '.join(rules)}"]
