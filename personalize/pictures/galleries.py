"""Which folders of a folder are learned from: itself, subfolders called `10_name class`, or those in a project of kohya's."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, RecipeError
from .files import Contents, all_files, first_few, is_picture, look_into, natural, unnameable
from .metadata import Note, read_metadata

KOHYA = re.compile(r"([1-9]\d*)_(\S+)(?:\s+(.+))?")  # 10_zwx dog
PROJECT = ("img", "image", "images")  # of kohya's GUI: pictures in folders called `10_name class`
CLASSES = ("reg", "regs", "reg_images", "regularization", "regularisation", "regularization_images")  # and class images


@dataclass(frozen=True)
class Gallery:
    """A folder and the pictures of one concept in it: right inside, and those deeper down that its metadata names."""

    name: str  # below the folder that was asked for; "": itself
    contents: Contents
    notes: dict[Path, Note]
    pictures: tuple[Path, ...]

    @property
    def numbered(self) -> re.Match[str] | None:
        """Repeats, trigger and class, as its name tells them."""
        return KOHYA.fullmatch(self.name.rpartition("/")[2])


def check_folder(folder: Path) -> Path:
    """The folder. Raises DataError where there is none, or one that nothing of ours could name."""
    if unnameable(str(folder)):
        raise DataError(f"{folder} has a name that is no UTF-8 text", "rename it")
    try:
        if folder.is_dir():
            if not os.access(folder, os.R_OK | os.X_OK):
                raise DataError(f"cannot list {folder}: Permission denied", "check its permissions")
            return folder
        if folder.exists():
            raise DataError(
                f"{folder} is a file, not a folder", f"give the folder that holds the pictures, perhaps {folder.parent}"
            )
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}", "check its permissions") from error
    raise DataError(f"there is no folder {folder}", "check its spelling; relative paths start at the current folder")


def galleries(root: Path) -> list[Gallery]:
    """What is learned from a folder: its own pictures, or else those of each subfolder `10_name class`, of a project's `img`
    too; empty where there is nothing. Raises DataError for a folder or metadata that cannot be read."""
    contents, notes = look_into(check_folder(root)), read_metadata(root)
    if not contents.pictures:
        for place in (contents, _project(contents)):
            if place and (found := _numbered_in(root, place, notes)):
                return found
    own = _gallery("", contents, notes)
    return [own] if own.pictures else []


def check_output(folder: Path, output: Path) -> None:
    """Raise RecipeError for a run folder, or a file, that would lie among the pictures and be learned as one the next time."""
    if unnameable(str(output)):
        raise RecipeError(f"--output {output} is no UTF-8 text", "choose another name")
    place = output.parent if output.suffix else output
    for one in galleries(folder):
        if one.contents.folder.resolve() == place.resolve():
            what = f"{output} would lie among the pictures in {one.contents.folder}, and be learned with them the next time"
            raise RecipeError(what, f"choose another --output, such as runs/{folder.absolute().name}")


def count_pictures(folder: Path) -> int:
    """How many pictures `galleries` finds in a folder: 0 where there is none. Raises DataError as it does."""
    return sum(len(one.pictures) for one in galleries(folder)) if folder.is_dir() else 0


def class_folder(root: Path) -> Path | None:
    """The class images of a project of kohya's, if it has some."""
    contents = look_into(root)
    reg = next((one for one in contents.folders if one.name.lower() in CLASSES), None)
    return reg if reg and _project(contents) and galleries(reg) else None


def subfolders_with_pictures(contents: Contents) -> list[str]:
    """Names of the subfolders that hold pictures, also in subfolders called `10_name class`; others cannot be looked into."""
    return sorted(one.name for one in contents.folders if _holds_pictures(one))


def advice_without_pictures(contents: Contents) -> str:
    """What to do about a folder without pictures."""
    if inside := subfolders_with_pictures(contents):
        return f"there are some in its subfolder {first_few(inside)}: give that folder, or call subfolders like '10_name class'"
    if deep := next((path.parent for path in all_files(contents.folder) if is_picture(path)), None):
        return f"there are some deeper down: give {deep}"
    if contents.left_out:
        path, why = contents.left_out[0]
        return f"{path.name}: {why}"
    if suffixes := sorted({path.suffix.lower() for path in contents.others if path.suffix}):
        return f"it holds {first_few(suffixes)}; use PNG, JPEG, WebP or another format that Pillow reads"
    return "put 3 to 20 pictures in it"


def _project(contents: Contents) -> Contents | None:
    """The `img` of a folder that is a project of kohya's."""
    img = next((one for one in contents.folders if one.name.lower() in PROJECT), None)
    return look_into(img) if img else None


def _numbered_in(root: Path, place: Contents, notes: dict[Path, Note]) -> list[Gallery]:
    """Subfolders called `10_something` that hold pictures, of a place below the root without pictures of its own."""
    if place.pictures:
        return []
    named = [one for one in place.folders if KOHYA.fullmatch(one.name)]
    found = [_gallery(one.relative_to(root).as_posix(), look_into(one), {**notes, **read_metadata(one)}) for one in named]
    return [one for one in found if one.pictures]


def _gallery(name: str, contents: Contents, notes: dict[Path, Note]) -> Gallery:
    named = {path for path in notes if path.is_relative_to(contents.folder)}
    order = sorted({*contents.pictures, *named}, key=lambda path: natural(path.relative_to(contents.folder).as_posix()))
    return Gallery(name, contents, notes, tuple(order))


def _holds_pictures(folder: Path) -> bool:
    try:
        contents = look_into(folder)
        return bool(contents.pictures or _numbered_in(folder, contents, {}))
    except DataError:
        return False
