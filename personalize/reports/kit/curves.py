"""Curves as SVG paths. A panel is a 1000 x 1000 box that the page stretches; labels are placed in per cent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...text import compact

T = TypeVar("T")
Point = tuple[float, float]  # (x, y), such as (step, loss)
BOX = 1000
BUCKETS = 240  # a curve never has more points than this
DOTS = 900


@dataclass(frozen=True)
class Line:
    """One curve: css class, label, and `d` of its path."""

    kind: str
    label: str
    d: str


@dataclass(frozen=True)
class Panel:
    """A chart: its lines, faint dots, and ticks as (per cent, text)."""

    title: str
    lines: tuple[Line, ...]
    dots: str
    rows: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, str], ...]
    readings: tuple[tuple[float, float, float, str], ...]  # (x %, y %, x, value) of the first line, for the cross-hair


def plot(title: str, lines: Sequence[tuple[str, str, list[Point]]], raw: list[Point]) -> Panel:
    """Place curves and dots; the scale starts at zero or below and leaves the wildest 2 % of the dots at the rim."""
    values = sorted(value for _, value in raw)
    calm = values[int(0.98 * (len(values) - 1)) : int(0.98 * (len(values) - 1)) + 1]
    top = max([value for *_, points in lines for _, value in points] + calm) * 1.04 or 1.0
    bottom = min([0.0, *(value for *_, points in lines for _, value in points)]) * 1.04
    ends = [step for points in (*(points for *_, points in lines), raw) for step, _ in (points[:1] + points[-1:])]
    low, high = min(ends), max(max(ends), min(ends) + 1)
    across = lambda step: (step - low) / (high - low)  # noqa: E731
    up = lambda value: 1 - min((value - bottom) / (top - bottom), 1.0)  # noqa: E731
    at = lambda point: f"{BOX * across(point[0]):.0f} {BOX * up(point[1]):.0f}"  # noqa: E731
    first, whole = lines[0][2], high - low > 10  # steps are whole, strengths are not
    return Panel(
        title,
        tuple(Line(kind, label, "M" + "L".join(at(point) for point in points)) for kind, label, points in lines),
        "".join(f"M{at(point)}h0" for point in thin(raw, DOTS)),
        tuple((100 * up(value), compact(value)) for value in ticks(bottom, top, 3) if bottom <= value <= top),
        tuple((100 * across(step), f"{step:g}") for step in ticks(low, high, 5) if step % 1 == 0 or not whole),
        tuple(
            (round(100 * across(x), 2), round(100 * up(y), 2), int(x) if whole else x, compact(y)) for x, y in thin(first, 160)
        ),
    )


def smooth(points: Sequence[Point]) -> list[Point]:
    """Gaussian-weighted running mean, 1/18 of the run wide."""
    grouped = buckets(points)
    width = max(1.0, len(grouped) / 18)
    reach = math.ceil(3 * width)
    out = []
    for i, (step, _, _) in enumerate(grouped):
        near = range(max(0, i - reach), min(len(grouped), i + reach + 1))
        weights = [grouped[j][2] * math.exp(-0.5 * ((i - j) / width) ** 2) for j in near]
        out.append((step, sum(w * grouped[j][1] for w, j in zip(weights, near, strict=True)) / sum(weights)))
    return out


def thin(points: Sequence[Point], most: int = BUCKETS) -> list[Point]:
    """At most that many of the points, evenly chosen, the first and last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers between low and high.

    >>> ticks(0, 200)
    [0.0, 50.0, 100.0, 150.0, 200.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999) * power
    first = math.ceil(low / unit - 1e-9)
    return [round(i * unit, 12) for i in range(first, math.floor(high / unit + 1e-9) + 1)]


def buckets(points: Sequence[Point]) -> list[tuple[float, float, int]]:
    """Points gathered into at most BUCKETS runs of neighbours: (mean step, mean value, count)."""
    groups = parts(points, min(BUCKETS, len(points)))
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part), len(part)) for part in groups]


def parts(things: Sequence[T], count: int) -> list[Sequence[T]]:
    """The sequence cut into so many nearly equal runs."""
    return [things[i * len(things) // count : (i + 1) * len(things) // count] for i in range(count)]
