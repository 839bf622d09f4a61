"""A base that a process keeps between two drawings, so that the next one begins at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .model import Base, Reading
from .sources import locate

READ = ("base", "prediction", "zero_snr", "clip_skip", "vae")  # what of a recipe decides what is read


class Resident:
    """The last base that was opened, where it is to be kept: a server's worker keeps one, a command none."""

    def __init__(self) -> None:
        self.keeps = False
        self._key: Any = None
        self._base: Base | None = None

    def open(self, recipe: Reading, device: str | torch.device, dtype: torch.dtype) -> Base:
        """The base that a recipe names, loaded anew where another was asked for before or its files have changed.

        Raises BaseModelError.
        """
        if not self.keeps:
            return Base.of(recipe, device, dtype)
        key = (*(getattr(recipe, name) for name in READ), str(device), dtype, *map(age, (recipe.base, recipe.vae)))
        if self._base is None or key != self._key:
            self.forget()
            self._base, self._key = Base.of(recipe, device, dtype), key
        return self._base

    def forget(self) -> None:
        """Let go of the base."""
        self._key = self._base = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def age(name: str | None) -> Any:
    """When the weights that a name stands for were last changed; None where nothing is there."""
    if name is None or not Path(name).expanduser().exists():
        return None  # the hub's cache and what came along do not change
    path = locate(name, download=False)
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return tuple((str(file), file.stat().st_mtime_ns) for file in files)


RESIDENT = Resident()
