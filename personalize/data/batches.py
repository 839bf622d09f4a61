"""Which pictures a step sees, which way round, and with which captions: pure functions of (seed, step)."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from ..base.cond import Cond
from .latents import Latents


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from. `cond` is None where the text encoder trains: embed `captions` then."""

    mean: Tensor  # [b, c, h, w], scaled
    std: Tensor  # [b, c, h, w], scaled
    cond: Cond | None  # b rows
    captions: list[str]  # "" where dropped
    index: Tensor  # [b], which example each item is

    def latents(self, rng: Generator) -> Tensor:
        """[b, c, h, w]: a fresh draw from the VAE's posterior, on the CPU generator's stream whatever the device."""
        noise = torch.randn(self.mean.shape, generator=rng, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def to(self, device: str | torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        cond = None if self.cond is None else self.cond.to(device)
        return replace(self, mean=self.mean.to(device), std=self.std.to(device), cond=cond, index=self.index.to(device))


def generator(seed: int, purpose: str, *where: int) -> Generator:
    """A CPU generator that depends on its arguments only, so that a resumed run draws what an unbroken one would have."""
    digest = hashlib.sha256(repr((seed, purpose, *where)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def batches(
    latents: Latents, *, batch_size: int, seed: int, caption_dropout: float = 0.0, start_step: int = 0, purpose: str = "data"
) -> Iterator[Batch]:
    """Endless batches from `start_step` on. Pictures come in shuffled epochs, end to end, so that each is seen equally often.

    `purpose` keeps the streams of several datasets (instance and class images) apart.
    """
    for step in itertools.count(start_step):
        index = _order(len(latents.captions), batch_size, seed, step, purpose)
        flipped = torch.rand(batch_size, generator=generator(seed, f"{purpose} flip", step)) < 0.5
        dropped = torch.rand(batch_size, generator=generator(seed, f"{purpose} dropout", step)) < caption_dropout
        yield _batch(latents, index, flipped, dropped)


def _order(pictures: int, batch_size: int, seed: int, step: int, purpose: str) -> Tensor:
    """[b]: positions step * b ... of the endless row of permutations."""
    first = step * batch_size
    return torch.tensor([_epoch(pictures, seed, purpose, k // pictures)[k % pictures] for k in range(first, first + batch_size)])


@functools.lru_cache(maxsize=16)
def _epoch(pictures: int, seed: int, purpose: str, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(pictures, generator=generator(seed, f"{purpose} order", epoch)).tolist()
    return order


def _batch(latents: Latents, index: Tensor, flipped: Tensor, dropped: Tensor) -> Batch:
    side = flipped.long() * (len(latents.mean) - 1)  # without mirrored versions there is only side 0
    captions = ["" if drop else latents.captions[i] for i, drop in zip(index.tolist(), dropped.tolist(), strict=True)]
    cond = None
    if latents.cond is not None:
        cond = latents.cond[torch.where(dropped, len(latents.cond) - 1, latents.cond_index[index])]
    return Batch(latents.mean[side, index], latents.std[side, index], cond, captions, index)
