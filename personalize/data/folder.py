"""A folder of pictures -> examples, each with its caption, and what a person should know about them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..recipe import Data
from .captions import fill, lacking, read_metadata, safe_trigger, sidecar
from .pictures import Unreadable, is_picture, probe


@dataclass(frozen=True, slots=True)
class Example:
    """One picture: where it is, what it is called, its bytes' sha256 and its upright size in pixels (width, height)."""

    path: Path
    caption: str
    sha256: str
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Dataset:
    """The pictures in natural order, what was odd about them, and the trigger: as given, else the folder's name made safe."""

    examples: tuple[Example, ...]
    warnings: list[str]
    trigger: str


def read_folder(data: Data) -> Dataset:
    """Open, check and caption every picture of a folder (and those in subfolders that metadata.jsonl names).

    A picture that cannot be read is skipped with a warning. Raises DataError when the folder or its captions are not
    usable, or when no picture is left; RecipeError for an unknown word in the caption's template.
    """
    trigger = " ".join((data.trigger or "").split()) or safe_trigger(os.path.basename(os.path.abspath(data.folder)))
    examples, warnings = _examples(data.folder, fill(data.caption, trigger, data.class_name))
    return Dataset(examples, [*warnings, *_untriggered(trigger, examples)], trigger)


def class_images(folder: Path, prompt: str) -> Dataset:
    """A folder of class images for prior preservation: a Dataset like any other, captioned with the class prompt."""
    examples, warnings = _examples(folder, prompt)
    return Dataset(examples, warnings, prompt)


def _examples(folder: Path, template: str) -> tuple[tuple[Example, ...], list[str]]:
    written = read_metadata(_checked(folder))
    paths = _pictures(folder, written)
    examples: list[Example] = []
    skipped: list[str] = []
    for path in paths:
        try:
            sha256, size = probe(path)
        except Unreadable as error:
            skipped.append(f"skipped {path.name}: {error}")
        else:
            examples.append(Example(path, sidecar(path) or written.get(path) or template, sha256, size))
    if not examples:
        raise DataError(f"none of the {len(paths)} pictures in {folder} can be read", "; ".join(skipped[:3]))
    return tuple(examples), [*skipped, *_twins(examples), *_unused(folder, paths)]


def _checked(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"{folder} is a file, not a folder", f"give the folder that holds the pictures, perhaps {folder.parent}")
    raise DataError(f"there is no folder {folder}", "check its spelling; relative paths start at the current folder")


def _pictures(folder: Path, written: Iterable[Path]) -> list[Path]:
    """Picture files right inside the folder, and those that metadata.jsonl names, in natural order."""
    found = {*written, *(path for path in _visible(folder) if is_picture(path) and not path.is_dir())}
    if not found:
        raise DataError(f"there are no pictures in {folder}", _instead(folder))
    return sorted(found, key=lambda path: natural(path.relative_to(folder).as_posix()))


def _visible(folder: Path) -> list[Path]:
    """Files and folders that a person put there: not hidden, not the leavings of a Mac's zip, no pipes or devices."""
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX"]
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}", "check its permissions") from error
    return sorted(path for path in paths if path.is_file() or path.is_dir() or path.is_symlink())


def _galleries(folder: Path) -> list[str]:
    """Names of the subfolders that hold pictures."""
    return [sub.name for sub in _visible(folder) if sub.is_dir() and any(map(is_picture, _visible(sub)))]


def _instead(folder: Path) -> str:
    """What to do about a folder without pictures."""
    if galleries := _galleries(folder):
        return f"there are some in its subfolder {_some(galleries)}: give that folder"
    if suffixes := sorted({path.suffix.lower() for path in _visible(folder) if path.suffix}):
        return f"it holds {_some(suffixes)}; use PNG, JPEG, WebP or another format that Pillow reads"
    return "put 3 to 20 pictures in it"


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key: numbers by value, letters whatever their case, ties by the exact name.

    >>> sorted(["b10", "B9", "a"], key=natural)
    ['a', 'B9', 'b10']
    """
    plain = unicodedata.normalize("NFC", name).casefold()
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", plain)], name


def _twins(examples: Sequence[Example]) -> list[str]:
    """The same file twice counts double in training, which is rarely meant."""
    first: dict[str, str] = {}
    pairs = [(e.path.name, first.setdefault(e.sha256, e.path.name)) for e in examples]
    return [f"{name} is the same picture as {twin}" for name, twin in pairs if name != twin]


def _unused(folder: Path, used: Sequence[Path]) -> list[str]:
    roots = {path.relative_to(folder).parts[0] for path in used}
    unused = [name for name in _galleries(folder) if name not in roots]
    return [f"pictures in the subfolder {_some(unused)} are not used"] if unused else []


def _untriggered(trigger: str, examples: Sequence[Example]) -> list[str]:
    bare = lacking(trigger, [example.caption for example in examples])
    if not bare:
        return []
    what = f"{len(bare)} of {len(examples)} captions lack the trigger '{trigger}', such as '{bare[0]:.60}'"
    return [f"{what}: put it into them, or name with --trigger the word that they use"]


def _some(words: Sequence[str]) -> str:
    """The first few of a list, in words."""
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")
