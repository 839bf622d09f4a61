"""Shapes of weights, and which ones may be the same weight's."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def same(shape: Shape, known: Shape) -> bool:
    """Whether a shape as a file tells it may be that of a known weight.

    -1 matches anything (OFT and IA3 tell one side or none), [out, in * kh * kw] a convolution (LoHa and LoKr store it flat),
    and a 1x1 convolution is as good as a linear layer.

    >>> same((320, 36), (320, 4, 3, 3)), same((320, -1), (320, 4, 3, 3)), same((320, 4), (320, 4, 3, 3))
    (True, True, False)
    """
    if shape == known:
        return True
    if (len(shape), len(known)) == (2, 4):
        known = (known[0], math.prod(known[1:]))
    elif (len(shape), len(known)) == (4, 2):
        known = (*known, 1, 1)
    return len(shape) == len(known) and all(size in (-1, true) for size, true in zip(shape, known, strict=True))
