"""dW as it is, of any shape: of weights (`diff`) and of norms (`w_norm`). Biases stand beside other kinds (BIASES)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...families.family import Shape
from .kind import Kind, Shapes, check, no_rank

if TYPE_CHECKING:
    from torch import Tensor

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


FULL = _kind("full", "diff", (1, 2, 3, 4, 5))
NORM = _kind("norm", "w_norm", (1,))
