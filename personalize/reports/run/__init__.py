"""The report of a training run: a run folder -> one self-contained HTML page.

read.py        the run folder as values, whatever is missing or damaged
contents.py    those values -> what the page shows
samples.py     grids of sample pictures      settings.py   what differs from the defaults, time and memory
figures.py     measured figures as meters    selection.py  which checkpoint was chosen, and why
live.py        the page of a run that goes on
curves.py      loss, rates and norms         usage.py      commands that use the adapter
"""

from __future__ import annotations

from functools import partial
from os import PathLike
from pathlib import Path

from ...errors import DataError, check_type
from ..kit.page import BUDGET, render_within, template, write_page
from .contents import page_values
from .read import read_run
from .samples import Sides

# Longest side of (large pictures, pictures in grids): the first pair that fits the budget, or else the last.
LADDER = (Sides(768, 320), Sides(512, 256), Sides(384, 192), Sides(256, 128), Sides(160, 96))

__all__ = ["write_report"]


def write_report(run_folder: Path, *, live: bool = False) -> Path:
    """Write `report.html` into a run folder, from what is there: an unfinished run gets a shorter page.

    While a run goes on (`live`), the page says so, and a browser reads it again every half minute.

    Raises:
        DataError: the folder does not exist.
        OutputError: the page cannot be written.
    """
    check_type(run_folder, (str, PathLike), "a run", 'its folder: p.write_report("runs/rex")', DataError)
    run = read_run(run_folder := Path(run_folder))
    pages = (partial(page_values, run, sides, live) for sides in LADDER)
    return write_page(run_folder / "report.html", render_within(BUDGET, template(Path(__file__).parent), pages))
