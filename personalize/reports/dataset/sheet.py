"""A survey as a contact sheet: each picture as training cuts it, with what was found about it, as PNG or as one HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

from ...data.images import load_picture
from ...data.masks import load_mask
from ...io import atomic, write_text
from .findings import Finding
from .looking import Look, Survey
from .telling import SIGNS, headline, places

CELL, GAP, LINE, COLUMNS = 176, 12, 19, 6  # pixels, and pictures in a row
MOST = 600  # pictures on a sheet; the marked ones come first when there are more
INK, SOFT, LINES = "#26201b", "#756a60", "#e7dece"
COLOURS = {"bad": "#b3284f", "warning": "#b8740a", "note": "#7d8894"}


def sheet(survey: Survey, found: Sequence[Finding], path: Path) -> Path:
    """Write the contact sheet as PNG. Raises OutputError."""
    looks = _chosen(survey, found)
    columns = max(1, min(COLUMNS, len(looks)))
    width = max(3 * (CELL + GAP) + GAP, columns * (CELL + GAP) + GAP)
    row = CELL + 3 * LINE + GAP
    image = Image.new("RGB", (width, GAP + 2 * LINE + GAP + -(-len(looks) // columns) * row), "white")
    _write(image, (GAP, GAP), f"{survey.folder.absolute().name}: {headline(survey)}", width - 2 * GAP, INK)
    _write(image, (GAP, GAP + LINE), places(survey), width - 2 * GAP, SOFT)
    for i, one in enumerate(looks):
        left, top = GAP + i % columns * (CELL + GAP), 2 * GAP + 2 * LINE + i // columns * row
        marks = _marks(one, found)
        seen = _seen(one)
        at = (left + (CELL - seen.width) // 2, top + (CELL - seen.height) // 2)
        image.paste(seen, at)
        wide = 3 if marks else 1
        frame = (at[0] - wide, at[1] - wide, at[0] + seen.width + wide - 1, at[1] + seen.height + wide - 1)
        ImageDraw.Draw(image).rectangle(frame, outline=COLOURS[marks[0].level] if marks else LINES, width=wide)
        _write(image, (left, top + CELL + 2), survey.name(one.example.path), CELL, INK)
        _write(image, (left, top + CELL + 2 + LINE), _size(one), CELL, SOFT)
        words = ", ".join(mark.mark for mark in marks) or one.example.caption
        colour = COLOURS[marks[0].level] if marks else SOFT
        _write(image, (left, top + CELL + 2 + 2 * LINE), words, CELL, colour)
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def page(survey: Survey, found: Sequence[Finding], path: Path) -> Path:
    """Write the survey as one self-contained HTML page. Raises OutputError."""
    cells: list[dict[str, Any]] = []
    for one in _chosen(survey, found):
        seen, marks = _seen(one, 2 * CELL), _marks(one, found)
        cells.append(
            {
                "src": _url(seen),
                "size": seen.size,
                "name": survey.name(one.example.path),
                "about": _size(one),
                "caption": one.example.caption,
                "marks": [(mark.level, mark.mark) for mark in marks],
                "level": marks[0].level if marks else "",
            }
        )
    most = max(len(some) for some in survey.buckets.values())
    rows = [
        {"shape": shape, "count": len(some), "bar": len(some) / most, "cut": [1 - one.kept for one in some]}
        for shape, some in survey.buckets.items()
    ]
    about = {"headline": headline(survey), "places": places(survey), "signs": SIGNS}
    html = _template().render(survey=survey, found=found, rows=rows, cells=cells, **about)
    return write_text(path, html.encode("utf-8", "replace").decode())


def _chosen(survey: Survey, found: Sequence[Finding]) -> list[Look]:
    """The pictures to show: all of them in order, or of very many the marked ones and then the first."""
    if len(survey.looks) <= MOST:
        return list(survey.looks)
    return sorted(survey.looks, key=lambda one: not _marks(one, found))[:MOST]


def _marks(one: Look, found: Sequence[Finding]) -> list[Finding]:
    """What was found about a picture, the worst first."""
    return [finding for finding in found if finding.mark and one.example.path in finding.pictures]


def _seen(one: Look, side: int = CELL) -> Image.Image:
    """A picture as training cuts it, in a square of `side`, with what its mask leaves out darkened."""
    scale = side / max(one.shape)
    shape = (max(1, round(one.shape[0] * scale)), max(1, round(one.shape[1] * scale)))
    picture = load_picture(one.example, shape)
    if one.example.mask:
        light = 0.25 + 0.75 * load_mask(one.example, shape, 1)[..., None]
        picture = Image.fromarray((np.asarray(picture) * light).astype(np.uint8))
    return picture


def _size(one: Look) -> str:
    (width, height), repeats = one.example.size, one.example.repeats
    again = f", {repeats} times" if repeats > 1 else ""
    return f"{width}x{height} to {one.shape[0]}x{one.shape[1]}{again}"


def _write(image: Image.Image, at: tuple[int, int], text: str, width: int, colour: str) -> None:
    """One line of text, shortened with … to fit into `width` pixels."""
    pen, font, shown = ImageDraw.Draw(image), ImageFont.load_default(14), " ".join(text.split())
    while len(shown) > 1 and pen.textlength(shown, font) > width:
        shown = shown[:-2].rstrip() + "…"
    pen.text(at, shown, fill=colour, font=font)


def _url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


@cache
def _template() -> Any:
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.loader = FileSystemLoader(Path(__file__).parent)
    return env.get_template("page.html.j2")
