"""GLoRA (Chavan et al. 2023, https://arxiv.org/abs/2306.07967): dW = alpha / rank * (W a1 a2 + b1 b2).

As LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS) writes and applies it. It once stored all four the other way round
(W a2 a1 + b2 b1), which shapes tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...families.family import Shape
from .kind import DORA, DOWN, MID, SCALED, UP, Kind, Shapes, check, product, ratio, shapes_of
from .lora import shape as lora_shape

if TYPE_CHECKING:
    from torch import Tensor

    from .kind import Tensors

NAMES = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


def shape(shapes: Shapes) -> Shape:
    """That of b1 @ b2, or of b2 @ b1 in old files; a1 @ a2 is [in, in]."""
    a, b, c, d = _in_order(shapes)
    if "bm.weight" in shapes:
        check(c == "b1.weight", shapes, "bm.weight", c, d)
        whole = lora_shape({UP: shapes[c], MID: shapes["bm.weight"], DOWN: shapes[d]})
    else:
        whole = product(shapes, c, d)
    check(product(shapes, a, b)[:2] == (whole[1], whole[1]) and set(shapes[b][2:]) <= {1}, shapes, a, b, c, d)
    return whole


def rank(shapes: Shapes) -> int:
    """The inner side of b1 @ b2."""
    return shapes[_in_order(shapes)[3]][0]


def _in_order(shapes: Shapes) -> tuple[str, str, str, str]:
    """The roles as they are multiplied. On a square weight both orders fit: then the rank, smaller than the width, tells."""
    (out, inner, *_), (other, inside, *_) = shapes["b1.weight"], shapes["b2.weight"]
    if inner == other and (inside != out or out >= inner):
        return NAMES
    return NAMES[1], NAMES[0], NAMES[3], NAMES[2]


def delta(tensors: Tensors, weight: Tensor | None, alpha: float | None) -> Tensor:
    """alpha / rank * (W a1 a2 + b1 b2), in W's shape."""
    import torch

    assert weight is not None
    shapes = shapes_of(tensors)
    a1, a2, b1, b2 = (tensors[role] for role in _in_order(shapes))
    if "bm.weight" in tensors:
        own = torch.einsum("mnkl,im,nj->ijkl", tensors["bm.weight"], b1.flatten(1), b2.flatten(1))
    else:
        own = b1.flatten(1) @ b2.flatten(1)
    mixed = torch.einsum("oi...,ij->oj...", weight, a1.flatten(1) @ a2.flatten(1))
    return ratio(rank(shapes), alpha) * (mixed + own.reshape(weight.shape))


GLORA = Kind(
    "GLoRA",
    NAMES,
    ("bm.weight", *SCALED),
    shape,
    rank,
    delta,
    linear_in=("a1.weight", "b1.weight"),
    needs_base=True,
    names={DORA: "GLoRA + DoRA"},
)
