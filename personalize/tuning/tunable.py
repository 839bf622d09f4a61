"""What learns on a base: the interface that training, choosing and drawing work with, and adapters on layers, which have it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.kinds.kind import DOWN, UP
from ..models.model import Base
from .bounded import bound_norms
from .layers import ActiveRows, AdapterLayer, cast_once
from .specs import deltas_of, values_of

SHORT = {DOWN: "down", UP: "up"}  # roles as a state file names them; others by their own name


class Tunable(Protocol):
    """What learns on a base. Its values can be taken off, scaled, replaced and saved while the base stays as it is."""

    @property
    def base(self) -> Base:
        """The base that it changes."""
        ...

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trainable fp32 parameters: part of the base -> {name: parameter}."""
        ...

    def off(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the base predicts as if nothing had been learned."""
        ...

    def at(self, strength: float) -> contextlib.AbstractContextManager[None]:
        """Inside, what was learned counts `strength` times."""
        ...

    def dropout(self, seed: int) -> contextlib.AbstractContextManager[None]:
        """Inside, dropout is active, and drawn from `seed`; outside it never is."""
        ...

    def computing(self, *others: Any) -> contextlib.AbstractContextManager[None]:
        """Inside, rows go through the base with this one's values; with `others`, each has the same share of them, in order."""
        ...

    def cast_once(self) -> contextlib.AbstractContextManager[None]:
        """Inside, values are cast to the base's dtype once for all passes; they must not change meanwhile."""
        ...

    def collect_gradients(self) -> None:
        """After backward passes: give each parameter its gradient."""
        ...

    def drop_gradients(self) -> None:
        """Forget all gradients, those of others that share a pass with this one among them."""
        ...

    def leaves(self) -> list[nn.Parameter]:
        """What backward passes compute gradients of: of this one, and of others that share a pass with it."""
        ...

    def bound(self, most: float) -> int:
        """Bring each layer's update down to a norm of `most`; how many were above it."""
        ...

    def put(self, saved: Adapter) -> None:
        """Take over the values of something of the same shape, e.g. of an earlier checkpoint."""
        ...

    def snapshot(self, metadata: Mapping[str, str] | None = None) -> Adapter:
        """A copy of the values, on the CPU."""
        ...

    def save(self, path: Path, dialect: str, metadata: Mapping[str, str] | None = None) -> Path:
        """Write a snapshot. Raises OutputError where that is not possible."""
        ...


def of_base(base: Base, adapter: Adapter) -> Adapter:
    """An adapter of a base's layers, that says which family it is of where its layers alone do not tell."""
    name = base.family.name
    return adapter.for_family(name) if len(adapter.families) > 1 and name in {one.name for one in adapter.families} else adapter


class LayerAdapter:
    """Adapter `number` of those that layers of a base hold: a Tunable."""

    def __init__(self, base: Base, layers: Mapping[str, AdapterLayer], active: ActiveRows, number: int = 0) -> None:
        self.base, self.active, self.number = base, active, number
        self.layers: dict[str, AdapterLayer] = dict(layers)

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Part -> {module path + '.down' or '.up' (other kinds: their role): parameter}."""
        groups: dict[str, dict[str, nn.Parameter]] = {}
        for path, layer in self.layers.items():
            group = groups.setdefault(path.partition(".")[0], {})
            group |= {f"{path}.{SHORT.get(role, role)}": parameter for role, parameter in self._parameters_of(path, layer)}
        return groups

    def _parameters_of(self, path: str, layer: AdapterLayer) -> Iterator[tuple[str, nn.Parameter]]:
        """Roles and parameters of one layer."""
        yield from ((role, factor.weight) for role, factor in layer.factors.items())

    def snapshot(self, metadata: Mapping[str, str] | None = None) -> Adapter:
        """A copy of what is attached now, on the CPU."""
        each = (deltas_of(layer, path, self.number) for path, layer in self.layers.items())
        deltas = {path: delta for own in each for path, delta in own.items()}
        return of_base(self.base, Adapter(deltas, metadata or {}))

    def save(self, path: Path, dialect: str, metadata: Mapping[str, str] | None = None) -> Path:
        """Write a snapshot. Raises OutputError where that is not possible."""
        return self.snapshot().save(path, dialect, metadata)

    @contextlib.contextmanager
    def computing(self, *others: LayerAdapter) -> Iterator[None]:
        """Inside, rows go through the base with this adapter; with `others`, each has the same share of them, in order."""
        with self.active.of(self.number, *(other.number for other in others)):
            yield

    def cast_once(self) -> contextlib.AbstractContextManager[None]:
        """Inside, tensors are cast to the base's dtype once for all layers and passes; they must not change meanwhile."""
        return cast_once(self.layers.values(), self.base.dtype)

    def collect_gradients(self) -> None:
        """Nothing: the parameters are the layers' own."""

    def drop_gradients(self) -> None:
        """Forget all gradients in these layers."""
        for leaf in self.leaves():
            leaf.grad = None

    def leaves(self) -> list[nn.Parameter]:
        """The parameters of these layers, those of all adapters that share them."""
        return [factor.weight for layer in self.layers.values() for factor in layer.factors.values()]

    def bound(self, most: float) -> int:
        """Bring each layer's update down to a Frobenius norm of `most`; how many were above it."""
        return bound_norms(self.layers.values(), self.number, most)

    @torch.no_grad()
    def put(self, saved: Adapter) -> None:
        """Take over the values of an adapter of the same shape."""
        for path, layer in self.layers.items():
            tensors, layer.alphas[self.number] = values_of(layer, path, saved.deltas)
            for role, own in layer.tensors(self.number).items():
                own.copy_(tensors[role].reshape(own.shape))

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the base predicts as if nothing were attached."""
        with self.active.of():
            yield

    @contextlib.contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """Inside, the adapter counts `strength` times."""
        before = [layer.strengths[self.number] for layer in self.layers.values()]
        for layer, own in zip(self.layers.values(), before, strict=True):
            layer.strengths[self.number] = own * strength
        try:
            yield
        finally:
            for layer, own in zip(self.layers.values(), before, strict=True):
                layer.strengths[self.number] = own

    @contextlib.contextmanager
    def dropout(self, seed: int) -> Iterator[None]:
        """Inside, dropout is active, and drawn from `seed`; outside it never is."""
        layers = [layer for layer in self.layers.values() if layer.dropout]
        if not layers:
            yield
            return
        with torch.random.fork_rng(devices=[self.base.device] if self.base.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for layer in layers:
                layer.dropping = True
            try:
                yield
            finally:
                for layer in layers:
                    layer.dropping = False
