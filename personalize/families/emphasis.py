r"""Prompts as UIs read them: (more), [less], (this much:1.3), BREAK, and \( \) for plain brackets."""

from __future__ import annotations

import re

STEP = 1.1  # of one pair of brackets, in AUTOMATIC1111
TOKEN = re.compile(r"\\[()\[\]{}\\:]|\\|\(|\[|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\)|\]|\bBREAK\b|[^\\()\[\]:B]+|:|B")

Piece = tuple[str, float | None]  # text and its weight; without one, the text goes on in a new window
BREAK: Piece = ("", None)


def pieces(prompt: str) -> list[Piece]:
    r"""A prompt as (text, weight) pieces, as AUTOMATIC1111 reads it; BREAK stands for itself.

    Brackets that are left open weigh what a pair would; closing ones without a partner are text.

    >>> pieces("a (red:1.3) [old] cat")
    [('a ', 1.0), ('red', 1.3), (' ', 1.0), ('old', 0.909), (' cat', 1.0)]
    >>> pieces(r"miku \(vocaloid\), ((big))")
    [('miku (vocaloid), ', 1.0), ('big', 1.21)]
    """
    found: list[list] = []
    round_open: list[int] = []
    square_open: list[int] = []

    def weigh(start: int, factor: float) -> None:
        for piece in found[start:]:
            if piece[1] is not None:
                piece[1] *= factor

    for match in TOKEN.finditer(prompt):
        text, number = match[0], match[1]
        if text == "(":
            round_open.append(len(found))
        elif text == "[":
            square_open.append(len(found))
        elif number is not None and round_open:
            weigh(round_open.pop(), float(number))
        elif text == ")" and round_open:
            weigh(round_open.pop(), STEP)
        elif text == "]" and square_open:
            weigh(square_open.pop(), 1 / STEP)
        elif text == "BREAK":
            found.append(list(BREAK))
        else:
            found.append([text[1:] if len(text) == 2 and text[0] == "\\" else text, 1.0])
    for opened, factor in ((round_open, STEP), (square_open, 1 / STEP)):
        for start in opened:
            weigh(start, factor)
    return _merge_neighbours([(text, weight if weight is None else round(weight, 3)) for text, weight in found])


def _merge_neighbours(found: list[Piece]) -> list[Piece]:
    """Neighbours of one weight as one piece."""
    merged: list[Piece] = []
    for text, weight in found:
        if merged and weight is not None and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged
