"""Curves as SVG paths. A panel is a 1000 x 1000 box that the page stretches; labels are placed in per cent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from .read import Record, number

T = TypeVar("T")
Point = tuple[float, float]  # (step, value)
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


def panels(steps: Sequence[Record]) -> list[Panel]:
    """Loss, learning rate and gradient norm of a run's step records; panels without data are left out."""
    raw = series(steps, "loss")
    drawn = [("loss", [("smooth", "smoothed", smooth(steadied(steps)))], raw)] if len(raw) > 1 else []
    rates = [("unet", "UNet", series(steps, "lr")), ("text", "text encoder", series(steps, "text_encoder_lr"))]
    moving = [(kind, label, thin(points)) for kind, label, points in rates if any(value for _, value in points)]
    drawn += [("learning rate", moving, [])] if moving and len(moving[0][2]) > 1 else []
    norms = series(steps, "grad_norm")
    drawn += [("gradient norm", [("smooth", "smoothed", smooth(norms))], norms)] if len(norms) > 1 else []
    return [panel(*parts) for parts in drawn]


def series(steps: Sequence[Record], key: str) -> list[Point]:
    """The finite values of one key."""
    found = ((record["step"], number(record.get(key))) for record in steps)
    return [(step, value) for step, value in found if value is not None]


def steadied(steps: Sequence[Record]) -> list[Point]:
    """Loss by step with the luck of the timesteps taken out.

    A denoising loss depends far more on the timestep drawn than on what was learned. Each picture's loss is divided by the
    run's mean loss near its timestep and multiplied by the run's mean loss. Without per-picture records it stays as it is.
    """
    pairs = sorted((t, record["step"], loss) for record in steps for t, loss in _drawn(record))
    bins = min(12, len(pairs) // 20)
    if bins < 2:
        return series(steps, "loss")
    overall = sum(loss for *_, loss in pairs) / len(pairs)
    out: dict[float, list[float]] = {}
    for part in _parts(pairs, bins):
        typical = sum(loss for *_, loss in part) / len(part)
        for _, step, loss in part:
            out.setdefault(step, []).append(loss / typical * overall if typical else loss)
    return sorted((step, sum(losses) / len(losses)) for step, losses in out.items())


def smooth(points: Sequence[Point]) -> list[Point]:
    """Gaussian-weighted running mean, 1/18 of the run wide."""
    buckets = _buckets(points)
    width = max(1.0, len(buckets) / 18)
    reach = math.ceil(3 * width)
    out = []
    for i, (step, _, _) in enumerate(buckets):
        near = range(max(0, i - reach), min(len(buckets), i + reach + 1))
        weights = [buckets[j][2] * math.exp(-0.5 * ((i - j) / width) ** 2) for j in near]
        out.append((step, sum(w * buckets[j][1] for w, j in zip(weights, near, strict=True)) / sum(weights)))
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


def panel(title: str, lines: Sequence[tuple[str, str, list[Point]]], raw: list[Point]) -> Panel:
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
        tuple((100 * up(value), figure(value)) for value in ticks(bottom, top, 3) if bottom <= value <= top),
        tuple((100 * across(step), f"{step:g}") for step in ticks(low, high, 5)),
        tuple((round(100 * across(s), 2), round(100 * up(v), 2), int(s) if whole else s, figure(v)) for s, v in thin(first, 160)),
    )


def figure(value: float) -> str:
    """Three significant digits, without a trail of zeros.

    >>> figure(0.04), figure(0.0005), figure(123.4), figure(12345.6)
    ('0.04', '5e-4', '123', '12,346')
    """
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def _drawn(record: Record) -> list[tuple[float, float]]:
    """(timestep, loss) of each picture in a step."""
    times, losses = record.get("timesteps"), record.get("losses")
    if not isinstance(times, list) or not isinstance(losses, list) or len(times) != len(losses):
        return []
    numbers = [(number(t), number(loss)) for t, loss in zip(times, losses, strict=True)]
    return [(t, loss) for t, loss in numbers if t is not None and loss is not None]


def _buckets(points: Sequence[Point]) -> list[tuple[float, float, int]]:
    """Points gathered into at most BUCKETS runs of neighbours: (mean step, mean value, count)."""
    parts = _parts(points, min(BUCKETS, len(points)))
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part), len(part)) for part in parts]


def _parts(things: Sequence[T], count: int) -> list[Sequence[T]]:
    """The sequence cut into so many nearly equal runs."""
    return [things[i * len(things) // count : (i + 1) * len(things) // count] for i in range(count)]
