"""How far apart two updates are as dW: exactly, or as cheaply as a limit allows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .delta import Delta, LowRank, Structured, add, frobenius


def relative_difference(a: Delta | None, b: Delta | None) -> float:
    """||dW_a - dW_b||, where a missing update is zero; of the stored tensors where dW depends on the base."""
    if a is None or b is None:
        return (a or b).norm()  # type: ignore[union-attr]
    if a.needs_base or b.needs_base:
        ours, theirs = a.stored(), b.stored()
        same = ours.keys() == theirs.keys() and all(ours[role].shape == theirs[role].shape for role in ours)
        return math.hypot(*(frobenius(ours[role] - theirs[role]) for role in ours)) if same else math.inf
    return add(a, b * -1.0).norm()


def estimate_norm(delta: Delta) -> float:
    """||dW||, cheaply: of factors from their Gram matrices in fp32, so never below a few ten-thousandths of ||up|| ||down||."""
    if isinstance(delta, LowRank) and delta.rank <= min(delta.up.shape[0], math.prod(delta.shape[1:])):
        up, down = delta.up.flatten(1), delta.down.flatten(1)
        square = float(((up.T @ up) * (down @ down.T)).sum())
        if 1e-30 < square < math.inf:  # nothing was too small or too large
            return abs(delta.scale) * math.sqrt(square)
    return delta.norm()


def is_within(a: Delta, b: Delta, limit: float) -> bool:
    """Whether ||dW_a - dW_b|| <= limit: by a bound from both factors, from those of each rank, or from both halves of Kronecker
    products, and exactly where that does not tell."""
    pair = (a, b) if isinstance(a, LowRank) and isinstance(b, LowRank) and (a.shape, a.rank) == (b.shape, b.rank) else None
    if pair and any(abs(pair[0].scale) * float(far.sum()) <= limit for far in _bounds(*pair)):
        return True
    if isinstance(a, Structured) and isinstance(b, Structured) and a.kind == b.kind and (halves := a.row.halves):
        (one, two), (other, another) = halves(a.tensors), halves(b.tensors)
        if one.shape == other.shape and two.shape == another.shape:
            moved = frobenius(one * a.scale - other * b.scale), frobenius(two - another)
            if moved[0] * frobenius(two) + frobenius(other) * abs(b.scale) * moved[1] <= limit:
                return True
    return relative_difference(a, b) <= limit


def _bounds(a: LowRank, b: LowRank) -> Iterator[Tensor]:
    """||dW_a - dW_b|| / a's scale from above, of factors of one rank: by the norms of whole factors, which is quick; then of each
    rank [r], which add up."""
    ratio = b.scale / a.scale if a.scale else math.nan
    other = b.up.flatten(1) if ratio == 1 else b.up.flatten(1) * ratio
    one, two = a.down.flatten(1), b.down.flatten(1)
    up, down = a.up.flatten(1) - other, None if torch.equal(one, two) else one - two
    for columns, rows in ((None, None), (0, 1)):
        far = torch.linalg.vector_norm(up, dim=columns) * torch.linalg.vector_norm(one, dim=rows)
        if down is not None:
            far = far + torch.linalg.vector_norm(other, dim=columns) * torch.linalg.vector_norm(down, dim=rows)
        yield far
