"""A contact sheet: each image as training crops it, with what was found about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...data.images import load_picture
from ...data.masks import load_mask
from ...findings import Finding
from ...io import atomic
from .measure import DatasetStats, ImageStats
from .summary import headline, layout

CELL, GAP, LINE, COLUMNS = 176, 12, 19, 6  # pixels, and pictures in a row
MOST = 600  # pictures on a sheet; the marked ones come first when there are more
INK, SOFT, LINES = "#26201b", "#756a60", "#e7dece"
COLOURS = {"error": "#b3284f", "warning": "#b8740a", "info": "#7d8894"}


def write_sheet(stats: DatasetStats, found: Sequence[Finding], path: Path) -> Path:
    """Write the contact sheet as PNG. Raises OutputError."""
    images = shown_images(stats, found)
    columns = max(1, min(COLUMNS, len(images)))
    width = max(3 * (CELL + GAP) + GAP, columns * (CELL + GAP) + GAP)
    row = CELL + 3 * LINE + GAP
    image = Image.new("RGB", (width, GAP + 2 * LINE + GAP + -(-len(images) // columns) * row), "white")
    _draw_text(image, (GAP, GAP), f"{stats.folder.absolute().name}: {headline(stats)}", width - 2 * GAP, INK)
    _draw_text(image, (GAP, GAP + LINE), layout(stats), width - 2 * GAP, SOFT)
    for i, one in enumerate(images):
        left, top = GAP + i % columns * (CELL + GAP), 2 * GAP + 2 * LINE + i // columns * row
        marks = marks_of(one, found)
        crop = training_crop(one)
        at = (left + (CELL - crop.width) // 2, top + (CELL - crop.height) // 2)
        image.paste(crop, at)
        wide = 3 if marks else 1
        frame = (at[0] - wide, at[1] - wide, at[0] + crop.width + wide - 1, at[1] + crop.height + wide - 1)
        ImageDraw.Draw(image).rectangle(frame, outline=COLOURS[marks[0].level] if marks else LINES, width=wide)
        _draw_text(image, (left, top + CELL + 2), stats.name(one.example.path), CELL, INK)
        _draw_text(image, (left, top + CELL + 2 + LINE), size_text(one), CELL, SOFT)
        words = ", ".join(mark.mark for mark in marks) or one.example.caption
        colour = COLOURS[marks[0].level] if marks else SOFT
        _draw_text(image, (left, top + CELL + 2 + 2 * LINE), words, CELL, colour)
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def shown_images(stats: DatasetStats, found: Sequence[Finding]) -> list[ImageStats]:
    """The pictures to show: all of them in order, or of very many the marked ones and then the first."""
    if len(stats.images) <= MOST:
        return list(stats.images)
    return sorted(stats.images, key=lambda one: not marks_of(one, found))[:MOST]


def marks_of(one: ImageStats, found: Sequence[Finding]) -> list[Finding]:
    """What was found about a picture, the worst first."""
    return [finding for finding in found if finding.mark and one.example.path in finding.where]


def training_crop(one: ImageStats, side: int = CELL) -> Image.Image:
    """A picture as training cuts it, in a square of `side`, with what its mask leaves out darkened."""
    scale = side / max(one.shape)
    shape = (max(1, round(one.shape[0] * scale)), max(1, round(one.shape[1] * scale)))
    picture = load_picture(one.example, shape)
    if one.example.mask:
        light = 0.25 + 0.75 * load_mask(one.example, shape, 1)[..., None]
        picture = Image.fromarray((np.asarray(picture) * light).astype(np.uint8))
    return picture


def size_text(one: ImageStats) -> str:
    (width, height), repeats = one.example.size, one.example.repeats
    again = f", {repeats} times" if repeats > 1 else ""
    return f"{width}x{height} to {one.shape[0]}x{one.shape[1]}{again}"


def _draw_text(image: Image.Image, at: tuple[int, int], text: str, width: int, colour: str) -> None:
    """One line of text, shortened with … to fit into `width` pixels."""
    pen, font, shown = ImageDraw.Draw(image), ImageFont.load_default(14), " ".join(text.split())
    while len(shown) > 1 and pen.textlength(shown, font) > width:
        shown = shown[:-2].rstrip() + "…"
    pen.text(at, shown, fill=colour, font=font)
