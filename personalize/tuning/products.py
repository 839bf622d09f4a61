"""LoRA layers that read the same input, computed at once: as few products as there can be, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters.kinds.kind import DOWN, UP
from ..adapters.kinds.lora import LORA
from ..models.joined import as_one, joined_of, neighbours

if TYPE_CHECKING:
    from .layers import AdapterLayer


class LoraProducts(torch.autograd.Function):
    """W_i x + scale * up_i down_i x of n layers i: x [rows, in] => n times [rows, out].

    `weight` [n * out, in] is frozen; behind `scale` come all down [r, in], then all up [out, r].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *factors: Tensor) -> tuple[Tensor, ...]:
        n = ctx.n = len(factors) // 2
        down, up = as_one(factors[:n]), as_one(factors[n:]).unflatten(0, (n, -1))
        out, low = nn.functional.linear(x, weight, bias), x @ down.T
        by_layer(out, n).baddbmm_(by_layer(low, n), up.mT, alpha=scale)
        ctx.save_for_backward(x, weight, low, down, up)
        ctx.scale = scale
        return tuple(out.chunk(n, dim=1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, low, down, up), n, scale = ctx.saved_tensors, ctx.n, ctx.scale
        grad = grads[0] if n == 1 else torch.cat(grads, dim=1)
        low_grad, up_grad = torch.empty_like(low), torch.empty_like(up)
        by_layer(low_grad, n).baddbmm_(by_layer(grad, n), up, beta=0, alpha=scale)
        up_grad.baddbmm_(by_layer(grad, n).mT, by_layer(low, n), beta=0, alpha=scale)
        x_grad = (grad @ weight).addmm_(low_grad, down) if ctx.needs_input_grad[0] else None
        return x_grad, None, None, None, *(low_grad.T @ x).chunk(n), *up_grad.unbind()


def by_layer(rows: Tensor, n: int) -> Tensor:
    """[rows, n * k] => [n, rows, k], a view."""
    return rows.unflatten(1, (n, -1)).transpose(0, 1)


def products(layer: AdapterLayer, x: Tensor) -> Tensor | None:
    """What a layer makes of x [..., in], computed with its siblings, whose shares wait for them; None if it is not joined."""
    joined = joined_of(layer.base_layer)
    if joined is None or not plain_lora(layer) or torch.compiler.is_compiling():
        return None
    name = next(name for name, one in zip(joined.names, joined.layers, strict=True) if one is layer)
    if (found := joined.take(x, name)) is not None:
        assert isinstance(found, Tensor)
        return found
    siblings = siblings_of(layer)
    outs = compute(siblings, x)
    names = joined.names if len(siblings) > 1 else (name,)
    own = dict(zip(names, outs, strict=True))
    result = own.pop(name)
    joined.ready = (x, own) if own else None
    return result


def siblings_of(layer: AdapterLayer) -> list[AdapterLayer]:
    """The adapter layers that are computed with this one, in the order of their weights; itself alone if they are not alike."""
    joined = joined_of(layer.base_layer)
    if joined is None or len(joined.names) == 1:
        return [layer]
    found: list[Any] = joined.layers
    alike = all(type(one) is type(layer) and plain_lora(one) and one.active is layer.active for one in found)
    alike = alike and len({(one.scale(0), one.factors[DOWN].weight.shape) for one in found}) == 1
    return found if alike and neighbours([one.weight for one in found]) else [layer]


def plain_lora(layer: AdapterLayer) -> bool:
    """Whether a layer carries one LoRA on a plain linear layer, and drops nothing."""
    one = len(layer.strengths) == 1 and not (layer.dropping and layer.dropout)
    return one and layer.kind is LORA and layer.factors.keys() == {UP, DOWN} and type(layer.base_layer) is nn.Linear


def compute(layers: Sequence[AdapterLayer], x: Tensor) -> list[Tensor]:
    """W x + scale * up down x of each layer."""
    factors = [one.factors[role].cast(x.dtype) for role in (DOWN, UP) for one in layers]
    weight, first = as_one([one.weight for one in layers]), layers[0]
    outs = LoraProducts.apply(x.flatten(0, -2), weight, first.bias, first.scale(0), *factors)
    return [out.unflatten(0, x.shape[:-1]) for out in outs]
