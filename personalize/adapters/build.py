"""From a file's tensors, by role, to the update that they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .delta import Decomposed, Delta, Dense, LowRank, Shape, Structured
from .kinds.kind import ALPHA, DORA, DOWN, MAGNITUDE, MID, UP


def build(kind: str, tensors: Mapping[str, Tensor], alpha: float | None, shape: Shape) -> Delta:
    """The update that a file's tensors make, by role; `shape` is that of the weight, as far as it is known."""
    plain = {role: value for role, value in tensors.items() if role not in (ALPHA, DORA, MAGNITUDE)}
    if kind in ("full", "norm"):
        (weight,) = plain.values()
        return Dense(weight.reshape(shape))
    inner: Delta
    if kind == "LoRA":
        down = _folded(plain[MID], plain[DOWN]) if MID in plain else plain[DOWN]
        up = plain[UP].reshape(*plain[UP].shape[:2], *[1] * (down.ndim - 2))  # flat beside a kernel in LyCORIS' DyLoRA
        inner = LowRank(up, down, len(down) if alpha is None else alpha)
    else:
        inner = Structured(kind, plain, alpha, shape)
    if MAGNITUDE in tensors:
        return Decomposed(inner, tensors[MAGNITUDE].reshape(-1, *[1] * (len(inner.shape) - 1)))
    return Decomposed(inner, tensors[DORA]) if DORA in tensors else inner


def _folded(core: Tensor, down: Tensor) -> Tensor:
    """A Tucker core [r, r, kh, kw] and down [r, in, 1, 1] as one [r, in, kh, kw]: exact."""
    return torch.einsum("rskl,si->rikl", core.float(), down.flatten(1).float())
