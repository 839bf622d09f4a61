"""Updates as files have them, and the tensors of a layer that computes with them: there and back.

A layer holds what a file keeps of one module: of its weight, and of its bias, which is an entry of its own, `<path>.bias`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import kinds
from ..adapters.build import build
from ..adapters.delta import Decomposed, Delta, Dense, LowRank, as_low_rank
from ..adapters.kinds.full import FULL, NORM
from ..adapters.kinds.kind import ALPHA, DOWN, UP, Kind
from ..adapters.kinds.lora import LORA
from ..families.names import part_of
from ..models.model import Base
from .by_timestep import Clock, TimedLayer
from .dense import BIAS, NORMS, DenseLayer, bias_role, weight_role
from .layers import ActiveRows, AdapterLayer, Spec
from .placement import find_layer

Deltas = Mapping[str, Delta]  # by path


def make_layers(
    base: Base, starts: Sequence[Deltas], active: ActiveRows, dropout: float = 0.0, ranks: float = 0.0
) -> dict[str, AdapterLayer]:
    """A layer for each module that these adapters change, which are of one shape: path => layer, not in its place yet.

    `ranks`, where not 0, is the share of a LoRA's ranks in the denoiser that counts at every timestep (by_timestep.py).
    """
    paths = dict.fromkeys(path.removesuffix(BIAS) for path in (starts[0] if starts else ()))
    layers = {path: _make_layer(base, path, starts, active, dropout, ranks) for path in paths}
    clock = Clock(base, ranks)
    for layer in layers.values():
        if isinstance(layer, TimedLayer):
            layer.follow(clock)
    return layers


def _make_layer(
    base: Base, path: str, starts: Sequence[Deltas], active: ActiveRows, dropout: float, ranks: float
) -> AdapterLayer:
    own: Any = find_layer(base, path)
    first = starts[0].get(path)
    if path + BIAS in starts[0] or isinstance(own, NORMS) or isinstance(first, Dense):
        kind = NORM if isinstance(own, NORMS) else FULL
        return DenseLayer(own, kind, [dense_of(own, path, start) for start in starts], active, base.device)
    assert first is not None
    kind = kind_of(first)
    row = TimedLayer if ranks and kind is LORA and part_of(path) == base.family.denoiser.part else AdapterLayer
    return row(own, kind, [spec_of(kind, start[path], own.weight.shape) for start in starts], active, base.device, dropout)


def kind_of(delta: Delta) -> Kind:
    """The row of an update of a matrix or a convolution."""
    if isinstance(delta, Decomposed):
        return kinds.row("dora")
    return LORA if isinstance(delta, LowRank) else FULL if isinstance(delta, Dense) else kinds.row(delta.kind)  # type: ignore[attr-defined]


def spec_of(kind: Kind, delta: Delta, shape: Sequence[int]) -> Spec:
    """A delta's tensors by role, and its alpha, for a layer of that kind on a weight of this shape."""
    if kind is LORA:
        return lora_of(delta, shape)
    stored = dict(delta.stored())
    alpha = stored.pop(ALPHA, None)
    return stored, None if alpha is None else float(alpha)


def dense_of(layer: nn.Module, path: str, deltas: Deltas) -> Spec:
    """The updates of a layer's weight and of its bias, by role."""
    found = {weight_role(layer): deltas.get(path), bias_role(layer): deltas.get(path + BIAS)}
    return {role: delta.delta() for role, delta in found.items() if delta is not None}, None


def values_of(layer: AdapterLayer, path: str, deltas: Deltas) -> Spec:
    """What of these deltas is the layer's, by role, and its alpha."""
    if isinstance(layer, DenseLayer):
        return dense_of(layer.base_layer, path, deltas)
    return spec_of(layer.kind, deltas[path], layer.weight.shape)


def deltas_of(layer: AdapterLayer, path: str, number: int) -> dict[str, Delta]:
    """A copy of one of a layer's adapters, on the CPU: path => delta, that of a bias behind the layer's own."""
    tensors, alpha = {role: one.to("cpu", copy=True) for role, one in layer.tensors(number).items()}, layer.alphas[number]
    if isinstance(layer, DenseLayer):
        return {path + BIAS * (role == bias_role(layer.base_layer)): Dense(one) for role, one in tensors.items()}
    if layer.kind is LORA:
        assert alpha is not None
        return {path: LowRank(tensors[UP], tensors[DOWN], alpha)}
    whole = tensors | {role: torch.tensor(value) for role, value in layer.fixed.items()}
    return {path: build(kinds.kind_of(whole), whole, alpha, tuple(layer.weight.shape))}


def lora_of(delta: Delta, shape: Sequence[int]) -> tuple[dict[str, Tensor], float]:
    """Any delta as LoRA's two factors for a weight [out, in(, kh, kw)], and their alpha; exact."""
    factors, (out, inside, *kernel) = as_low_rank(delta), shape
    down = factors.down.reshape(factors.rank, inside, *kernel)
    return {DOWN: down, UP: factors.up.reshape(out, factors.rank, *[1] * len(kernel))}, factors.alpha
