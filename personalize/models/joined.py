"""Linear layers that read the same input, with their weights side by side in one tensor: one product computes them all.

q, k and v of self-attention, and k and v of cross-attention. On a GPU a product of three times the width costs one launch
instead of three. Values are rounded as kernels please, so a CPU, whose runs repeat to the bit, is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

JOINED = "joined"  # under this name a layer knows those that it computes with


@dataclass(eq=False)
class Joined:
    """Children of one attention module, by name, that read the same input."""

    owner: nn.Module
    names: tuple[str, ...]
    ready: tuple[Tensor, dict[str, Any]] | None = None  # an input, and what of it was computed and not asked for yet

    @property
    def layers(self) -> list[nn.Module]:
        """The layers as they are now, adapters in their place among them."""
        return [getattr(self.owner, name) for name in self.names]

    def take(self, x: Tensor, name: str) -> Any:
        """What was computed of this very input for a layer; None where nothing was. It is given once."""
        if self.ready is None or self.ready[0] is not x:
            self.ready = None
            return None
        found = self.ready[1].pop(name, None)
        if not self.ready[1]:
            self.ready = None
        return found


def join_projections(model: nn.Module) -> None:
    """Lay weights side by side, and let every plain linear layer know whom it is computed with, itself alone among them."""
    for owner in (module for module in model.modules() if own_layer(module) is module):
        plain = [name for name, one in owner.named_children() if type(own_layer(one)) is nn.Linear]
        together = projections(owner, plain)
        for names in [together, *((name,) for name in plain if name not in together)]:
            layers = [own_layer(getattr(owner, name)) for name in names]
            lay_side_by_side(layers)
            joined = Joined(owner, tuple(names))
            for layer in layers:
                vars(layer)[JOINED] = joined


def projections(owner: nn.Module, plain: Sequence[str]) -> tuple[str, ...]:
    """Of an attention module's plain layers, those that read the same input and are alike."""
    names = ("to_k", "to_v") if getattr(owner, "is_cross_attention", True) else ("to_q", "to_k", "to_v")
    if not set(names) <= set(plain):
        return ()
    layers = [own_layer(getattr(owner, name)) for name in names]
    alike = len({one.weight.shape for one in layers}) == 1 and all(one.bias is None for one in layers)
    return names if alike else ()


def own_layer(layer: nn.Module) -> Any:
    """A base's own layer, under an adapter or not."""
    return getattr(layer, "base_layer", layer)


def joined_of(layer: nn.Module) -> Joined | None:
    """Whom a base's own layer is computed with; None unless `join_projections` was there, and it is still frozen and plain."""
    found = vars(layer).get(JOINED)
    return found if isinstance(found, Joined) and type(layer) is nn.Linear else None


# ---------------------------------------------------------------- side by side


@torch.no_grad()
def lay_side_by_side(layers: Sequence[nn.Linear]) -> None:
    """Let the frozen weights [out, in] of layers of one shape be neighbours in memory."""
    weights = [one.weight for one in layers]
    if len(weights) > 1 and not neighbours(weights):
        for layer, room in zip(layers, torch.cat(weights).chunk(len(weights)), strict=True):
            layer.weight = nn.Parameter(room, requires_grad=False)


def neighbours(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape lie behind each other in one storage."""
    first, size = tensors[0], tensors[0].numel()
    storage, start = first.untyped_storage()._cdata, first.storage_offset()
    return all(
        one.shape == first.shape
        and one.is_contiguous()
        and one.untyped_storage()._cdata == storage
        and one.storage_offset() == start + i * size
        for i, one in enumerate(tensors)
    )


def as_one(tensors: Sequence[Tensor]) -> Tensor:
    """n matrices [rows, columns] as one [n * rows, columns]: a view where they are neighbours."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    if not neighbours(tensors):
        return torch.cat(list(tensors))
    return first.as_strided((len(tensors) * len(first), first.shape[1]), first.stride())
