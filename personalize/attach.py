"""Adapters on a base's modules, through peft: attach(base, spec | adapters) <-> detach() -> Adapter.

Module paths are canonical everywhere outside this file: `unet.` or `text_encoder.text_model.` and the module's own path,
although transformers' CLIPTextModel has lost its `text_model` level.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .adapters import PARTS, Adapter, Delta, Dense, LowRank
from .adapters.deltas import as_low_rank
from .adapters.keys import same
from .adapters.weighting import Weighting
from .base import Base
from .errors import AdapterError, FamilyMismatchError, RecipeError, nearest
from .families import canonical, native
from .recipe import AdapterSpec

NAME = "personalize"  # peft's name for what is attached
Strengths = float | Mapping[str, float]

# Kohya's choice of layers; conv_in, conv_out and the time embedding are left out, UIs stumble over them (only a glob finds them).
TARGETS = {
    "unet": {
        "attention": r".*\.attn[12]\.to_(q|k|v|out\.0)",
        "self-attention": r".*\.attn1\.to_(q|k|v|out\.0)",
        "cross-attention": r".*\.attn2\.to_(q|k|v|out\.0)",
        "feedforward": r".*\.ff\.net\.(0\.proj|2)",
        "projection": r".*\.attentions\.\d+\.proj_(in|out)",
        "conv": r".*\.(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.0\.conv)",
    },
    "text_encoder": {
        "attention": r".*\.self_attn\.(q|k|v|out)_proj",
        "feedforward": r".*\.mlp\.fc[12]",
    },
}


class Attached:
    """Adapter layers on a base, until `detach()` or the end of the `with` block; the base's own weights never change."""

    def __init__(self, base: Base, layers: dict[str, LoraLayer], vectors: dict[str, Vector] | None = None) -> None:
        self.base, self.layers, self.vectors = base, layers, vectors or {}
        self._shift(1.0)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trainable parameters: part -> {module path + '.down' or '.up': parameter, fp32}."""
        groups: dict[str, dict[str, nn.Parameter]] = {}
        for path, layer in self.layers.items():
            group = groups.setdefault(path.partition(".")[0], {})
            group[f"{path}.down"], group[f"{path}.up"] = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        return groups

    def snapshot(self, metadata: Mapping[str, str] | None = None) -> Adapter:
        """A copy of what is attached now, on the CPU."""
        deltas: dict[str, Delta] = {path: lift(layer) for path, layer in self.layers.items()}
        return Adapter(deltas | {path: vector.delta for path, vector in self.vectors.items()}, metadata or {})

    def detach(self) -> Adapter:
        """What was attached; the base is left exactly as it was before."""
        adapter = self.snapshot()
        self._remove()
        return adapter

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the base predicts as if nothing were attached."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        self._shift(0.0)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)
            self._shift(1.0)

    @contextlib.contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """Inside, everything attached counts `strength` times."""
        before = [layer.scaling[NAME] for layer in self.layers.values()]
        for layer, scaling in zip(self.layers.values(), before, strict=True):
            layer.scaling[NAME] = scaling * strength
        self._shift(strength)
        try:
            yield
        finally:
            for layer, scaling in zip(self.layers.values(), before, strict=True):
                layer.scaling[NAME] = scaling
            self._shift(1.0)

    @contextlib.contextmanager
    def dropping(self, seed: int) -> Iterator[None]:
        """Inside, dropout is active, and drawn from `seed`; outside it never is."""
        drops = [drop for layer in self.layers.values() if isinstance(drop := layer.lora_dropout[NAME], nn.Dropout)]
        if not drops:
            yield
            return
        with torch.random.fork_rng(devices=[self.base.device] if self.base.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for drop in drops:
                drop.train()
            try:
                yield
            finally:
                for drop in drops:
                    drop.eval()

    @torch.no_grad()
    def _shift(self, strength: float) -> None:
        """Norms and biases carry their update in place."""
        for vector in self.vectors.values():
            vector.parameter.copy_(vector.before + strength * vector.delta.weight.to(vector.before))

    def _remove(self) -> None:
        self._shift(0.0)
        for path, layer in self.layers.items():
            part, own = native(path, self.base.parts)
            parent, _, leaf = own.rpartition(".")
            setattr(self.base.parts[part].get_submodule(parent), leaf, layer.base_layer)
        for part in {path.partition(".")[0] for path in self.layers}:
            del self.base.parts[part].peft_config
        self.layers, self.vectors = {}, {}


@dataclass(frozen=True)
class Vector:
    """A norm or a bias of the base, what it was, and its update."""

    parameter: Tensor
    before: Tensor
    delta: Dense


def attach(
    base: Base,
    what: AdapterSpec | Adapter | Iterable[tuple[Adapter, Strengths]],
    *,
    parts: Sequence[str] = ("unet",),
    seed: int = 0,
) -> Attached:
    """Attach a fresh adapter of a spec's shape to `parts`, or loaded adapters, each with its strength.

    A fresh adapter starts as the identity (Hu et al. 2021: up = 0, down uniform, drawn from `seed`). A strength is a number,
    or one per part: {"unet": 0.8, "text_encoder": 0.5}. A stack is exact: sum of strength * dW, whatever the ranks and alphas.
    Raises RecipeError for a target that matches nothing, FamilyMismatchError for an adapter that does not fit.
    """
    if any(isinstance(module, LoraLayer) for model in base.parts.values() for module in model.modules()):
        raise AdapterError(f"{base.name} already carries an adapter", "detach() it first; to stack several, attach them together")
    if isinstance(what, AdapterSpec):
        return inject(base, fresh(base, what, parts, seed), what.dropout)
    pairs = [(what, 1.0)] if isinstance(what, Adapter) else list(what)
    for adapter, _ in pairs:
        check_fit(base, adapter)
    plain = [(adapter.resolve(lambda path: weight_named(base, path)), strengths) for adapter, strengths in pairs]
    scaled = [adapter.weighted(weighting_of(strengths)) for adapter, strengths in plain]
    return inject(base, functools.reduce(operator.add, scaled).deltas if scaled else {}, 0.0)


def fresh(base: Base, spec: AdapterSpec, parts: Sequence[str], seed: int) -> dict[str, LowRank]:
    """New LowRanks for what a spec targets: path -> identity. The text encoder keeps the UNet's alpha-to-rank ratio."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for part in parts:
        rank, names = (spec.rank, spec.targets) if part == "unet" else (spec.text_rank, spec.text_targets)
        for path, module in select(base, part, names).items():
            deltas[path] = identity(module, rank, rank * spec.alpha / spec.rank, generator)
    return deltas


