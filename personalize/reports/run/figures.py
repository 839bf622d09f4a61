"""Rows of metrics.json as meters."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...text import compact
from .read import Record, number


@dataclass(frozen=True)
class Meter:
    """A row of the figures table; places are per cent along its track, None where there is no value."""

    name: str
    explain: str
    unit: str
    lower: bool
    values: dict[str, float | None]
    places: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    good: bool | None = None


def meter(row: Record) -> Meter:
    """A row of metrics.json with places on a track and a verdict."""
    values = {key: number(row.get(key)) for key in ("floor", "base", "adapter", "ceiling")}
    known = [value for value in values.values() if value is not None]
    unit, lower = str(row.get("unit") or ""), row.get("better") == "lower"
    low, high = min(0.0, *known), max(*known, 100.0 if unit == "%" else 1.0 if max(known) <= 1 else 0.0)
    span = (high - low) or 1.0
    verdict, good = judge(values["base"], values["adapter"], values["ceiling"], lower, span)
    places = {key: round(100 * (value - low) / span, 2) for key, value in values.items() if value is not None}
    return Meter(str(row["name"]), str(row.get("explain") or ""), unit, lower, values, places, verdict, good)


def judge(base: float | None, adapter: float | None, ceiling: float | None, lower: bool, span: float) -> tuple[str, bool | None]:
    """What the adapter did to a figure that ranges over `span`, and whether that is good (None: it hardly matters)."""
    if base is None or adapter is None:
        return "", None
    change, gap = adapter - base, (base if ceiling is None else ceiling) - base
    if abs(gap) > 0.1 * span and (gap < 0) == lower and change / gap >= 0:
        return f"{change / gap:.0%} of the gap closed", change / gap >= 0.5
    good = None if abs(change) <= 0.05 * span else (change < 0) == lower
    return f"{'+' if change > 0 else ''}{compact(change)}" if change else "unchanged", good
