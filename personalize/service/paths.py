"""Names and paths that come in with requests: what a file may be called, and which places may be named."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ..captioning.find import locate_captioner
from ..models.sources import NAMED, is_hub_id, locate
from ..text import plain
from .errors import Refusal
from .hosts import registered_folders

LONGEST_PART = 255  # letters between two slashes that a disk takes
LONGEST = 200  # bytes of a file's name: every disk has room for a temporary ending behind it
DEEPEST = 4  # folders within folders
FORBIDDEN = set('<>:"|?*\\/')  # letters that some system reads as something else
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)", re.IGNORECASE)  # devices of Windows


def file_name(name: str) -> str:
    """A name that a file may have on every system, in composed letters. Raises Refusal for any other.

    >>> file_name("e\\u0301te\\u0301.png") == "\\u00e9t\\u00e9.png"
    True
    """
    name = unicodedata.normalize("NFC", name)
    if why := fault_of(name):
        raise Refusal(400, "bad_name", f"a file cannot be called {plain(ascii(name), 80)}: {why}", "rename it")
    return name


def fault_of(name: str) -> str:
    """Why no file should have this name; "" for a good one.

    >>> [fault_of(name) for name in ("rex 1.png", "..", "NUL.txt", "a/b")]
    ['', 'it is hidden', 'Windows keeps that name for a device', 'it holds /']
    """
    if not name:
        return "it is empty"
    if name.startswith("."):
        return "it is hidden"
    if odd := next((letter for letter in name if letter in FORBIDDEN), ""):
        return f"it holds {odd}"
    if not name.isprintable():  # control codes, surrogates, letters that turn the direction of writing
        return "it holds letters that cannot be shown"
    if name[-1] in ". ":
        return "it ends in a dot or a space"
    if RESERVED.fullmatch(name.partition(".")[0].rstrip()):
        return "Windows keeps that name for a device"
    return "it is too long" if len(name.encode()) > LONGEST else ""


def relative_path(name: str) -> tuple[str, ...]:
    """The parts of a path that stays where it is put: `10_rex dog/1.png`. Raises Refusal for any other.

    >>> relative_path("10_rex dog/1.png")
    ('10_rex dog', '1.png')
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or re.match(r"[A-Za-z]:", name):
        raise Refusal(400, "bad_path", f"{plain(ascii(name), 80)} leads out of its folder", "give names within the folder")
    if len(parts) > DEEPEST + 1:
        raise Refusal(400, "bad_path", f"{plain(ascii(name), 80)} lies too deep", f"at most {DEEPEST} folders")
    return tuple(file_name(part) for part in parts)


class Places:
    """The folders that requests may name: the workspace and what the user named when the service was started."""

    def __init__(self, workspace: Path, folders: Sequence[Path] = ()) -> None:
        self.workspace = workspace.expanduser().resolve()
        self.folders = tuple(path.expanduser().resolve() for path in folders)

    @property
    def roots(self) -> tuple[Path, ...]:
        """Those folders, and what the plugins of image UIs made known meanwhile."""
        return (self.workspace, *self.folders, *(path.resolve() for path in registered_folders(self.workspace)))

    def confine(self, path: str | Path, param: str | None = None) -> Path:
        """The true place of a path, links followed; a relative one counts from the workspace. Raises Refusal for any other."""
        if any(len(part) > LONGEST_PART for part in Path(path).parts):
            raise Refusal(400, "bad_path", f"{plain(str(path), 80)} is no path", "it is too long", param)
        try:
            true = (self.workspace / path).resolve()
        except (OSError, ValueError, RuntimeError):  # a NUL in it, a loop of links
            true = Path("/")
        if not any(true.is_relative_to(root) for root in self.roots):
            what = f"{plain(str(path), 200)} lies outside of the workspace"
            raise Refusal(403, "outside", what, "personalize serve --folder DIR lets requests name a folder", param)
        return true

    def confine_base(self, base: str) -> str:
        """A base's name, a hub id, or a path inside. Raises Refusal for any other, BaseModelError for what is no base."""
        if base in NAMED or (is_hub_id(base) and ".." not in base.split("/")):
            return base
        return str(locate(self.confine(base, "base"), download=False))

    def confine_captioner(self, name: str) -> str:
        """The same of a captioner."""
        if name in NAMED or (is_hub_id(name) and ".." not in name.split("/")):
            return name
        return str(locate_captioner(str(self.confine(name, "model")), download=False))
