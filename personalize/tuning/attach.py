"""Adapters on a base's modules: attach(base, spec | adapters) <-> detach() -> Adapter.

Module paths are canonical everywhere outside this folder: `unet.` or `text_encoder.text_model.` and the module's own path,
although transformers' CLIPTextModel has lost its `text_model` level.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.delta import Delta, Dense, LowRank, add
from ..adapters.fit import check_fit as check_shapes
from ..adapters.kinds import DOWN
from ..adapters.kinds.lora import LORA
from ..adapters.lazy import OnDemand
from ..adapters.strengths.grammar import Weighting, every_part, read
from ..errors import AdapterError, check_type
from ..families.names import PARTS, native
from ..models.model import Base
from ..recipe.fields import AdapterSpec
from .by_timestep import parts_by_timestep
from .layers import ActiveRows, AdapterLayer
from .placement import check_free, find_layer, put_layers, restore_layers
from .scheduled import Mover, Moving, Vector, side_by_side
from .specs import lora_of, make_layers
from .targets import fresh
from .tunable import LayerAdapter, of_base

REGISTERED = "attached"  # under this name a base knows what it carries
Strengths = float | Mapping[str, float] | str | Weighting  # a text is what stands behind a file's name: "0.8:lbw=OUTD"


class Attached(LayerAdapter):
    """Adapter layers on a base, until `detach()` or the end of the `with` block; the base's own weights never change.

    A Tunable. Of a stack, `parameters` are those of the sum; norms and biases carry their update in place.
    """

    def __init__(self, base: Base, moving: Moving | None = None) -> None:
        super().__init__(base, {}, ActiveRows(0))
        self.moving = moving or Moving()
        self.vectors: dict[str, Vector] = {}

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def snapshot(self, metadata: Mapping[str, str] | None = None) -> Adapter:
        """A copy of what is attached now, on the CPU."""
        layers = super().snapshot().deltas
        every = {**layers, **{path: vector.delta for path, vector in self.vectors.items()}}
        return of_base(self.base, Adapter(every, metadata or {}))

    def detach(self) -> Adapter:
        """What was attached; the base is left exactly as it was before."""
        adapter = self.snapshot()
        self._remove()
        return adapter

    def take_off(self) -> None:
        """Leave the base as it was before, and be ready to be put back."""
        self._shift(0.0)
        restore_layers(self.base, self.layers)
        vars(self.base).pop(REGISTERED, None)

    def put_back(self) -> bool:
        """What was taken off is on the base again; False, and nothing happened, if the base has other layers by now.

        Raises AdapterError if something else is on the base.
        """
        check_free(self.base)
        if any(find_layer(self.base, path) is not layer.base_layer for path, layer in self.layers.items()):
            return False
        vars(self.base)[REGISTERED] = self
        put_layers(self.base, self.layers)
        for vector in self.vectors.values():
            vector.before = vector.parameter.detach().clone()
        self._shift(1.0)
        return True

    def turn(self, step: int, steps: int, time: Tensor | float = 0.0) -> set[str]:
        """Bring every schedule to a step of 0 .. steps - 1; the parts in which anything changed. At first it is step 0 of 1.

        Ranks that go by the timestep count as at `time`, which the denoiser is told in that step; at 0 all of them do.
        """
        changed = parts_by_timestep(self.base, self.layers)
        if self.moving.weightings:
            now = float(time) if self.moving.timed else 0.0  # which may wait for the device
            changed |= self.moving.turn(step, steps, self.vectors, now)
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
        check_fit(self.base, *(adapter for adapter, _ in pairs))
        deltas, moving = mix(self.base, pairs)
        self._remove(keep=[path for path, delta in deltas.items() if len(delta.shape) > 1])
        self.moving = moving
        return inject(self, deltas)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the base predicts as if nothing were attached."""
        self._shift(0.0)
        try:
            with super().off():
                yield
        finally:
            self._shift(1.0)

    @contextlib.contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """Inside, everything attached counts `strength` times."""
        self._shift(strength)
        try:
            with super().at(strength):
                yield
        finally:
            self._shift(1.0)

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
        restore_layers(self.base, [path for path in self.layers if path not in keep])
        self.layers = {path: layer for path, layer in self.layers.items() if path in keep}
        self.vectors, self.moving = {}, Moving()
        if not keep:
            vars(self.base).pop(REGISTERED, None)


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
    check_type(base, Base, "what is attached to", 'a loaded Base: p.attach(p.Base.load("pocket"), rex)', AdapterError)
    check_free(base)
    if isinstance(what, AdapterSpec):
        return put_fresh(Attached(base), fresh(base, what, parts or [base.family.denoiser.part], seed), what)
    pairs = stack_of(what)
    check_fit(base, *(adapter for adapter, _ in pairs))
    deltas, moving = mix(base, pairs)
    return inject(Attached(base, moving), deltas)


def attached_to(base: Base) -> Attached | None:
    """What a base carries."""
    found: Attached | None = vars(base).get(REGISTERED)
    return found


