"""Render a table of a report as LaTeX, with the rules of the package booktabs. Every string is escaped."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.blocks import Table

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
}


def escape_latex(text: str) -> str:
    """Return plain text as LaTeX on one line: nothing in it is read as a command."""
    return "".join(_ESCAPED.get(character, character) for character in " ".join(text.split()))


def _render_row(cells: Sequence[str]) -> str:
    """Return a line of a `tabular`; after the end of the line before it, "[" or "*" would be read as its option."""
    line = " & ".join(map(escape_latex, cells))
    return f"    {'{}' if line.startswith(('[', '*')) else ''}{line} \\\\"


def render_latex(table: Table, label: str) -> str:
    """Return a table as a floating `table` with a `tabular`; it needs \\usepackage{booktabs}.

    Args:
        table: The table; its caption becomes that of the float.
        label: The name for \\ref.
    """
    alignment = "".join("l" if table.is_text(column) else "r" for column in range(len(table.columns)))
    head, *body = (_render_row(row) for row in (table.columns, *table.rows))
    lines = [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escape_latex(table.caption)}}}",
        f"  \\label{{tab:{label}}}",
        f"  \\begin{{tabular}}{{{alignment}}}",
        r"    \toprule",
        head,
        r"    \midrule",
        *body,
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"
