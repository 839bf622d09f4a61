"""What a denoiser is conditioned on, as one value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cond:
    """Conditioning of b pictures: what the text encoders make of their captions, and SDXL's micro-conditioning."""

    tokens: Tensor  # [b, n, d], n being 77 for each window of the tokenizer; SDXL's two encoders side by side
    pooled: Tensor | None = None  # [b, p], SDXL: its second encoder's projected end of text
    sizes: Tensor | None = None  # [b, 6], SDXL: original height and width, crop's top and left, height and width, in pixels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice | list[int]) -> Cond:
        return self._each(lambda one: one[rows])

    def to(self, device: str | torch.device) -> Cond:
        return self._each(lambda one: one.to(device))

    def cast(self, dtype: torch.dtype) -> Cond:
        """What the text encoders said, in another dtype; sizes stay as they are."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return Cond(self.tokens.to(dtype), pooled, self.sizes)

    def expand(self, b: int) -> Cond:
        """One row, b times."""
        return self._each(lambda one: one.expand(b, *one.shape[1:]))

    def with_sizes(self, sizes: Tensor | None) -> Cond:
        """The same captions for pictures of these sizes [b, 6]."""
        return Cond(self.tokens, self.pooled, sizes)

    def zeros(self) -> Cond:
        """Nothing at all, in these shapes: how SDXL was taught that there is no caption."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Cond(torch.zeros_like(self.tokens), pooled, self.sizes)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Cond:
        kept = (None if one is None else change(one) for one in (self.pooled, self.sizes))
        return Cond(change(self.tokens), *kept)

    @staticmethod
    def cat(conds: Iterable[Cond]) -> Cond:
        """All rows, in order; all must be of one base and as many windows."""
        conds = list(conds)
        pooled, sizes = [one.pooled for one in conds], [one.sizes for one in conds]
        return Cond(torch.cat([one.tokens for one in conds]), _join(pooled), _join(sizes))


def _join(tensors: list[Tensor | None]) -> Tensor | None:
    there = [one for one in tensors if one is not None]
    assert len(there) in (0, len(tensors)), "some rows have what others lack"
    return torch.cat(there) if there else None
