"""Finished runs -> one table, one HTML page, one Markdown file. It reads files only: no torch, no model, no training."""

from pipeline.report.comparison import numbers, table
from pipeline.report.document import write_report
from pipeline.report.grid_page import write_grid_page

__all__ = ["numbers", "table", "write_grid_page", "write_report"]
