"""Fewer ranks per module: rules as rows, and a report of what was lost. Each update is cut by its exact truncated SVD."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import AdapterError, nearest
from ...families.family import Shape
from ...formats.tensors import TORCH, one_thread
from ..adapter import Adapter
from ..delta import Decomposed, Delta, Dense, LowRank, Structured, kind_name
from ..lazy import map_deltas
from . import linalg
from .report import NOISE, Line, Report, tail_squares

# ---------------------------------------------------------------- rules


@dataclass(frozen=True, eq=False)
class Cut:
    """A module before it is cut: the singular values of dW, and what one rank of it costs in a file."""

    path: str
    values: Tensor
    old: int
    floor: int  # the ranks that are kept at least
    top: int  # ... and at most
    cost: int  # bytes per rank

    def line(self, rank: int) -> Line:
        return Line(self.path, self.old, rank, self.values)


Each = Callable[[Tensor, float], int]  # singular values of one module, the rule's number => rank
Choice = Callable[[Sequence[Cut], float], list[int]]  # all modules => ranks, between floor and top


@dataclass(frozen=True)
class Rule:
    """How many ranks to keep. `low` and `high` bound its number, exclusively where `open`."""

    what: str
    choose: Choice
    low: float
    high: float = math.inf
    open: str = ""  # "low", "high"
    together: bool = False  # whether it must have seen all modules; else it looks at one at a time

    def allows(self, value: float) -> bool:
        above = value > self.low if self.open == "low" else value >= self.low
        below = value < self.high if self.open == "high" else value <= self.high
        return math.isfinite(value) and above and below


def _each(choose: Each) -> Choice:
    """A rule that looks at one module at a time."""
    return lambda cuts, value: [min(max(choose(cut.values, value), cut.floor), cut.top) for cut in cuts]


def _fixed_rank(values: Tensor, rank: float) -> int:
    return min(int(rank), int((values > 0).sum()))


def _sv_ratio(values: Tensor, ratio: float) -> int:
    return int((values > values[0] / ratio).sum())


def _sv_fro(values: Tensor, share: float) -> int:
    tails = tail_squares(values)
    return int((tails > (1 - share**2 + NOISE) * tails[0]).sum())


def _sv_cumulative(values: Tensor, share: float) -> int:
    tails = values.flip(0).cumsum(0).flip(0)
    return int((tails > (1 - share + math.sqrt(NOISE)) * tails[0]).sum())


def _error(cuts: Sequence[Cut], error: float) -> list[int]:
    """The smallest singular values of all go first, so no other choice of as many ranks loses less."""
    report = Report(tuple(cut.line(cut.top) for cut in cuts))
    forced = math.fsum(line.norm_beyond(line.new) ** 2 for line in report.lines)
    squares, owners = _pool(cuts)
    order = squares.argsort()
    allowed = max(error**2, NOISE) * math.fsum(line.norm**2 for line in report.lines) - forced
    dropped = owners[order[squares[order].cumsum(0) <= allowed]]
    return [cut.top - count for cut, count in zip(cuts, dropped.bincount(minlength=len(cuts)).tolist(), strict=True)]


def _size(cuts: Sequence[Cut], size: float) -> list[int]:
    """The ranks that save most of dW per byte go in first, until no other fits."""
    ranks = [cut.floor for cut in cuts]
    left = size - sum(cut.cost * cut.floor for cut in cuts)
    if left < 0:
        raise AdapterError(
            f"no ranks fit: one for each module needs {-left:.0f} bytes more", "drop the weakest (--drop), or store fp16"
        )
    squares, owners = _pool(cuts)
    worth = squares / torch.tensor([float(cut.cost) for cut in cuts], dtype=torch.float64)[owners]
    for i in owners[worth.argsort(descending=True, stable=True)].tolist():
        if cuts[i].cost <= left:
            ranks[i], left = ranks[i] + 1, left - cuts[i].cost
    return ranks


RULES = {
    "rank": Rule("this many ranks per module", _each(_fixed_rank), 1),
    "sv_ratio": Rule("singular values above the module's largest divided by this (kohya)", _each(_sv_ratio), 1, open="low"),
    "sv_fro": Rule("this share of each module's Frobenius norm, not of its square (kohya)", _each(_sv_fro), 0, 1, "low"),
    "sv_cumulative": Rule("this share of the sum of each module's singular values (kohya)", _each(_sv_cumulative), 0, 1, "low"),
    "error": Rule("as few ranks as keep the relative error of the whole adapter below this", _error, 0, 1, "high", together=True),
    "size": Rule("the best ranks that fit into a file of this many bytes", _size, 0, open="low", together=True),
}


# ---------------------------------------------------------------- resize


def resize(
    adapter: Adapter, rule: str, value: float, *, max_rank: int | None = None, dtype: str = "fp16", drop: bool = False
) -> tuple[Adapter, Report]:
    """The adapter at fewer ranks by a row of RULES, and what was lost.

    Ranks never grow. Every module keeps one rank at least, and `max_rank` at most; with `drop`, modules that the rule leaves
    nothing of go away. Those that lose nothing stay as they are; LoHa and LoKr become LoRA; biases and norms are one indivisible
    rank. `dtype` is that of the file that "size" is about. Metadata is kept.

    Raises AdapterError for unknown rules and impossible numbers, and for updates that depend on the base, by name.
    """
    check_rule(rule, value, max_rank)
    if dtype not in TORCH:
        raise AdapterError(f"no storage dtype is called {dtype!r}", nearest(dtype, TORCH))
    with one_thread():
        cuts = [_cut(path, delta, max_rank, TORCH[dtype].itemsize, 0 if drop else 1) for path, delta in adapter.deltas.items()]
        chosen = RULES[rule].choose(cuts, value - _overhead(adapter) if rule == "size" else value)
        ranks = {cut.path: rank for cut, rank in zip(cuts, chosen, strict=True) if rank}
        deltas = map_deltas(adapter.deltas, lambda path, delta: _at_rank(delta, ranks[path]), ranks)
    return adapter.with_deltas(deltas), Report(tuple(cut.line(rank) for cut, rank in zip(cuts, chosen, strict=True)))


def on_demand(
    adapter: Adapter, rule: str, value: float, *, max_rank: int | None = None, dtype: str = "fp16", drop: bool = False
) -> tuple[Adapter, Mapping[str, Line]]:
    """As `resize`, but by a rule that looks at one module at a time each is read and cut when it is asked for, and its line of
    the report is there from then on. Not with `drop`: which modules stay must be known first."""
    if drop or rule not in RULES or RULES[rule].together or dtype not in TORCH:
        whole, report = resize(adapter, rule, value, max_rank=max_rank, dtype=dtype, drop=drop)
        return whole, {line.path: line for line in report.lines}
    check_rule(rule, value, max_rank)
    lines: dict[str, Line] = {}

    def cut_at(path: str, delta: Delta) -> Delta:
        with one_thread():
            core = linalg.core_of(*linalg.factors(delta)) if isinstance(delta, LowRank) else None
            cut = _cut(path, delta, max_rank, TORCH[dtype].itemsize, 1, core)
            (rank,) = RULES[rule].choose([cut], value)
            lines[path] = cut.line(rank)
            return _at_rank(delta, rank, core)

    return adapter.with_deltas(map_deltas(adapter.deltas, cut_at)), lines


def cut_to_rank(path: str, delta: Delta, rank: int | None = None) -> tuple[Delta, Line]:
    """One update at a rank at most, balanced and without the ranks that fp32 cannot tell from nothing; and what was lost."""
    if not can_factor(delta):
        return keep_as_is(path, delta)
    return cut_parts(path, delta.shape, rank_of(delta), linalg.svd(delta, rank), rank)


def cut_parts(path: str, shape: Shape, old: int, parts: linalg.Svd, rank: int | None) -> tuple[Delta, Line]:
    """The same of an update whose singular values and vectors are known; `old` is its rank."""
    felt = int((parts.s.square() > NOISE * parts.s[0].square()).sum())
    new = max(1, min(rank or felt, felt))
    return linalg.low_rank(parts, shape, new), Line(path, old, new, parts.s, parts.rest)


def keep_as_is(path: str, delta: Delta) -> tuple[Delta, Line]:
    """One update as it is."""
    return delta, Line(path, rank_of(delta), rank_of(delta), lambda: _values(delta))


def check_plain(path: str, delta: Delta) -> None:
    """Raises AdapterError, by name, for an update whose dW is known only together with the base."""
    if delta.needs_base:
        raise AdapterError(f"{path}: {kind_name(delta)} depends on the base's weights", "name the base: --base")


def check_rule(rule: str, value: float, max_rank: int | None) -> None:
    """Raises AdapterError for rules that do not exist and numbers that make no sense."""
    if rule not in RULES:
        raise AdapterError(f"no rule for ranks is called {rule!r}", nearest(rule, RULES))
    if not RULES[rule].allows(value):
        raise AdapterError(f"{rule.replace('_', '-')} {value:g} makes no sense", f"it keeps {RULES[rule].what}")
    if max_rank is not None and max_rank < 1:
        raise AdapterError(f"a rank of at most {max_rank} leaves nothing", "1 is the smallest rank")


def _cut(path: str, delta: Delta, max_rank: int | None, width: int, floor: int, core: linalg.Core | None = None) -> Cut:
    """Singular values only: those of all modules are held until the rule has seen them. `core` is a LoRA's, where it is known."""
    check_plain(path, delta)
    values = core.values() if core else _values(delta)
    top = min(len(values), max_rank or len(values))
    cost = width * (sum(linalg.sides(delta.shape)) if can_factor(delta) else math.prod(delta.shape))
    return Cut(path, values, rank_of(delta), min(floor, top), top, cost)


