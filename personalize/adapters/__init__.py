"""The adapter file and its algebra. Needs torch only, so that a plugin can use it inside any host.

    a, b = Adapter.load("a.safetensors"), Adapter.load("b.safetensors")
    (a * 0.7 + b * -0.3).save("c.safetensors")
    merge([a, b], [1, 1], "ties", rank=32).save("ties.safetensors")

`describe` reads a file's header and does not even import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .describe import Description, describe
from .keys import FAMILIES, PARTS, Family, canonical, family_of

if TYPE_CHECKING:
    from .adapter import Adapter, distance
    from .checkpoints import open_weights
    from .comparing import compared
    from .converting import converted
    from .deltas import Delta, Dense, LowRank
    from .embedding import Embedding
    from .merging import merge
    from .resizing import resize
    from .surgery import bake, extract, interpolate

_LAZY = {
    "Adapter": "adapter",
    "Delta": "deltas",
    "Dense": "deltas",
    "Embedding": "embedding",
    "LowRank": "deltas",
    "bake": "surgery",
    "compared": "comparing",
    "converted": "converting",
    "distance": "adapter",
    "extract": "surgery",
    "interpolate": "surgery",
    "merge": "merging",
    "open_weights": "checkpoints",
    "resize": "resizing",
}

__all__ = [
    "FAMILIES",
    "PARTS",
    "Adapter",
    "Delta",
    "Dense",
    "Description",
    "Embedding",
    "Family",
    "LowRank",
    "bake",
    "canonical",
    "compared",
    "converted",
    "describe",
    "distance",
    "extract",
    "family_of",
    "interpolate",
    "merge",
    "open_weights",
    "resize",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
