"""Texts and numbers as a person reads them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def plain(text: str, limit: int = 500) -> str:
    """One line without control characters, which could write anywhere on a terminal, and not endless."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.splitlines()))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def readable(count: float) -> str:
    """Bytes as `340 kB`, `1.2 MB`, `3.4 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def pace(steps_per_second: float) -> str:
    """`12.3 steps/s`, or `4.1 s/step` for slow ones."""
    return f"{steps_per_second:.1f} steps/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.1f} s/step"


def fits(fit: Mapping[str, Any]) -> str:
    """How a run fits into memory, from what it told: `bfloat16, checkpointing: 5.1 of 8.0 GB (probe), estimate 4.8 GB`."""
    told = [f"{readable(fit['probe'])} of {readable(fit['budget'])} (probe)"] if fit.get("probe") and fit.get("budget") else []
    told += [f"estimate {readable(estimate['peak'])}"] if (estimate := fit.get("estimate")) else []
    return f"{fit['words']}{': ' if told else ''}{', '.join(told)}"


def loaded(facts: Mapping[str, Any]) -> str:
    """What was loaded of a base, from its facts: the true dtypes, sizes and prediction, whatever was asked for."""
    prediction = facts["prediction"] + (" with zero-terminal SNR" if facts["zero_snr"] else "")
    stored = " and ".join(f"{dtype.lower()} ({readable(size)})" for dtype, size in facts["stored"].items())
    dtypes = dict.fromkeys(dtype for part in facts["dtypes"].values() for dtype in part.split(" and "))
    held = f"{' and '.join(dtypes)} ({readable(facts['bytes'])})"
    million = sum(facts["parameters"].values()) / 1e6
    return f"{facts['title']}, {prediction}, {million:,.0f} M parameters, stored as {stored}, held as {held}"


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML file says. Raises ValueError for what is none."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def first_line(error: BaseException) -> str:
    """The first line of a library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
