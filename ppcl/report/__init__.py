"""The report of a job: one HTML file that needs nothing but itself, and the table of its variants."""

from ppcl.report.page import write_report
from ppcl.report.summary import summary_rows

__all__ = ["summary_rows", "write_report"]
