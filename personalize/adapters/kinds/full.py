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


def _start(role: str) -> Callable[[Tensor, Size, Generator], dict[str, Tensor]]:
    def start(weight: Tensor, size: Size, generator: Generator) -> dict[str, Tensor]:
        """dW = 0; updates of biases start likewise (`diff_b`, `b_norm`)."""
        import torch

        return {role: torch.zeros(weight.shape)}

    return start


FULL = replace(_kind("full", "diff", (1, 2, 3, 4, 5)), start=_start("diff"))
NORM = replace(_kind("norm", "w_norm", (1,)), start=_start("w_norm"), settings=("biases",), trained_as="norms")
