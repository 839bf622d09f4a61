"""Which layers of a base carry an adapter, by names and patterns, and how a new one starts there."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase, translate

import torch
from torch import Tensor, nn

from ..adapters import kinds
from ..adapters.build import build
from ..adapters.delta import Delta, Dense
from ..adapters.kinds import Kind, Size
from ..adapters.kinds.full import FULL, NORM
from ..adapters.strengths.blocks import block_of
from ..errors import RecipeError, nearest
from ..families.family import Family
from ..families.names import canonical, part_of
from ..models.model import Base
from ..models.skeleton import Skeleton
from ..recipe.adapter import EMBEDDING
from ..recipe.fields import AdapterSpec
from .dense import BIAS, NORMS

ALL = "all"  # the target that names every layer


def fresh(base: Base | Skeleton, spec: AdapterSpec, parts: Sequence[str], seed: int) -> dict[str, Delta]:
    """New updates of a spec's kind for what it targets: path -> one that changes nothing yet.

    Text encoders keep the denoiser's alpha-to-rank ratio. Raises RecipeError for a target that matches nothing.
    """
    if spec.kind == EMBEDDING:
        return {}  # vectors of words are no layer's
    kind, generator = kinds.trainable()[spec.kind], torch.Generator().manual_seed(seed)
    deltas: dict[str, Delta] = {}
    for part in parts:
        rank, names = (spec.rank, spec.targets) if part == base.family.denoiser.part else (spec.text_rank, spec.text_targets)
        if kind in (NORM, FULL):
            deltas |= fresh_weights(base, part, names) if kind is FULL else fresh_vectors(base, part, names, spec.biases)
            continue
        size, alpha = Size(rank, spec.lokr_factor, spec.lokr_full, spec.oft_block), alpha_of(kind, spec, rank)
        for path, module in select(base, part, names).items():
            deltas[path] = begin(kind, weight_of(module), size, alpha, generator)
    return without_frozen(base.family, deltas, spec.freeze)


def without_frozen(family: Family, deltas: Mapping[str, Delta], freeze: Sequence[str]) -> dict[str, Delta]:
    """What is left of updates when layers are to stay as they are. Raises RecipeError for a pattern that names none of them."""
    frozen = {path for pattern in freeze for path in layers_named(family, deltas, pattern, "--freeze")}
    if frozen and len(frozen) == len(deltas):
        raise RecipeError("--freeze leaves no layer to train", "name fewer layers, or other --targets")
    return {path: delta for path, delta in deltas.items() if path not in frozen}


def begin(kind: Kind, weight: Tensor, size: Size, alpha: float | None, generator: torch.Generator) -> Delta:
    """An update of a weight with dW = 0, as its kind starts."""
    assert kind.start
    known = torch.ones(()).expand(weight.shape) if weight.is_meta else weight.detach()  # a base of shapes alone
    tensors = kind.start(known, size, generator)
    return build(kinds.kind_of(tensors), tensors, alpha, tuple(weight.shape))


def alpha_of(kind: Kind, spec: AdapterSpec, rank: int) -> float | None:
    """The alpha of a file whose updates have this rank; None for kinds without one.

    Rank-stabilized (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732), dW is scaled by alpha / sqrt(rank): readers divide by
    the rank, so that the file's alpha is alpha * sqrt(rank), in fp32 as it is stored.
    """
    if not kind.has_alpha:
        return None
    alpha = rank * spec.alpha / spec.rank
    return float(torch.tensor(alpha * math.sqrt(rank))) if spec.rslora else alpha


def fresh_vectors(base: Base | Skeleton, part: str, targets: Sequence[str], biases: bool) -> dict[str, Delta]:
    """Zeros for the weights and biases of a part's norms, and with `biases` for those of its target layers.

    Path globs choose norms too; the part's own names speak of layers, and leave all norms in. Raises RecipeError for a target
    that matches nothing.
    """
    norms = {path: one for path, one in find_norms(base).items() if path.startswith(f"{part}.")}
    named = base.family.network(part).targets
    patterns = [target for target in targets if target not in named]
    found = {p: one for p, one in norms.items() if not patterns or any(matches(named, part, name, p) for name in patterns)}
    layers = select(base, part, targets) if biases else {}
    if not found and not layers:
        what = f"no norm of the {part} of {base.name} matches the target {', '.join(map(repr, patterns)) or 'norms'}"
        raise RecipeError(what, hint_for(named, patterns[0], norms) if patterns and norms else "train another --kind")
    return zeros(found, {**found, **layers})


def fresh_weights(base: Base | Skeleton, part: str, targets: Sequence[str]) -> dict[str, Delta]:
    """Zeros for the weights and biases of a part's target layers, norms among them. Raises RecipeError as `select` does."""
    layers = select(base, part, targets, adaptable(base) | find_norms(base))
    return zeros(layers, layers)


