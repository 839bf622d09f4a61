"""LoRA and a sparse rest: dW = alpha / rank * (up @ down + rest), what the SVD of LyCORIS' extraction left (`use_sparse_bias`).

The rest is a matrix in coordinates: `bias_indices` [2, n], or [4, n] over a kernel, `bias_values` [n] and `bias_size`. It goes
by the LoRA's own scale, as in A1111's `finalize_updown` (https://github.com/AUTOMATIC1111/stable-diffusion-webui).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...errors import AdapterError
from ...families.family import Shape
from . import lora
from .kind import ALPHA, DOWN, INDICES, SIZE, UP, VALUES, Kind, Shapes, check, inner, ratio

if TYPE_CHECKING:
    from torch import Tensor

    from .kind import Tensors


def shape(shapes: Shapes) -> Shape:
    """That of up @ down."""
    check(len(shapes[INDICES]) == 2 and shapes[INDICES] == (*shapes[SIZE], *shapes[VALUES]), shapes, INDICES, VALUES, SIZE)
    return lora.shape({role: size for role, size in shapes.items() if role in (UP, DOWN)})


def delta(tensors: Tensors, weight: Tensor | None, alpha: float | None) -> Tensor:
    """alpha / rank * (up @ down + rest). Raises AdapterError for a rest of another size, or entries outside of it."""
    whole = lora.delta(tensors, None, None)
    size = [int(side) for side in tensors[SIZE]]
    at = tensors[INDICES].long()
    if math.prod(size) != whole.numel() or bool((at < 0).any()) or bool((at.amax(1) >= tensors[SIZE]).any()):
        raise AdapterError(f"its sparse part of size {size} does not fit an update of {list(whole.shape)}")
    place = at[0]
    for side, index in zip(size[1:], at[1:], strict=True):
        place = place * side + index
    rest = whole.new_zeros(whole.numel()).index_add(0, place, tensors[VALUES].to(whole.dtype))
    return ratio(len(tensors[DOWN]), alpha) * (whole + rest.reshape(whole.shape))


SPARSE = Kind("LoRA+sparse", (UP, DOWN, INDICES, VALUES, SIZE), (ALPHA,), shape, inner(DOWN), delta, linear_in=(UP, VALUES))
