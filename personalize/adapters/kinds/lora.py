"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): dW = alpha / rank * up @ down.

up [out, r] and down [r, in] on a linear layer; up [out, r, 1, 1] and down [r, in, kh, kw] on a convolution (LoCon), or with a
Tucker core mid [r, r, kh, kw] between up and down [r, in, 1, 1].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...families.family import Shape
from .kind import (
    DORA,
    DOWN,
    MAGNITUDE,
    MID,
    SCALED,
    UP,
    Kind,
    MisfitError,
    Shapes,
    Size,
    check,
    inner,
    product,
    ratio,
    tucker_shape,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from .kind import Tensors


def shape(shapes: Shapes) -> Shape:
    """[out, in(, kh, kw)]; with a Tucker core in the middle, the kernel is the core's."""
    up, down = shapes[UP], shapes[DOWN]
    if MID not in shapes:
        if len(up) not in (2, len(down)) or len(down) not in (2, 4):
            raise MisfitError(f"{DOWN} of shape {list(down)} does not fit its other half {list(up)}")
        return product(shapes, UP, DOWN)
    whole = tucker_shape(shapes, MID, product(shapes, UP, MID)[0], down[1], UP, DOWN)
    check(product({**shapes, MID: shapes[MID][:2]}, MID, DOWN)[2:] in ((), (1, 1)), shapes, MID, DOWN)
    return whole


def delta(tensors: Tensors, weight: Tensor | None, alpha: float | None) -> Tensor:
    """alpha / rank * up @ down, [out, in(, kh, kw)]."""
    up, down = pair(tensors)
    return (ratio(len(down), alpha) * up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def pair(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """up [out, r(, 1, 1)] and down [r, in(, kh, kw)], with a Tucker core folded into `down`: exact."""
    import torch

    up, down = tensors[UP], tensors[DOWN]
    if MID in tensors:
        down = torch.einsum("rskl,si->rikl", tensors[MID].float(), down.flatten(1).float())
    return up.reshape(*up.shape[:2], *[1] * (down.ndim - 2)), down  # flat beside a kernel in LyCORIS' DyLoRA


def factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """up [out, r] and down [r, in * kh * kw]."""
    up, down = pair(tensors)
    return up.flatten(1), down.flatten(1)


def start(weight: Tensor, size: Size, generator: Generator) -> dict[str, Tensor]:
    """dW = 0 for a weight [out, in(, kh, kw)]: down ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is peft's and kohya's; up = 0."""
    import torch

    out, *fan_in = weight.shape
    bound = 1 / math.sqrt(math.prod(fan_in))
    down = torch.empty(size.rank, *fan_in).uniform_(-bound, bound, generator=generator)
    return {UP: torch.zeros(out, size.rank, *[1] * (len(fan_in) - 1)), DOWN: down}


def forward(layer: nn.Module, x: Tensor, out: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """W x + scale * up down x, for a linear layer ([..., in] => [..., out]) or a convolution ([b, in, h, w] => [b, out, h, w]).

    In fp32 the bits are peft's; in other dtypes a linear layer multiplies by `up`, scales and adds in one operation.
    """
    from torch import float32
    from torch.nn.functional import conv2d, linear

    up, down = tensors[UP].to(x.dtype), tensors[DOWN].to(x.dtype)
    if down.ndim == 4:
        change = conv2d(layer._conv_forward(x, down, None), up)  # type: ignore[operator]
    elif x.dtype == float32:
        change = linear(linear(x, down), up)
    else:
        rows = out.flatten(0, -2)
        return rows.addmm_(linear(x.flatten(0, -2), down), up.T, alpha=scale).unflatten(0, out.shape[:-1])
    return out + (change if scale == 1 else change * scale)


def least_rank(rank: int, share: float) -> int:
    """How many of the ranks count at every timestep where the others go by it: that share, and at least one.

    >>> [least_rank(8, share) for share in (0.01, 0.5, 1)]
    [1, 4, 8]
    """
    return max(1, round(share * rank))


LORA = Kind(
    "LoRA",
    (UP, DOWN),
    (MID, MAGNITUDE, *SCALED),
    shape,
    inner(DOWN),
    delta,
    linear_in=(UP,),
    names={DORA: "DoRA", MAGNITUDE: "DoRA", MID: "LoCon (Tucker)"},
    factors=factors,
    rows=(UP, MAGNITUDE),
    whole=(MID, DORA),
    start=start,
    forward=forward,
    settings=("rslora", "lora_plus", "rank_by_timestep"),
)
