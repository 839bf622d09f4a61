"""Columns of text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase


def align_columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    """Cells in columns, to the right but for those in `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        yield ("   " + "  ".join(cells)).rstrip()


def counts(values: Mapping[int, int] | Mapping[float, int], form: str, most: int) -> str:
    """Values and how often each occurs, at most so many of them; a single value stands alone.

    >>> counts({8: 90}, "{:g} ({} layers)", 6), counts({8: 90, 4: 32}, "{:g} ({} layers)", 6)
    ('8', '8 (90 layers), 4 (32 layers)')
    """
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    shown = [form.format(value, count) for value, count in list(values.items())[:most]]
    return ", ".join(shown) + (" ..." if len(values) > most else "")


def letter(place: int) -> str:
    """The name of a file in a table.

    >>> [letter(place) for place in (0, 25, 26)]
    ['A', 'Z', 'A1']
    """
    turn, index = divmod(place, len(ascii_uppercase))
    return ascii_uppercase[index] + (str(turn) if turn else "")
