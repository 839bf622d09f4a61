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
    change: str = ""


def meter(row: Record) -> Meter:
    """A row of metrics.json with places on a track and what changed."""
    values = {key: number(row.get(key)) for key in ("floor", "base", "adapter", "ceiling")}
    known = [value for value in values.values() if value is not None]
    unit, lower = str(row.get("unit") or ""), row.get("better") == "lower"
    low, high = min(0.0, *known), max(*known, 100.0 if unit == "%" else 1.0 if max(known) <= 1 else 0.0)
    span = (high - low) or 1.0
    places = {key: round(100 * (value - low) / span, 2) for key, value in values.items() if value is not None}
    return Meter(
        str(row["name"]), str(row.get("explain") or ""), unit, lower, values, places, change(values["base"], values["adapter"])
    )


def change(base: float | None, adapter: float | None) -> str:
    """What the adapter did to a figure. Whether that is good, the verdict says, which is calibrated; these figures are not."""
    if base is None or adapter is None:
        return ""
    difference = adapter - base
    return f"{'+' if difference > 0 else ''}{compact(difference)}" if difference else "unchanged"
