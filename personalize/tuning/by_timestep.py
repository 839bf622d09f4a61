"""LoRA whose ranks go by the timestep: T-LoRA (Soboleva et al. 2025, https://arxiv.org/abs/2507.05964, section 4.1).

At timestep t of T the first r(t) = floor((r - r_min) (T - t) / T) + r_min of r ranks count: few where there is much noise, where
few images are soon learned by heart, and all where there is hardly any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..adapters.kinds.kind import DOWN, UP
from ..adapters.kinds.lora import least_rank
from ..models.model import Base
from .layers import AdapterLayer


def ranks_at(t: Any, steps: int, rank: Any, least: Any) -> Any:
    """r(t) for r_min = `least` at timesteps of 0 .. `steps`: numbers, or tensors that can be broadcast.

    >>> [ranks_at(t, 1000, 8, 4) for t in (0, 500, 999)]
    [8, 6, 4]
    """
    return (rank - least) * (steps - t) // steps + least


class Clock:
    """Which ranks count for the rows that go through a denoiser, by the timesteps that it was last called with."""

    def __init__(self, base: Base, share: float) -> None:
        self.base, self.share = base, share
        self.ranks: set[int] = set()
        self.counts: dict[int, Tensor] = {}  # rank => [b, rank], 1 where it counts and else 0; [1, rank] for all rows
        self.handle: RemovableHandle | None = None

    def start(self) -> None:
        """Follow the denoiser's calls."""
        if self.handle is None:
            self.handle = self.base.denoiser.register_forward_pre_hook(self.hear, with_kwargs=True)

    def stop(self) -> None:
        """No longer follow them."""
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.counts = None, {}

    def hear(self, module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Take the timesteps from a denoiser's call. They hold until the next one: checkpointed blocks compute again later."""
        t = torch.as_tensor(named["timestep"] if "timestep" in named else given[1]).reshape(-1, 1)
        for rank in self.ranks:
            counting = ranks_at(t, self.base.noise.steps, rank, least_rank(rank, self.share))
            self.counts[rank] = (torch.arange(rank, device=t.device) < counting).to(self.base.dtype)


class TimedLayer(AdapterLayer):
    """A layer with LoRAs, of which each row meets the ranks that count at its timestep."""

    clock: Clock

    def follow(self, clock: Clock) -> None:
        """Go by this clock from now on."""
        self.clock = clock
        clock.ranks.add(self.rank)

    @property
    def rank(self) -> int:
        return int(self.factors[DOWN].weight.shape[int(len(self.strengths) > 1)])

    def forward(self, x: Tensor) -> Tensor:
        """[b, ..., in] => [b, ..., out], or [b, in, h, w] => [b, out, h', w']."""
        out: Tensor = self.base_layer(x)
        if not (who := self.active.who):
            return out
        seen = F.dropout(x, self.dropout) if self.dropping and self.dropout else x
        counts = self.clock.counts.get(self.rank)
        shares = [None] * len(who) if counts is None else counts.to(x).expand(len(x), -1).chunk(len(who))
        tensors = {role: factor.cast(x.dtype) for role, factor in self.factors.items()}
        several = len(self.strengths) > 1
        changes = []
        for number, rows, share in zip(who, seen.chunk(len(who)), shares, strict=True):
            own = {role: whole[number] for role, whole in tensors.items()} if several else tensors
            changes.append(self._times(self._update(rows, share, own[UP], own[DOWN]), self.scale(number)))
        return out + (changes[0] if len(changes) == 1 else torch.cat(changes))

    def _update(self, x: Tensor, counts: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        """up M_t down x, where the diagonal M_t has `counts` [b, r] of each row."""
        if isinstance(self.base_layer, nn.Conv2d):
            low = self._compute(x, down, None)
            return F.conv2d(low if counts is None else low * counts[:, :, None, None], up)
        low = F.linear(x, down)
        return F.linear(low if counts is None else low * counts.reshape(len(x), *[1] * (x.ndim - 2), -1), up)

    @staticmethod
    def _times(change: Tensor, scale: float) -> Tensor:
        return change if scale == 1 else change * scale


def parts_by_timestep(base: Base, layers: Mapping[str, AdapterLayer]) -> set[str]:
    """The parts of the base in which ranks go by the timestep: its denoiser, or none."""
    return {base.family.denoiser.part} if any(isinstance(layer, TimedLayer) for layer in layers.values()) else set()
