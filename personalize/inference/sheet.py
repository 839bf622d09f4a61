"""Contact sheets: small images enlarged, set out in a grid, with a line of text over columns and rows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..io import atomic


class Pictures(list[Image.Image]):
    """Images that a notebook shows beside each other. Otherwise a list."""

    def _repr_png_(self) -> bytes | None:
        if not self:
            return None
        buffer = io.BytesIO()
        contact_sheet(self, min(4, len(self))).save(buffer, format="PNG")
        return buffer.getvalue()


def enlarge(picture: Image.Image, side: int = 192) -> Image.Image:
    """A small picture grown by a whole factor to at least `side` pixels, every pixel kept square; a large one as it is."""
    factor = max(1, -(-side // max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def contact_sheet(
    pictures: Sequence[Image.Image], columns: int, *, rows: Sequence[str] = (), heads: Sequence[str] = (), side: int = 192
) -> Image.Image:
    """A contact sheet on white, `columns` wide: `heads` label the columns, `rows` (e.g. prompts), of
    one line or several, stand above their row."""
    cells = [enlarge(picture, side) for picture in pictures]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    gap, line = 8, 22
    top, label = (line if heads else 0) + gap, line * max((row.count("\n") + 1 for row in rows), default=0)
    lines = -(-len(cells) // columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), top + lines * (label + height + gap)), "white")
    for i, head in enumerate(heads[:columns]):
        write_line(sheet, (gap + i * (width + gap), gap // 2), head, width)
    for i, row in enumerate(rows[:lines]):
        for j, text in enumerate(row.split("\n")):
            write_line(sheet, (gap, top + i * (label + height + gap) + j * line), text, sheet.width - 2 * gap)
    for i, cell in enumerate(cells):
        sheet.paste(cell, (gap + i % columns * (width + gap), top + i // columns * (label + height + gap) + label))
    return sheet


def write_line(sheet: Image.Image, at: tuple[int, int], text: str, width: int) -> None:
    """One line of text, shortened with … to fit into `width` pixels."""
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    shown = text
    while len(shown) > 1 and pen.textlength(shown, font) > width:
        shown = shown[:-2].rstrip() + "…"
    pen.text(at, shown, fill="#333333", font=font)


def save_sheet(sheet: Image.Image, path: Path) -> Path:
    """Write a plain PNG, whole or not at all."""
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path
