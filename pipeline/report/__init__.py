"""Reports on finished runs: a table of results, one HTML page and one Markdown file per dataset.

This package only reads files. It imports no torch, loads no model and trains nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.report.comparison import results_frame, results_table
    from pipeline.report.document import write_report
    from pipeline.report.grid_page import write_grid_page

__all__ = ["results_frame", "results_table", "write_grid_page", "write_report"]

# A name is imported at its first use: a list of heads needs nothing that draws.
_MODULES = {
    "results_frame": "pipeline.report.comparison",
    "results_table": "pipeline.report.comparison",
    "write_grid_page": "pipeline.report.grid_page",
    "write_report": "pipeline.report.document",
}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
