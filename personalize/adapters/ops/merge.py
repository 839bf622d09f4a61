"""Several adapters as one, module by module: the weights, a row of methods.py, and the cut to a rank."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...errors import AdapterError, nearest
from ...families.family import Shape
from ...formats.tensors import one_thread
from ..adapter import Adapter, all_words, check_kin
from ..contract import shared_metadata
from ..delta import Delta, Dense
from ..lazy import OnDemand
from . import linalg, sums
from .convert import USUAL
from .methods import METHODS, OPTIONS, Method, Module, Options, Term
from .report import Line, Report
from .resize import check_plain, cut_parts, cut_to_rank, keep_as_is, rank_of

CUT = (
    "and layers like it have no factors in one of the adapters: they are merged at a rank of {}, with the error that is told; "
    "--rank chooses another, and after `personalize convert --to full` nothing is cut"
)
SUMS = ("concat", "svd")  # methods that are the plain sum


def merge(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str = "concat", rank: int | None = None, **options: Any
) -> Adapter:
    """`merge_with_report` without the report."""
    return merge_with_report(adapters, weights, method, rank, **options)[0]


def merge_with_report(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str = "concat", rank: int | None = None, **options: Any
) -> tuple[Adapter, Report]:
    """One adapter from several, each with its weight (any sign), by a row of METHODS; and what the cut to `rank` lost.

    `rank` caps every module's rank. Without it, what would come out as dW although nothing went in so is brought to the sum of
    the ranks; an update without factors (LoKr of whole halves) counts with the rank that `convert` gives it, which is told.
    Metadata that all agree on is kept. The same arguments give the same adapter.

    Raises AdapterError for unknown methods and options, and by name for modules whose shapes differ or that depend on the base;
    FamilyMismatchError for adapters of different families.
    """
    merged, lines = on_demand(adapters, weights, method, rank, **options)
    return merged.with_deltas(dict(merged.deltas)), Report(tuple(lines.values()))


def on_demand(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str = "concat", rank: int | None = None, **options: Any
) -> tuple[Adapter, Mapping[str, Line]]:
    """As `merge_with_report`, but each module is merged when it is asked for, and its line of the report is there from then on.

    Of adapters that were opened, saving the merge holds one module at a time.
    """
    row, chosen = _row(method, options)
    _check(adapters, weights, method, rank)
    given = [adapter for adapter, weight in zip(adapters, weights, strict=True) if weight]
    counts = Counter(path for adapter in given for path in adapter.deltas)
    shapes = {path: shape for adapter in given for path, shape in adapter.shapes.items()}
    paths = sorted(path for path in shapes if not row.shared or counts[path] == len(given))
    lines: dict[str, Line] = {}
    told: list[str] = []

    def merge_at(path: str) -> tuple[Delta, Line]:
        with one_thread():
            module = Module(path, _terms(path, adapters, weights))
            _check_plain(module, method, rank)
            if method == "concat" and rank is None and len(module.terms) > 1 and (product := _product(module)):
                return keep_as_is(path, product)
            if (usual := None if rank else usual_rank(module)) and not told:
                told.append(path)
                warnings.warn(f"{path} {CUT.format(usual)}", stacklevel=2)
            if (cap := rank or usual) and method in SUMS and (cut := _cut_sum(module, cap)):
                return cut
            return _cut(module, row.merge(module, chosen), cap, row.refactor)

    def make(path: str) -> Delta:
        delta, line = merge_at(path)
        if callable(line.known):  # it holds the delta
            line = replace(line, known=lambda: merge_at(path)[1].values)
        lines[path] = line
        return delta

    merged = OnDemand({path: shapes[path] for path in paths}, make)
    return Adapter(merged, shared_metadata(adapter.metadata for adapter in adapters), all_words(given)), lines


def _terms(path: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[Term, ...]:
    terms = []
    for place, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        if weight and (delta := adapter.deltas.get(path)):
            terms.append(Term(place, float(weight), delta))
    return tuple(terms)


def _check_plain(module: Module, method: str, rank: int | None) -> None:
    """Raise AdapterError for what depends on the base, unless it goes through as it is: alone in its layer, and not cut."""
    alone = method == "concat" and len(module.terms) == 1 and not (rank and rank_of(module.terms[0].delta) > rank)
    for term in () if alone else module.terms:
        check_plain(module.path, term.delta)


def _cut_sum(module: Module, rank: int) -> tuple[Delta, Line] | None:
    """The sum cut to a rank without making dW of it; None where that gains nothing."""
    small = min(linalg.sides(module.shape)) if len(module.shape) in (2, 4) else 0
    pieces = sums.pieces_of([term.weighted_delta() for term in module.terms]) if linalg.is_worth_a_sketch(small, rank) else None
    return cut_parts(module.path, module.shape, small, sums.sketch(pieces, rank), rank) if pieces and len(pieces) > 1 else None


def _product(module: Module) -> Delta | None:
    """The sum as one Kronecker product, where it is one."""
    return sums.as_one_product([term.delta for term in module.terms], [term.weight for term in module.terms])


def usual_rank(module: Module) -> int | None:
    """The rank of a sum that has no factors although no part of it is dW itself; None for others, and where dW is smaller."""
    pairs = [term.delta.low_rank() for term in module.terms]
    if len(pairs) == 1 or all(pairs) or len(module.shape) not in (2, 4):
        return None
    if any(isinstance(term.delta, Dense) for term in module.terms):
        return None
    rank = sum(pair.rank if pair else USUAL for pair in pairs)
    out, inside = linalg.sides(module.shape)
    return rank if rank * (out + inside) < out * inside else None


def _cut(module: Module, delta: Delta, rank: int | None, refactor: bool) -> tuple[Delta, Line]:
    """Cut to `rank`; without one, to the sum of the ranks where all went in as factors and came out as dW."""
    factored = all(term.delta.low_rank() for term in module.terms)
    cap = rank or (sum(rank_of(term.delta) for term in module.terms) if factored else None)
    if refactor or (cap and isinstance(delta, Dense)) or (rank and rank_of(delta) > rank):
        return cut_to_rank(module.path, delta, cap)
    return keep_as_is(module.path, delta)


def _row(method: str, options: Options) -> tuple[Method, Options]:
    if method not in METHODS:
        raise AdapterError(f"no way to merge is called {method!r}", nearest(method, METHODS))
    row = METHODS[method]
    for name, value in options.items():
        if name not in row.options:
            hint = nearest(name, row.options) if row.options else "it has none"
            raise AdapterError(f"{method} has no option {name!r}", hint)
        if not OPTIONS[name].allows(value):
            raise AdapterError(f"{method}: {name} {value!r} makes no sense", f"it is the {OPTIONS[name].what}")
    return row, {**row.options, **options}


def _check(adapters: Sequence[Adapter], weights: Sequence[float], method: str, rank: int | None) -> None:
    if not 1 <= len(adapters) <= METHODS[method].most:
        raise AdapterError(f"{method} cannot merge {len(adapters)} adapters", "concat takes any number")
    if len(weights) != len(adapters):
        raise AdapterError(f"{len(adapters)} adapters and {len(weights)} weights", "give one weight for each")
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise AdapterError(f"a weight of {wrong[0]} makes no sense", "use finite numbers")
    if rank is not None and rank < 1:
        raise AdapterError(f"rank {rank} leaves nothing", "1 is the smallest")
    check_kin(adapters)
    known: dict[str, Shape] = {}
    for path, shape in ((path, shape) for adapter in adapters for path, shape in adapter.shapes.items()):
        if known.setdefault(path, shape) != shape:
            what = f"{path}: updates of shapes {list(known[path])} and {list(shape)} cannot be merged"
            raise AdapterError(what, "all adapters must be made for the same base")
