"""Settings that differ from their defaults; warnings, time, memory and versions of a run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone

from ...recipe.settings import settings
from ...text import base_summary, compact, duration, memory_summary
from ..kit.page import file_size
from .read import Record, Run, number, section


def changed_settings(recipe: Record) -> list[tuple[str, str, str, str]]:
    """Settings that differ from their defaults: (name, value, default, help), in the recipe's own order."""
    filled = {name: setting.default for name, setting in settings().items()} | dict(recipe)
    out = []
    for name, setting in settings().items():
        default = setting.info.get_default(call_default_factory=True, validated_data=filled)
        follows = name == "output" or (name == "name" and recipe.get("name") == recipe.get("trigger"))
        if name in recipe and not follows and setting_text(recipe[name]) != setting_text(default):
            out.append((name, setting_text(recipe[name]), setting_text(default), setting.help))
    return out


def setting_text(value: object) -> str:
    """A setting as one reads it."""
    if isinstance(value, list | tuple):
        return " | ".join(setting_text(one) for one in value)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return compact(value) if isinstance(value, float) else str(value)
    return "" if value is None else str(value)


def warnings(run: Run) -> list[str]:
    """Warnings of the run and what its events show."""
    listed = run.started.get("warnings")
    out = [str(warning) for warning in listed] if isinstance(listed, list) else []
    lost = sum(number(record.get("loss")) is None or record.get("skipped") is True for record in run.steps)
    out += [f"{lost} step{'s' * (lost > 1)} had a loss or gradient that was not finite and changed nothing"] if lost else []
    out += [f"step {record['step']}: {cause}" for record in run.steps if (cause := record.get("cause"))][:3]
    return [*out, *(f"since the run began, {change}" for change in run.changes), *run.notes]


def environment(run: Run) -> list[tuple[str, str]]:
    """Time, memory and versions as (name, value); what is not known is left out."""
    times = [value for value in (number(record.get("seconds")) for record in run.steps) if value]
    middle = sorted(times)[len(times) // 2] if times else None
    batch, finished, facts = number(run.recipe.get("batch_size")), run.finished or {}, section(run.started, "base")
    parameters = run.started.get("parameters")
    rows: list[tuple[str, str]] = [
        ("training", text_or_empty(duration, training_seconds(run))),
        ("command to adapter", text_or_empty(duration, number(finished.get("total_seconds")))),
        ("one step", text_or_empty(duration, middle)),
        ("speed", f"{batch / middle:.3g} pictures/s" if middle and batch else ""),
        ("peak memory", text_or_empty(file_size, number(finished.get("peak_bytes")))),
        ("fits as", memory_summary(fit) if (fit := section(run.started, "fit")).get("words") else ""),
        ("base", base_summary(facts) if facts else ""),
        ("device", " ".join(str(run.started[key]) for key in ("device", "dtype") if run.started.get(key))),
        ("trainable", f"{number(parameters) or 0:,.0f} parameters" if parameters else ""),
        ("adapter file", f"{run.adapter.name}, {file_size(run.adapter.stat().st_size)}" if run.adapter else ""),
        ("resumed", f"{run.starts - 1} time{'s' * (run.starts > 2)}" if run.starts > 1 else ""),
        *((name, str(version)) for name, version in section(run.started, "versions").items()),
    ]
    return [(name, value) for name, value in rows if value]


def text_or_empty(text_of: Callable[[float], str], value: float | None) -> str:
    """A number as text, "" where it is not known."""
    return "" if value is None else text_of(value)


def training_seconds(run: Run) -> float | None:
    """Seconds of training: as the run said, else the sum over its steps."""
    value = number((run.finished or {}).get("seconds"))
    return value if value is not None else sum(number(record.get("seconds")) or 0.0 for record in run.steps) or None


def date_and_time(value: object) -> str:
    """A time stamp, ISO or unix, as a date and minutes."""
    try:
        when = (
            datetime.fromisoformat(value)
            if isinstance(value, str)
            else datetime.fromtimestamp(number(value) or 0.0, timezone.utc)
        )
    except (ValueError, OverflowError, OSError):
        return ""
    return f"{when.day} {when:%B %Y, %H:%M %Z}".rstrip() if value else ""
