"""The Recipe: the one home of every default, bound and help text.

Flags, presets, schemas, forms and docs are generated from it. A recipe is resolved from
defaults <- adapter (`--from`) <- preset (a partial recipe in TOML) <- flags, and is immutable afterwards.

Sections order the code; names are flat: every field has ONE name, unique over all sections, which is its key in TOML (in its
section's table or outside any) and, with dashes, its flag (`batch_size`, `--batch-size`).

    fields.py    Recipe and its parts
    settings.py  its fields as flat, named settings: flag, type, bounds, help
    resolve.py   recipes from presets, flags and adapters, and back to TOML and JSON
    reference.py docs/recipe.md
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..lazy import Lazy

if TYPE_CHECKING:
    from .fields import AdapterSpec, Choosing, Data, Fitting, Objective, Optim, Part, Recipe, Sampling
    from .resolve import from_json, presets, read_settings, resolve, to_json, to_toml
    from .settings import Setting, flat, flatten, record, settings

_HOMES = {
    "AdapterSpec": "fields",
    "Choosing": "fields",
    "Data": "fields",
    "Fitting": "fields",
    "Objective": "fields",
    "Optim": "fields",
    "Part": "fields",
    "Recipe": "fields",
    "Sampling": "fields",
    "Setting": "settings",
    "flat": "settings",
    "flatten": "settings",
    "from_json": "resolve",
    "presets": "resolve",
    "read_settings": "resolve",
    "record": "settings",
    "resolve": "resolve",
    "settings": "settings",
    "to_json": "resolve",
    "to_toml": "resolve",
}

__all__ = [
    "AdapterSpec",
    "Choosing",
    "Data",
    "Fitting",
    "Objective",
    "Optim",
    "Part",
    "Recipe",
    "Sampling",
    "Setting",
    "flat",
    "flatten",
    "from_json",
    "presets",
    "read_settings",
    "record",
    "resolve",
    "settings",
    "to_json",
    "to_toml",
]

sys.modules[__name__].__class__ = Lazy