def zeros(weights: Mapping[str, nn.Module], biases: Mapping[str, nn.Module]) -> dict[str, Delta]:
    """Updates that change nothing, of the weights of some modules and of the biases of some, where they have one."""
    deltas: dict[str, Delta] = {path: Dense(torch.zeros(weight_of(module).shape)) for path, module in weights.items()}
    with_bias = [(path, one.bias) for path, one in biases.items() if isinstance(one.bias, Tensor)]
    return deltas | {path + BIAS: Dense(torch.zeros(bias.shape)) for path, bias in with_bias}


def find_norms(base: Base | Skeleton) -> dict[str, nn.Module]:
    """Every norm that has a weight: canonical path -> LayerNorm or GroupNorm."""
    return {
        canonical(f"{part}.{path}"): module
        for part, model in base.parts.items()
        for path, module in model.named_modules()
        if isinstance(module, NORMS) and isinstance(module.weight, Tensor)
    }


def select(
    base: Base | Skeleton, part: str, targets: Sequence[str], among: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """The modules of a part that any target names, of those that can carry an adapter or are `among` others.

    Raises RecipeError for a target that matches nothing.
    """
    every = adaptable(base) if among is None else among
    modules = {path: module for path, module in every.items() if path.startswith(f"{part}.")}
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
    if target == ALL:
        return True
    return fnmatchcase(path, target) or fnmatchcase(path.removeprefix(f"{part}."), target)


def is_named(family: Family, pattern: str, path: str) -> bool:
    """Whether a pattern names a layer: as a target does, by what its path begins with (`up_blocks.1`, `mid`), or by its block.

    >>> from personalize.families.names import FAMILIES
    >>> [is_named(FAMILIES[1], pattern, "unet.mid_block.resnets.0.conv1") for pattern in ("mid", "MID", "unet", "up_blocks")]
    [True, True, True, False]
    """
    path, part = path.removesuffix(BIAS), part_of(path)
    own = path.removeprefix(f"{part}.")
    if matches(family.network(part).targets, part, pattern, path):
        return True
    begins = re.compile(translate(pattern).removesuffix(r"\Z").removesuffix(r"\z") + r"(?![A-Za-z0-9])")
    return bool(begins.match(path) or begins.match(own)) or fnmatchcase(block_of(family, path), f"{pattern}*")


def layers_named(family: Family, paths: Collection[str], pattern: str, flag: str) -> list[str]:
    """The paths that a pattern names. Raises RecipeError, about a setting's flag, where it names none."""
    if found := [path for path in paths if is_named(family, pattern, path)]:
        return found
    named = family.network(part_of(next(iter(paths)))).targets
    raise RecipeError(f"{flag}: {pattern!r} names no layer that is trained", hint_for(named, pattern, paths))


def hint_for(named: Mapping[str, str], target: str, paths: Iterable[str]) -> str:
    """The nearest thing to a target that matched nothing."""
    if not re.search(r"[.*?\[]", target):
        return nearest(target, named)
    literal = target.replace("*", "")

    def shared_letters(path: str) -> int:
        return sum(block.size for block in difflib.SequenceMatcher(None, literal, path, autojunk=False).get_matching_blocks())

    return f"the nearest layer is {max(paths, key=shared_letters)}"


def adaptable(base: Base | Skeleton) -> dict[str, nn.Module]:
    """Every layer that can carry an adapter: canonical path -> Linear or (ungrouped) Conv2d."""
    return {
        canonical(f"{part}.{path}"): module
        for part, model in base.parts.items()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
