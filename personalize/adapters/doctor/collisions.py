"""How much adapters get into each other's way, block by block, from the singular vectors of their factors.

With A = sum s_i u_i v_i^T and B = sum t_j x_j y_j^T of one layer:

cosine   <A, B> / ||A|| ||B||: 1 the same update, -1 its opposite, 0 neither helps nor hurts
inputs   sum s_i^2 t_j^2 <v_i, y_j>^2 / ||s^2|| ||t^2||: mean squared cosine of the angles between what both listen to, weighted
         by energy so that noise does not count: the cosine between A^T A and B^T B
outputs  the same of u and x, what both write to: the cosine between A A^T and B B^T
overlap  sqrt(inputs * outputs): high only where both answer the same question in the same place
chance   what `overlap` random directions with the same singular values would have
invaded  ||B V V^T||^2 / ||B||^2, with V the inputs that hold 90 % of A: the share of B's effect that happens on A's ground

A block's value is the mean over its layers weighted by ||A|| ||B||, where a layer that one of them lacks counts as no collision:
overlap and cosine both add up as <., .> / (||A|| ||B||) does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from torch import Tensor

from ...errors import AdapterError
from ...families.family import Family
from ...families.names import DENOISERS, family_of, part_of
from ..adapter import Adapter, check_kin
from ..delta import Delta
from ..ops import linalg
from ..ops.resize import can_factor
from .measures import Weights, block_norms, block_of, in_family_order, known_part

MAIN = 0.9  # of ||A||^2: the directions that hold it are A's ground
TWINS = 0.9  # cosine from which on two adapters are nearly one
ALL = "all"  # the block that stands for all of them
_SKETCH = 64  # singular vectors of full updates


@dataclass(frozen=True)
class Meeting:
    """Two adapters in one block, at their weights: places in the list, ||dW|| of each, and the measures above."""

    pair: tuple[int, int]
    block: str
    norms: tuple[float, float]
    cosine: float
    inputs: float
    outputs: float
    overlap: float
    chance: float
    invaded: tuple[float, float]  # share of the second's effect on the first's ground, and the other way round


@dataclass(frozen=True)
class Collision:
    """Every pair in every block, and in "all"; blocks that only one of a pair changes are left out."""

    family: str
    weights: tuple[float, ...]
    norms: tuple[Mapping[str, float], ...]  # of each adapter at its weight: block => ||dW||
    short: tuple[bool, ...]  # of each adapter: whether it changes attention and text encoders only, as short lbw lists do
    meetings: tuple[Meeting, ...]
    unknown: int  # layers left out, because dW depends on a base that was not given

    @property
    def blocks(self) -> tuple[str, ...]:
        """All blocks that some adapter changes, in the family's order."""
        return in_family_order(self.family, {block for norms in self.norms for block in norms})

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        return tuple(combinations(range(len(self.weights)), 2))

    @property
    def twins(self) -> tuple[tuple[int, int], ...]:
        """Pairs that do nearly the same."""
        return tuple(one.pair for one in self.meetings if one.block == ALL and one.cosine > TWINS)

    def at(self, pair: tuple[int, int], block: str = ALL) -> Meeting | None:
        """Where two meet; None if they do not."""
        return next((one for one in self.meetings if (one.pair, one.block) == (pair, block)), None)


class _Side(NamedTuple):
    """One adapter in one layer."""

    delta: Delta
    weight: float
    svd: linalg.Svd | None  # None of biases and norms

    @property
    def norm(self) -> float:
        return abs(self.weight) * (math.hypot(float(self.svd.s.norm()), self.svd.rest) if self.svd else self.delta.norm())


class _Sums(NamedTuple):
    """What adds up over layers; all are products of both norms, but for the squared norms themselves."""

    inner: float = 0.0
    inputs: float = 0.0
    outputs: float = 0.0
    overlap: float = 0.0
    chance: float = 0.0
    second_on_first: float = 0.0
    first_on_second: float = 0.0

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(*map(float.__add__, self, other))


