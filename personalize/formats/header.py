"""The header of a safetensors file, checked before anything is believed: 8 bytes of length, JSON, tensor bytes.

Format: https://huggingface.co/docs/safetensors#format. Checked here rather than by a library, because a hostile file must
end in one line that names it, and because everything but the weights can be known without importing torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import AdapterError, HostileFileError

MAX_HEADER = 32 << 20  # bytes; real ones hold a few hundred kB, or some MB with a thumbnail and tag statistics
MAX_DIMENSIONS = 8
PICKLES = {".ckpt", ".bin", ".pt", ".pth"}  # endings of files whose opening can run code

ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_SCALARS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b",
    "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B",
}  # fmt: skip

_DISGUISES = (
    (b"PK", "a zip archive, as torch.save writes (.ckpt, .pt)"),
    (b"\x80", "a Python pickle (.ckpt, .pt)"),
    (b"version https://git-lfs", "a git-lfs pointer: the file itself was not downloaded"),
    (b"<", "a web page: the download went wrong"),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a PNG picture"),
)
_FIELDS = {"dtype", "shape", "data_offsets"}  # of an entry, all of them and no others
_AGAIN = "copy or download it again"
_CONVERT = "pickled weights can run code and are never opened; convert the file to .safetensors where it came from"


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype as safetensors names it, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Address:
    """Where a parameter lies: under which key, in which rows of that tensor (None is all of it), and whether as its transpose."""

    key: str
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Header:
    """What a file says about itself, found consistent."""

    path: Path
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int  # of the whole file, in bytes


def read_header(path: Path) -> Header:
    """Read and check a header. Raises AdapterError if there is no such file, HostileFileError for anything unsound."""
    with open_file(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        return _parse(path, file, size)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """The open file; AdapterError for whatever the system refuses, there or in the block."""
    try:
        _check_file(path)
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}", "check the path and its permissions") from error


def read_scalar(file: BinaryIO, key: str, entry: Entry) -> float:
    """The one number that a tensor holds, such as an alpha; finite."""
    if math.prod(entry.shape) != 1 or entry.dtype not in {*_SCALARS, "BF16"}:
        raise HostileFileError(f"{file.name}: {short(key)} should be one number, but is {entry.dtype}{list(entry.shape)}")
    file.seek(entry.start)
    raw = file.read(entry.end - entry.start)
    if len(raw) < ITEM_SIZES[entry.dtype]:
        raise HostileFileError(f"{file.name} became shorter while it was read", "try again")
    raw, code = (b"\0\0" + raw, "<f") if entry.dtype == "BF16" else (raw, _SCALARS[entry.dtype])
    value = float(struct.unpack(code, raw)[0])
    if not math.isfinite(value):
        raise HostileFileError(f"{file.name}: {short(key)} is {value}")
    return value


def _check_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        inside = ", ".join(map(str, sorted(path.glob("*.safetensors"))[:3]))
        raise AdapterError(f"{path} is a folder", f"name the file: {inside}" if inside else "name a .safetensors file")
    if not path.exists():
        raise AdapterError(f"{path} does not exist", "check the path")
    raise AdapterError(f"{path} is not an ordinary file", "name a .safetensors file")


def _parse(path: Path, file: BinaryIO, size: int) -> Header:
    start = file.read(64)
    if not start:
        raise HostileFileError(f"{path} is empty", _AGAIN)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:9] != b"{":
        raise _disguise(path, start)
    if length > size - 8:
        raise HostileFileError(f"{path} is truncated: its header of {length} bytes does not fit in {size}", _AGAIN)
    if length > MAX_HEADER:
        raise HostileFileError(f"{path}: a header of {length} bytes is no adapter's", _AGAIN)
    file.seek(8)
    fields = _json(path, file.read(length))
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HostileFileError(f"{path}: its metadata is not a table of texts")
    tensors = {key: _entry(path, key, value, 8 + length) for key, value in fields.items()}
    _check_layout(path, tensors, 8 + length, size)
    return Header(path, tensors, metadata, size)


def _disguise(path: Path, start: bytes) -> HostileFileError:
    for magic, words in _DISGUISES:
        if start.startswith(magic):
            return HostileFileError(f"{path} is {words}, not a .safetensors file", _CONVERT if magic in (b"PK", b"\x80") else "")
    return HostileFileError(f"{path} is not a .safetensors file, or is truncated", _AGAIN)


def _json(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ValueError(f"{key} appears twice")
            table[key] = value
        return table

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise HostileFileError(f"{path}: its header is not sound JSON: {short(error)}", _AGAIN) from None
    if not isinstance(fields, dict):
        raise HostileFileError(f"{path}: its header is not a table")
    return fields


def _entry(path: Path, key: str, value: Any, offset: int) -> Entry:
    """One header entry, its offsets made absolute. Lengths are compared as Python integers: nothing can overflow."""
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise _unsound(path, key, "needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise _unsound(path, key, f"has the unknown dtype {short(dtype)}", f"known: {', '.join(ITEM_SIZES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise _unsound(path, key, f"has the impossible shape {short(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _unsound(path, key, f"has impossible offsets {short(offsets)}")
    start, end = offsets
    if end - start != math.prod(shape) * ITEM_SIZES[dtype]:
        raise _unsound(path, key, f"of {dtype}{short(shape)} cannot lie in {end - start} bytes")
    return Entry(dtype, tuple(shape), offset + start, offset + end)


def _unsound(path: Path, key: str, what: str, hint: str = "") -> HostileFileError:
    return HostileFileError(f"{path}: tensor {short(key)} {what}", hint)


def _check_layout(path: Path, tensors: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors follow each other without a gap or an overlap, from the header to the end of the file."""
    for key, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != start:
            fault = "overlaps another" if entry.start < start else "leaves a gap before it"
            raise HostileFileError(f"{path}: tensor {short(key)} {fault}")
        start = entry.end
    if start > size:
        raise HostileFileError(f"{path} is truncated: {start - size} bytes are missing", _AGAIN)
    if start < size:
        raise HostileFileError(f"{path}: {size - start} bytes at its end belong to no tensor")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def short(value: object) -> str:
    """A stranger's text, fit for one line: no control characters, at most 80 characters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(value)[:81])
    return text if len(text) <= 80 else text[:79] + "…"
