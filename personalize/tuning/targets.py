"""Which layers of a base carry an adapter, by names and patterns, and how a new one starts there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..adapters.delta import LowRank
from ..adapters.kinds import DOWN, UP, lora
from ..errors import RecipeError, nearest
from ..families.names import canonical
from ..models.model import Base
from ..recipe.fields import AdapterSpec


def fresh(base: Base, spec: AdapterSpec, parts: Sequence[str], seed: int) -> dict[str, LowRank]:
    """New LowRanks for what a spec targets: path -> identity. Text encoders keep the denoiser's alpha-to-rank ratio."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for part in parts:
        rank, names = (spec.rank, spec.targets) if part == base.family.denoiser.part else (spec.text_rank, spec.text_targets)
        for path, module in select(base, part, names).items():
            deltas[path] = identity(module, rank, rank * spec.alpha / spec.rank, generator)
    return deltas


def identity(module: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> LowRank:
    """A LowRank for `module` with dW = 0, as its kind starts."""
    tensors = lora.start(tuple(weight_of(module).shape), rank, alpha, generator)
    return LowRank(tensors[UP], tensors[DOWN], alpha)


def select(base: Base, part: str, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a part that any target names, in the model's order. Raises RecipeError for one that matches nothing."""
    modules = {path: module for path, module in adaptable(base).items() if path.startswith(f"{part}.")}
    chosen, named = set[str](), base.family.network(part).targets
    for target in targets:
        found = {path for path in modules if matches(named, part, target, path)}
        if not found:
            raise RecipeError(
                f"no layer of the {part} of {base.name} matches the target {target!r}", hint_for(named, target, modules)
            )
        chosen |= found
    return {path: module for path, module in modules.items() if path in chosen}


def matches(named: Mapping[str, str], part: str, target: str, path: str) -> bool:
    """Whether a target, a name of the part's own or a glob over module paths (with or without the part's name), names a path."""
    if pattern := named.get(target):
        return re.fullmatch(pattern, path) is not None
    return fnmatchcase(path, target) or fnmatchcase(path.removeprefix(f"{part}."), target)


def hint_for(named: Mapping[str, str], target: str, paths: Iterable[str]) -> str:
    """The nearest thing to a target that matched nothing."""
    if not re.search(r"[.*?\[]", target):
        return nearest(target, named)
    literal = target.replace("*", "")

    def shared_letters(path: str) -> int:
        return sum(block.size for block in difflib.SequenceMatcher(None, literal, path, autojunk=False).get_matching_blocks())

    return f"the nearest layer is {max(paths, key=shared_letters)}"


def adaptable(base: Base) -> dict[str, nn.Module]:
    """Every layer that can carry an adapter: canonical path -> Linear or (ungrouped) Conv2d."""
    return {
        canonical(f"{part}.{path}"): module
        for part, model in base.parts.items()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear or convolution layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
