"""Which pictures a step sees, which way round, and with which captions: pure functions of (seed, step).

All pictures of a batch have one shape. Steps take turns through the buckets, spread evenly, each as often as it has pictures
(repeats counted); within its turns a bucket goes through its pictures in shuffled rounds, end to end, also in the middle of a
batch. So as many steps as there are pictures show each one exactly `batch_size` times, whatever its shape, and a batch that a
small bucket cannot fill holds some of its pictures again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from ..families.cond import Cond
from ..recipe.fields import Data
from .buckets import Shape, frame
from .captions import tags
from .latents import Latents

PLAIN = Data()


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from. `cond` is None where captions are read at each step: embed `captions` then."""

    mean: Tensor  # [b, c, h, w], scaled
    std: Tensor  # [b, c, h, w], scaled
    cond: Cond | None  # b rows
    captions: list[str]  # "" where dropped
    index: Tensor  # [b], which example each item is
    shape: Shape  # (width, height) in pixels
    sizes: Tensor  # [b, 6], original (h, w), crop (top, left), target (h, w) in pixels: SDXL's micro-conditioning
    mask: Tensor | None = None  # [b, 1, h, w] in 0..1, None where no picture of the batch has one

    def latents(self, rng: Generator) -> Tensor:
        """[b, c, h, w]: a fresh draw from the VAE's posterior, on the CPU generator's stream whatever the device."""
        noise = torch.randn(self.mean.shape, generator=rng, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def to(self, device: str | torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        cond = None if self.cond is None else self.cond.to(device)
        mask = None if self.mask is None else self.mask.to(device)
        moved = {name: getattr(self, name).to(device) for name in ("mean", "std", "index", "sizes")}
        return replace(self, cond=cond, mask=mask, **moved)


def generator(seed: int, purpose: str, *where: int) -> Generator:
    """A CPU generator that depends on its arguments only, so that a resumed run draws what an unbroken one would have."""
    digest = hashlib.sha256(repr((seed, purpose, *where)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def batches(
    latents: Latents, *, batch_size: int, seed: int, data: Data = PLAIN, start_step: int = 0, purpose: str = "data"
) -> Iterator[Batch]:
    """Endless batches from `start_step` on."""
    for step in itertools.count(start_step):
        yield batch_at(latents, step, batch_size=batch_size, seed=seed, data=data, purpose=purpose)


def batch_at(
    latents: Latents,
    step: int,
    *,
    batch_size: int,
    seed: int,
    data: Data = PLAIN,
    purpose: str = "data",
    shape: Shape | None = None,
) -> Batch:
    """The batch of a step. With `shape`, pictures of any bucket are brought into that one: class images keep to the step's.

    `data` says what happens to captions. `purpose` keeps the streams of several datasets (instance and class images) apart.
    """
    pools = latents.buckets if shape is None else {shape: list(itertools.chain(*latents.buckets.values()))}
    counts = tuple(map(len, pools.values()))
    bucket, turn = _turn(counts, seed, purpose, step)
    shape, pool = list(pools.items())[bucket]
    stream = purpose if len(pools) == 1 else f"{purpose} {shape}"
    index = [pool[place] for place in _places(len(pool), turn * batch_size, batch_size, seed, stream)]
    flipped = torch.rand(batch_size, generator=generator(seed, f"{purpose} flip", step)) < 0.5
    dropped = torch.rand(batch_size, generator=generator(seed, f"{purpose} dropout", step)) < data.caption_dropout
    captions = []
    for row, (i, drop) in enumerate(zip(index, dropped.tolist(), strict=True)):
        said = _variant(latents.variants[i], generator(seed, f"{purpose} choices", step, row))
        captions.append("" if drop else vary_caption(said, data, generator(seed, f"{purpose} tags", step, row)))
    return _batch(latents, index, shape, (flipped & latents.mirrored).tolist(), dropped, captions)


def _variant(ways: Sequence[str], rng: Generator) -> str:
    """What a caption says at a step, where it leaves a choice."""
    return ways[int(torch.randint(len(ways), (), generator=rng))] if len(ways) > 1 else ways[0]


def vary_caption(caption: str, data: Data, rng: Generator) -> str:
    """A caption with its tags shuffled and some left out, as the recipe asks; the first `keep_tokens` tags stay in place."""
    if not data.varies:
        return caption
    words = tags(caption)
    kept, rest = words[: data.keep_tokens], words[data.keep_tokens :]
    order = torch.randperm(len(rest), generator=rng).tolist()
    stays = (torch.rand(len(rest), generator=rng) >= data.tag_dropout).tolist()
    return ", ".join([*kept, *(rest[i] for i in (order if data.caption_shuffle else range(len(rest))) if stays[i])])


def _turn(counts: tuple[int, ...], seed: int, purpose: str, step: int) -> tuple[int, int]:
    """(bucket, how many turns it had before) of a step: each of `counts` buckets has as many turns in a round as pictures."""
    number, place = divmod(step, sum(counts))
    bucket, before = _round(counts, seed, purpose, number)[place]
    return bucket, number * counts[bucket] + before


@functools.lru_cache(maxsize=16)
def _round(counts: tuple[int, ...], seed: int, purpose: str, number: int) -> list[tuple[int, int]]:
    """(bucket, turn) of each step of a round: turns at even distances, from an offset of each bucket's own."""
    offsets = torch.rand(len(counts), generator=generator(seed, f"{purpose} buckets", number)).tolist()
    buckets = enumerate(zip(counts, offsets, strict=True))
    turns = sorted(((turn + offset) / count, bucket, turn) for bucket, (count, offset) in buckets for turn in range(count))
    return [(bucket, turn) for _, bucket, turn in turns]


def _places(pictures: int, first: int, count: int, seed: int, purpose: str) -> list[int]:
    """Positions first ... first + count of the endless row of permutations."""
    return [_epoch(pictures, seed, purpose, k // pictures)[k % pictures] for k in range(first, first + count)]


@functools.lru_cache(maxsize=256)
def _epoch(pictures: int, seed: int, purpose: str, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(pictures, generator=generator(seed, f"{purpose} order", epoch)).tolist()
    return order


def _batch(
    latents: Latents, index: list[int], shape: Shape, flipped: Sequence[bool], dropped: Tensor, captions: list[str]
) -> Batch:
    posteriors = [latents.posterior(i, shape, flip) for i, flip in zip(index, flipped, strict=True)]
    mean, std = (torch.stack(parts) for parts in zip(*posteriors, strict=True))
    numbers = torch.tensor(index)
    cond = None
    if latents.cond is not None:
        rows = torch.tensor([latents.rows.get(caption, -1) for caption in captions])
        cond = latents.cond[torch.where(dropped, len(latents.cond) - 1, rows)]
    masks = [_flip_mask(latents.masks[i], flip) for i, flip in zip(index, flipped, strict=True)]
    some = next((mask for mask in masks if mask is not None), None)
    mask = None if some is None else torch.stack([torch.ones_like(some) if one is None else one for one in masks])[:, None]
    sizes = torch.tensor([frame(latents.sizes[i], shape) for i in index])
    return Batch(mean, std, cond, captions, numbers, shape, sizes, mask)


def _flip_mask(mask: Tensor | None, flip: bool) -> Tensor | None:
    return mask.flip(-1) if flip and mask is not None else mask
