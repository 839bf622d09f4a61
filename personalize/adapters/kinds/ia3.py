"""(IA)^3 (Liu et al. 2022, https://arxiv.org/abs/2205.05638): dW = W * factors, one for each input or output channel.

As LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS) writes it: `weight` holds the factors less 1, `on_input` tells the side.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...errors import AdapterError
from ...families.family import Shape
from .kind import Kind, Shapes, Size, check, no_rank

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from .kind import Tensors


def shape(shapes: Shapes) -> Shape:
    """(-1, -1): one factor for each input or output tells neither side."""
    check(math.prod(shapes["weight"]) > 0, shapes, "weight")
    return (-1, -1)


def delta(tensors: Tensors, weight: Tensor | None, alpha: float | None) -> Tensor:
    """W times a factor per channel, in W's shape."""
    assert weight is not None
    side, factors = 1 if bool(tensors["on_input"].item()) else 0, tensors["weight"]
    if factors.numel() != weight.shape[side]:
        raise AdapterError(f"IA3 factors {list(factors.shape)} do not fit a weight of {list(weight.shape)}")
    return weight * factors.reshape([-1 if i == side else 1 for i in range(weight.ndim)])


def start(weight: Tensor, size: Size, generator: Generator) -> dict[str, Tensor]:
    """dW = 0: a factor less 1 for each output of a linear layer, and for each input of a convolution, where A1111 reads them."""
    import torch

    on_input = weight.ndim > 2
    factors = torch.zeros(1, weight.shape[1], *[1] * (weight.ndim - 2)) if on_input else torch.zeros(len(weight))
    return {"weight": factors, "on_input": torch.tensor(float(on_input))}


IA3 = Kind("IA3", ("weight", "on_input"), (), shape, no_rank, delta, linear_in=("weight",), needs_base=True, start=start)
