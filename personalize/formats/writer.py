"""Writing safetensors files: tensors as bytes, one at a time, with the hashes that tools look for. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_LEGACY = 0x100000, 0x110000  # the bytes of a file that A1111's old hash is of
_BLOCK = 1 << 22


def with_ending(path: str | Path) -> Path:
    """The path of a file to write: it always ends in .safetensors."""
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path.parent / f"{path.name}.safetensors"


def overwrites(path: Path, source: Path) -> bool:
    """Whether writing to `path` would change `source`: it is that file, or lies in that folder."""
    return source.resolve() in (path.resolve(), *path.resolve().parents) or (path.exists() and path.samefile(source))


class Writer:
    """A safetensors file as it is written: tensors as they come, the header last, into the room that was left for it.

    What is left of the room becomes spaces; a header that needs more moves the tensors. The same bytes for the same tensors in
    the same order. Adds `sshs_model_hash`, `sshs_legacy_hash` (kohya, A1111) and `modelspec.hash_sha256` to the metadata.
    """

    def __init__(self, file: BinaryIO, room: int) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self._file, self._room = file, 8 + room + -room % 8
        self._odd: dict[str, tuple[str, Sequence[int], bytes]] = {}
        self._digest, self._first, self._end = hashlib.sha256(), bytearray(), 0
        file.seek(self._room)

    @property
    def digest(self) -> str:
        """sha256 of all tensors."""
        return self._digest.hexdigest()

    def add(self, key: str, dtype: str, shape: Sequence[int], raw: bytes | memoryview) -> None:
        """Write a tensor's bytes, its dtype by safetensors' name; what would leave the next unaligned waits for the end."""
        if len(raw) % 4:
            self._odd[key] = dtype, shape, bytes(raw)
        else:
            self._write(key, dtype, shape, raw)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what has waited, and the header."""
        for key, waiting in self._odd.items():
            self._write(key, *waiting)
        hashes = dict(zip(HASHES, (self.digest, "0" * 8, f"0x{self.digest}"), strict=True))
        start = max(self._room, len(encode_header(self.entries, {**metadata, **hashes})))
        draft = encode_header(self.entries, {**metadata, **hashes}, start) + self._first
        hashes["sshs_legacy_hash"] = hashlib.sha256(draft[slice(*_LEGACY)]).hexdigest()[:8]
        _move(self._file, self._room, start, self._end)
        self._file.seek(0)
        self._file.write(encode_header(self.entries, {**metadata, **hashes}, start))

    def _write(self, key: str, dtype: str, shape: Sequence[int], raw: bytes | memoryview) -> None:
        start, self._end = self._end, self._end + len(raw)
        self.entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, self._end]}
        self._digest.update(raw)
        self._first += raw[: max(0, _LEGACY[1] - len(self._first))]
        self._file.write(raw)


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
