"""Adapters on a base's modules, through peft: attach(base, spec | adapters) <-> detach() -> Adapter.

Module paths are canonical everywhere outside this file: `unet.` or `text_encoder.text_model.` and the module's own path,
although transformers' CLIPTextModel has lost its `text_model` level.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.delta import Delta, Dense, LowRank, as_low_rank
from ..adapters.fit import check_fit as check_shapes
from ..adapters.strengths.grammar import Weighting, every_part, read
from ..errors import AdapterError
from ..families.names import PARTS, canonical, native
from ..models.model import Base
from ..recipe.fields import AdapterSpec
from .layers import NAME, Following, follow, lowered
from .scheduled import Moving, Vector, side_by_side
from .targets import fresh, weight_of

Strengths = float | Mapping[str, float] | str | Weighting  # a text is what stands behind a file's name: "0.8:lbw=OUTD"


class Attached:
    """Adapter layers on a base, until `detach()` or the end of the `with` block; the base's own weights never change."""

    def __init__(self, base: Base, moving: Moving | None = None) -> None:
        self.base, self.moving = base, moving or Moving()
        self.layers: dict[str, LoraLayer] = {}
        self.vectors: dict[str, Vector] = {}

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

    def turn(self, step: int, steps: int) -> set[str]:
        """Bring every schedule to a step of 0 .. steps - 1; the parts in which anything changed. At first it is step 0 of 1."""
        changed = self.moving.turn(step, steps, self.vectors) if self.moving.weightings else set()
        if changed:
            self._shift(1.0)
        return changed

    def swap(self, what: Adapter | Iterable[tuple[Adapter, Strengths]]) -> Attached:
        """Other adapters in place of these, as `attach` takes them. The base is neither read nor written anew.

        Layers that both change stay where they are and get other values. Raises as `attach` does, before anything changes.
        """
        if attached_to(self.base) is not self:
            raise AdapterError(f"nothing of this is on {self.base.name} any more", "attach() it anew")
        pairs = stack_of(what)
        for adapter, _ in pairs:
            check_fit(self.base, adapter)
        deltas, moving = mix(self.base, pairs)
        self._remove(keep=deltas)
        self.moving = moving
        return inject(self, deltas, 0.0)

    def put(self, adapter: Adapter) -> None:
        """Another adapter of the same shape in the place of what is attached; the parameters of `groups` stay as they were."""
        for path, layer in self.layers.items():
            place(layer, as_low_rank(adapter.deltas[path]), self.base.device)

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

    def lowered(self) -> contextlib.AbstractContextManager[None]:
        """Inside, factors are cast to the base's dtype once for all layers and passes; they must not change meanwhile."""
        factors: list[Following] = [side[NAME] for one in self.layers.values() for side in (one.lora_A, one.lora_B)]
        return lowered(factors, self.base.dtype)

    @torch.no_grad()
    def _shift(self, strength: float) -> None:
        """Norms and biases carry their update in place."""
        for vector in self.vectors.values():
            change = strength * vector.delta.weight.to(vector.before)
            vector.parameter.copy_(vector.before + change if strength else vector.before)  # -0.0 + 0.0 is not -0.0

    def _remove(self, keep: Collection[str] = ()) -> None:
        """Put the base's own layers back, but for those to keep; nothing if they are back already."""
        if attached_to(self.base) is not self:
            return
        self._shift(0.0)
        for part, model in self.base.parts.items():
            found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
            gone = [name for name in found if canonical(f"{part}.{name}") not in keep]
            for name in gone:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, found[name].base_layer)
            if len(gone) == len(found):
                vars(model).pop("peft_config", None)
        self.layers = {path: layer for path, layer in self.layers.items() if path in keep}
        self.vectors, self.moving = {}, Moving()
        if not keep:
            vars(self.base).pop("attached", None)


def attach(
    base: Base,
    what: AdapterSpec | Adapter | Iterable[tuple[Adapter, Strengths]],
    *,
    parts: Sequence[str] = (),
    seed: int = 0,
) -> Attached:
    """Attach a fresh adapter of a spec's shape to `parts` (none: the denoiser), or loaded adapters, each with its strength.

    A fresh adapter starts as the identity (Hu et al. 2021: up = 0, down uniform, drawn from `seed`). A strength is a number,
    or one per part: {"unet": 0.8, "text_encoder": 0.5}, or what one types: "0.8:lbw=OUTD", "0@0,1@0.5:stop=10"; what changes
    from step to step is brought there by `turn`. A stack is exact: sum of strength * dW, whatever the ranks and alphas.
    Raises RecipeError for a target that matches nothing, FamilyMismatchError for an adapter that does not fit.
    """
    if any(isinstance(module, LoraLayer) for model in base.parts.values() for module in model.modules()):
        raise AdapterError(f"{base.name} already carries an adapter", "detach() it first; to stack several, attach them together")
    if isinstance(what, AdapterSpec):
        return inject(Attached(base), fresh(base, what, parts or [base.family.denoiser.part], seed), what.dropout)
    pairs = stack_of(what)
    for adapter, _ in pairs:
        check_fit(base, adapter)
    deltas, moving = mix(base, pairs)
    return inject(Attached(base, moving), deltas, 0.0)


