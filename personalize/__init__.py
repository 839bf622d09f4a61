"""From a handful of pictures to a portable adapter: `personalize train FOLDER`, or this small typed API.

    import personalize

    recipe = personalize.resolve("pocket-subject", {"folder": "photos/rex", "class": "dog"})
    for event in personalize.train(recipe):
        print(event)

Names are imported when first used, so that `import personalize` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapters import Adapter, describe
    from .attach import attach
    from .base import Base
    from .data import read_folder
    from .draw import draw
    from .errors import PersonalizeError
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
    "write_report",
]


class _Package(ModuleType):
    """Serves the public names on first use, also where a submodule has the same name (`train`, `attach`)."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'personalize' has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):  # importing personalize.train must not hide train()
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
