"""Files that clients sent, as they sent them, each in a folder of its own: what OpenAI calls files and uploads."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..io import disk_error, write_text
from ..text import plain, readable
from .errors import Refusal, not_found
from .uploads import folder_aside

ABOUT, CONTENT = "file.json", "content"
ID = re.compile(r"(file|upload|part)-[0-9a-f]{16}")


@dataclass(frozen=True)
class StoredFile:
    """A file that was sent; `dataset` is where its pictures are."""

    id: str
    filename: str
    bytes: int
    created_at: int
    purpose: str
    dataset: str = ""
    about: dict[str, Any] = field(default_factory=dict)


class Files:
    """The files in a folder. A file is there when its record is: that is written last."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def all(self, sort: str = "file") -> list[StoredFile]:
        """All files, or all unfinished uploads, the newest first."""
        found = [one for path in self.place.glob(f"{sort}-*") if (one := self._read(path.name))]
        return sorted(found, key=lambda one: (-one.created_at, one.id))

    def get(self, id: str) -> StoredFile:
        """A file by its id. Raises Refusal."""
        if not ID.fullmatch(id) or (found := self._read(id)) is None:
            raise not_found(id.partition("-")[0] if ID.fullmatch(id) else "file", id)
        return found

    def content(self, id: str) -> Path:
        """Where its bytes are."""
        return self.place / self.get(id).id / CONTENT

    def keep(self, filename: str, file: BinaryIO, purpose: str, most: int, **more: Any) -> StoredFile:
        """Keep a file. Raises Refusal for one that is too large."""
        with folder_aside(self.place) as aside:
            (inner := aside / "file").mkdir()
            size = copy(file, inner / CONTENT, most)
            about = StoredFile(new_id("file"), filename, size, int(time.time()), purpose, **more)
            self._write(inner, about)
            inner.rename(self.place / about.id)
        return about

    def begin(self, filename: str, size: int, purpose: str, about: dict[str, Any]) -> StoredFile:
        """A folder for a file that comes in parts."""
        found = StoredFile(new_id("upload"), filename, size, int(time.time()), purpose, "", about)
        try:
            (self.place / found.id).mkdir()
        except OSError as error:
            raise disk_error(self.place, error) from error
        self._write(self.place / found.id, found)
        return found

    def update(self, file: StoredFile) -> StoredFile:
        """Write a file's record anew."""
        self._write(self.place / file.id, file)
        return file

    def add_part(self, upload: StoredFile, file: BinaryIO, most: int) -> str:
        """Keep a part of a file; returns its id. Raises Refusal where all parts are more than was said."""
        folder = self.place / upload.id
        there = sum(path.stat().st_size for path in folder.glob("part-*"))
        id = new_id("part")
        with folder_aside(self.place) as aside:
            copy(file, aside / id, min(most, upload.bytes - there))
            (aside / id).replace(folder / id)
        return id

    def join_parts(self, upload: StoredFile, parts: list[str]) -> Path:
        """The parts of an upload as one file, in this order, in its folder. Raises Refusal for parts that are missing."""
        folder = self.place / upload.id
        paths = [folder / part for part in parts]
        for part, path in zip(parts, paths, strict=True):
            if not ID.fullmatch(part) or not path.is_file():
                raise not_found("part", part)
        if (size := sum(path.stat().st_size for path in paths)) != upload.bytes:
            raise Refusal(400, "wrong_size", f"the parts are {readable(size)}, and {readable(upload.bytes)} were announced")
        try:
            with (folder / CONTENT).open("wb") as target:
                for path in paths:
                    with path.open("rb") as source:
                        shutil.copyfileobj(source, target, 1 << 18)
        except OSError as error:
            raise disk_error(folder, error) from error
        return folder / CONTENT

    def remove(self, id: str) -> None:
        """Remove a file with its record."""
        folder = self.place / self.get(id).id
        with folder_aside(self.place) as aside:
            folder.rename(aside / "gone")

    def remove_old_uploads(self, before: float) -> None:
        """Remove uploads that nobody finished."""
        for one in self.all("upload"):
            if one.created_at < before:
                shutil.rmtree(self.place / one.id, ignore_errors=True)

    def _write(self, folder: Path, about: StoredFile) -> None:
        write_text(folder / ABOUT, json.dumps(asdict(about)))

    def _read(self, id: str) -> StoredFile | None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # it is being written, or was by another version
            return StoredFile(**json.loads((self.place / id / ABOUT).read_text(encoding="utf-8")))
        return None


def new_id(sort: str) -> str:
    """An id that nobody guesses."""
    return f"{sort}-{secrets.token_hex(8)}"


def copy(source: BinaryIO, path: Path, most: int) -> int:
    """Write a stream to a file; returns its bytes. Raises Refusal for more than `most`, OutputError where the disk refuses."""
    size = 0
    try:
        with path.open("xb") as target:
            while block := source.read(1 << 18):
                size += len(block)
                if size > most:
                    raise Refusal(413, "too_large", f"more than {readable(max(most, 0))}", "send less")
                target.write(block)
    except OSError as error:
        raise disk_error(path, error) from error
    return size


def download_name(name: str) -> str:
    """A name for a header: ASCII, without what ends it.

    >>> download_name('a"b.zip')
    'a_b.zip'
    """
    return re.sub(r"[^\w.() -]", "_", plain(name, 150), flags=re.ASCII) or "file"
