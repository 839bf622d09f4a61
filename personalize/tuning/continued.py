"""Updates that start as what an adapter already is, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.delta import Decomposed, Delta, Dense, LowRank, kind_name
from ..adapters.kinds.dora import norms_of
from ..adapters.kinds.kind import ALPHA, DOWN, UP, shapes_of
from ..errors import AdapterError
from ..families.family import Shape
from ..models.model import Base
from ..text import command_line
from .attach import check_fit, weight_named
from .specs import lora_of
from .targets import matches

Pair = tuple[LowRank, LowRank]  # what a file holds, and what is to hold it


def start_from(base: Base, adapter: Adapter, start: Mapping[str, Delta], name: str) -> dict[str, Delta]:
    """Updates of the modules, kinds and shapes of `start` whose dW is the adapter's; what is beyond it starts as there.

    A LoRA holds any adapter of no higher ranks, a DoRA any LoRA or DoRA of those; other kinds hold tensors of their own shapes.
    `name` is what messages call the adapter. Raises FamilyMismatchError for one of another base, AdapterError for one that
    changes other modules as well, or that `start` cannot hold exactly.
    """
    check_fit(base, adapter)
    if more := sorted(set(adapter.deltas) - set(start)):
        what = f"{name} changes {len(more)} layers that would not be trained, such as {more[0]}"
        raise AdapterError(what, hint_for_targets(base, sorted(adapter.deltas), more))
    pairs = {path: _pair(base, path, delta, start[path]) for path, delta in adapter.deltas.items()}
    _check_ranks(base, pairs, name)
    return {
        path: _hold(base, path, adapter.deltas[path], one, pairs[path], name) if path in pairs else one
        for path, one in start.items()
    }


def _pair(base: Base, path: str, delta: Delta, start: Delta) -> Pair | None:
    """The factors of a delta, and those of `start` that are to hold them; None where none can."""
    if isinstance(start, LowRank):
        plain = delta if not delta.needs_base else Dense(delta.delta(weight_named(base, path)))
        return LowRank(*_factors(lora_of(plain, start.shape))), start
    own = delta.inner if isinstance(delta, Decomposed) and len(delta.magnitude) == 1 else delta
    if isinstance(start, Decomposed) and isinstance(start.inner, LowRank) and isinstance(own, LowRank):
        return own, start.inner
    return None


def _check_ranks(base: Base, pairs: Mapping[str, Pair | None], name: str) -> None:
    """Raise AdapterError, which names the rank that holds all, where a rank is higher than that of what is trained."""
    if higher := {path: pair for path, pair in pairs.items() if pair and pair[0].rank > pair[1].rank}:
        path = max(higher, key=lambda path: higher[path][0].rank)
        own, start = higher[path]
        flag = "--rank" if path.startswith(f"{base.family.denoiser.part}.") else "--text-rank"
        what = f"{name} has rank {own.rank} at {path}, more than {flag} {start.rank} holds"
        convert = command_line("personalize", "convert", name, "--to", "lora", "--rank", start.rank)
        raise AdapterError(what, f"{flag} {own.rank} holds it exactly; {convert} -o FILE makes it smaller and prints the error")


def _hold(base: Base, path: str, delta: Delta, start: Delta, pair: Pair | None, name: str) -> Delta:
    """An update of the kind and shape of `start` with a delta's dW. Raises AdapterError."""
    if pair:
        wide = widen(*pair)
        if isinstance(start, LowRank):
            return wide
        norms = delta.magnitude if isinstance(delta, Decomposed) else norms_of(weight_named(base, path).float() + wide.delta())
        return Decomposed(wide, norms)
    if type(delta) is type(start) and not isinstance(start, Decomposed) and _form(delta) == _form(start):
        return delta
    what = f"{name} holds {kind_name(delta)} at {path}, and what is trained is {kind_name(start)} of {_sizes(start)}"
    raise AdapterError(what, "--kind lora begins with any adapter; others with one of the same kind and size")


def _form(delta: Delta) -> tuple[str, dict[str, Shape], float | None]:
    """What two updates share that one layer can hold: kind, shapes by role, and which side is meant."""
    tensors = {role: one for role, one in delta.stored().items() if role != ALPHA}
    flag = tensors.get("on_input")
    return kind_name(delta), shapes_of(tensors), None if flag is None else float(flag)


def _sizes(delta: Delta) -> str:
    return ", ".join(f"{role} {list(size)}" for role, size in shapes_of(delta.stored()).items() if size)


def widen(own: LowRank, start: LowRank) -> LowRank:
    """The same dW in the rank and alpha of `start`, whose further rows of `down` meet columns of zeros in `up`."""
    missing = start.rank - own.rank
    zeros = own.up.new_zeros(own.up.shape[0], missing, *own.up.shape[2:])
    up, down = torch.cat([own.up * (own.scale / start.scale), zeros], 1), torch.cat([own.down, start.down[own.rank :]])
    return LowRank(up, down, start.alpha)


def _factors(spec: tuple[Mapping[str, Tensor], float]) -> tuple[Tensor, Tensor, float]:
    tensors, alpha = spec
    return tensors[UP], tensors[DOWN], alpha


def hint_for_targets(base: Base, paths: Iterable[str], missing: Iterable[str]) -> str:
    """Which settings train all these layers as well."""
    denoiser, missing = base.family.denoiser.part, list(missing)
    parts = dict.fromkeys(path.partition(".")[0] for path in missing)
    hints = []
    for part in parts:
        named = base.family.network(part).targets
        own = [path for path in paths if path.startswith(f"{part}.")]
        lost = [path for path in missing if path.startswith(f"{part}.")]
        if not all(any(matches(named, part, name, path) for name in named) for path in lost):
            return "an adapter of linear layers and convolutions cannot hold them"
        names = [name for name in named if any(matches(named, part, name, path) for path in own)]
        hints.append(f"{'--targets' if part == denoiser else '--text-encoder-lr 1e-4 --text-targets'} {','.join(names)}")
    return f"{' '.join(hints)} trains them"