def attached_to(base: Base) -> Attached | None:
    """What a base carries."""
    found: Attached | None = vars(base).get("attached")
    return found


def stack_of(what: Adapter | Iterable[tuple[Adapter, Strengths]]) -> list[tuple[Adapter, Weighting]]:
    """Adapters and how much of each."""
    pairs = [(what, 1.0)] if isinstance(what, Adapter) else what
    return [(adapter, weighting_of(strengths)) for adapter, strengths in pairs]


def mix(base: Base, pairs: Iterable[tuple[Adapter, Weighting]]) -> tuple[Mapping[str, Delta], Moving]:
    """What a stack adds to the base: the exact sum of all whose strength stays, and each that moves, at 1, by itself."""
    plain = [(adapter.resolve(lambda path: weight_named(base, path)), weighting) for adapter, weighting in pairs]
    fixed = [adapter.weighted(weighting) for adapter, weighting in plain if not weighting.moves]
    others = [(adapter.weighted(weighting.shape).deltas, weighting) for adapter, weighting in plain if weighting.moves]
    return side_by_side(functools.reduce(operator.add, fixed).deltas if fixed else {}, others)


def weighting_of(strengths: Strengths) -> Weighting:
    """A number, one per part, or what one types, as a weighting; parts that are not named count 1."""
    if isinstance(strengths, Weighting | str):
        return read(strengths.split(":")) if isinstance(strengths, str) else strengths
    named = strengths if isinstance(strengths, Mapping) else dict.fromkeys(PARTS, strengths)
    return Weighting(every_part(named))


def check_fit(base: Base, adapter: Adapter) -> None:
    """Raise FamilyMismatchError (AdapterError within the base's own family) unless every delta has its module, in its shape."""
    shapes = {path: tuple(weight.shape) for path in adapter.deltas if (weight := find_weight(base, path)) is not None}
    check_shapes(adapter, shapes, base.name, base.family.name)


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


def inject(attached: Attached, deltas: Mapping[str, Delta], dropout: float) -> Attached:
    """Put deltas on a base's modules as peft layers; those of norms and biases go into the base until they are taken off.

    If anything fails on the way, the base is as it was.
    """
    base, single = attached.base, {path for path, delta in deltas.items() if len(delta.shape) == 1}
    with contextlib.ExitStack() as undo:
        undo.callback(attached._remove)
        vars(base)["attached"] = attached
        for part, model in base.parts.items():
            own = {native(path, base.parts)[1]: path for path in deltas if path.startswith(f"{part}.") and path not in single}
            if new := [name for name, path in own.items() if path not in attached.layers]:
                pattern = "|".join(map(re.escape, new))  # full paths, so that peft's match by ending cannot find others
                config = LoraConfig(r=1, lora_alpha=1, lora_dropout=dropout, target_modules=pattern, init_lora_weights=False)
                vars(model).pop("peft_config", None)
                inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)  # on no device: place() brings the values
            for name, path in own.items():
                layer = attached.layers[path] = place(model.get_submodule(name), as_low_rank(deltas[path]), base.device)
                attached.moving.take(path, layer.lora_A[NAME].weight)
        attached.vectors = {path: vector(weight_named(base, path), deltas[path]) for path in single}
        attached._shift(1.0)
        attached.turn(0, 1)
        undo.pop_all()
    return attached


def place(layer: Any, delta: LowRank, device: torch.device) -> LoraLayer:
    """Give a peft layer the factors of a delta, as trainable fp32 parameters. Each layer may have its own rank and alpha."""
    rank = delta.rank
    layer.r[NAME], layer.lora_alpha[NAME], layer.scaling[NAME] = rank, delta.alpha, delta.alpha / rank
    weight = weight_of(layer.base_layer)
    kernel = weight.shape[2:]
    layer.lora_A[NAME].weight = parameter(delta.down.reshape(rank, weight.shape[1], *kernel), device)
    layer.lora_B[NAME].weight = parameter(delta.up.reshape(weight.shape[0], rank, *[1] * len(kernel)), device)
    layer.cast_input_dtype_enabled = False
    for module in (layer, layer.lora_A[NAME], layer.lora_B[NAME]):
        follow(module)
    return layer.eval()


def lift(layer: LoraLayer) -> LowRank:
    """A copy of a peft layer's factors, on the CPU."""
    down, up = (side[NAME].weight.detach().to("cpu", copy=True) for side in (layer.lora_A, layer.lora_B))
    return LowRank(up, down, float(layer.lora_alpha[NAME]))


def parameter(values: Tensor, device: torch.device) -> nn.Parameter:
    """A trainable fp32 copy."""
    return nn.Parameter(values.to(device, torch.float32, copy=True).contiguous())
