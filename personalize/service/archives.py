"""Zip archives from strangers: looked through before anything is written, and counted while it is.

Refused as a whole: names that lead out of the folder, links and devices, encrypted entries, entries that share bytes (Fifield
2019, "A better zip bomb"), what grows too much, and directories that would not fit into memory.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from ..pictures.files import is_hidden, same_name
from ..text import plain, readable
from .errors import Refusal
from .options import Limits
from .paths import relative_path

END, END_SIZE, COMMENT = b"PK\x05\x06", 22, 65535  # the record at an archive's end, and the longest comment behind it
ENTRY = 1024  # bytes of the directory that an entry may take
SMALL = 1 << 20  # bytes up to which a file may grow as it likes
BLOCK = 1 << 18
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError)
TAKEN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others need memory in proportion to what the file claims

Entry = tuple[zipfile.ZipInfo, tuple[str, ...]]


def hostile(what: str, hint: str = "make the archive anew") -> Refusal:
    """An archive that is no honest one."""
    return Refusal(400, "bad_archive", what, hint)


def read_archive(file: BinaryIO, limits: Limits) -> tuple[zipfile.ZipFile, list[Entry]]:
    """An opened archive and the files in it with the parts of their paths, found harmless. Raises Refusal."""
    _check_directory(file, limits)
    try:
        archive = zipfile.ZipFile(file)
        infos = archive.infolist()
    except (*DAMAGE, OSError) as error:
        raise hostile(f"this is no zip archive that can be read: {plain(str(error), 200)}") from error
    _check_overlap(infos)
    entries = [(info, _parts(info)) for info in infos if not info.is_dir() and not _is_systems(info.filename)]
    if len(entries) > limits.files:
        raise Refusal(413, "too_many_files", f"{len(entries)} files are more than {limits.files}", "send fewer at a time")
    if (total := sum(info.file_size for info, _ in entries)) > limits.unpacked:
        raise Refusal(413, "too_large", f"unpacked, it would be {readable(total)}", f"at most {readable(limits.unpacked)}")
    seen: dict[str, str] = {}
    for info, parts in entries:
        _check_entry(info, limits)
        path = "/".join(parts)
        if (other := seen.setdefault(same_name(path), path)) is not path:
            raise hostile(f"{plain(other, 80)} is there twice, as {plain(path, 80)}", "give every file a name of its own")
    return archive, entries


def unpack_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    """Write one file of an archive. Raises Refusal for one that is damaged, or larger than it says."""
    count = 0
    with path.open("xb") as target:
        for block in _blocks(archive, info):
            count += len(block)
            if count > info.file_size:
                raise hostile(f"{plain(info.filename, 80)} is larger than it says")
            target.write(block)


def _blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """The bytes of a file in an archive. Raises Refusal for what is damaged."""
    try:
        with archive.open(info) as source:
            while block := source.read(BLOCK):
                yield block
    except DAMAGE as error:
        raise hostile(f"{plain(info.filename, 80)} is damaged: {plain(str(error), 200)}") from error


def _check_directory(file: BinaryIO, limits: Limits) -> None:
    """Raise Refusal where the directory is too large to be read at all: an entry takes 46 bytes there, and 500 in memory."""
    size = file.seek(0, 2)
    start = max(0, size - END_SIZE - COMMENT)
    file.seek(start)
    tail = file.read()
    file.seek(0)
    if (at := tail.rfind(END)) < 0 or len(tail) - at < END_SIZE:
        raise hostile("this is no zip archive")
    directory = struct.unpack_from("<L", tail, at + 12)[0]
    if directory > limits.files * ENTRY:  # also the mark of zip64, 2^32 - 1: for so many files that nobody sends them
        raise Refusal(413, "too_many_files", "it holds too many files", f"at most {limits.files}")


def _check_overlap(infos: list[zipfile.ZipInfo]) -> None:
    """Raise Refusal where two entries share bytes."""
    for one, other in pairwise(sorted(infos, key=lambda info: info.header_offset)):
        if one.header_offset + 30 + len(one.filename.encode()) + one.compress_size > other.header_offset:
            raise hostile("files in it share their bytes")


def _check_entry(info: zipfile.ZipInfo, limits: Limits) -> None:
    """Raise Refusal for what is no plain file, and for what would grow beyond measure."""
    name, kind = plain(info.filename, 80), stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise hostile(f"{name} is a link or a device, and not a file", "pack the files themselves")
    if info.flag_bits & 0x1:
        raise hostile(f"{name} is encrypted", "pack it without a password")
    if info.compress_type not in TAKEN:
        raise hostile(f"{name} is packed in a way that is not read", "use the usual way, deflate")
    if info.file_size > SMALL and info.file_size > limits.ratio * max(1, info.compress_size):
        raise hostile(f"{name} would grow {info.file_size // max(1, info.compress_size)}-fold", "no picture does")


def _parts(info: zipfile.ZipInfo) -> tuple[str, ...]:
    """Where a file of an archive belongs. Python cuts a name at a NUL, and so the name as it was written is looked at."""
    if "\0" in info.orig_filename:
        raise hostile(f"{plain(ascii(info.orig_filename), 80)} is no name")
    return relative_path(info.orig_filename)


def _is_systems(name: str) -> bool:
    """Whether a file was put there by a system: `__MACOSX/._1.png`, `.DS_Store`. One that leads out is none."""
    parts = name.split("/")
    leads_out = ".." in parts or name.startswith("/") or "\\" in name
    return not leads_out and any(is_hidden(Path(part)) for part in parts if part)
