"""Ways to merge the updates of one module, all in terms of dW: rows, each with its paper. merge.py applies them.

Factors are never scaled and added side by side with their partners missing: (a + c) @ (b + d) is not a @ b + c @ d.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..delta import Delta, Dense, LowRank
from . import linalg
from .resize import can_factor

Options = Mapping[str, Any]
_FELT = 1e-7  # of the largest singular value: less is rounding


class Term(NamedTuple):
    """One adapter's share in a module: its place in the list (0, 1, ...), its weight (not 0) and its update."""

    place: int
    weight: float
    delta: Delta

    def weighted_delta(self) -> Delta:
        return self.delta * self.weight

    def dense(self) -> Tensor:
        """weight * dW in memory of its own."""
        return self.delta.delta().mul_(self.weight)


@dataclass(frozen=True)
class Module:
    """One weight and all that is to be added to it: one term at least, all of the same shape."""

    path: str
    terms: tuple[Term, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].delta.shape

    def plain_sum(self) -> Delta:
        return reduce(lambda a, b: a + b, (term.weighted_delta() for term in self.terms))


Merge = Callable[[Module, Options], Delta]


# ---------------------------------------------------------------- in factors: exact, dW is never made


def _concat(module: Module, options: Options) -> Delta:
    return module.plain_sum()


def _slerp(module: Module, options: Options) -> Delta:
    """Directions along the great circle between them, lengths in a straight line, times the sum of both weights' sizes."""
    if len(module.terms) == 1:
        return module.plain_sum()
    a, b = (term.delta * math.copysign(1, term.weight) for term in module.terms)
    total = math.fsum(abs(term.weight) for term in module.terms)
    t, norms = abs(module.terms[1].weight) / total, (a.norm(), b.norm())
    cosine = linalg.inner(a, b) / (norms[0] * norms[1]) if all(norms) else 1.0
    if abs(cosine) > options["straight"]:
        return module.plain_sum()
    angle = math.acos(cosine)
    length = total * ((1 - t) * norms[0] + t * norms[1]) / math.sin(angle)
    return a * (length * math.sin((1 - t) * angle) / norms[0]) + b * (length * math.sin(t * angle) / norms[1])


def _orthogonal(module: Module, options: Options) -> Delta:
    """Each update loses mu / (1 + mu) of what it does along the principal input directions of those before it: the minimiser X of
    ||X - dW||^2 + mu ||X V V^T||^2."""
    first, *others = module.terms
    total, share = first.weighted_delta(), 1.0 if math.isinf(options["mu"]) else options["mu"] / (1 + options["mu"])
    basis = _principal(first.delta, options["energy"])
    for term in others if can_factor(first.delta) else ():
        total = total + _without(term.weighted_delta(), basis, share)
        basis = torch.linalg.qr(torch.cat([basis, _principal(term.delta, options["energy"])], 1)).Q
    return total if can_factor(first.delta) else module.plain_sum()


def _principal(delta: Delta, energy: float) -> Tensor:
    """The input directions [in * kh * kw, k] that hold this share of ||dW||^2."""
    if not can_factor(delta):
        return torch.empty(0)
    parts = linalg.svd(delta)
    squares = parts.s.square()
    missing = squares.flip(0).cumsum(0).flip(0) / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return parts.v[: int((missing > 1 - energy + 1e-14).sum())].T


def _without(delta: Delta, basis: Tensor, share: float) -> Delta:
    """dW - share * dW @ basis @ basis^T, in the rank of dW."""
    if pair := delta.low_rank():
        down = pair.down.flatten(1).double()
        return LowRank(pair.up, (down - share * (down @ basis) @ basis.T).reshape(pair.down.shape), pair.alpha)
    matrix = delta.delta().reshape(linalg.sides(delta.shape)).double()
    return Dense((matrix - share * (matrix @ basis) @ basis.T).reshape(delta.shape))


def _knots(module: Module, options: Options) -> Delta:
    """[dW_1 ... dW_n] = U S [V_1 ... V_n], then TIES of the V_i: entries in the same row mean the same direction of output."""
    if not can_factor(module.terms[0].delta):
        return _ties(module, options)
    each = [linalg.svd(term.delta) for term in module.terms]
    u, s, mixing = torch.linalg.svd(torch.cat([one.u * one.s for one in each], 1), full_matrices=False)
    aligned = [mix @ one.v for mix, one in zip(mixing.split([len(one.s) for one in each], 1), each, strict=True)]
    left = [_largest(v, options) * term.weight for v, term in zip(aligned, module.terms, strict=True)]
    return linalg.low_rank(linalg.of_factors(u * s, _elect(left, options)), module.shape)


