"""What an optimizer holds of parameters beside themselves and their gradients: found out by a step of one of each shape."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...recipe.fields import Optim
from ...recipe.rule import ADAMW, rule_of
from .meter import bytes_of

Shape = tuple[int, ...]


def bytes_held(optim: Optim, shapes: Iterable[Shape]) -> int:
    """Bytes that an optimizer holds of fp32 parameters of these shapes, and their average, if there is one."""
    average = 4 if optim.ema else 0
    counts = Counter(shapes)
    return sum(count * (bytes_of_one(optim.optimizer, shape) + average * math.prod(shape)) for shape, count in counts.items())


def states_held(optim: Optim) -> float:
    """How many tensors of a parameter's size an optimizer holds of a large one, about."""
    return bytes_held(optim, [(64, 64)]) / (64 * 64 * 4)


@functools.cache
def bytes_of_one(name: str, shape: Shape) -> int:
    """Bytes that an optimizer holds of an fp32 parameter of a shape, on the CPU."""
    parameter = nn.Parameter(torch.zeros(shape))
    if name == ADAMW:
        return 2 * parameter.nbytes
    parameter.grad = torch.ones_like(parameter)
    rule = rule_of(name)([{"params": [parameter], "part": "unet"}], Optim(optimizer=name))
    rule.step()
    return bytes_of(value for value in rule.state[parameter].values() if isinstance(value, Tensor))
