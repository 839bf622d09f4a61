"""DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353), on top of another kind: dW = m * W' / ||W'|| - W, W' = W + inner dW.

The magnitudes m are [1, in, 1..] for norms of columns, which UIs read, or [out, 1..] for norms of rows (peft's
`lora_magnitude_vector` [out], LyCORIS' wd_on_out). The kind below is any that may have them; its tensors stand beside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...families.family import Shape
from . import kind_of, lora, row
from .kind import DORA, MAGNITUDE, Kind, Shapes, Size

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from .kind import Tensors


def _inner(shapes: Shapes) -> Kind:
    return row(kind_of(shapes))


def shape(shapes: Shapes) -> Shape:
    """That of the kind below."""
    return _inner(shapes).shape(shapes)


def rank(shapes: Shapes) -> int:
    """That of the kind below."""
    return _inner(shapes).rank(shapes)


def delta(tensors: Tensors, weight: Tensor | None, alpha: float | None) -> Tensor:
    """m * W' / ||W'|| - W, in W's shape."""
    assert weight is not None
    inner = row(kind_of(tensors)).delta(tensors, weight, alpha)
    magnitude = tensors[DORA] if DORA in tensors else tensors[MAGNITUDE].reshape(-1, *[1] * (weight.ndim - 1))
    return decompose(weight, inner.reshape(weight.shape), magnitude)


def decompose(weight: Tensor, inner: Tensor, magnitude: Tensor) -> Tensor:
    """What brings W + inner to these norms, less W; `weight` and `inner` are of one shape."""
    tuned = weight + inner
    norms = norms_of(tuned, 1 if magnitude.shape[0] == 1 else 0)
    return tuned * (magnitude.reshape(norms.shape) / norms) - weight


def norms_of(weight: Tensor, axis: int = 1) -> Tensor:
    """The norms of a weight's columns, [1, in, 1..], or of its rows (axis 0); more than 0, so that one can divide by them."""
    import torch

    norms = torch.linalg.vector_norm(weight, dim=[i for i in range(weight.ndim) if i != axis], keepdim=True)
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)


def start(weight: Tensor, size: Size, generator: Generator) -> dict[str, Tensor]:
    """dW = 0: a LoRA's start, and the norms of the columns as they are. Gradients go through the norms of W', as in LyCORIS."""
    return lora.start(weight, size, generator) | {DORA: norms_of(weight.float())}


DORA_KIND = Kind(
    "DoRA",
    (f"{DORA}|{MAGNITUDE}",),
    (),
    shape,
    rank,
    delta,
    needs_base=True,
    on_top=True,
    start=start,
    settings=("rslora", "lora_plus"),
)