def _tsv(module: Module, options: Options) -> Delta:
    """U and V of all side by side, each replaced by the nearest orthonormal matrix, so that no two adapters share a direction."""
    if not can_factor(module.terms[0].delta):
        return module.plain_sum()
    room = max(1, min(linalg.sides(module.shape)) // len(module.terms))
    each = [linalg.svd(term.delta) for term in module.terms]
    u = _nearest_orthonormal(torch.cat([one.u[:, :room] for one in each], 1))
    v = _nearest_orthonormal(torch.cat([one.v[:room] for one in each], 0).T)
    s = torch.cat([one.s[:room] * term.weight for one, term in zip(each, module.terms, strict=True)])
    return linalg.low_rank(linalg.of_factors(u * s, v.T), module.shape)


def _common(module: Module, options: Options) -> Delta:
    """P_u dW P_v of each, P projecting onto what every other writes to (u) and listens to (v)."""
    if len(module.terms) == 1 or not can_factor(module.terms[0].delta):
        return module.plain_sum()
    each = [linalg.svd(term.delta) for term in module.terms]
    spans = [(one.u[:, felt], one.v[felt]) for one in each for felt in [one.s > _FELT * one.s[0]]]
    ups, downs = [], []
    for i, (one, term) in enumerate(zip(each, module.terms, strict=True)):
        up, down = one.u * one.s * term.weight, one.v
        for u, v in spans[:i] + spans[i + 1 :]:
            up, down = u @ (u.T @ up), (down @ v.T) @ v
        ups.append(up)
        downs.append(down)
    return linalg.low_rank(linalg.of_factors(torch.cat(ups, 1), torch.cat(downs)), module.shape)


def _nearest_orthonormal(columns: Tensor) -> Tensor:
    """The polar factor (Procrustes)."""
    u, _, v = torch.linalg.svd(columns, full_matrices=False)
    return u @ v


# ---------------------------------------------------------------- entry by entry: one dense dW per adapter at a time

Prune = Callable[[Tensor, Options, torch.Generator], Tensor]  # one adapter's weighted dW, which it may change => what is left
Combine = Callable[[list[Tensor], Options], Tensor]


def _entrywise(prune: Prune, combine: Combine) -> Merge:
    def merge(module: Module, options: Options) -> Delta:
        left = [prune(term.dense(), options, _draw(options.get("seed", 0), module.path, term.place)) for term in module.terms]
        return Dense(combine(left, options))

    return merge


def _draw(seed: int, path: str, place: int) -> torch.Generator:
    """Random numbers of this adapter in this module, whatever else is merged."""
    digest = hashlib.sha256(f"{seed}:{path}:{place}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _count(share: float, dW: Tensor) -> int:
    return max(1, round(share * dW.numel()))


def _bar(sizes: Tensor, count: int) -> Tensor:
    """The `count`-th largest size; infinite for none."""
    flat = sizes.flatten()
    return flat.kthvalue(len(flat) - count + 1).values if count > 0 else flat.new_tensor(math.inf)


def _largest(dW: Tensor, options: Options, draw: torch.Generator | None = None) -> Tensor:
    sizes = dW.abs()
    return dW.masked_fill_(sizes < _bar(sizes, _count(options["density"], dW)), 0)


def _band(dW: Tensor, options: Options, draw: torch.Generator) -> Tensor:
    """The largest `density` of the entries after the very largest, the outliers, are gone."""
    sizes, outliers = dW.abs(), int(options["outliers"] * dW.numel())
    kept = min(_count(options["density"], dW), dW.numel() - outliers)
    return dW.masked_fill_((sizes < _bar(sizes, outliers + kept)) | (sizes >= _bar(sizes, outliers)), 0)


def _random(dW: Tensor, options: Options, draw: torch.Generator) -> Tensor:
    """Each entry with the same chance, rescaled so that the expected dW is the same."""
    chance = options["density"]
    return dW.masked_fill_(torch.rand(dW.shape, generator=draw) >= chance, 0).div_(chance)


def _likely(dW: Tensor, options: Options, draw: torch.Generator) -> Tensor:
    """As `_random`, but the larger of a row are likelier kept: chances from density - epsilon / 2 to density + epsilon / 2."""
    density, rows = options["density"], dW.reshape(dW.shape[0], -1) if dW.ndim > 1 else dW.reshape(1, -1)
    epsilon = min(options["epsilon"], 2 * density, 2 * (1 - density))
    rising = (density + epsilon * ((torch.arange(rows.shape[1]) + 0.5) / rows.shape[1] - 0.5)).expand_as(rows)
    chance = torch.empty_like(rows).scatter_(1, rows.abs().argsort(dim=1, stable=True), rising).reshape(dW.shape)
    return dW.masked_fill_(torch.rand(dW.shape, generator=draw) >= chance, 0).div_(chance)


def _sum(left: list[Tensor], options: Options) -> Tensor:
    return reduce(Tensor.add_, left)


def _elect(left: list[Tensor], options: Options) -> Tensor:
    """Entries whose sign is that of their sum over all; added up, or averaged over those that agree."""
    sign = sum(left[1:], left[0]).sign()
    agreeing = [one.masked_fill_(one.sign() != sign, 0) for one in left]
    count = sum((one != 0 for one in agreeing), torch.zeros_like(sign)).clamp_(min=1) if options["mean"] else 1
    return _sum(agreeing, options) / count


_ties = _entrywise(_largest, _elect)


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Option:
    """A number that some methods take. With `above`, `low` itself is not allowed."""

    what: str
    low: float = -math.inf
    high: float = math.inf
    kind: type = float
    above: bool = False

    def allows(self, value: Any) -> bool:
        if self.kind is not float:
            return type(value) is self.kind
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (value > self.low if self.above else value >= self.low) and value <= self.high


@dataclass(frozen=True)
class Method:
    """A way to merge. An adapter of weight 0 takes no part; a module that one adapter lacks is zero there."""

    what: str
    merge: Merge
    paper: str = ""  # arXiv number
    options: Options = field(default_factory=dict)  # name => default
    most: float = math.inf  # adapters
    refactor: bool = False  # always into balanced factors of the fewest ranks
    shared: bool = False  # only of modules that all adapters change


OPTIONS = {
    "density": Option("share of the entries that is kept", 0, 1, above=True),
    "outliers": Option("share of the entries, the largest, that is dropped", 0, 1),
    "epsilon": Option("how much likelier the largest entries are kept than the smallest", 0, 1),
    "mean": Option("average the adapters that agree, as the paper does, instead of adding them up", kind=bool),
    "seed": Option("of the random numbers", kind=int),
    "mu": Option("how strongly the later adapters make room: 0 not at all, inf wholly", 0),
    "energy": Option("share of an adapter's squared norm whose directions are its own", 0, 1, above=True),
    "straight": Option("above this cosine two updates are one direction and are added up", 0, 1),
}
_PRUNE: Options = {"density": 0.5}
_TIES: Options = {"density": 0.5, "mean": False}
_DARE: Options = {"density": 0.5, "seed": 0}

METHODS: Mapping[str, Method] = {
    "concat": Method("the exact sum: factors side by side, ranks add up", _concat),
    "svd": Method("the exact sum in its fewest ranks", _concat, refactor=True),
    "slerp": Method("two adapters, turned into each other at full length", _slerp, "", {"straight": 0.9995}, most=2),
    "orthogonal": Method(
        "the later ones leave the first one's main directions alone", _orthogonal, "2511.11051", {"mu": math.inf, "energy": 0.9}
    ),
    "common": Method("what every one does in the directions of all others", _common, shared=True),
    "tsv": Method("all adapters' directions made orthogonal", _tsv, "2412.00081"),
    "knots": Method("TIES in directions that all adapters share", _knots, "2410.19735", _TIES),
    "ties": Method("the largest entries, without those that are outvoted", _ties, "2306.01708", _TIES),
    "dare": Method("random entries, rescaled", _entrywise(_random, _sum), "2311.03099", _DARE),
    "dare-ties": Method(
        "random entries, rescaled, without those that are outvoted", _entrywise(_random, _elect), "2311.03099", {**_TIES, **_DARE}
    ),
    "della": Method(
        "as dare-ties, but the larger are likelier kept",
        _entrywise(_likely, _elect),
        "2406.11617",
        {**_TIES, **_DARE, "epsilon": 0.2},
    ),
    "magnitude": Method("the largest entries", _entrywise(_largest, _sum), "1506.02626", _PRUNE),
    "breadcrumbs": Method(
        "the largest entries but for outliers", _entrywise(_band, _sum), "2312.06795", {**_PRUNE, "outliers": 0.01}
    ),
}
