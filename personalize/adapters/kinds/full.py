"""dW as it is, of any shape: of weights (`diff`) and of norms (`w_norm`). Biases stand beside other kinds (BIASES)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...families.family import Shape
from .kind import Kind, Shapes, Size, check, no_rank

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from .kind import Tensors


def _kind(title: str, role: str, dimensions: tuple[int, ...]) -> Kind:
    """The kind of one tensor that is dW."""

    def delta(tensors: Tensors, weight: Tensor | None, alpha: float | None) -> Tensor:
        return tensors[role]

    return Kind(title, (role,), (), _shape(role, dimensions), no_rank, delta, linear_in=(role,), rows=(role,))


def _shape(role: str, dimensions: tuple[int, ...]) -> Callable[[Shapes], Shape]:
    def shape(shapes: Shapes) -> Shape:
        check(len(shapes[role]) in dimensions and 0 not in shapes[role], shapes, role)
        return shapes[role]

    return shape


def start(weight: Tensor, size: Size, generator: Generator) -> dict[str, Tensor]:
    """dW = 0 of a norm's weight [c]; its bias starts likewise (`b_norm`)."""
    import torch

    return {"w_norm": torch.zeros(len(weight))}


FULL = _kind("full", "diff", (1, 2, 3, 4, 5))
NORM = replace(_kind("norm", "w_norm", (1,)), start=start, settings=("biases",), trained_as="norms")
