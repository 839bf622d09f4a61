"""How fast each layer learns, and from which step on: rates by name, by depth, and layers that are thawed one after the other.

Layers near the output first and fastest: discriminative fine-tuning and gradual unfreezing (Howard & Ruder 2018,
https://arxiv.org/abs/1801.06146, sections 3.1 and 3.3); rates that decay by layer (Clark et al. 2020, https://arxiv.org/abs/2003.10555).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import RecipeError
from ..families.family import Family
from ..families.names import part_of
from ..recipe.by_layer import GRADUAL, read_scales, read_thaws
from ..recipe.fields import Optim
from .dense import BIAS
from .targets import layers_named

GRADUAL_SHARE = 0.5  # of the steps, in which `gradual` thaws everything


@dataclass(frozen=True, order=True)
class Rate:
    """How a layer learns."""

    start: int = 0  # so many steps before it does
    scale: float = 1.0  # of its part's learning rate


EVEN = Rate()  # in all steps, as its part does


def rates_of(family: Family, start: Iterable[str], optim: Optim, steps: int) -> dict[str, Rate]:
    """The rate of each layer by its path; `start` are the paths of all updates, of weights and of biases.

    Raises RecipeError for a pattern that names none of them, and where nothing would learn at first.
    """
    paths = dict.fromkeys(path.removesuffix(BIAS) for path in start)
    scales, starts = dict.fromkeys(paths, 1.0), starts_of(family, paths, optim, steps)
    for pattern, scale in read_scales(optim.lr_scale):
        scales |= dict.fromkeys(layers_named(family, paths, pattern, "--lr-scale"), scale)
    if optim.lr_decay != 1:
        scales = {path: scales[path] * optim.lr_decay**depth for path, depth in depths(family, paths).items()}
    if paths and not optim.pivot and (first := min(starts.values())):
        raise RecipeError(f"--unfreeze: nothing would learn in the first {first} steps", "begin with 1.0:up_blocks")
    return {path: Rate(starts[path], scales[path]) for path in paths}


def starts_of(family: Family, paths: Collection[str], optim: Optim, steps: int) -> dict[str, int]:
    """How many steps are done when a layer begins to learn; what no pattern names learns in all of them."""
    unfreeze = optim.unfreeze
    if optim.pivot:  # the trigger's vectors learn before them
        return dict.fromkeys(paths, round(optim.pivot * steps))
    if unfreeze == GRADUAL:
        deep = depths(family, paths)
        order = {part: sorted({deep[path] for path in paths if part_of(path) == part}) for part in map(part_of, paths)}
        return {
            path: round(GRADUAL_SHARE * steps * order[part].index(deep[path]) / len(order[part]))
            for path, part in zip(paths, map(part_of, paths), strict=True)
        }
    starts = dict.fromkeys(paths, 0)
    for share, patterns in read_thaws(unfreeze):
        for pattern in patterns:
            starts |= dict.fromkeys(layers_named(family, paths, pattern, "--unfreeze"), round((1 - share) * steps))
    return starts


def depths(family: Family, paths: Iterable[str]) -> dict[str, int]:
    """How many blocks or layers of its part lie between a layer and the part's output; what is in no block lies behind all."""
    order = {block: len(blocks) - 1 - i for blocks in [family.denoiser.blocks()] for i, block in enumerate(blocks)}
    counts = {row.part: row.layer_count for row in family.texts}
    found = {}
    for path in paths:
        part, _, own = path.partition(".")
        if part in counts:
            number = re.search(r"\.(\d+)\.", f".{own}.")
            found[path] = counts[part] - 1 - int(number[1]) if number else 0  # the last norm and the projection
        else:
            found[path] = order[family.denoiser.block_of(own)]
    return found


@dataclass(frozen=True)
class RateGroup:
    """Layers that learn alike, as people are told."""

    layers: str  # their blocks, from the first to the last: "IN01 ... MID", "text_encoder 0 ... 11"
    count: int
    rate: Rate


def groups_of(family: Family, rates: Mapping[str, Rate]) -> list[RateGroup]:
    """Layers by their part and rate, those that begin first above."""
    alike: dict[tuple[str, Rate], list[str]] = {}
    for path, rate in rates.items():
        alike.setdefault((part_of(path), rate), []).append(path)
    order = sorted(alike, key=lambda one: (one[1].start, -one[1].scale))
    return [RateGroup(summary(family, part, alike[part, rate]), len(alike[part, rate]), rate) for part, rate in order]


def summary(family: Family, part: str, paths: Sequence[str]) -> str:
    """The blocks that layers of a part lie in, in few words."""
    deep = depths(family, paths)
    ends = [min(paths, key=deep.__getitem__), max(paths, key=deep.__getitem__)]
    if part == family.denoiser.part:
        names = [family.denoiser.block_of(path.partition(".")[2]) for path in ends]
    else:
        counts = {row.part: row.layer_count for row in family.texts}
        names = [f"layer {counts[part] - 1 - deep[path]}" for path in ends]
    words = names[0] if names[0] == names[1] else f"{names[1]} to {names[0]}"
    return f"{part} {words}"
