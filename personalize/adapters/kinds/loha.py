"""LoHa (Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098): dW = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), entrywise.

As LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS) writes and applies it: halves are [out, r] @ [r, in * kh * kw], or have
Tucker cores t1 and t2 [r, r, kh, kw] between [r, out] and [r, in].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...families.family import Shape
from .kind import DORA, SCALED, Kind, MisfitError, Shapes, Size, bound_of, check, half, half_shape, inner, ratio, shapes_of

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from .kind import Tensors

HALVES = (("hada_w1", "hada_t1"), ("hada_w2", "hada_t2"))  # each with its core


def shape(shapes: Shapes) -> Shape:
    """[out, in * kh * kw], or [out, in, kh, kw] with Tucker cores."""
    check(("hada_t1" in shapes) == ("hada_t2" in shapes), shapes, "hada_t1", "hada_t2")
    one, two = (half_shape(shapes, *half) for half in HALVES)
    if one != two:
        raise MisfitError(f"hada_w1 makes {list(one)} and hada_w2 {list(two)}")
    return one


def delta(tensors: Tensors, weight: Tensor | None, alpha: float | None) -> Tensor:
    """alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), entry by entry."""
    one, two = (half(tensors, *names) for names in HALVES)
    return ratio(len(tensors["hada_w1_b"]), alpha) * (one * two)


def factor_rank(shapes: Shapes) -> int:
    """That of `factors`; 0 where they would be larger than dW, and of hostile shapes far larger."""
    if "hada_t1" in shapes:
        return 0
    rank = shapes["hada_w1_a"][1] * shapes["hada_w2_a"][1]
    return rank if rank < min(shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]) else 0


def factors(tensors: Tensors) -> tuple[Tensor, Tensor] | None:
    """Rank r^2: every column of one half times every column of the other (Khatri-Rao)."""
    import torch

    if not factor_rank(shapes_of(tensors)):
        return None
    a, b = tensors["hada_w1_a"], tensors["hada_w2_a"]
    up = torch.einsum("oi,oj->oij", a, b).flatten(1)
    right = torch.einsum("in,jn->ijn", tensors["hada_w1_b"].flatten(1), tensors["hada_w2_b"].flatten(1))
    return up, right.flatten(0, 1)


def start(weight: Tensor, size: Size, generator: Generator) -> dict[str, Tensor]:
    """dW = 0 as LyCORIS starts: w1_a ~ N(0, 0.1), w1_b and w2_b ~ N(0, 1), w2_a = 0; flat over a kernel."""
    import torch

    (out, *rest), rank = weight.shape, size.rank
    inside = math.prod(rest)
    return {
        "hada_w1_a": 0.1 * torch.randn(out, rank, generator=generator),
        "hada_w1_b": torch.randn(rank, inside, generator=generator),
        "hada_w2_a": torch.zeros(out, rank),
        "hada_w2_b": torch.randn(rank, inside, generator=generator),
    }


LOHA = Kind(
    "LoHa",
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("hada_t1", "hada_t2", *SCALED),
    shape,
    inner("hada_w1_b"),
    delta,
    linear_in=("hada_w1_a",),
    names={DORA: "LoHa + DoRA"},
    factors=factors,
    factor_rank=factor_rank,
    bound=bound_of(*HALVES),
    rows=("hada_w1_a", "hada_w2_a"),
    whole=("hada_t1", "hada_t2", DORA),
    start=start,
    settings=("rslora",),
)
