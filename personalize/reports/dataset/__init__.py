"""The coach: what a folder of pictures is like before anything is trained on it, and what to do about each thing found.

    looking.py    one picture -> its format, bucket, sharpness and perceptual hash: `look` -> Survey
    findings.py   a Survey -> findings, each with one suggestion: a table of rules
    telling.py    a Survey -> one screen of text, or JSON
    sheet.py      a Survey -> a contact sheet (PNG) or a page (HTML)

Nothing here needs torch, so that looking is quick.
"""

from .findings import Finding, find
from .looking import Survey, look
from .sheet import page, sheet
from .telling import as_json, screen

__all__ = ["Finding", "Survey", "as_json", "find", "look", "page", "screen", "sheet"]
