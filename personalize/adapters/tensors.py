"""Tensors of a safetensors file: read one at a time, written as one block with the hashes that tools look for."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import HostileFileError
from .headers import Entry, short

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_READABLE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _READABLE.items()}
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch uses one thread: an adapter's matrices are so thin that two take several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_tensor(file: BinaryIO, key: str, entry: Entry) -> Tensor:
    """One tensor of floating-point numbers. Never reads more than the file holds: its header was checked."""
    if entry.dtype not in _READABLE:
        raise HostileFileError(f"{file.name}: {short(key)} holds {entry.dtype}, not weights", f"known: {', '.join(_READABLE)}")
    if 0 in entry.shape:
        return torch.empty(entry.shape, dtype=_READABLE[entry.dtype])
    raw = bytearray(entry.end - entry.start)
    file.seek(entry.start)
    if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
        raise HostileFileError(f"{file.name} became shorter while it was read", "try again")
    return torch.frombuffer(raw, dtype=_READABLE[entry.dtype]).reshape(entry.shape)


def with_ending(path: str | Path) -> Path:
    """The path of a file to write: it always ends in .safetensors."""
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path.parent / f"{path.name}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, the same bytes for the same tensors and metadata.

    Adds `sshs_model_hash`, `sshs_legacy_hash` (kohya, A1111) and `modelspec.hash_sha256` to the metadata.
    """
    entries, chunks, end = {}, [], 0
    for key in sorted(tensors, key=lambda key: (-tensors[key].element_size(), key)):  # widest first keeps all aligned
        tensor = tensors[key].contiguous()
        chunks.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
        start, end = end, end + tensor.nbytes
        entries[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    whole, first = hashlib.sha256(), bytearray()
    for chunk in chunks:
        whole.update(chunk)
        first += chunk[: max(0, 0x110000 - len(first))]
    digest = whole.hexdigest()
    hashes = dict(zip(_HASHES, (digest, "0" * 8, f"0x{digest}"), strict=True))
    draft = _header(entries, metadata, hashes) + first
    hashes["sshs_legacy_hash"] = hashlib.sha256(draft[0x100000:0x110000]).hexdigest()[:8]
    with path.open("wb") as file:
        file.write(_header(entries, metadata, hashes))
        file.writelines(chunks)


def _header(entries: Mapping[str, object], metadata: Mapping[str, str], hashes: Mapping[str, str]) -> bytes:
    table = {"__metadata__": dict(sorted({**metadata, **hashes}.items())), **entries}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
