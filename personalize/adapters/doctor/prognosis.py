"""What could be done about a collision, and what a merge would cost: told before anything is made."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from ..adapter import Adapter
from ..delta import Delta
from ..distance import relative_difference
from ..ops import linalg
from ..ops.merge import merge
from ..ops.methods import METHODS
from ..ops.resize import can_factor, keep_as_is
from ..strengths import blocks
from .collisions import ALL, Collision, check_shapes, common_family
from .measures import family_named

RANKS = (4, 8, 16, 32, 64, 128)
THRESHOLD = 0.25  # overlap from which on one of two should step back
EXACT = ("concat", "svd")  # methods whose result is the sum, but for the cut to a rank
FACTORED = ("slerp", "orthogonal", "tsv", "knots")  # never make dW: a second for twelve layers of SDXL, the others ten
SAMPLE = 12  # layers that a method is tried on
_DENSE = 512  # on both sides: singular values of larger full updates are sampled too


# ---------------------------------------------------------------- block weights


@dataclass(frozen=True)
class Suggestion:
    """Block weights for one adapter: factors below 1 by block, the list behind `lbw=`, and the share of ||dW|| that is left.

    No factors: it stays as it is. No list: its family is unknown, and blocks are parts (FILE:unet=0.8:te=0.5).
    """

    place: int
    factors: Mapping[str, float]
    lbw: str
    kept: float


@dataclass(frozen=True)
class Relief:
    """What suggestions do to one pair: overlap before and after, both as shares of ||A|| ||B|| at the weights given."""

    pair: tuple[int, int]
    before: float
    after: float


def suggest(collision: Collision, threshold: float = THRESHOLD) -> tuple[tuple[Suggestion, ...], tuple[Relief, ...]]:
    """In each block where two overlap by more than the threshold, the one that has less of itself there (the share of its own
    ||dW||^2; of equals the later one) is multiplied by 1 - overlap. Twins are left alone: no block weights part them."""
    factors: list[dict[str, float]] = [{} for _ in collision.weights]
    for one in collision.meetings:
        if one.block != ALL and one.overlap > threshold and one.pair not in collision.twins:
            shares = [_share(collision.norms[place], one.block) for place in one.pair]
            place = one.pair[0] if shares[0] < shares[1] * (1 - 1e-9) else one.pair[1]
            factor = max(0.0, round(1 - one.overlap, 2))
            factors[place][one.block] = min(factor, factors[place].get(one.block, 1.0))
    suggestions = tuple(_suggestion(collision, place, own) for place, own in enumerate(factors))
    return suggestions, tuple(_relief(collision, pair, factors) for pair in collision.pairs)


def _share(norms: Mapping[str, float], block: str) -> float:
    total = math.hypot(*norms.values())
    return (norms[block] / total) ** 2 if total else 0.0


def _suggestion(collision: Collision, place: int, factors: Mapping[str, float]) -> Suggestion:
    norms = collision.norms[place]
    total = math.hypot(*norms.values())
    kept = math.hypot(*(norm * factors.get(block, 1.0) for block, norm in norms.items())) / total if total else 1.0
    family = family_named(collision.family)
    order = blocks.names(family, attention=collision.short[place]) if family and factors else ()
    return Suggestion(place, factors, ",".join(f"{factors.get(block, 1.0):g}" for block in order), kept)


def _relief(collision: Collision, pair: tuple[int, int], factors: Sequence[Mapping[str, float]]) -> Relief:
    both = [one for one in collision.meetings if one.pair == pair and one.block != ALL]
    whole = math.prod(math.hypot(*collision.norms[place].values()) for place in pair)
    met = {one.block: one.overlap * math.prod(one.norms) for one in both}
    after = {block: value * math.prod(factors[place].get(block, 1.0) for place in pair) for block, value in met.items()}
    return Relief(pair, *(math.fsum(one.values()) / whole if whole else 0.0 for one in (met, after)))


# ---------------------------------------------------------------- what a merge would lose


@dataclass(frozen=True)
class Prediction:
    """||merged - sum|| / ||sum|| of a way to merge, from `layers` of `of` layers: exact if that is all of them.

    How far a merge is from the sum is no verdict where that is its purpose (TIES, orthogonal), only how much it intervenes.
    """

    method: str
    rank: int | None
    error: float | None  # None: must be made to be known
    layers: int
    of: int

    @property
    def exact(self) -> bool:
        return self.layers == self.of


def predict(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    ranks: Sequence[int] = RANKS,
    methods: Collection[str] = FACTORED,
    sample: int = SAMPLE,
) -> tuple[Prediction, ...]:
    """The sum at each rank below its own, from the singular values of its factors; `methods`, tried on a sample of layers; the
    rest by name only.

    Empty if something depends on a base: `Adapter.resolve` comes first. Raises as `collide` does.
    """
    common_family(adapters)
    if any(delta.needs_base for adapter in adapters for delta in adapter.deltas.values()):
        return ()
    sums = _sums(adapters, weights)
    if not sums:
        return ()
    cuts = _cuts(sums, ranks, sample)
    fit = [method for method, row in METHODS.items() if method not in EXACT and len(adapters) <= row.most]
    tried = _try_methods(adapters, weights, [method for method in fit if method in methods], sums, sample)
    rest = [Prediction(method, None, None, 0, len(sums)) for method in fit if method not in methods]
    return (Prediction("concat", None, 0.0, len(sums), len(sums)), *cuts, *tried, *rest)


def _sums(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Delta]]:
    """Path => what is to be added up there."""
    pairs = list(zip(adapters, weights, strict=True))
    terms: dict[str, list[Delta]] = {}
    for path in sorted(set().union(*(adapter.deltas for adapter in adapters))):
        own = [adapter.deltas[path] * weight for adapter, weight in pairs if weight and path in adapter.deltas]
        check_shapes(path, own)
        terms |= {path: own} if own else {}
    return terms


def _sum(terms: Sequence[Delta]) -> Delta:
    return reduce(lambda a, b: a + b, [term.low_rank() or term for term in terms])


def _cuts(terms: Mapping[str, Sequence[Delta]], ranks: Sequence[int], sample: int) -> list[Prediction]:
    """Eckart and Young: the best rank r loses what the singular values behind r hold."""
    chosen = list(terms) if all(map(_cheap, terms.values())) else _sample_of(list(terms), sample)
    lines = [keep_as_is(path, _sum(terms[path]))[1] for path in chosen]
    divisible = [can_factor(terms[path][0]) for path in chosen]
    most = max(line.new for line in lines)
    whole = math.hypot(*(line.norm for line in lines))
    found = []
    for rank in (rank for rank in ranks if rank < most):
        lost = math.hypot(*(line.norm_beyond(rank) for line, cut in zip(lines, divisible, strict=True) if cut))
        found.append(Prediction("svd", rank, lost / whole if whole else 0.0, len(chosen), len(terms)))
    return found


def _cheap(terms: Sequence[Delta]) -> bool:
    small = min(linalg.sides(terms[0].shape)) <= _DENSE
    return small or not can_factor(terms[0]) or all(term.low_rank() for term in terms)


def _try_methods(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    methods: Sequence[str],
    terms: Mapping[str, Sequence[Delta]],
    sample: int,
) -> list[Prediction]:
    """Merges of a few layers, held against their sums."""
    chosen = _sample_of(list(terms), sample)
    sums = {path: _sum(terms[path]) for path in chosen}
    whole = math.hypot(*(one.norm() for one in sums.values()))
    few = [Adapter({path: one.deltas[path] for path in chosen if path in one.deltas}, one.metadata) for one in adapters]
    found = []
    for method in methods:
        merged = merge(few, weights, method).deltas
        lost = math.hypot(*(relative_difference(merged.get(path), wanted) for path, wanted in sums.items()))
        found.append(Prediction(method, None, lost / whole if whole else 0.0, len(chosen), len(terms)))
    return found


def _sample_of(paths: Sequence[str], count: int) -> list[str]:
    """Evenly spread over all layers."""
    return list(paths) if len(paths) <= count else [paths[i * len(paths) // count] for i in range(count)]