def _values(delta: Delta) -> Tensor:
    """The singular values of dW; of what is kept or dropped as one, its norm."""
    return linalg.singular_values(delta) if can_factor(delta) else torch.tensor([delta.norm()], dtype=torch.float64)


def _at_rank(delta: Delta, rank: int, core: linalg.Core | None = None) -> Delta:
    kept = delta.low_rank() or delta
    if not can_factor(kept) or (rank >= rank_of(kept) and isinstance(kept, LowRank | Dense)):
        return kept
    parts = core.svd(rank) if core else linalg.svd(delta, rank if isinstance(kept, LowRank) else None)
    return linalg.low_rank(parts, delta.shape, rank)


def can_factor(delta: Delta) -> bool:
    """Whether factors can hold it: [out, in] or [out, in, kh, kw]."""
    return len(delta.shape) in (2, 4)


def rank_of(delta: Delta) -> int:
    """Of the factors that it has or, if it has none, the rank that dW can have."""
    plain = delta.inner if isinstance(delta, Decomposed) else delta
    rank = plain.factor_rank if isinstance(plain, Structured) else plain.rank if isinstance(plain, LowRank) else 0
    return rank or (min(linalg.sides(delta.shape)) if can_factor(delta) else 1)


def _pool(cuts: Iterable[Cut]) -> tuple[Tensor, Tensor]:
    """The squares of all singular values that a rule may decide on, and the number of the module that each belongs to."""
    free = [cut.values[cut.floor : cut.top].square() for cut in cuts]
    owners = [torch.full((len(one),), i) for i, one in enumerate(free)]
    return torch.cat([torch.empty(0, dtype=torch.float64), *free]), torch.cat([torch.empty(0, dtype=torch.long), *owners])


def _overhead(adapter: Adapter) -> int:
    """Bytes of a file beside its factors, rather too many: three entries and an alpha per module, metadata, our own facts."""
    entries = sum(3 * (len(path) + 140) + 2 * (len(path) + 20) for path in adapter.deltas)
    return entries + len(json.dumps(dict(adapter.metadata))) + 4096
