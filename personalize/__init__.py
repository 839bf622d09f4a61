"""From a handful of images to a portable adapter: `personalize train FOLDER`, or this small typed API.

    import personalize

    recipe = personalize.resolve(folder="photos/rex", class_="dog")
    run = personalize.train(recipe).finish()       # or: for event in personalize.train(recipe): print(event)
    print(run.adapter, run.report)

Names are imported when first used, so that `import personalize` costs nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .lazy import Lazy
from .version import __version__

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .adapters.describe import describe
    from .api.recipes import resolve
    from .api.runs import Run, train
    from .data.folder import read_folder
    from .errors import PersonalizeError
    from .inference.pipeline import draw
    from .models.model import Base
    from .recipe.fields import Recipe
    from .reports.run import write_report
    from .training.fleet import train_fleet
    from .tuning.attach import attach

_HOMES = {
    "Adapter": "adapters.adapter",
    "Base": "models.model",
    "PersonalizeError": "errors",
    "Recipe": "recipe.fields",
    "Run": "api.runs",
    "attach": "tuning.attach",
    "describe": "adapters.describe",
    "draw": "inference.pipeline",
    "read_folder": "data.folder",
    "resolve": "api.recipes",
    "train": "api.runs",
    "train_fleet": "training.fleet",
    "write_report": "reports.run",
}

__all__ = [
    "Adapter",
    "Base",
    "PersonalizeError",
    "Recipe",
    "Run",
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
