"""A loaded base: `Base`, with four verbs (encode, embed, denoise, decode), and where it comes from.

model.py      Base, and how it is loaded
sources.py    what a name stands for: pocket, a folder, a file, a hub id
folder.py     diffusers folders          single.py  single-file checkpoints       loaded.py  what either gives
quantized.py  frozen layers in 8 or 4 bits     precision.py  dtypes by name
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..lazy import Lazy

if TYPE_CHECKING:
    from .model import Base

_HOMES = {"Base": "model"}

__all__ = ["Base"]

sys.modules[__name__].__class__ = Lazy
