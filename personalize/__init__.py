"""From a handful of pictures to a portable adapter: `personalize train FOLDER`, or this small typed API.

    import personalize

    recipe = personalize.resolve("pocket-subject", {"folder": "photos/rex", "class": "dog"})
    for event in personalize.train(recipe):
        print(event)

Names are imported when first used, so that `import personalize` costs nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"

from .lazy import Lazy

if TYPE_CHECKING:
    from .adapters import Adapter, describe
    from .attach import attach
    from .base import Base
    from .data import read_folder
    from .draw import draw
    from .errors import PersonalizeError
    from .fleet import train_fleet
    from .recipe import Recipe, resolve
    from .report import write_report
    from .train import train

_HOMES = {
    "Adapter": "adapters",
    "Base": "base",
    "PersonalizeError": "errors",
    "Recipe": "recipe",
    "attach": "attach",
    "describe": "adapters",
    "draw": "draw",
    "read_folder": "data",
    "resolve": "recipe",
    "train": "train",
    "train_fleet": "fleet",
    "write_report": "report",
}

__all__ = [
    "Adapter",
    "Base",
    "PersonalizeError",
    "Recipe",
    "__version__",
    "attach",
    "describe",
    "draw",
    "read_folder",
    "resolve",
    "train",
    "train_fleet",
    "write_report",
]

sys.modules[__name__].__class__ = Lazy
