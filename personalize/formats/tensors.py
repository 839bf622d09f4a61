"""Tensors of a safetensors file: read and written one at a time, with the hashes that tools look for."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import HostileFileError
from .header import Entry, short

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_READABLE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in (_READABLE | _INTEGERS).items()}
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_LEGACY = 0x100000, 0x110000  # the bytes of a file that A1111's old hash is of
_BLOCK = 1 << 22


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch uses one thread: an adapter's matrices are so thin that two take several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_tensor(file: BinaryIO, key: str, entry: Entry, integers: bool = False) -> Tensor:
    """One tensor of floating-point numbers, or of integers. Never reads more than the file holds: its header was checked."""
    known = _INTEGERS if integers else _READABLE
    if entry.dtype not in known:
        raise HostileFileError(f"{file.name}: {short(key)} holds {entry.dtype}, not weights", f"known: {', '.join(known)}")
    if 0 in entry.shape:
        return torch.empty(entry.shape, dtype=known[entry.dtype])
    raw = bytearray(entry.end - entry.start)
    file.seek(entry.start)
    if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
        raise HostileFileError(f"{file.name} became shorter while it was read", "try again")
    return torch.frombuffer(raw, dtype=known[entry.dtype]).reshape(entry.shape)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, where they lie and as long as it lives: torch may come without NumPy."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def with_ending(path: str | Path) -> Path:
    """The path of a file to write: it always ends in .safetensors."""
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path.parent / f"{path.name}.safetensors"


class Writer:
    """A safetensors file as it is written: tensors as they come, the header last, into the room that was left for it.

    What is left of the room becomes spaces; a header that needs more moves the tensors. The same bytes for the same tensors in
    the same order. Adds `sshs_model_hash`, `sshs_legacy_hash` (kohya, A1111) and `modelspec.hash_sha256` to the metadata.
    """

    def __init__(self, file: BinaryIO, room: int) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self._file, self._room = file, 8 + room + -room % 8
        self._odd: dict[str, Tensor] = {}
        self._digest, self._first, self._end = hashlib.sha256(), bytearray(), 0
        file.seek(self._room)

    @property
    def digest(self) -> str:
        """sha256 of all tensors."""
        return self._digest.hexdigest()

    def add(self, key: str, tensor: Tensor) -> None:
        """Write a tensor; one that would leave the next unaligned waits for the end."""
        if tensor.nbytes % 4:
            self._odd[key] = tensor
        else:
            self._write(key, tensor)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what has waited, and the header."""
        for key, tensor in self._odd.items():
            self._write(key, tensor)
        hashes = dict(zip(HASHES, (self.digest, "0" * 8, f"0x{self.digest}"), strict=True))
        start = max(self._room, len(encode_header(self.entries, {**metadata, **hashes})))
        draft = encode_header(self.entries, {**metadata, **hashes}, start) + self._first
        hashes["sshs_legacy_hash"] = hashlib.sha256(draft[slice(*_LEGACY)]).hexdigest()[:8]
        _move(self._file, self._room, start, self._end)
        self._file.seek(0)
        self._file.write(encode_header(self.entries, {**metadata, **hashes}, start))

    def _write(self, key: str, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        raw = bytes_of(tensor)
        start, self._end = self._end, self._end + len(raw)
        self.entries[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, self._end]}
        self._digest.update(raw)
        self._first += raw[: max(0, _LEGACY[1] - len(self._first))]
        self._file.write(raw)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a small file at once, ordered by key."""
    with path.open("w+b") as file:
        writer = Writer(file, 0)
        for key in sorted(tensors):
            writer.add(key, tensors[key])
        writer.finish(metadata)


def encode_header(entries: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str], size: int = 0) -> bytes:
    """The header of a safetensors file, its length in front, with spaces up to `size` bytes in all."""
    table = {"__metadata__": dict(sorted(metadata.items())), **entries}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * max(-len(text) % 8, size - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def _move(file: BinaryIO, start: int, to: int, length: int) -> None:
    """Bytes of a file to a later place in it, from the last to the first."""
    for at in range(length - length % _BLOCK, -1, -_BLOCK) if to > start else ():
        file.seek(start + at)
        block = file.read(min(_BLOCK, length - at))
        file.seek(to + at)
        file.write(block)
