"""Adapter layers that compute in their input's dtype, while their factors are fp32 parameters.

Each of them alone would cast its two factors in every forward pass, and their gradients in every backward pass: `lowered` casts
those of all layers at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

NAME = "personalize"  # peft's name for what is attached


class Following:
    """A factor: an fp32 weight that follows its input's dtype. Peft would keep an fp32 copy of each layer's input instead."""

    weight: Tensor
    low: Tensor | None = None  # the weight, cast already

    def factor(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype."""
        return (self.weight if self.low is None else self.low).to(dtype)


class FollowingLinear(Following, nn.Linear):
    """A factor of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.factor(x.dtype))


class FollowingConv(Following, nn.Conv2d):
    """A factor of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.factor(x.dtype), None)


class Adapted:
    """A peft layer with our adapter alone, in fewer operations. In fp32 the bits are peft's."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.disable_adapters or self.merged or self.active_adapters != [NAME]:
            result: Tensor = super().forward(x)  # type: ignore[misc]
            return result
        return self.adapted(x, self.lora_A[NAME], self.lora_B[NAME], self.lora_dropout[NAME], self.scaling[NAME])

    def adapted(self: Any, x: Tensor, down: nn.Module, up: nn.Module, dropout: nn.Module, scale: float) -> Tensor:
        """W x + scale * up down x."""
        out: Tensor = self.base_layer(x)
        change: Tensor = up(down(dropout(x)))
        return out + (change if scale == 1 else change * scale)


class AdaptedLinear(Adapted, lora.Linear):
    """In other dtypes than fp32 `up` is multiplied, scaled and added in one operation, which also rounds but once."""

    def adapted(self, x: Tensor, down: nn.Module, up: Any, dropout: nn.Module, scale: float) -> Tensor:
        if x.dtype == torch.float32:
            return super().adapted(x, down, up, dropout, scale)
        rows = x.flatten(0, -2)
        out: Tensor = self.base_layer(rows)
        return out.addmm_(down(dropout(rows)), up.factor(x.dtype).T, alpha=scale).unflatten(0, x.shape[:-1])


class AdaptedConv(Adapted, lora.Conv2d):
    """A convolution."""


FOLLOWING = {
    nn.Linear: FollowingLinear,
    nn.Conv2d: FollowingConv,
    lora.Linear: AdaptedLinear,
    lora.Conv2d: AdaptedConv,
}


def follow(module: nn.Module) -> None:
    """Let a peft layer, or a factor of one, follow its input's dtype; one that does so already stays as it is."""
    module.__class__ = FOLLOWING.get(type(module), type(module))


class Lower(torch.autograd.Function):
    """fp32 tensors => the same in another dtype, in one operation; so their gradients come back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *full: Tensor) -> tuple[Tensor, ...]:
        ctx.full = full
        ctx.set_materialize_grads(False)
        low = [torch.empty_like(one, dtype=dtype) for one in full]
        torch._foreach_copy_(low, full)
        return tuple(low)

    @staticmethod
    def backward(ctx: Any, *low: Tensor | None) -> tuple[Tensor | None, ...]:
        full = [None if grad is None else torch.empty_like(one) for one, grad in zip(ctx.full, low, strict=True)]
        torch._foreach_copy_([one for one in full if one is not None], [grad for grad in low if grad is not None])
        return None, *full


@contextlib.contextmanager
def lowered(factors: Sequence[Following], dtype: torch.dtype) -> Iterator[None]:
    """Inside, factors are in a base's dtype as they are at the beginning, and gradients reach their weights all the same."""
    if dtype == torch.float32 or not factors:
        yield
        return
    for factor, low in zip(factors, Lower.apply(dtype, *(factor.weight for factor in factors)), strict=True):
        factor.low = low
    try:
        yield
    finally:
        for factor in factors:
            factor.low = None
