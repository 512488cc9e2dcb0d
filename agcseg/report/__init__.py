"""Reads the runs of a folder and reports them: curves, tables, and what they say about the paper's claims.

Errors are fractions in [0, 1] in report.csv, and % or points wherever people read them."""

from agcseg.report.claims import MARGIN, Verdict, verdicts
from agcseg.report.compare import by_setting, cells, reference_of
from agcseg.report.figures import figure, figure1, forest, lambda_figure, lambda_starts_figure
from agcseg.report.measures import t_interval
from agcseg.report.page import write_report
from agcseg.report.read import Run, read_folders, read_runs
from agcseg.report.tables import differences_table, headline, settings_table, summarise

__all__ = [
    "MARGIN",
    "Run",
    "Verdict",
    "by_setting",
    "cells",
    "differences_table",
    "figure",
    "figure1",
    "forest",
    "headline",
    "lambda_figure",
    "lambda_starts_figure",
    "read_folders",
    "read_runs",
    "reference_of",
    "settings_table",
    "summarise",
    "t_interval",
    "verdicts",
    "write_report",
]
