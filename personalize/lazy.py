"""Packages whose names come with their files, when they are first asked for: help and figures need no torch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class Lazy(ModuleType):
    """A package with a table `_HOMES` of its names => their files; serves a name also where a file has the same one."""

    def __getattr__(self, name: str) -> Any:
        homes = self.__dict__.get("_HOMES", {})
        if name not in homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name] if homes[name][0] == "." else f".{homes[name]}", self.__name__), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in self.__dict__.get("_HOMES", {}) and isinstance(value, ModuleType)):  # importing a file hides no name
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__dict__["_HOMES"]})
