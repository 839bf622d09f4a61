"""Strengths, cosines and overlaps of adapters by block, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ...text import plain, significant, with_sign
from ..kit.tables import letter
from .doctor import block_names, block_norms

if TYPE_CHECKING:
    from ...adapters.doctor.collisions import Collision, Meeting
    from ...adapters.doctor.exam import Checkup

Colour = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
CELL, ROW, MARGIN, GAP = 56, 34, 20, 26
INK, FAINT, ABSENT = "#222222", "#777777", (243, 243, 243)
BLUES: Sequence[Colour] = ((247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107))
REDS: Sequence[Colour] = ((255, 251, 247), (253, 190, 133), (230, 85, 13), (127, 39, 4))
POLES: Sequence[Colour] = ((5, 80, 150), (146, 197, 222), (250, 250, 250), (244, 165, 130), (165, 15, 30))


@dataclass(frozen=True)
class Scale:
    """Colours from `low` to `high`, and how numbers are written."""

    name: str
    colours: Sequence[Colour]
    low: float
    high: float
    write: Callable[[float], str]

    def colour(self, value: float) -> Colour:
        share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0) if self.high > self.low else 0.0
        index = min(int(share * (len(self.colours) - 1)), len(self.colours) - 2)
        rest = share * (len(self.colours) - 1) - index
        a, b = self.colours[index], self.colours[index + 1]
        return tuple(round(x + rest * (y - x)) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Strip:
    """One row of the picture; blocks without a value stay grey."""

    label: str
    values: Mapping[str, float]
    scale: Scale


def heat_map(checkups: Sequence[Checkup], collision: Collision | None = None) -> Image.Image:
    """Blocks across; down: each adapter's strength, each pair's cosine and overlap. Numbers in the cells, a legend below."""
    blocks, groups = block_names(checkups, collision), _groups(checkups, collision)
    fonts = {size: ImageFont.load_default(size) for size in (12, 14, 17)}
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    names = [f"{letter(i)}  {plain(one.about.path.name, 70)}" for i, one in enumerate(checkups)]
    left = MARGIN + 14 + int(max(ruler.textlength(strip.label, fonts[14]) for _, strips in groups for strip in strips))
    tall = sum(GAP + 8 + ROW * len(strips) for _, strips in groups)
    top = MARGIN + 24 * len(names) + 34
    widest = max(int(ruler.textlength(text, fonts[17])) for text in names)
    width = max(left + CELL * len(blocks) + MARGIN, widest + 2 * MARGIN, MARGIN * 2 + 230 * len(groups) + 100)
    sheet = Image.new("RGB", (width, top + tall + 80), "white")
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        pen.text((MARGIN, MARGIN + 24 * i), name, INK, fonts[17])
    for i, block in enumerate(blocks):
        pen.text((left + CELL * (i + 0.5), top - 8), block, INK, fonts[14], anchor="mm")
    y = top + 6
    for title, strips in groups:
        pen.text((MARGIN, y + GAP / 2 + 2), title, FAINT, fonts[12], anchor="lm")
        y += GAP
        for strip in strips:
            _draw_strip(pen, strip, blocks, (left, y), fonts[14], fonts[12])
            y += ROW
        y += 8
    for i, (_, strips) in enumerate(groups):
        _draw_legend(sheet, strips[0].scale, (MARGIN + 230 * i, y + 30), fonts[12])
    pen.text((MARGIN + 230 * len(groups), y + 36), "grey: not changed", FAINT, fonts[12], anchor="lm")
    return sheet


def _draw_strip(
    pen: ImageDraw.ImageDraw,
    strip: Strip,
    blocks: Sequence[str],
    at: tuple[int, int],
    font: Font,
    small: Font,
) -> None:
    left, y = at
    pen.text((left - 10, y + ROW / 2), strip.label, INK, font, anchor="rm")
    for i, block in enumerate(blocks):
        value = strip.values.get(block)
        fill = ABSENT if value is None else strip.scale.colour(value)
        pen.rectangle((left + CELL * i + 1, y + 1, left + CELL * (i + 1) - 2, y + ROW - 2), fill)
        if value is not None:
            ink = "white" if 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 140 else INK
            pen.text((left + CELL * (i + 0.5), y + ROW / 2), strip.scale.write(value), ink, small, anchor="mm")


def _draw_legend(sheet: Image.Image, scale: Scale, at: tuple[int, int], font: Font) -> None:
    x, y = at
    pen, long = ImageDraw.Draw(sheet), 180
    for i in range(long):
        pen.line((x + i, y, x + i, y + 12), scale.colour(scale.low + (scale.high - scale.low) * i / (long - 1)))
    pen.rectangle((x - 1, y - 1, x + long, y + 13), outline="#bbbbbb")
    for share, anchor in ((0.0, "lt"), (0.5, "mt"), (1.0, "rt")):
        pen.text(
            (x + share * long, y + 17), scale.write(scale.low + share * (scale.high - scale.low)), FAINT, font, anchor=anchor
        )
    pen.text((x, y - 5), scale.name, INK, font, anchor="ls")


def _groups(checkups: Sequence[Checkup], collision: Collision | None) -> list[tuple[str, list[Strip]]]:
    """Title and rows: strengths first, then what pairs have in common."""
    norms = block_norms(checkups, collision)
    weights = collision.weights if collision else (1.0,) * len(checkups)
    strength = Scale("||dW||", BLUES, 0, max((value for one in norms for value in one.values()), default=1.0) or 1.0, significant)
    labels = [letter(i) + (f" x {weight:g}" if weight != 1 else "") for i, weight in enumerate(weights)]
    groups = [
        ("strength: size of what is added", [Strip(label, own, strength) for label, own in zip(labels, norms, strict=True)])
    ]
    if collision and collision.pairs:
        cosine = Scale("cosine of dW", POLES, -1, 1, with_sign)
        overlap = Scale("overlap", REDS, 0, 1, "{:.2f}".format)
        pairs = [(f"{letter(a)} and {letter(b)}", _meetings_of(collision, (a, b))) for a, b in collision.pairs]
        groups += [
            (
                "cosine: +1 the same, -1 the opposite",
                [Strip(label, {m.block: m.cosine for m in met}, cosine) for label, met in pairs],
            ),
            (
                "overlap: what they read and write in common",
                [Strip(label, {m.block: m.overlap for m in met}, overlap) for label, met in pairs],
            ),
        ]
    return groups


def _meetings_of(collision: Collision, pair: tuple[int, int]) -> list[Meeting]:
    return [one for one in collision.meetings if one.pair == pair and one.block in collision.blocks]
