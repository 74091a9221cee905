"""Render a table of a report as LaTeX, with the rules of the package booktabs. Every string is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from pipeline.report.blocks import Table, on_one_line

PAGE_WIDTH = 337.0  # points: the text of LaTeX's article has 345
MAX_TEXT = 110.0  # points: a longer text of a table with groups is wrapped
GAP = 6.0  # points between two columns
MAX_LINES = 50  # of the tabulars of one float
SMALL = 9.0  # points: the size of small letters
_WIDTHS = {**dict.fromkeys(" .,:;()[]|'ijltfrI-/", 0.33), **dict.fromkeys("+±×=MWmw%", 0.8)}  # of characters; others: 0.52

_ESCAPED = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"\textperiodcentered{}",
    "Δ": r"$\Delta$",
}


def escape_latex(text: str) -> str:
    """Return plain text as LaTeX on one line: nothing in it is read as a command."""
    return "".join(_ESCAPED.get(character, character) for character in on_one_line(text))


def _render_row(cells: Sequence[str]) -> str:
    """Return a line of a `tabular`; after the end of the line before it, "[" or "*" would be read as its option."""
    line = " & ".join(map(escape_latex, cells))
    return f"    {'{}' if line.startswith(('[', '*')) else ''}{line} \\\\"


def render_latex(table: Table, label: str) -> str:
    """Return a table as a floating `table` with a `tabular`; it needs \\usepackage{booktabs}.

    A table with groups of columns that is wider than a page is printed in parts, one below the other, each with the names of
    the rows; parts that are too long for a page get a `table` of their own.

    Args:
        table: The table; its caption becomes that of the float.
        label: The name for \\ref; characters that have a meaning in LaTeX are left out.
    """
    name = re.sub(r"[^A-Za-z0-9.:-]+", "-", label).strip("-")
    tabulars = [_render_tabular(table, part) for part in _split_columns(table)]
    floats = [tabulars[:1]]
    for tabular in tabulars[1:]:
        fits = sum(map(len, (*floats[-1], tabular))) <= MAX_LINES
        floats = [*floats[:-1], [*floats[-1], tabular]] if fits else [*floats, [tabular]]
    return "\n".join(_render_float(parts, table.caption, f"tab:{name}", number) for number, parts in enumerate(floats))


def _render_float(tabulars: Sequence[Sequence[str]], caption: str, label: str, number: int) -> str:
    """Return a `table` with one or several tabulars; `number` counts those of one table from 0, of which the first is named."""
    head = [f"  \\caption{{{escape_latex(caption)}}}", f"  \\label{{{label}}}"]
    body = "\n\n  \\medskip\n".join("\n".join(tabular) for tabular in tabulars)
    lines = [
        r"\begin{table}",
        r"  \centering\small",
        r"  \setlength{\tabcolsep}{3pt}",
        *(head if not number else [f"  \\par Table~\\ref{{{label}}}, continued\\par\\medskip"]),
        body,
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _split_columns(table: Table) -> list[list[int]]:
    """Return the columns of each part of a table: whole groups, as many as fit on a page, and at least one."""
    if not table.groups:
        return [list(range(len(table.columns)))]
    first, *others = range(table.num_text_columns - 1, len(table.columns))
    parts: list[list[int]] = []
    room = -1.0
    for _, group in groupby(others, key=lambda column: table.groups[column]):
        columns = list(group)
        needed = max(sum(_column_width(table, column) for column in columns), GAP + _text_width(table.groups[columns[0]]))
        if needed > room:
            parts, room = [*parts, [first]], PAGE_WIDTH - _column_width(table, first)
        parts[-1] += columns
        room -= needed
    return parts


def _column_width(table: Table, column: int) -> float:
    """Return about the width of a column in points, with the space beside it; long texts are wrapped."""
    widest = max(map(_text_width, (table.columns[column], *(row[column] for row in table.rows))))
    return GAP + (min(widest, MAX_TEXT) if table.is_text(column) else widest)


def _text_width(text: str) -> float:
    return SMALL * sum(_WIDTHS.get(character, 0.52) for character in text)


def _render_tabular(table: Table, columns: Sequence[int]) -> list[str]:
    """Return the lines of a `tabular` with some columns; columns of text before the first one become lines between the rows."""
    alignment = "".join(_align(table, column) for column in columns)
    lines = [f"  \\begin{{tabular}}{{{alignment}}}", r"    \toprule"]
    if table.groups:
        lines += _render_groups([table.groups[column] for column in columns])
    lines += [_render_row([table.columns[column] for column in columns]), r"    \midrule"]
    section: tuple[str, ...] = ()
    for row in table.rows:
        if table.groups and row[: columns[0]] != section:
            section = row[: columns[0]]
            lines.append(f"    \\multicolumn{{{len(columns)}}}{{l}}{{\\emph{{{escape_latex(', '.join(section))}}}}} \\\\")
        lines.append(_render_row([row[column] for column in columns]))
    return [*lines, r"    \bottomrule", r"  \end{tabular}"]


def _align(table: Table, column: int) -> str:
    if not table.is_text(column):
        return "r"
    is_wrapped = table.groups and _column_width(table, column) >= MAX_TEXT
    return f"p{{{MAX_TEXT:.0f}pt}}" if is_wrapped else "l"


def _render_groups(groups: Sequence[str]) -> list[str]:
    """Return the line of the heads above the columns, and the rules below them."""
    cells, rules, start = [], [], 1
    for name, members in groupby(groups):
        end = start + len(list(members)) - 1
        cells.append(f"\\multicolumn{{{end - start + 1}}}{{c}}{{{escape_latex(name)}}}" if name else " & " * (end - start))
        rules += [f"\\cmidrule(lr){{{start}-{end}}}"] if name else []
        start = end + 1
    return [f"    {' & '.join(cells)} \\\\", f"    {' '.join(rules)}"]
