"""A stand-in until adapters/kinds/lora.py is merged, with its interface: replace `LORA` by `registry.table("kinds")["LoRA"]`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from ..adapters.kinds.kind import DOWN, UP

Tensors = Mapping[str, Tensor]  # by role


@dataclass(frozen=True)
class Kind:
    """An adapter kind as far as layers need it."""

    name: str
    delta: Callable[[Tensors, Tensor | None, float | None], Tensor]  # tensors, W, alpha -> dW, scale and all
    start: Callable[[tuple[int, ...], int, float, torch.Generator], dict[str, Tensor]] | None = None
    forward: Callable[[nn.Module, Tensor, Tensor, Tensors, float], Tensor] | None = None  # layer, x, W x, tensors, scale


def delta(tensors: Tensors, weight: Tensor | None, alpha: float | None) -> Tensor:
    """alpha / rank * up @ down, [out, in(, kh, kw)]."""
    up, down = tensors[UP], tensors[DOWN]
    scale = 1.0 if alpha is None else alpha / len(down)
    return (scale * up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def start(shape: tuple[int, ...], rank: int, alpha: float, generator: torch.Generator) -> dict[str, Tensor]:
    """dW = 0 for a weight [out, in(, kh, kw)]: down ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is peft's and kohya's; up = 0."""
    out, *fan_in = shape
    bound = 1 / math.sqrt(math.prod(fan_in))
    down = torch.empty(rank, *fan_in).uniform_(-bound, bound, generator=generator)
    return {DOWN: down, UP: torch.zeros(out, rank, *[1] * (len(fan_in) - 1))}


def forward(layer: nn.Module, x: Tensor, out: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """W x + scale * up down x, for a linear layer ([..., in] => [..., out]) or a convolution ([b, in, h, w] => [b, out, h, w]).

    In fp32 the bits are peft's; in other dtypes a linear layer multiplies by `up`, scales and adds in one operation.
    """
    up, down = tensors[UP].to(x.dtype), tensors[DOWN].to(x.dtype)
    if down.ndim == 4:
        change = conv2d(layer._conv_forward(x, down, None), up)  # type: ignore[operator]
    elif x.dtype == torch.float32:
        change = linear(linear(x, down), up)
    else:
        rows = out.flatten(0, -2)
        return rows.addmm_(linear(x.flatten(0, -2), down), up.T, alpha=scale).unflatten(0, out.shape[:-1])
    return out + (change if scale == 1 else change * scale)


LORA = Kind("LoRA", delta, start, forward)
