"""Attached adapters whose strength changes from step to step: which rows of a layer's factors are theirs.

Adapters stand side by side in one pair of factors, up [out, r] and down [r, in]; row i of `down` belongs to one of them, and a
strength multiplies its rows. So a step costs a product per layer, and neither the base's weights nor the layers are touched.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..adapters.delta import Delta, Dense, as_low_rank
from ..adapters.kinds.lora import least_rank
from ..adapters.strengths.grammar import WHOLE, Weighting
from ..families.names import PARTS, TEXT_PARTS, part_of
from .by_timestep import ranks_at

Deltas = Mapping[str, Delta]


@dataclass
class Vector:
    """A norm or a bias of the base, what it was, and its update."""

    parameter: Tensor
    before: Tensor
    delta: Dense


@dataclass(frozen=True)
class Rows:
    """A layer's `down` as it counts now, the same at strength 1, and whose row each is: [r, in, ...] twice, [r]."""

    down: nn.Parameter
    whole: Tensor
    owners: Tensor
    places: Tensor  # [r], each row's among its owner's
    ranks: Tensor  # [r], how many rows its owner has
    least: Tensor  # [r], how many of them count at every timestep


@dataclass(frozen=True)
class Mover:
    """An adapter that does not count the same at every step: its updates at strength 1, and how they count."""

    deltas: Deltas
    weighting: Weighting
    least_ranks: float = 1.0  # share of its ranks in the denoiser that counts at every timestep


@dataclass
class Moving:
    """How much of each of several adapters; what does not move is the first, at 1. Empty where nothing moves."""

    weightings: Sequence[Weighting] = ()
    owners: Mapping[str, Sequence[int]] = field(default_factory=dict)  # layer => whose each row is
    shares: Mapping[str, Sequence[tuple[int, Delta]]] = field(default_factory=dict)  # norm or bias => who adds what
    least: Sequence[float] = ()  # of each, the share of its ranks in the denoiser that counts at every timestep
    timesteps: int = 0  # of the base
    rows: dict[str, Rows] = field(default_factory=dict)
    levels: dict[str, tuple[float, ...]] = field(default_factory=dict)  # part => strength of each adapter now, and the timestep

    @property
    def timed(self) -> bool:
        """Whether ranks go by the timestep."""
        return min(self.least, default=1.0) < 1

    def take(self, path: str, down: nn.Parameter) -> None:
        """From now on `down` is the layer's at `path`. Layers in which nothing moves stay as they are."""
        if any(owners := self.owners.get(path, ())):
            sizes = Counter(owners)  # rows of one owner are neighbours
            places, ranks = [i for size in sizes.values() for i in range(size)], [sizes[one] for one in owners]
            least = [least_rank(rank, self.least[one]) for one, rank in zip(owners, ranks, strict=True)]
            numbers = torch.tensor([owners, places, ranks, least], device=down.device)
            self.rows[path] = Rows(down, down.detach().clone(), *numbers)

    @torch.no_grad()
    def turn(self, step: int, steps: int, vectors: Mapping[str, Vector], time: float = 0.0) -> set[str]:
        """Bring every row and vector to its strength at a step; the parts of the base in which anything changed.

        `time` is the timestep: ranks that go by it count as there. At 0 all of them do.
        """
        now = [weighting.levels(step, steps) for weighting in self.weightings]
        levels = {part: (*(each[part] for each in now), self._time(part, time)) for part in PARTS}
        own = {part_of(path) for path in (*self.rows, *self.shares)}
        changed = {part for part in own if levels[part] != self.levels.get(part)}
        for path, rows in self.rows.items():
            if (part := part_of(path)) in changed:
                scale = torch.tensor(levels[part]).to(rows.whole)[rows.owners] * self._counting(rows, levels[part][-1])
                torch.mul(rows.whole, scale.reshape(-1, *[1] * (rows.whole.ndim - 1)), out=rows.down)
        for path, shares in self.shares.items():
            if (part := part_of(path)) in changed:
                total = sum(delta.delta() * levels[part][i] for i, delta in shares)
                vectors[path].delta = Dense(torch.as_tensor(total))
        self.levels = levels
        return changed

    def _time(self, part: str, time: float) -> float:
        """The timestep, as far as it matters to a part of the base."""
        return time if self.timed and part not in TEXT_PARTS else 0.0

    def _counting(self, rows: Rows, time: float) -> Tensor | float:
        """Which rows count [r], as 1 and 0."""
        return (rows.places < ranks_at(time, self.timesteps, rows.ranks, rows.least)).to(rows.whole) if time else 1.0


def side_by_side(fixed: Deltas, others: Sequence[Mover], timesteps: int) -> tuple[Deltas, Moving]:
    """Per path the factors of all that have it, in their order, and whose they are; of norms and biases the sum."""
    if not others:
        return fixed, Moving()
    members = [fixed, *(other.deltas for other in others)]
    joined: dict[str, Delta] = {}
    owners, shares = dict[str, list[int]](), dict[str, list[tuple[int, Delta]]]()
    for path in dict.fromkeys(path for member in members for path in member):
        own = [(i, member[path]) for i, member in enumerate(members) if path in member]
        if len(own[0][1].shape) == 1:
            shares[path] = own
        else:
            own = [(i, as_low_rank(delta)) for i, delta in own]
            owners[path] = [i for i, pair in own for _ in range(pair.rank)]  # type: ignore[attr-defined]
        joined[path] = functools.reduce(operator.add, [delta for _, delta in own])
    least = [1.0, *(other.least_ranks for other in others)]
    return joined, Moving([WHOLE, *(other.weighting for other in others)], owners, shares, least, timesteps)
