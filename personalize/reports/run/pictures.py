"""Pictures that a run folder shows: its own, and the training pictures that are still what was trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from ...io import sha256_of
from ..kit.pictures import Picture, load_inline
from .read import inside

Inline = Callable[[str, int], Picture | None]


def inliner(folder: Path) -> Inline:
    """A function (path relative to the folder, longest side) -> Picture, or None for what cannot be shown."""

    @cache
    def inline(relative: str, side: int) -> Picture | None:
        path = inside(folder, relative)
        return load_inline(path, side) if path else None

    return inline


def training_picture(path: str, sha256: str, side: int) -> Picture | None:
    """A training picture outside the run folder, upright and square: only if it still is the very one that was trained on."""
    try:
        with open(path, "rb") as file:
            same = sha256_of(file) == sha256
    except (OSError, ValueError):
        return None
    return load_inline(Path(path), side, square=True) if same else None
