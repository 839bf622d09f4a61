"""What an adapter adds to one weight. Each kind answers `delta() -> dW`; so far there is one, LoRA's low rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError
from . import keys


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """dW = alpha / rank * up @ down (Hu et al. 2021, https://arxiv.org/abs/2106.09685); its own fp32 copy of the factors.

    up is [out, rank] with down [rank, in] on a linear layer, or [out, rank, 1, 1] with [rank, in, kh, kw] on a convolution.
    Raises AdapterError if they do not fit each other.
    """

    up: Tensor
    down: Tensor
    alpha: float

    def __post_init__(self) -> None:
        if not keys.fit(tuple(self.up.shape), tuple(self.down.shape)):
            raise AdapterError(f"low-rank factors {list(self.up.shape)} and {list(self.down.shape)} do not fit each other")
        for side in ("up", "down"):
            own = getattr(self, side).detach().to("cpu", torch.float32, copy=True)
            object.__setattr__(self, side, own.contiguous())
        object.__setattr__(self, "alpha", float(self.alpha))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What multiplies up @ down."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of dW: [out, in(, kh, kw)]."""
        return (self.up.shape[0], *self.down.shape[1:])

    def __repr__(self) -> str:
        return f"LowRank({list(self.shape)}, rank={self.rank}, alpha={self.alpha:g})"

    def delta(self) -> Tensor:
        """dW in fp32, [out, in(, kh, kw)]."""
        return (self.scale * self.up.flatten(1) @ self.down.flatten(1)).reshape(self.shape)

    def finite(self) -> bool:
        """Whether no entry of dW can be NaN or beyond fp32, judged by the largest entry of each factor."""
        largest = self.rank * abs(self.scale) * float(self.up.abs().max()) * float(self.down.abs().max())
        return largest < torch.finfo(torch.float32).max

    def with_alpha(self, alpha: float) -> LowRank:
        """The same dW under another alpha (not 0): their ratio goes into `up`."""
        return self if alpha == self.alpha else LowRank(self.up * (self.alpha / alpha), self.down, alpha)

    def __mul__(self, weight: float) -> LowRank:
        return LowRank(self.up * weight, self.down, self.alpha)  # not into alpha: tools read alpha 0 as "alpha = rank"

    def __add__(self, other: LowRank) -> LowRank:
        """The exact sum: factors side by side, rank = sum of ranks."""
        if self.shape != other.shape:
            raise AdapterError(f"updates of shapes {list(self.shape)} and {list(other.shape)} cannot be added")
        a, b = self.with_alpha(self.rank), other.with_alpha(other.rank)
        return LowRank(torch.cat([a.up, b.up], 1), torch.cat([a.down, b.down], 0), a.rank + b.rank)

    def norm(self) -> float:
        """Frobenius norm of dW in fp64, from the triangles of both factors: exact, and dW is never formed."""
        return abs(self.scale) * float(torch.linalg.norm(_triangle(self.up) @ _triangle(self.down.transpose(0, 1)).T))


def _triangle(factor: Tensor) -> Tensor:
    """R of the QR of a factor seen as [anything, rank]."""
    rows = factor.transpose(0, 1).flatten(1).T.double()
    return torch.linalg.qr(rows, mode="r").R
