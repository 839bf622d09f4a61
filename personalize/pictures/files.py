"""Which files of a folder are pictures, masks, previews and captions, and what is left out; which names are the same."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import DataError

MARK = "-masklabel"  # OneTrainer's name for a mask
SIDECARS = (".txt", ".caption")  # after a picture's name, with or without its ending; the last is the first choice of kohya's
ASIDE = "_aside"  # where the report on a dataset has pictures moved that are better not learned
SYSTEM = {"lost+found", "__macosx", "system volume information", "$recycle.bin", "@eadir", "#recycle", ASIDE}  # nobody's pictures
REFUSED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # programs, data and video, not pixels
SHEET, SUMMARY = "batch.png", "summary.json"  # what a batch writes beside its runs
MORE_SUFFIXES = {".pjp": "JPEG", ".pjpeg": "JPEG"}  # browsers' other names, which Pillow does not know
PLUGINS = ("pillow_heif", "pillow_avif", "pillow_jxl")
ADVICE = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "this format needs a plugin: pip install pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "this format needs a plugin: pip install pillow-avif-plugin"),
    ".jxl": "this format needs a plugin: pip install pillow-jxl-plugin",
    **dict.fromkeys((".svg", ".eps", ".ps", ".wmf", ".emf"), "a drawing, not pixels: export it as PNG"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"), "a camera's raw data: export it as JPEG"),
}


@dataclass(frozen=True)
class Contents:
    """What lies right inside a folder, in natural order; without what is hidden or the system's own."""

    folder: Path
    pictures: tuple[Path, ...]
    masks: tuple[Path, ...]
    folders: tuple[Path, ...]
    others: tuple[Path, ...]  # files of other kinds: captions, metadata and whatever else
    left_out: tuple[tuple[Path, str], ...]  # pictures and folders that cannot be used, and why

    @functools.cached_property
    def _by_name(self) -> dict[str, Path]:
        alike = {same_name(path.name): path for path in reversed((*self.masks, *self.others))}
        return alike | {path.name: path for path in (*self.masks, *self.others)}

    def caption_of(self, picture: Path) -> Path | None:
        """The file beside a picture that holds its caption: NAME.txt, NAME.png.txt or NAME.caption."""
        return self._first([f"{name}{ending}" for ending in SIDECARS for name in (picture.stem, picture.name)])

    def mask_of(self, picture: Path) -> Path | None:
        """The file beside a picture that says what of it is learned: NAME-masklabel.png."""
        return self._first([f"{picture.stem}{MARK}.png"])

    def _first(self, names: Iterable[str]) -> Path | None:
        """The first of several names that is there: as it is written, or else one that is the same."""
        found = (self._by_name.get(name) or self._by_name.get(same_name(name)) for name in names)
        return next(filter(None, found), None)


def look_into(folder: Path) -> Contents:
    """What lies right inside a folder. Raises DataError where it cannot be listed."""
    try:
        paths = sorted((path for path in folder.iterdir() if not is_hidden(path)), key=lambda path: natural(path.name))
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}", "check its permissions") from error
    adapters = {path.stem for path in paths if path.suffix == ".safetensors"}
    groups: dict[str, list[Path]] = {"folders": [], "masks": [], "pictures": [], "others": []}
    left_out = []
    for path in paths:
        kind = _kind(path, adapters)
        if why := obstacle(path) if kind in ("pictures", "folders") else "":
            left_out.append((path, why))
        elif kind:
            groups[kind].append(path)
    return Contents(folder, left_out=tuple(left_out), **{kind: tuple(some) for kind, some in groups.items()})


def _kind(path: Path, adapters: Iterable[str]) -> str:
    """The group of Contents that a path belongs to; "" for an adapter's preview or a batch's sheet, a pipe, a device."""
    if path.is_dir():
        return "folders"
    if is_picture(path):
        ours = path.stem in adapters or (path.name == SHEET and (path.parent / SUMMARY).is_file())
        return "masks" if is_mask(path) else "" if ours else "pictures"
    return "others" if path.is_file() else ""


def is_picture(path: Path) -> bool:
    """Whether the suffix (in any case) says that it is a picture: one that we read, or one to give advice about."""
    return path.suffix.lower() in ADVICE or format_of(path.suffix) in formats()


def is_mask(path: Path) -> bool:
    """Whether a file is another picture's mask, and so never a training picture."""
    return same_name(path.stem).endswith(MARK)


def is_hidden(path: Path) -> bool:
    """Whether a name is hidden, the leavings of a Mac, or a folder of the system's own."""
    return path.name.startswith(".") or path.name.lower() in SYSTEM


def obstacle(path: Path) -> str:
    """Why a picture or folder cannot be used, whatever is in it; "" where nothing is in the way."""
    if unnameable(path.name):
        return "its name is no UTF-8 text: rename it"
    try:
        status = path.stat()
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return "a pipe or a device, not a file"
    if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(status.st_mode) else 0)):
        return "cannot be opened: Permission denied"
    return "" if status.st_size or stat.S_ISDIR(status.st_mode) else "empty"


def unnameable(text: str) -> bool:
    """Whether a name holds bytes that are no UTF-8 text: no file of ours can tell it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def printable_name(text: str) -> str:
    r"""A name with what is no text in it written as escapes.

    >>> printable_name("caf\udce9.png")
    'caf\\udce9.png'
    """
    return text.encode(errors="backslashreplace").decode()


def same_name(name: str) -> str:
    """What is equal for names that people take for the same: accents composed or apart (as Macs store them), any case.

    >>> same_name("E\u0301te\u0301.TXT") == same_name("été.txt")
    True
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", PurePosixPath(name).as_posix()).casefold())


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key: numbers by value, letters whatever their case, ties by the exact name.

    >>> sorted(["b10", "B9", "a"], key=natural)
    ['a', 'B9', 'b10']
    """
    plain = unicodedata.normalize("NFC", name).casefold()
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", plain)], name


def all_files(folder: Path) -> Iterator[Path]:
    """Every file at any depth that is not hidden; folders that cannot be listed are passed over."""
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(Path(name)))
        yield from (Path(at, name) for name in files if not is_hidden(Path(name)))


@functools.cache
def formats() -> list[str]:
    """Names of the formats that this Pillow and its installed plugins open, in the order in which to try them."""
    from PIL import Image  # here: `--help` needs no pictures

    for plugin in PLUGINS:
        with contextlib.suppress(ImportError):
            getattr(importlib.import_module(plugin), "register_heif_opener", lambda: None)()
    Image.init()
    return [name for name in Image.ID if name in Image.OPEN and name not in REFUSED]


def format_of(suffix: str) -> str:
    """Pillow's format for a suffix in any case, or ""."""
    from PIL import Image

    return Image.registered_extensions().get(suffix.lower(), "") or MORE_SUFFIXES.get(suffix.lower(), "")


def is_picture_inside(path: Path) -> bool:
    """Whether a file that no name calls a picture begins like one."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(12).startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8"))
    return False


def first_few(words: Sequence[str]) -> str:
    """The first few of a list, in words.

    >>> first_few(["a", "b", "c", "d", "e", "f"])
    'a, b, c, d and 2 more'
    """
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")
