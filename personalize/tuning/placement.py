"""Adapter layers in the place of a base's own layers, and back."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

from torch import nn

from ..errors import AdapterError
from ..families.names import native
from ..models.model import Base
from .by_timestep import TimedLayer
from .layers import AdapterLayer


def place_of(base: Base, path: str) -> tuple[nn.Module, str]:
    """The module that holds the layer at a canonical path, and the layer's name there."""
    part, own = native(path, base.parts)
    parent, _, leaf = own.rpartition(".")
    return base.parts[part].get_submodule(parent), leaf


def find_layer(base: Base, path: str) -> nn.Module:
    """The layer at a canonical path: the base's own, or an adapter's in its place."""
    parent, leaf = place_of(base, path)
    return parent.get_submodule(leaf)


def put_layers(base: Base, layers: Mapping[str, AdapterLayer]) -> None:
    """Let adapter layers, by canonical path, compute in the place of the layers that they hold."""
    known_to_diffusers()
    for path, layer in layers.items():
        parent, leaf = place_of(base, path)
        setattr(parent, leaf, layer)
        if isinstance(layer, TimedLayer):
            layer.clock.start()


def restore_layers(base: Base, paths: Iterable[str]) -> None:
    """Put the base's own layers back."""
    for path in paths:
        parent, leaf = place_of(base, path)
        layer = parent.get_submodule(leaf)
        if isinstance(layer, AdapterLayer):
            setattr(parent, leaf, layer.base_layer)
        if isinstance(layer, TimedLayer):
            layer.clock.stop()


def check_free(base: Base) -> None:
    """Raise AdapterError if a base carries adapter layers."""
    if any(isinstance(module, AdapterLayer) for model in base.parts.values() for module in model.modules()):
        raise AdapterError(f"{base.name} already carries an adapter", "detach() it first; to stack several, attach them together")


@functools.cache
def known_to_diffusers() -> None:
    """Let diffusers' `cross_attention_kwargs={"scale": 0.5}` reach our layers, as it reaches all that have peft's interface."""
    from diffusers.utils import is_peft_available

    if not is_peft_available():  # it scales nothing then
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    BaseTunerLayer.register(AdapterLayer)
