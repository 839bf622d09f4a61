"""The adapter file and its algebra. Needs torch only, so that a plugin can use it inside any host.

    adapter = Adapter.load("rex.safetensors")
    (adapter * 0.8 + other).save("both.safetensors")

`describe` reads a file's header and does not even import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .describe import Description, describe
from .keys import FAMILIES, PARTS, Family, canonical, family_of

if TYPE_CHECKING:
    from .adapter import Adapter, distance
    from .deltas import Delta, Dense, LowRank
    from .embedding import Embedding

_LAZY = {
    "Adapter": "adapter",
    "Delta": "deltas",
    "Dense": "deltas",
    "Embedding": "embedding",
    "LowRank": "deltas",
    "distance": "adapter",
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
    "canonical",
    "describe",
    "distance",
    "family_of",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
