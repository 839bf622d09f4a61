"""Checkpoints out of checkpoints: an adapter into a base's weights, and a blend of two."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...errors import AdapterError, nearest
from ...families.names import PARTS, part_of
from ...formats.checkpoint import Weights, check_destination, rewrite
from ...formats.header import short
from ..adapter import Adapter
from ..delta import frobenius
from ..fit import check_fit, check_parts
from ..lazy import map_deltas
from ..strengths.grammar import every_part
from .checkpoints import Change, Report, Source, check_same_shapes, in_fp32, open_source, shared_paths

Strengths = float | Mapping[str, float]  # one for all, or per part; parts that are not named count 1.0
STORY = "personalize.merged"  # metadata: what a checkpoint was made of


def bake(
    base: Source, adapters: Iterable[tuple[Adapter, Strengths]], destination: str | Path, *, strip_metadata: bool = False
) -> Report:
    """Write the base with adapters in its weights, W + sum of strength * dW, in its own layout and dtype.

    Computed in fp32; an adapter that depends on the base (DoRA, OFT) is given the base's W. The report tells what the dtype
    rounded off: bf16 loses small updates. A second copy of the weights (EMA) is given the same. To go back, keep the base.

    Raises FamilyMismatchError or AdapterError for an adapter that does not fit, and what `rewrite` raises.
    """
    base = open_source(base)
    updates: dict[str, list[tuple[float, Adapter]]] = {}
    story = []
    for adapter, strengths in adapters:
        by_part = _strengths_by_part(adapter, strengths)
        asked = Adapter(map_deltas(adapter.deltas, lambda _, delta: delta, _paths_of(adapter, by_part)), adapter.metadata)
        check_parts(asked, base.parts, str(base.path))
        check_fit(asked, {path: base.shape(path) for path in asked.shapes if path in base}, str(base.path), base.family)
        story.append(f"{_name(adapter)} ({', '.join(f'{part} {strength:g}' for part, strength in by_part.items())})")
        for path in asked.deltas:
            updates.setdefault(path, []).append((by_part[part_of(path)], adapter))
    changes: dict[str, Change] = {}
    copied: dict[str, Change] = {}

    def update(view: Weights, done: dict[str, Change], path: str) -> Tensor | None:
        if path not in updates:
            return None
        stored = view[path]
        weight = in_fp32(stored)
        total = weight.clone()
        for strength, adapter in updates[path]:
            total += strength * adapter.deltas[path].delta(weight).reshape(weight.shape)
        done[path] = _rounding(weight, total, stored.dtype)
        return total

    said = _metadata(base, " + ".join([base.path.name, *story]), strip_metadata)
    copies = partial(update, base.copy, copied)
    made = rewrite(base, destination, partial(update, base, changes), said, copies=copies, stripped=strip_metadata)
    return Report(changes, path=made, copies=len(copied))


def _paths_of(adapter: Adapter, by_part: Mapping[str, float]) -> list[str]:
    return [path for path in adapter.deltas if by_part[part_of(path)]]


def _strengths_by_part(adapter: Adapter, strengths: Strengths) -> dict[str, float]:
    """The strength of each part of an adapter. Raises AdapterError for parts that are none, and for NaN and infinity."""
    named = strengths if isinstance(strengths, Mapping) else dict.fromkeys(PARTS, strengths)
    for part, strength in named.items():
        if part not in PARTS:
            raise AdapterError(f"no part of a model is called {short(part)!r}", nearest(part, PARTS))
        if not math.isfinite(strength):
            raise AdapterError(f"a strength of {strength} makes no sense", "use a finite number")
    known = every_part(named)
    return {part: known[part] for part in adapter.parts}


def _name(adapter: Adapter) -> str:
    return short(adapter.metadata.get("ss_output_name", "an adapter"))


def interpolate(base: Source, tuned: Source, alpha: float, destination: str | Path, *, strip_metadata: bool = False) -> Report:
    """Write (1 - alpha) base + alpha tuned, of every parameter (Wortsman et al. 2021, https://arxiv.org/abs/2109.01903).

    Layout, dtype and all files beside the weights are the base's; so is a part that only the base has. `alpha` 0 is the base,
    1 is `tuned`; outside of them it extrapolates. Raises as `extract` and `rewrite` do.
    """
    base, tuned = open_source(base), open_source(tuned)
    if not math.isfinite(alpha):
        raise AdapterError(f"an alpha of {alpha} makes no sense", "use a finite number, such as 0.5")
    check_destination(destination, base, tuned)
    paths = shared_paths(tuned, base, ())
    check_same_shapes(tuned, base, paths)
    shared, changes = set(paths), dict[str, Change]()

    def blend(ours: Weights, theirs: Weights, done: dict[str, Change], path: str) -> Tensor | None:
        if path not in shared:
            return None
        stored = ours[path]
        before, other = in_fp32(stored), in_fp32((theirs if path in theirs else tuned)[path])
        total = torch.lerp(before, other.to(before.dtype).reshape(before.shape), alpha)  # exact at 0 and at 1
        done[path] = _rounding(before, total, stored.dtype)
        return total

    said = _metadata(base, f"{1 - alpha:g} x {base.path.name} + {alpha:g} x {tuned.path.name}", strip_metadata)
    copied: dict[str, Change] = {}
    copies = partial(blend, base.copy, tuned.copy, copied)  # a model without a second copy is its own
    made = rewrite(base, destination, partial(blend, base, tuned, changes), said, copies=copies, stripped=strip_metadata)
    return Report(changes, path=made, copies=len(copied))


def _rounding(before: Tensor, after: Tensor, dtype: torch.dtype) -> Change:
    """The change of a parameter, and what its dtype rounds off."""
    return Change(
        frobenius(after - before), frobenius(after.to(dtype).to(after.dtype).sub_(after)) if after.dtype != dtype else 0.0
    )


def _metadata(base: Weights, story: str, stripped: bool) -> dict[str, str]:
    """A line about what was made, behind what the base tells of itself; nothing if that is to be stripped."""
    if stripped:
        return {}
    return {STORY: "; ".join(filter(None, (base.metadata.get(STORY), story)))}
