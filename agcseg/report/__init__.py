"""Reads the runs of one folder and reports them: curves, tables, and what they say about the paper's claims.

Errors are fractions in [0, 1] in code and in report.csv, and % or points wherever people read them."""

from agcseg.report.claims import MARGIN, Verdict, verdicts
from agcseg.report.compare import cells
from agcseg.report.figures import figure, figure1, lambda_figure, lambda_starts_figure, settings_figure
from agcseg.report.page import write_report
from agcseg.report.read import Run, read_folder, read_runs
from agcseg.report.settings import compared, differences_table, settings_table
from agcseg.report.tables import summarise, table_text

__all__ = [
    "MARGIN",
    "Run",
    "Verdict",
    "cells",
    "compared",
    "differences_table",
    "figure",
    "figure1",
    "lambda_figure",
    "lambda_starts_figure",
    "read_folder",
    "read_runs",
    "settings_figure",
    "settings_table",
    "summarise",
    "table_text",
    "verdicts",
    "write_report",
]
