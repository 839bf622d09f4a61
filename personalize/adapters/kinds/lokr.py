"""LoKr (Yeh et al. 2023, https://arxiv.org/abs/2309.14859): dW = alpha / rank * kron(w1, w2).

As LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS) writes and applies it: w1 [o1, i1] and w2 [o2, i2(, kh, kw)] are whole, or
products of w1_a and w1_b, w2_a and w2_b; w2 also with a Tucker core. The rank is the inner side of the factored half.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...families.family import Shape
from .kind import DORA, SCALED, Kind, Shapes, Size, bound_of, check, half, half_shape, largest_divisor, ratio, shapes_of

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from .kind import Tensors

HALVES = (("lokr_w1", "lokr_t1"), ("lokr_w2", "lokr_t2"))  # each with its core


def shape(shapes: Shapes) -> Shape:
    """kron(w1 [o1, i1], w2 [o2, i2(, kh, kw)]), w2 flat over the kernel where it is factored without a Tucker core."""
    (out, inside, *more), (low, *rest) = (_half_shape(shapes, *half) for half in HALVES)
    check(not more, shapes, "lokr_w1")
    return (out * low, inside * rest[0], *rest[1:])


def _half_shape(shapes: Shapes, whole: str, core: str) -> Shape:
    if whole not in shapes:
        return half_shape(shapes, whole, core)
    a, b = f"{whole}_a", f"{whole}_b"
    check(len(shapes[whole]) >= 2 and 0 not in shapes[whole] and not shapes.keys() & {a, b, core}, shapes, whole, a, b, core)
    return shapes[whole]


def rank(shapes: Shapes) -> int:
    """The inner side of the half that is factored; 0, and then no scale, if both are whole."""
    return next((shapes[b][0] for b in ("lokr_w2_b", "lokr_w1_b") if b in shapes), 0)


def delta(tensors: Tensors, weight: Tensor | None, alpha: float | None) -> Tensor:
    """alpha / rank * kron(w1, w2); over a kernel, w1 is 1 x 1."""
    return ratio(rank(shapes_of(tensors)), alpha) * kron(*halves(tensors))


def halves(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """w1 and w2."""
    one, two = (tensors[whole] if whole in tensors else half(tensors, whole, core) for whole, core in HALVES)
    return one, two


def kron(one: Tensor, two: Tensor) -> Tensor:
    """[o1, i1] and [o2, i2(, kh, kw)] => [o1 * o2, i1 * i2(, kh, kw)]. torch.kron fails where sides of 1 leave strides open."""
    (out, inside), (low, deep, *kernel) = one.shape, two.shape
    blocks = one.reshape(out, 1, inside, 1, *[1] * len(kernel)) * two[None, :, None]
    return blocks.reshape(out * low, inside * deep, *kernel)


def thin(tensors: Tensors) -> list[tuple[Tensor, ...]]:
    """w1 and w2 as matrices: whole, or as two factors where those are thin."""
    return [_thin(tensors, whole, core) for whole, core in HALVES]


def _thin(tensors: Tensors, whole: str, core: str) -> tuple[Tensor, ...]:
    if whole in tensors or core in tensors:
        return ((tensors[whole] if whole in tensors else half(tensors, whole, core)).flatten(1),)
    a, b = tensors[f"{whole}_a"], tensors[f"{whole}_b"].flatten(1)
    return (a, b) if a.shape[1] < min(len(a), b.shape[1]) else (a @ b,)


def factor_rank(shapes: Shapes) -> int:
    """That of `factors`; 0 where they would be larger than dW, and of hostile shapes far larger."""
    if "lokr_w2" in shapes or "lokr_t2" in shapes:
        return 0
    out, inside = _half_shape(shapes, *HALVES[0])
    (low, width), (_, *deep) = shapes["lokr_w2_a"], shapes["lokr_w2_b"]
    rank = min(out, inside) * width
    return rank if rank < min(out * low, inside * math.prod(deep)) else 0


def factors(tensors: Tensors) -> tuple[Tensor, Tensor] | None:
    """kron(w1, a @ b) = kron(w1, a) @ kron(1, b) = kron(1, a) @ kron(w1, b), whichever is narrower."""
    import torch

    if not factor_rank(shapes_of(tensors)):
        return None
    one = tensors["lokr_w1"] if "lokr_w1" in tensors else half(tensors, *HALVES[0])
    a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"].flatten(1)
    out, inside = one.shape
    if inside <= out:
        return kron(one, a), kron(torch.eye(inside), b)
    return kron(torch.eye(out), a), kron(one, b)


def start(weight: Tensor, size: Size, generator: Generator) -> dict[str, Tensor]:
    """dW = 0 as LyCORIS starts: w1 and w2_a ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), w2_b = 0, or w2 = 0 where it is whole.

    w2 is factored where its rank is less than half of its longer side.
    """
    import torch

    out, inside, *kernel = weight.shape
    (low, high), (left, right) = split(out, size.factor), split(inside, size.factor)
    tensors = {"lokr_w1": _uniform(low, left, generator)}
    if size.whole or size.rank >= max(high, right) / 2:
        return tensors | {"lokr_w2": torch.zeros(high, right, *kernel)}
    second = torch.zeros(size.rank, right * math.prod(kernel))
    return tensors | {"lokr_w2_a": _uniform(high, size.rank, generator), "lokr_w2_b": second}


def split(side: int, factor: int) -> tuple[int, int]:
    """A side of a weight as two factors, the smaller one first, as LyCORIS' `factorization`: one of them is `factor` if that
    divides the side, else the smaller one is at most that. 0: as near to each other as can be."""
    if factor and side % factor == 0:
        return min(factor, side // factor), max(factor, side // factor)
    small = largest_divisor(side, min(factor or side, math.isqrt(side)))
    return small, side // small


def _uniform(rows: int, columns: int, generator: Generator) -> Tensor:
    import torch

    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


LOKR = Kind(
    "LoKr",
    ("lokr_w1|lokr_w1_a", "lokr_w2|lokr_w2_a"),
    ("lokr_w1_b", "lokr_w2_b", "lokr_t2", *SCALED),
    shape,
    rank,
    delta,
    linear_in=("lokr_w1", "lokr_w1_a"),
    names={DORA: "LoKr + DoRA"},
    factors=factors,
    factor_rank=factor_rank,
    bound=bound_of(*HALVES),
    halves=halves,
    thin=thin,
    rows=("lokr_w1", "lokr_w1_a"),
    whole=(DORA,),
    start=start,
    settings=("rslora", "lokr_factor", "lokr_full"),
)
