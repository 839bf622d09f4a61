"""A LoRA that starts as what an adapter of any kind already is, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.delta import LowRank
from ..adapters.kinds.kind import DOWN, UP
from ..errors import AdapterError
from ..models.model import Base
from ..text import command_line
from .attach import check_fit, weight_named
from .targets import matches
from .tunable import lora_of


def start_from(base: Base, adapter: Adapter, start: Mapping[str, LowRank], name: str) -> dict[str, LowRank]:
    """LowRanks of the modules, ranks and alphas of `start` whose dW is the adapter's; what is beyond its ranks starts as there.

    `name` is what messages call the adapter. Raises FamilyMismatchError for one of another base, AdapterError for one that
    changes other modules as well, or has higher ranks.
    """
    check_fit(base, adapter)
    if more := sorted(set(adapter.deltas) - set(start)):
        what = f"{name} changes {len(more)} layers that would not be trained, such as {more[0]}"
        raise AdapterError(what, hint_for_targets(base, sorted(adapter.deltas), more))
    plain = adapter.resolve(lambda path: weight_named(base, path)).deltas
    own = {path: LowRank(*_factors(lora_of(delta, tuple(weight_named(base, path).shape)))) for path, delta in plain.items()}
    if higher := {path: delta.rank for path, delta in own.items() if delta.rank > start[path].rank}:
        path = max(higher, key=higher.__getitem__)
        flag = "--rank" if path.startswith(f"{base.family.denoiser.part}.") else "--text-rank"
        what = f"{name} has rank {higher[path]} at {path}, more than {flag} {start[path].rank} holds"
        convert = command_line("personalize", "convert", name, "--to", "lora", "--rank", start[path].rank)
        smaller = f"{convert} -o FILE makes it smaller and prints the error"
        raise AdapterError(what, f"{flag} {higher[path]} holds it exactly; {smaller}")
    return {path: widen(own[path], one) if path in own else one for path, one in start.items()}


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
            return "a LoRA of linear layers and convolutions cannot hold them"
        names = [name for name in named if any(matches(named, part, name, path) for path in own)]
        hints.append(f"{'--targets' if part == denoiser else '--text-encoder-lr 1e-4 --text-targets'} {','.join(names)}")
    return f"{' '.join(hints)} trains them"
