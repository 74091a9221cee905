"""Finished runs -> one table, one HTML page, one Markdown file. It reads files only: no torch, no model, no training."""

from pipeline.report.comparison import numbers, table
from pipeline.report.document import write_report

__all__ = ["numbers", "table", "write_report"]
