"""Reports on finished runs: a table of results, one HTML page and one Markdown file per dataset.

This package only reads files. It imports no torch, loads no model and trains nothing.
"""

from pipeline.report.comparison import results_frame, results_table
from pipeline.report.document import write_report
from pipeline.report.grid_page import write_grid_page

__all__ = ["results_frame", "results_table", "write_grid_page", "write_report"]
