"""A run folder -> one self-contained HTML page."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ...io import write_text
from .contents import Sides, gather, words
from .curves import figure
from .read import read_run

HERE = Path(__file__).parent
BUDGET = 3_000_000  # bytes of a page that still travels by mail
# Longest side of (large pictures, pictures in grids): the first pair that fits the budget, or else the last.
LADDER = (Sides(768, 320), Sides(512, 256), Sides(384, 192), Sides(256, 128), Sides(160, 96))

__all__ = ["write_report"]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder, from what is there: an unfinished run gets a shorter page.

    Raises:
        DataError: the folder does not exist.
        OutputError: the page cannot be written.
    """
    run = read_run(run_folder := Path(run_folder))
    html = ""
    for sides in LADDER:
        html = _template().render(gather(run, sides))
        if len(html) <= BUDGET:
            break
    # A lone surrogate in a caption must not cost the page.
    return write_text(run_folder / "report.html", html.encode("utf-8", "replace").decode())


@cache
def _template() -> Template:
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.loader = FileSystemLoader(HERE)
    env.filters |= {"figure": figure, **words()}
    env.globals |= {part: Markup((HERE / f"page.{part}").read_text(encoding="utf-8")) for part in ("css", "js")}
    return env.get_template("page.html.j2")
