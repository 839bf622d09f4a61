"""Batteries of which `make test` runs a part: the whole is `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def all_but(quick: Collection[Any], rows: Iterable[Any]) -> list[Any]:
    """Rows as parameters; those that are not among the quick ones are marked slow."""
    return [row if row in quick else _slow(row) for row in rows]


def every(step: int, rows: Iterable[Any]) -> list[Any]:
    """Rows as parameters; all but each `step`-th are marked slow."""
    return [_slow(row) if i % step else row for i, row in enumerate(rows)]


def _slow(row: Any) -> Any:
    return pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow)
