"""Adapters by name, as prompts call them: from memory, from files of the command line, or out of a folder."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..adapters.adapter import Adapter
from ..adapters.describe import describe
from ..adapters.dialects import file_of
from ..adapters.embedding import load_learned, vectors_of
from ..adapters.strengths.grammar import WHOLE, Weighting
from ..errors import AdapterError, RecipeError
from ..families.notation import unescape
from ..families.words import words_pattern
from ..formats.header import short
from ..io import weights_hash
from ..text import quote
from .prompts import Use, find_name, tag_name
from .request import Request

MOST = 8  # adapters read from files that stay in memory, besides those in use


class Named(NamedTuple):
    """A file, how much of it, and the name it was given, if any."""

    path: Path
    weighting: Weighting = WHOLE
    name: str = ""


@dataclass
class Entry:
    """An adapter in memory, and the state of the file that it was read from."""

    path: Path
    state: tuple[int, int] | None
    adapter: Adapter

    @cached_property
    def sha256(self) -> str:
        """Of the file's weights, without its header: the hash that image UIs show."""
        return weights_hash(file_of(self.path))


@dataclass
class Library:
    """Adapters by name. A folder's file is opened only when a name calls it, and read again when it has changed."""

    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # in memory
    files: dict[str, Path] = field(default_factory=dict)
    folder: Path | None = None  # whose .safetensors files, at any depth, are there by their names
    embeddings: Path | None = None  # a folder of textual inversions, which prompts call by their words
    _loaded: dict[str, Entry] = field(default_factory=dict, repr=False)  # the last one used stands last

    def __post_init__(self) -> None:
        if self.folder and not self.folder.is_dir():
            raise RecipeError(f"there is no folder {self.folder}", "--lora-dir is the folder with the adapters")
        if self.embeddings and not self.embeddings.is_dir():
            raise RecipeError(
                f"there is no folder {self.embeddings}", "--embedding-dir is the folder with the textual inversions"
            )

    def add(self, stack: Sequence[Named]) -> tuple[Use, ...]:
        """Put files into the library; their names, and how much of each. Raises RecipeError for a name that is given twice."""
        uses = []
        for path, weighting, given in stack:
            name = tag_name(given or path.stem)
            if given and self.files.get(name, path) != path:
                raise RecipeError(f"two adapters are called {name}: {self.files[name]} and {path}", "give one another name")
            number = 2
            while self.files.get(name, path) != path:  # of another folder
                name, number = f"{tag_name(path.stem)}-{number}", number + 1
            self.files[name] = path
            uses.append(Use(name, weighting))
        return tuple(uses)

    def find(self, name: str) -> str:
        """The name that a tag means: one that was given, else a file of the folder by its name or its `ss_output_name`.

        Raises RecipeError for an unknown name, with the nearest one as a hint, and for one that is two files.
        """
        given = [*self.adapters, *self.files]
        with contextlib.suppress(RecipeError):
            return find_name(name, given)
        inside = self._inside()
        try:
            found = find_name(name, inside)
        except RecipeError:
            aliases = self._aliases(inside)
            found = aliases[find_name(name, {**aliases, **dict.fromkeys(given), **dict.fromkeys(inside)})]
        if len(inside[found]) > 1:
            both = " and ".join(map(str, inside[found][:2]))
            raise RecipeError(f"{found} is {both}", f"say which: --adapter {quote(f'{found}={inside[found][0]}')}")
        self.files[found] = inside[found][0]
        return found

    def resolve(self, request: Request) -> Request:
        """The request with its adapters under the names that they have here, and the textual inversions that it says.

        Raises RecipeError.
        """
        uses = tuple(Use(self.find(name), weighting) for name, weighting in request.adapters)
        said = [Use(name, WHOLE) for name in self.words_in(request.prompt, request.negative) if name not in dict(uses)]
        return replace(request, adapters=(*uses, *said)) if uses or said else request

    def words_in(self, *texts: str) -> list[str]:
        """The textual inversions of the folder that these texts name, which are files of the library from now on."""
        found = files_in(self.embeddings) if self.embeddings else {}
        free = {name for name, paths in found.items() if name not in self.adapters and self.files.get(name) in (None, paths[0])}
        if not free:
            return []
        names = {name.lower(): name for name in free}
        matches = (match[0].lower() for text in texts for match in words_pattern(names).finditer(unescape(text)))
        said = [names[word] for word in dict.fromkeys(matches)]
        self.files |= {name: found[name][0] for name in said}
        return said

    def load(self, names: Iterable[str]) -> dict[str, Adapter]:
        """The adapters of these names, each read from its file unless it is in memory. Raises AdapterError."""
        names = list(dict.fromkeys(names))
        found = {name: self.adapters[name] if name in self.adapters else self._load(name).adapter for name in names}
        for name in list(self._loaded)[: -max(MOST, len(names))]:
            del self._loaded[name]
        return found

    def sha256(self, name: str) -> str:
        """The hash of an adapter's weights in its file; "" of one that was never in a file."""
        return "" if name in self.adapters else self._load(name).sha256

    def _load(self, name: str) -> Entry:
        path, entry = self.files[name], self._loaded.pop(name, None)
        state = file_state(path)
        if entry is None or (entry.path, entry.state) != (path, state):
            entry = Entry(path, state, load_learned(path, name))
            if lost := entry.adapter.words.keys() - vectors_of(entry.adapter.words).keys():
                what = f"{path} brings the word {short(min(lost))!r} in vectors that are not read here"
                warnings.warn(f"{what}: it is drawn as it is spelled", stacklevel=2)
        self._loaded[name] = entry
        return entry

    def _inside(self) -> dict[str, list[Path]]:
        """The folder's files by name."""
        return files_in(self.folder) if self.folder else {}

    def _aliases(self, inside: Mapping[str, Sequence[Path]]) -> dict[str, str]:
        """What the files say they are called => their names."""
        aliases = {}
        for name, paths in inside.items():
            with contextlib.suppress(AdapterError):  # not an adapter: no prompt can mean it
                aliases[tag_name(describe(paths[0]).metadata.get("ss_output_name", name))] = name
        return aliases


def files_in(folder: Path) -> dict[str, list[Path]]:
    """The adapters and textual inversions of a folder, at any depth, by the names that prompts have for them."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found.setdefault(tag_name(path.stem), []).append(path)
    return found


def file_state(path: Path) -> tuple[int, int] | None:
    """Changes when an adapter's file does: its time in nanoseconds and its size in bytes. None where there is no file."""
    try:
        status = file_of(path).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
