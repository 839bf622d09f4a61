"""What became of an adapter's ranks, and what a cut of them lost. No torch before singular values are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ...families.names import PARTS, part_of

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 1e-14  # of a squared norm: what fp32 factors cannot tell from nothing


@dataclass(frozen=True, eq=False)
class Line:
    """One module: its rank before and after, the singular values of dW (fp64, falling) and the norm of what they leave out."""

    path: str
    old: int
    new: int
    known: Tensor | Callable[[], Tensor]  # the values, or how to find them: a merge that cuts nothing need not know
    rest: float = 0.0

    @cached_property
    def values(self) -> Tensor:
        return self.known() if callable(self.known) else self.known

    @property
    def cut(self) -> bool:
        """Whether anything was lost."""
        return self.new < self.old or self.rest > 0

    @property
    def norm(self) -> float:
        return self.norm_beyond(0)

    @property
    def error(self) -> float:
        """||dW - dW at the new rank|| / ||dW||."""
        return self.norm_beyond(self.new) / self.norm if self.cut and self.norm else 0.0

    def norm_beyond(self, rank: int) -> float:
        """||dW - dW at a rank||: the norm of the singular values behind it (Eckart and Young)."""
        return math.hypot(float(self.values[rank:].norm()), self.rest)


@dataclass(frozen=True, eq=False)
class Report:
    """What became of each module, and of all together."""

    lines: tuple[Line, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in PARTS if any(part_of(line.path) == part for line in self.lines))

    def part(self, name: str) -> Report:
        return Report(tuple(line for line in self.lines if part_of(line.path) == name))

    @property
    def error(self) -> float:
        """The relative error of dW over all modules together."""
        if not any(line.cut for line in self.lines):
            return 0.0
        norm = math.hypot(*(line.norm for line in self.lines))
        return math.hypot(*(line.norm_beyond(line.new) for line in self.lines)) / norm if norm else 0.0

    def rank_for(self, error: float = 0.01) -> int | None:
        """The smallest rank, the same for every module, that keeps the relative error; None if the values known do not tell."""
        import torch

        squares = torch.zeros(max((len(line.values) for line in self.lines), default=0) + 1, dtype=torch.float64)
        for line in self.lines:
            squares[: len(line.values)] += tail_squares(line.values)
        lost = squares + math.fsum(line.rest**2 for line in self.lines)
        enough = (lost <= max(error**2, NOISE) * lost[0]).nonzero()
        return int(enough[0]) if len(enough) else None

    def rows(self) -> Iterator[tuple[str, Report]]:
        """What is worth printing: each part, then all of it as "total"."""
        yield from ((name, self.part(name)) for name in self.parts)
        yield "total", self


def tail_squares(values: Tensor) -> Tensor:
    """[i] = sum of squares from i on."""
    return values.square().flip(0).cumsum(0).flip(0)
