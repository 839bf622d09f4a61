"""The adapter file and its algebra. Needs torch only, so that a plugin can use it inside any host.

    a, b = Adapter.load("a.safetensors"), Adapter.load("b.safetensors")
    (a * 0.7 + b * -0.3).save("c.safetensors")
    merge([a, b], [1, 1], "ties", rank=32).save("ties.safetensors")

`describe` reads a file's header and does not even import torch.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..families.family import Family
from ..families.names import FAMILIES, PARTS, canonical, family_of
from ..lazy import Lazy
from .describe import Description, describe

if TYPE_CHECKING:
    from ..families.checkpoint import open_weights
    from .adapter import Adapter, distance
    from .delta import Delta, Dense, LowRank
    from .embedding import Embedding
    from .ops.bake import bake, interpolate
    from .ops.compare import compare, compared
    from .ops.convert import convert, converted
    from .ops.extract import extract
    from .ops.merge import merge
    from .ops.resize import resize

_HOMES = {
    "Adapter": "adapter",
    "Delta": "delta",
    "Dense": "delta",
    "Embedding": "embedding",
    "LowRank": "delta",
    "bake": "ops.bake",
    "compare": "ops.compare",
    "compared": "ops.compare",
    "convert": "ops.convert",
    "converted": "ops.convert",
    "distance": "adapter",
    "extract": "ops.extract",
    "interpolate": "ops.bake",
    "merge": "ops.merge",
    "open_weights": "..families.checkpoint",
    "resize": "ops.resize",
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
    "compare",
    "compared",
    "convert",
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

sys.modules[__name__].__class__ = Lazy
