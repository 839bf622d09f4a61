"""Adapters by name: those of the command line, and those of a folder, as prompts call them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..adapters.adapter import Adapter
from ..adapters.describe import describe
from ..adapters.strengths.grammar import WHOLE, Weighting
from ..errors import AdapterError, RecipeError
from .prompts import Use, find, nameable


class Named(NamedTuple):
    """A file, how much of it, and the name it was given, if any."""

    path: Path
    weighting: Weighting = WHOLE
    name: str = ""


@dataclass
class Shelf:
    """Name => file; a folder's file is opened only when a prompt calls it."""

    files: dict[str, Path] = field(default_factory=dict)
    folder: Path | None = None

    def find(self, name: str) -> str:
        """The name that a tag means: one of the command line, else a file of the folder by its name or its `ss_output_name`.

        Raises RecipeError for a name that is nothing, naming the nearest, and for one that is two files.
        """
        inside = self._inside()
        with contextlib.suppress(RecipeError):
            return find(name, self.files)
        try:
            found = find(name, inside)
        except RecipeError:
            aliases = self._aliases(inside)
            found = aliases[find(name, {**aliases, **dict.fromkeys(self.files), **dict.fromkeys(inside)})]
        if len(inside[found]) > 1:
            both = " and ".join(map(str, inside[found][:2]))
            raise RecipeError(f"{found} is {both}", f"say which: --adapter {found}={inside[found][0]}")
        self.files[found] = inside[found][0]
        return found

    def load(self, names: Iterable[str]) -> dict[str, Adapter]:
        """The adapters of these names."""
        return {name: Adapter.load(self.files[name]) for name in names}

    def _inside(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in sorted(self.folder.rglob("*.safetensors")) if self.folder else ():
            found.setdefault(nameable(path.stem), []).append(path)
        return found

    def _aliases(self, inside: dict[str, list[Path]]) -> dict[str, str]:
        """What the files say they are called => their names."""
        aliases = {}
        for name, paths in inside.items():
            with contextlib.suppress(AdapterError):  # not an adapter: no prompt can mean it
                aliases[nameable(describe(paths[0]).metadata.get("ss_output_name", name))] = name
        return aliases


def shelve(stack: Sequence[Named], folder: Path | None) -> tuple[tuple[Use, ...], Shelf]:
    """What counts for every prompt, and everything by name. Raises RecipeError for a name that is given twice."""
    if folder and not folder.is_dir():
        raise RecipeError(f"there is no folder {folder}", "--lora-dir is the folder with the adapters")
    shelf, uses = Shelf(folder=folder), []
    for path, weighting, given in stack:
        name = nameable(given or path.stem)
        if given and shelf.files.get(name, path) != path:
            raise RecipeError(f"two adapters are called {name}: {shelf.files[name]} and {path}", "give one another name")
        number = 2
        while shelf.files.get(name, path) != path:  # of another folder
            name, number = f"{nameable(path.stem)}-{number}", number + 1
        shelf.files[name] = path
        uses.append(Use(name, weighting))
    return tuple(uses), shelf
