"""A bound on how large the update of a layer becomes, after each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..adapters.kinds.kind import DOWN, UP
from .dense import DenseLayer
from .layers import AdapterLayer

Update = tuple[Tensor, list[Tensor], float]  # the norm of dW, tensors, and the power of a factor each takes for dW to take it


@torch.no_grad()
def bound_norms(layers: Iterable[AdapterLayer], number: int, most: float) -> int:
    """Bring each layer's dW, of adapter `number`, down to a Frobenius norm of `most`; how many were above it.

    Max norm regularization (Srivastava et al. 2014) as kohya's --scale_weight_norms has it: the tensors of a LoRA
    share the factor between them. Waits for the device once.
    """
    updates = [update for layer in layers for update in updates_of(layer, number)]
    factors = (most / torch.stack([norm for norm, *_ in updates])).clamp(max=1)
    for factor, (_, tensors, power) in zip(factors, updates, strict=True):
        for tensor in tensors:
            tensor.mul_(factor**power)  # by 1: not a bit is changed
    return int((factors < 1).sum())


def updates_of(layer: AdapterLayer, number: int) -> Iterator[Update]:
    """What a layer adds to its weight, and to its bias where it does."""
    tensors = layer.tensors(number)
    if isinstance(layer, DenseLayer):
        yield from ((tensor.norm(), [tensor], 1.0) for tensor in tensors.values())
    elif tensors.keys() == {UP, DOWN}:
        up, down = tensors[UP].flatten(1), tensors[DOWN].flatten(1)
        alpha = layer.alphas[number]
        scale = 1.0 if alpha is None else alpha / len(down)
        squared = ((up.T @ up) * (down @ down.T)).sum()  # ||up down||^2, and dW is never formed
        yield scale * squared.clamp(min=0).sqrt(), [tensors[UP], tensors[DOWN]], 0.5
    else:
        carrying = [tensor for role, tensor in tensors.items() if role in layer.kind.linear_in]
        yield layer._delta(tensors, number).norm(), carrying, 1.0