def identity(module: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> LowRank:
    """A LowRank for `module` with dW = 0: down ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is peft's and kohya's; up = 0."""
    out, *fan_in = weight_of(module).shape
    bound = 1 / math.sqrt(math.prod(fan_in))
    down = torch.empty(rank, *fan_in).uniform_(-bound, bound, generator=generator)
    return LowRank(torch.zeros(out, rank, *[1] * (len(fan_in) - 1)), down, alpha)


def select(base: Base, part: str, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a part that any target names, in the model's order. Raises RecipeError for one that matches nothing."""
    modules = {path: module for path, module in adaptable(base).items() if path.startswith(f"{part}.")}
    chosen: set[str] = set()
    for target in targets:
        found = {path for path in modules if matches(part, target, path)}
        if not found:
            raise RecipeError(
                f"no layer of the {part} of {base.name} matches the target {target!r}", hint_for(part, target, modules)
            )
        chosen |= found
    return {path: module for path, module in modules.items() if path in chosen}


def matches(part: str, target: str, path: str) -> bool:
    """Whether a target, a name of TARGETS or a glob over module paths (with or without the part's name), names a path."""
    if pattern := TARGETS[kind_of(part)].get(target):
        return re.fullmatch(pattern, path) is not None
    return fnmatchcase(path, target) or fnmatchcase(path.removeprefix(f"{part}."), target)


def kind_of(part: str) -> str:
    """`unet`, or `text_encoder` for both of SDXL's."""
    return part.removesuffix("_2")


def hint_for(part: str, target: str, paths: Iterable[str]) -> str:
    """The nearest thing to a target that matched nothing."""
    if not re.search(r"[.*?\[]", target):
        return nearest(target, TARGETS[kind_of(part)])
    literal = target.replace("*", "")

    def found(path: str) -> int:
        return sum(block.size for block in difflib.SequenceMatcher(None, literal, path, autojunk=False).get_matching_blocks())

    return f"the nearest layer is {max(paths, key=found)}"


def weighting_of(strengths: Strengths) -> Weighting:
    """A number, or one per part, as a weighting; parts that are not named count 1."""
    named = strengths if isinstance(strengths, Mapping) else dict.fromkeys(PARTS, strengths)
    return Weighting({part: named.get(part, 1.0) for part in PARTS})


def check_fit(base: Base, adapter: Adapter) -> None:
    """Raise FamilyMismatchError (AdapterError within the base's own family) unless every delta has its module, in its shape."""
    there = {path: tuple(weight.shape) for path in adapter.deltas if (weight := find_weight(base, path)) is not None}
    wrong = [path for path, delta in adapter.deltas.items() if path not in there or not same(delta.shape, there[path])]
    if not wrong:
        return
    path = wrong[0]
    theirs, ours = list(adapter.deltas[path].shape), f"is {list(there[path])}" if path in there else "does not exist"
    name = f"{called} " if (called := adapter.metadata.get("ss_output_name")) else ""
    kin = adapter.family in (base.family.name, "unknown")
    raise (AdapterError if kin else FamilyMismatchError)(
        f"the adapter {name}({adapter.family}) does not fit {base.name} ({base.family.name}): {len(wrong)} of "
        f"{len(adapter.deltas)} layers differ, e.g. {path} is {theirs} there and here it {ours}",
        "use the base it was trained on",
    )


def find_weight(base: Base, path: str) -> Tensor | None:
    """The parameter that a delta's path names: a weight or, behind `.bias`, a bias; None if the base has none."""
    part, own = native(path.removesuffix(".bias"), base.parts)
    try:
        found = getattr(base.parts[part].get_submodule(own), "bias" if path.endswith(".bias") else "weight", None)
    except (AttributeError, KeyError):
        return None
    return found if isinstance(found, Tensor) else None


def weight_named(base: Base, path: str) -> Tensor:
    """The same, which must be there."""
    weight = find_weight(base, path)
    assert weight is not None
    return weight


def vector(parameter: Tensor, delta: Delta) -> Vector:
    """The update of a norm or a bias, ready to be taken back."""
    return Vector(parameter, parameter.detach().clone(), Dense(delta.delta()))


def inject(base: Base, deltas: Mapping[str, Delta], dropout: float) -> Attached:
    """Put deltas on a base's modules as peft layers; those of norms and biases go into the base until they are taken off."""
    layers: dict[str, LoraLayer] = {}
    single = {path for path, delta in deltas.items() if len(delta.shape) == 1}  # never quantized
    vectors = {path: vector(weight_named(base, path), deltas[path]) for path in single}
    for part, model in base.parts.items():
        own = {native(path, base.parts)[1]: path for path in deltas if path.startswith(f"{part}.") and path not in single}
        if not own:
            continue
        pattern = "|".join(map(re.escape, own))  # full paths, so that peft's match by ending cannot find others
        config = LoraConfig(r=1, lora_alpha=1, lora_dropout=dropout, target_modules=pattern, init_lora_weights=False)
        inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)  # on no device: place() brings the values
        for name, path in own.items():
            layers[path] = place(model.get_submodule(name), as_low_rank(deltas[path]), base.device)
    return Attached(base, layers, vectors)


def place(layer: Any, delta: LowRank, device: torch.device) -> LoraLayer:
    """Give a peft layer the factors of a delta, as trainable fp32 parameters. Each layer may have its own rank and alpha."""
    rank = delta.rank
    layer.r[NAME], layer.lora_alpha[NAME], layer.scaling[NAME] = rank, delta.alpha, delta.alpha / rank
    weight = weight_of(layer.base_layer)
    kernel = weight.shape[2:]
    layer.lora_A[NAME].weight = parameter(delta.down.reshape(rank, weight.shape[1], *kernel), device)
    layer.lora_B[NAME].weight = parameter(delta.up.reshape(weight.shape[0], rank, *[1] * len(kernel)), device)
    layer.cast_input_dtype_enabled = False
    for side in (layer.lora_A[NAME], layer.lora_B[NAME]):
        side.__class__ = FOLLOWING[type(side)]
    return layer.eval()


class FollowingLinear(nn.Linear):
    """Computes in its input's dtype with fp32 weights. Peft would keep an fp32 copy of the input of each layer instead."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class FollowingConv(nn.Conv2d):
    """The same for convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), None)


FOLLOWING = {nn.Linear: FollowingLinear, nn.Conv2d: FollowingConv}


def lift(layer: LoraLayer) -> LowRank:
    """A copy of a peft layer's factors, on the CPU."""
    down, up = (side[NAME].weight.detach().to("cpu", copy=True) for side in (layer.lora_A, layer.lora_B))
    return LowRank(up, down, float(layer.lora_alpha[NAME]))


def parameter(values: Tensor, device: torch.device) -> nn.Parameter:
    """A trainable fp32 copy."""
    return nn.Parameter(values.to(device, torch.float32, copy=True).contiguous())


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear or convolution layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def adaptable(base: Base) -> dict[str, nn.Module]:
    """Every layer that can carry an adapter: canonical path -> Linear or (ungrouped) Conv2d."""
    return {
        canonical(part, path): module
        for part, model in base.parts.items()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
