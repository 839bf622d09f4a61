"""Adapters of one shape on one frozen base: their rows go through it side by side, and each meets its own tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..adapters.delta import Delta
from ..models.model import Base
from .attach import REGISTERED
from .by_timestep import parts_by_timestep
from .layers import ActiveRows, AdapterLayer, cast_once
from .placement import check_free, put_layers, restore_layers
from .specs import make_layers
from .textual_inversion import Vectors, words_beside
from .tunable import LayerAdapter


class Fleet:
    """The adapters of one run or many on their base, until the end of the `with` block; the base's weights never change.

    `starts` are their values by module path, of the same modules, kinds and shapes for all. `members` are Tunables: outside of
    `LayerAdapter.computing` rows are nobody's, unless there is one member alone. `words`, where given, are vectors that each
    learns beside its layers, of words of its own. `ranks` is as for `make_layers`.
    """

    def __init__(
        self,
        base: Base,
        starts: Sequence[Mapping[str, Delta]],
        dropout: float = 0.0,
        words: Sequence[Vectors] = (),
        ranks: float = 0.0,
    ) -> None:
        check_free(base)
        self.base, self.active = base, ActiveRows(*([0] if len(starts) == 1 else []))
        self.layers = make_layers(base, starts, self.active, dropout, ranks)
        kind = LayerAdapter if len(starts) == 1 else Member
        plain = [kind(base, self.layers, self.active, number) for number in range(len(starts))]
        self.members: Sequence[Any] = words_beside(plain, words) if any(words) else plain

    def __enter__(self) -> Fleet:
        put_layers(self.base, self.layers)
        vars(self.base)[REGISTERED] = self
        return self

    def __exit__(self, *_: object) -> None:
        restore_layers(self.base, self.layers)
        vars(self.base).pop(REGISTERED, None)

    def turn(self, step: int, steps: int, time: Tensor | float = 0.0) -> set[str]:
        """The parts of the base that differ from step to step: strengths of adapters that are trained do not; ranks follow the
        denoiser's calls."""
        return parts_by_timestep(self.base, self.layers)

    def cast_once(self) -> contextlib.AbstractContextManager[None]:
        """Inside, tensors are cast to the base's dtype once for all layers and passes; they must not change meanwhile."""
        return cast_once(self.layers.values(), self.base.dtype)


class Member(LayerAdapter):
    """One of several adapters: its parameters are views of the layers', which hold those of all."""

    def __init__(self, base: Base, layers: Mapping[str, AdapterLayer], active: ActiveRows, number: int) -> None:
        super().__init__(base, layers, active, number)
        self._own = {
            path: {role: nn.Parameter(tensor) for role, tensor in layer.tensors(number).items()} for path, layer in layers.items()
        }

    def _parameters_of(self, path: str, layer: AdapterLayer) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._own[path].items()

    def collect_gradients(self) -> None:
        for path, layer in self.layers.items():
            for role, factor in layer.factors.items():
                whole = factor.weight.grad
                own = self._own[path][role]
                own.grad = whole[self.number] if whole is not None and own.requires_grad else None
