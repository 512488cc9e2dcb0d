"""Reads the runs of a folder and reports them: curves, tables, and what they say about the paper's claims.

Errors are fractions in [0, 1] in report.csv, and % or points wherever people read them."""

from agcseg.report.claims import MARGIN, verdicts
from agcseg.report.compare import by_setting, cells, t_interval
from agcseg.report.page import write_report
from agcseg.report.read import read_folders, read_runs

__all__ = ["MARGIN", "by_setting", "cells", "read_folders", "read_runs", "t_interval", "verdicts", "write_report"]