def collide(adapters: Sequence[Adapter], weights: Sequence[float] | None = None, *, base: Weights | None = None) -> Collision:
    """Every pair of adapters, each at its weight (1.0), block by block.

    Exact for updates in factors; of full ones the first 64 directions are looked at. Without a `base`, DoRA counts by the
    direction it turns to, and OFT, GLoRA and IA3 are left out. Raises FamilyMismatchError for adapters of different families,
    AdapterError for layers whose shapes differ.
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters):
        raise AdapterError(f"{len(adapters)} adapters and {len(weights)} weights", "give one weight for each")
    family = common_family(adapters)
    adapters = [adapter.resolve(base) for adapter in adapters] if base is not None else adapters
    norms: list[dict[str, float]] = [{} for _ in adapters]
    sums: dict[tuple[tuple[int, int], str], _Sums] = defaultdict(_Sums)
    unknown = 0
    for path in sorted(set().union(*(adapter.deltas for adapter in adapters))):
        sides: dict[int, _Side] = {}
        for place, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
            if delta := adapter.deltas.get(path):
                known = known_part(delta)
                unknown += known is None
                sides |= {place: _side(known, weight)} if known else {}
        check_shapes(path, [side.delta for side in sides.values()])
        for place, side in sides.items():
            norms[place][path] = side.norm
        for a, b in combinations(sides, 2):
            met = _overlap_of(sides[a], sides[b]) if sides[a].norm and sides[b].norm else _Sums()
            for block in (block_of(family, path), ALL):
                sums[(a, b), block] = sums[(a, b), block].plus(met)
    name = family.name if family else "unknown"
    blocks = tuple(block_norms(name, one) for one in norms)
    short = tuple(all(part_of(path) not in DENOISERS or "attentions" in path for path in one) for one in norms)
    meetings = tuple(_meeting(pair, block, sums[pair, block], blocks) for pair, block in _meeting_order(sums, blocks))
    return Collision(name, tuple(map(float, weights)), blocks, short, meetings, unknown)


def common_family(adapters: Sequence[Adapter]) -> Family | None:
    """The family that all adapters can be of; None if theirs are unknown. FamilyMismatchError if they differ."""
    check_kin(adapters)
    said: dict[str, str] = {}
    for adapter in adapters:
        said |= adapter.metadata
    return family_of({path: shape for adapter in adapters for path, shape in adapter.shapes.items()}, said)


def check_shapes(path: str, found: Sequence[Delta]) -> None:
    """Raises AdapterError if one layer is of several shapes."""
    if len(shapes := {delta.shape for delta in found}) > 1:
        listed = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise AdapterError(f"{path}: updates of shapes {listed}", "all adapters must be made for the same base")


def _side(delta: Delta, weight: float) -> _Side:
    return _Side(delta, float(weight), linalg.svd(delta, _SKETCH) if can_factor(delta) else None)


def _overlap_of(a: _Side, b: _Side) -> _Sums:
    """Two updates of one layer, neither of them zero."""
    inner = a.weight * b.weight * linalg.inner(a.delta, b.delta)
    if a.svd is None or b.svd is None:
        return _overlap_of_vectors(a, b, inner)
    right, left = (a.svd.v @ b.svd.v.T).square(), (a.svd.u.T @ b.svd.u).square()
    p, q = a.svd.s.square(), b.svd.s.square()
    flat, size = float(p.norm() * q.norm()), a.norm * b.norm
    inputs, outputs = (float(p @ angles @ q) / flat for angles in (right, left))
    chance = float(p.sum() * q.sum()) / flat / math.sqrt(math.prod(linalg.sides(a.delta.shape)))
    on_first = float((right[: _main(p)] @ q).sum()) * b.weight**2
    on_second = float((p @ right[:, : _main(q)]).sum()) * a.weight**2
    overlap = math.sqrt(inputs * outputs)
    return _Sums(inner, inputs * size, outputs * size, overlap * size, min(chance, 1.0) * size, on_first, on_second)


def _overlap_of_vectors(a: _Side, b: _Side, inner: float) -> _Sums:
    """Biases and norms are one direction each."""
    size = a.norm * b.norm
    shared = (inner / size) ** 2
    alike = shared * size
    return _Sums(inner, alike, alike, alike, size / math.prod(a.delta.shape), shared * b.norm**2, shared * a.norm**2)


def _main(squares: Tensor) -> int:
    """How many directions hold MAIN of the squared norm."""
    return int((squares.cumsum(0) < MAIN * squares.sum()).sum()) + 1


def _meeting(pair: tuple[int, int], block: str, sums: _Sums, blocks: Sequence[Mapping[str, float]]) -> Meeting:
    a, b = (math.hypot(*blocks[place].values()) if block == ALL else blocks[place][block] for place in pair)
    shares = [value / (a * b) if a and b else 0.0 for value in sums[:5]]
    cosine, inputs, outputs, overlap, chance = shares
    invaded = (sums.second_on_first / b**2 if b else 0.0, sums.first_on_second / a**2 if a else 0.0)
    return Meeting(pair, block, (a, b), cosine, inputs, outputs, overlap, chance, invaded)


def _meeting_order(
    sums: Mapping[tuple[tuple[int, int], str], _Sums], blocks: Sequence[Mapping[str, float]]
) -> Iterator[tuple[tuple[int, int], str]]:
    for pair in sorted({pair for pair, _ in sums}):
        yield from ((pair, block) for block in (*blocks[pair[0]], ALL) if (pair, block) in sums)
