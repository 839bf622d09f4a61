"""From a file's tensors, by role, to the update that they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import kinds
from .delta import Decomposed, Delta, Dense, LowRank, Shape, Structured
from .kinds import lora


def build(kind: str, tensors: Mapping[str, Tensor], alpha: float | None, shape: Shape) -> Delta:
    """The update that the tensors of a kind make, by role; `shape` is that of the weight, as far as it is known."""
    kind = kind.lower()
    plain = {role: value for role, value in tensors.items() if role not in (kinds.ALPHA, kinds.DORA, kinds.MAGNITUDE)}
    if kind in ("full", "norm"):
        (weight,) = plain.values()
        return Dense(weight.reshape(shape))
    inner: Delta
    if kind == "lora":
        up, down = lora.pair(plain)
        inner = LowRank(up, down, len(down) if alpha is None else alpha)
    else:
        inner = Structured(kind, plain, alpha, shape)
    if kinds.MAGNITUDE in tensors:
        return Decomposed(inner, tensors[kinds.MAGNITUDE].reshape(-1, *[1] * (len(inner.shape) - 1)))
    return Decomposed(inner, tensors[kinds.DORA]) if kinds.DORA in tensors else inner
