"""How far apart two updates are as dW: exactly, or as cheaply as a limit allows."""

from __future__ import annotations

import math

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


Grams = tuple[Tensor, Tensor]  # of the columns of up and the rows of down: [r, r] each


def grams_of(delta: Delta) -> Grams | None:
    """Both Gram matrices of two factors in fp32; None for what has none, or where they would be larger than dW."""
    if not isinstance(delta, LowRank) or delta.rank > min(delta.up.shape[0], math.prod(delta.shape[1:])):
        return None
    up, down = delta.up.flatten(1), delta.down.flatten(1)
    return up.T @ up, down @ down.T


def estimate_norm(delta: Delta, grams: Grams | None) -> float:
    """||dW||, cheaply: of factors from `grams_of` them, so never below a few ten-thousandths of ||up|| ||down||."""
    if isinstance(delta, LowRank) and grams:
        square = float((grams[0] * grams[1]).sum())
        if 1e-30 < square < math.inf:  # nothing was too small or too large
            return abs(delta.scale) * math.sqrt(square)
    return delta.norm()


def is_within(a: Delta, b: Delta, limit: float, grams: Grams | None = None) -> bool:
    """Whether ||dW_a - dW_b|| <= limit: by a bound from the factors of each rank, or from both halves of Kronecker products, and
    exactly where that does not tell. `grams` are those of b, if they are known."""
    low = isinstance(a, LowRank) and isinstance(b, LowRank) and a.shape == b.shape and a.rank == b.rank
    if low and _bound(a, b, grams) <= limit:  # type: ignore[arg-type]
        return True
    if isinstance(a, Structured) and isinstance(b, Structured) and a.kind == b.kind and (halves := a.row.halves):
        (one, two), (other, another) = halves(a.tensors), halves(b.tensors)
        if one.shape == other.shape and two.shape == another.shape:
            moved = frobenius(one * a.scale - other * b.scale), frobenius(two - another)
            if moved[0] * frobenius(two) + frobenius(other) * abs(b.scale) * moved[1] <= limit:
                return True
    return relative_difference(a, b) <= limit


def _bound(a: LowRank, b: LowRank, grams: Grams | None) -> float:
    """What ||dW_a - dW_b|| cannot exceed, from how far the factors of each rank are apart; NaN or Inf if a number is none."""
    ratio = b.scale / a.scale if a.scale else math.nan
    up, down, other_up, other_down = (one.flatten(1) for one in (a.up, a.down, b.up, b.down))
    sizes = [gram.diagonal().sqrt() for gram in grams] if grams else [_norms(other_up, 0), _norms(other_down, 1)]
    moved = _norms(up - (other_up if ratio == 1 else other_up * ratio), 0), _norms(down - other_down, 1)
    far = moved[0] * (sizes[1] + moved[1]) + abs(ratio) * sizes[0] * moved[1]
    return abs(a.scale) * float(far.sum())


def _norms(matrix: Tensor, dim: int) -> Tensor:
    """Of columns or rows: in a fifth of the time of torch.linalg.vector_norm, which goes against the grain of memory."""
    return (matrix * matrix).sum(dim).sqrt()