def stack_of(what: Adapter | Iterable[tuple[Adapter, Strengths]]) -> list[tuple[Adapter, Weighting]]:
    """Adapters and how much of each."""
    wanted = 'an Adapter, or pairs of one and a strength: p.attach(base, [(p.Adapter.load("rex.safetensors"), 0.8)])'
    pairs = [(what, 1.0)] if isinstance(what, Adapter) else list(what) if isinstance(what, Iterable) else [what]
    for pair in pairs:
        check_type(pair, (tuple, list), "what is attached", wanted, AdapterError)
        check_type(pair[0], Adapter, "what is attached", wanted, AdapterError)
    return [(adapter, weighting_of(strengths)) for adapter, strengths in pairs]


def mix(base: Base, pairs: Iterable[tuple[Adapter, Weighting]]) -> tuple[Mapping[str, Delta], Moving]:
    """What a stack adds to the base: the exact sum of all whose strength and ranks stay, and each other one, at 1, by itself."""
    fixed, others = list[Mapping[str, Delta]](), list[Mover]()
    for adapter, weighting in pairs:
        plain, least = without_base(base, adapter), adapter.least_ranks
        if weighting.moves or least < 1:
            others.append(Mover(plain.weighted(weighting.shape).deltas, weighting, least))
        else:
            fixed.append(plain.weighted(weighting).deltas)
    paths = dict.fromkeys(path for deltas in fixed for path in deltas)
    sums = {path: total([deltas[path] for deltas in fixed if path in deltas]) for path in paths}
    return side_by_side(sums, others, base.noise.steps if others else 0)


def total(deltas: Sequence[Delta]) -> Delta:
    """The exact sum of some updates of one weight, at least one: what `add` makes of them in order, factors joined at once."""
    first, *others = deltas
    if not others or not all(isinstance(delta, LowRank) and delta.shape == first.shape for delta in deltas):
        return functools.reduce(add, deltas)
    pairs = [delta.with_alpha(delta.rank) for delta in deltas if isinstance(delta, LowRank)]
    up, down = torch.cat([pair.up for pair in pairs], 1), torch.cat([pair.down for pair in pairs], 0)
    return LowRank.of(up, down, down.shape[0])


def without_base(base: Base, adapter: Adapter) -> Adapter:
    """The same update without what depends on the base's weights: itself, where nothing does."""
    deltas = adapter.deltas
    if not isinstance(deltas, OnDemand) and not any(delta.needs_base for delta in deltas.values()):
        return adapter
    return adapter.resolve(lambda path: weight_named(base, path))


def weighting_of(strengths: Strengths) -> Weighting:
    """A number, one per part, or what one types, as a weighting; parts that are not named count 1."""
    if isinstance(strengths, Weighting | str):
        return read(strengths.split(":")) if isinstance(strengths, str) else strengths
    named = strengths if isinstance(strengths, Mapping) else dict.fromkeys(PARTS, strengths)
    return Weighting(every_part(named))


def check_fit(base: Base, *adapters: Adapter) -> None:
    """Raise FamilyMismatchError (AdapterError within the base's own family) unless every delta has its module, in its shape."""
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.deltas)
    shapes = {path: tuple(weight.shape) for path in paths if (weight := find_weight(base, path)) is not None}
    for adapter in adapters:
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


def put_fresh(attached: Attached, deltas: Mapping[str, Delta], spec: AdapterSpec) -> Attached:
    """Put deltas on a base's modules as layers of their own kinds, to be trained."""
    base = attached.base
    ordered = {path: deltas[path] for path in in_order_of_parts(base, deltas)}
    with contextlib.ExitStack() as undo:
        undo.callback(attached._remove)
        vars(base)[REGISTERED] = attached
        attached.layers = make_layers(base, [ordered], attached.active, spec.dropout, spec.rank_by_timestep)
        put_layers(base, attached.layers)
        undo.pop_all()
    return attached


def inject(attached: Attached, deltas: Mapping[str, Delta]) -> Attached:
    """Put deltas on a base's modules as layers; those of norms and biases go into the base until they are taken off.

    LoRA layers that are there already get other values. If anything fails on the way, the base is as it was.
    """
    base, single = attached.base, {path for path, delta in deltas.items() if len(delta.shape) == 1}
    with contextlib.ExitStack() as undo:
        undo.callback(attached._remove)
        vars(base)[REGISTERED] = attached
        for path in in_order_of_parts(base, deltas):
            if path not in single:
                attached.layers[path] = layer_with(attached, path, deltas[path])
                attached.moving.take(path, attached.layers[path].factors[DOWN].weight)
        put_layers(base, attached.layers)
        attached.vectors = {path: vector(weight_named(base, path), deltas[path]) for path in single}
        attached._shift(1.0)
        attached.turn(0, 1)
        undo.pop_all()
    return attached


def in_order_of_parts(base: Base, paths: Iterable[str]) -> list[str]:
    """Paths part by part, in the base's order of parts."""
    return [path for part in base.parts for path in paths if path.startswith(f"{part}.")]


def layer_with(attached: Attached, path: str, delta: Delta) -> AdapterLayer:
    """The layer that carries a delta as LoRA: the one that is at its path, with other values, or a new one. Ranks may differ."""
    own = find_layer(attached.base, path)
    if isinstance(own, AdapterLayer) and own.kind is LORA:
        own.replace(lora_of(delta, own.weight.shape))
        return own
    own = own.base_layer if isinstance(own, AdapterLayer) else own
    weight = own.weight
    assert isinstance(weight, Tensor)
    return AdapterLayer(own, LORA, [lora_of(delta, weight.shape)], attached.active, attached.base.device)
