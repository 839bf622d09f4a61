"""What people type on the command line, as values."""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AdapterError, RecipeError

if TYPE_CHECKING:
    from ..adapters.strengths.grammar import Weighting

PATH = click.Path(path_type=Path)


class AdapterFile(click.ParamType):
    """An adapter and its strength, as adapters/strengths reads it: PATH, PATH:0.8, PATH:0.8:0.5, PATH:unet=0.8:te=0.5, ..."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, Weighting]:
        from ..adapters.strengths.grammar import split

        if isinstance(value, tuple):
            return value
        path, weighting = split(str(value))
        if not os.path.exists(path):  # also of names that no disk allows
            near, _, strength = path.rpartition(":")
            if near and os.path.exists(near):
                raise AdapterError(f"{strength!r} is no strength of {near}", "strengths are numbers: A.safetensors:0.8")
            raise AdapterError(f"there is no adapter {path}", "check its spelling; strengths are numbers: A.safetensors:0.8")
        return Path(path), weighting


class NamedAdapter(AdapterFile):
    """The same, with a name for prompts before it: NAME=PATH:0.8."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ..adapters.strengths.grammar import split
        from ..inference.library import Named

        name, _, rest = str(value).partition("=")
        named = rest and re.fullmatch(r"[^:/\\<>]+", name) and not os.path.exists(split(str(value))[0])
        path, weighting = super().convert(rest if named else value, param, ctx)
        return Named(path, weighting, name if named else "")


class Axis(click.ParamType):
    """An axis of a sheet: NAME=VALUE,VALUE,..."""

    name = "axis"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ..inference.xyplot import axis

        return axis(str(value))


class Side(click.ParamType):
    """A picture's size: 64 or 96x64."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value).lower())
        if not match:
            raise RecipeError(f"--size must be a side or WIDTHxHEIGHT, not {value}", "e.g. 64 or 96x64")
        return int(match[1]), int(match[2] or match[1])


class FileSize(click.ParamType):
    """A file size: 20000000, 20MB, 1.5 GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)b?\s*", str(value).lower())
        if not match:
            raise RecipeError(f"--size must be a file size, not {value}", "e.g. 20MB")
        return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]]
