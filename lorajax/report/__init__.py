"""Runs on disk to a tidy table, tables that compare methods, and figures.

    python -m lorajax.report runs/fair_glue [--csv=FILE] [--plots=FOLDER] [--into=README.md --section=fair] ...

A run is a folder with `config.json` and `summary.json`. A cell is what one method got on one task; methods are told
apart by what was asked of them (the config file with its settings, without task and rate) and compared at the rate
that was best for each. The rate is chosen on one half of the seeds and scored on the other, and the halves then swap,
so that a method with more rates to choose from gains nothing by chance alone.
"""

from lorajax.report.runs import Result, method, read, write_csv
from lorajax.report.scores import Cell, Standing, by_rate, cells, standings
from lorajax.report.tables import into, markdown, setting

__all__ = ["Cell", "Result", "Standing", "by_rate", "cells", "into", "markdown", "method", "read", "setting",
           "standings", "write_csv"]
