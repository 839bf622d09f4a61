"""The report on a dataset before anything is trained on it: what it holds, what is wrong with it, and what to do about that.

base.py       what the base makes of the images, before training: the one part that needs torch
measure.py    each image of a folder: format, bucket, sharpness, perceptual hash
rules.py      a table of rules, each with findings and one suggestion
summary.py    one screen of text, or JSON
sheet.py      a contact sheet (PNG)
page.py       one page (HTML)
"""

from .base import BaseView, look_at_base, write_reconstruction
from .measure import DatasetStats, measure_dataset
from .page import write_page
from .rules import find_problems
from .sheet import write_sheet
from .summary import as_json, as_text

__all__ = [
    "BaseView",
    "DatasetStats",
    "as_json",
    "as_text",
    "find_problems",
    "look_at_base",
    "measure_dataset",
    "write_page",
    "write_reconstruction",
    "write_sheet",
]
