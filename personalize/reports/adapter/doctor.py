"""What the doctor of adapters found, for a person, for a program, and as a picture.

Adapters go by letters, A B C ..., in the order given. What a file says never reaches a terminal raw.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from string import ascii_uppercase
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ...text import plain, readable

if TYPE_CHECKING:
    from ...adapters.doctor.collisions import Collision, Meeting
    from ...adapters.doctor.exam import Checkup
    from ...adapters.doctor.prognosis import Prediction
    from ...findings import Finding

WIDTH = 100  # columns
NAMED = 3  # layers or keys that a finding names


# ---------------------------------------------------------------- table


def table(checkups: Sequence[Checkup], collision: Collision | None = None, predictions: Sequence[Prediction] = ()) -> str:
    """Each file, the strengths by block, each pair by block, block weights that help, and what a merge would lose."""
    lines = [line for place, checkup in enumerate(checkups) for line in (*_file(letter(place), checkup), "")]
    lines += [*_strengths(checkups, collision), ""]
    for pair in collision.pairs if collision else ():
        lines += [*_pair(collision, pair), ""]  # type: ignore[arg-type]
    if collision and len(checkups) > 1:
        lines += [*_advice(checkups, collision), ""]
    return "\n".join([*lines, *_forecast(predictions)]).rstrip()


def letter(place: int) -> str:
    """A, B, C, ... Z, A1, B1 ..."""
    turn, index = divmod(place, len(ascii_uppercase))
    return ascii_uppercase[index] + (str(turn) if turn else "")


def _file(name: str, checkup: Checkup) -> Iterator[str]:
    about = checkup.about
    yield f"{name}  {plain(str(about.path))}  ({readable(about.bytes)})"
    for label, text in _rows(checkup):
        if text:
            yield from textwrap.wrap(f"{label:<10}{plain(text)}", WIDTH, initial_indent=" " * 3, subsequent_indent=" " * 13)
    for finding in checkup.findings:
        yield from _finding(finding)


def _rows(checkup: Checkup) -> Iterator[tuple[str, str]]:
    about = checkup.about
    yield "what", f"{about.kind} for {about.family}, {about.dialect or 'no known'} names, {about.dtype}"
    yield "trigger", checkup.trigger
    yield "parts", ", ".join(f"{part} ({count} layers)" for part, count in about.parts.items())
    yield "rank", _counted(about.ranks)
    yield "alpha", _counted(about.alphas)
    effective = [module.effective for module in checkup.modules if module.effective is not None]
    if effective:
        holds = f"; rank {checkup.needed} holds 99 % of it" if checkup.needed is not None else ""
        yield "in use", f"effective rank {median(effective):.1f} in the median layer{holds}"
    yield "strength", f"||dW|| = {figure(checkup.norm)}"
    yield "health", _health(checkup)


def _counted(values: Mapping[int, int] | Mapping[float, int]) -> str:
    """`8`, or `8 in 90 layers, 4 in 32 layers` where there are several."""
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    shown = [f"{value:g} in {count} layers" for value, count in list(values.items())[:4]]
    return ", ".join(shown) + (" ..." if len(values) > 4 else "")


def _health(checkup: Checkup) -> str:
    counts = {level: sum(one.level == level for one in checkup.findings) for level in ("error", "warning")}
    told = [f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items() if count]
    return ", ".join(told) or "sound"


def _finding(finding: Finding) -> Iterator[str]:
    text = plain(finding.what, 300)
    if finding.where:
        more = f" and {len(finding.where) - NAMED} more" if len(finding.where) > NAMED else ""
        text += ": " + ", ".join(plain(str(name), 90) for name in finding.where[:NAMED]) + more
    indent = " " * 15
    yield from textwrap.wrap(
        f"{finding.level:<10}[{finding.code}] {text}", WIDTH, initial_indent=" " * 5, subsequent_indent=indent
    )
    if finding.hint:
        yield from textwrap.wrap(f"-> {plain(finding.hint)}", WIDTH, initial_indent=indent, subsequent_indent=indent + "   ")


def _strengths(checkups: Sequence[Checkup], collision: Collision | None) -> Iterator[str]:
    """||dW|| by block, at the weights given; as many adapters side by side as fit."""
    norms, blocks = _norms(checkups, collision), _blocks(checkups, collision)
    weights = collision.weights if collision else (1.0,) * len(checkups)
    yield "strength by block: ||dW||, and the share of the adapter's ||dW||^2"
    for first in range(0, len(norms), 4):
        shown = range(first, min(first + 4, len(norms)))
        heads = [cell for i in shown for cell in (letter(i) + (f" x {weights[i]:g}" if weights[i] != 1 else ""), "share")]
        rows = [[block, *(cell for i in shown for cell in _strength(norms[i], block))] for block in blocks]
        total = ["all", *(cell for i in shown for cell in (figure(math.hypot(*norms[i].values())), ""))]
        yield from aligned([["block", *heads], *rows, total])


def _strength(norms: Mapping[str, float], block: str) -> tuple[str, str]:
    if block not in norms:
        return "-", ""
    total = math.hypot(*norms.values())
    return figure(norms[block]), f"{(norms[block] / total) ** 2 if total else 0:.0%}"


def _pair(collision: Collision, pair: tuple[int, int]) -> Iterator[str]:
    a, b = map(letter, pair)
    met = [one for one in collision.meetings if one.pair == pair]
    if not met:
        yield f"{a} and {b} change no layer in common"
        return
    yield f"{a} and {b}: overlap = sqrt(in * out); chance is what random directions would overlap"
    heads = ["block", "cosine", "overlap", "in", "out", "chance", f"{b} on {a}'s ground", f"{a} on {b}'s ground"]
    yield from aligned([heads, *map(_meeting, met)])


def _meeting(one: Meeting) -> list[str]:
    shares = (one.overlap, one.inputs, one.outputs, one.chance)
    return [one.block, signed(one.cosine, 3), *(f"{share:.3f}" for share in shares), *(f"{share:.0%}" for share in one.invaded)]


def _advice(checkups: Sequence[Checkup], collision: Collision) -> Iterator[str]:
    """Block weights, and what they would do."""
    from ...adapters.doctor.prognosis import THRESHOLD, suggest

    suggestions, reliefs = suggest(collision)
    for pair in collision.twins:
        yield f"{' and '.join(map(letter, pair))} are nearly the same update: use one of them, or both at half their strength"
    if not any(one.factors for one in suggestions):
        yield f"no block needs other weights: nowhere do two overlap by more than {THRESHOLD:g}"
        return
    yield "block weights that would help: who has less of itself in a block makes room there"
    for one in (one for one in suggestions if one.factors):
        blocks = ", ".join(f"{block} x {factor:g}" for block, factor in one.factors.items())
        text = f"{letter(one.place)}  {blocks}; keeps {one.kept:.0%} of its ||dW||"
        yield from textwrap.wrap(text, WIDTH, initial_indent=" " * 3, subsequent_indent=" " * 6)
        if one.lbw:
            yield f"      {plain(checkups[one.place].about.path.name)}:{collision.weights[one.place]:g}:lbw={one.lbw}"
    for relief in reliefs:
        names = " and ".join(map(letter, relief.pair))
        yield f"   {names}  overlap {relief.before:.3f} before, {relief.after:.3f} after"


def _forecast(predictions: Sequence[Prediction]) -> Iterator[str]:
    if predictions:
        yield "what merges would change: ||merged - sum|| / ||sum||, before anything is made"
        known = [one for one in predictions if one.error is not None]
        yield from aligned([[_method(one), f"{one.error:.2%}", _basis(one)] for one in known], left=(0, 2))
        if rest := [one.method for one in predictions if one.error is None]:
            yield from textwrap.wrap(
                f"to be known these must be made: {', '.join(rest)}", WIDTH, initial_indent=" " * 3, subsequent_indent=" " * 6
            )


def _method(one: Prediction) -> str:
    return f"{one.method} at rank {one.rank}" if one.rank else one.method


def _basis(one: Prediction) -> str:
    return "exact" if one.exact else f"tried on {one.layers} of {one.of} layers"


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    """Cells in columns, to the right but for those in `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        yield ("   " + "  ".join(cells)).rstrip()


def figure(value: float) -> str:
    """Three significant digits.

    >>> figure(0.01234), figure(12.34), figure(12345.6), figure(0)
    ('0.0123', '12.3', '12,346', '0')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def signed(value: float, digits: int = 2) -> str:
    """With its sign, but for what rounds to nothing.

    >>> signed(0.5), signed(-0.5), signed(-0.001)
    ('+0.50', '-0.50', '0.00')
    """
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


# ---------------------------------------------------------------- JSON


def as_json(checkups: Sequence[Checkup], collision: Collision | None = None, predictions: Sequence[Prediction] = ()) -> str:
    """Everything, for programs."""
    from ...adapters.doctor.prognosis import suggest

    told: dict[str, object] = {"files": [_as_values(checkup) for checkup in checkups]}
    if collision:
        suggestions, reliefs = suggest(collision)
        told |= {"collision": asdict(collision)}
        told |= {"suggestions": [asdict(one) for one in suggestions], "relief": [asdict(one) for one in reliefs]}
    told |= {"predictions": [asdict(one) for one in predictions]}
    return json.dumps(told, default=str, ensure_ascii=True)


def _as_values(checkup: Checkup) -> dict[str, object]:
    about = {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(checkup.about).items()}
    return {
        "about": about,
        "trigger": checkup.trigger,
        "norm": checkup.norm,
        "needed": checkup.needed,
        "blocks": dict(checkup.blocks),
        "findings": [
            {"severity": one.level, "code": one.code, "what": one.what, "where": one.where, "hint": one.hint}
            for one in checkup.findings
        ],
        "modules": [asdict(module) for module in checkup.modules],
    }


# ---------------------------------------------------------------- picture

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
    blocks, groups = _blocks(checkups, collision), _groups(checkups, collision)
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
    norms = _norms(checkups, collision)
    weights = collision.weights if collision else (1.0,) * len(checkups)
    strength = Scale("||dW||", BLUES, 0, max((value for one in norms for value in one.values()), default=1.0) or 1.0, figure)
    labels = [letter(i) + (f" x {weight:g}" if weight != 1 else "") for i, weight in enumerate(weights)]
    groups = [
        ("strength: size of what is added", [Strip(label, own, strength) for label, own in zip(labels, norms, strict=True)])
    ]
    if collision and collision.pairs:
        cosine = Scale("cosine of dW", POLES, -1, 1, signed)
        overlap = Scale("overlap", REDS, 0, 1, "{:.2f}".format)
        pairs = [(f"{letter(a)} and {letter(b)}", _met(collision, (a, b))) for a, b in collision.pairs]
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


def _met(collision: Collision, pair: tuple[int, int]) -> list[Meeting]:
    return [one for one in collision.meetings if one.pair == pair and one.block in collision.blocks]


def _norms(checkups: Sequence[Checkup], collision: Collision | None) -> Sequence[Mapping[str, float]]:
    return collision.norms if collision else [checkup.blocks for checkup in checkups]


def _blocks(checkups: Sequence[Checkup], collision: Collision | None) -> Sequence[str]:
    """All blocks in the order of the family; of files that do not go together, in the order met."""
    return collision.blocks if collision else list(dict.fromkeys(block for checkup in checkups for block in checkup.blocks))
