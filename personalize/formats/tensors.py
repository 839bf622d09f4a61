"""Tensors of a safetensors file, read and written one at a time."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import HostileFileError
from .header import Entry, short
from .writer import Writer

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


def add_tensor(writer: Writer, key: str, tensor: Tensor) -> None:
    """Write a tensor."""
    tensor = tensor.contiguous()
    writer.add(key, _NAMES[tensor.dtype], tensor.shape, bytes_of(tensor))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a small file at once, ordered by key."""
    with path.open("w+b") as file:
        writer = Writer(file, 0)
        for key in sorted(tensors):
            add_tensor(writer, key, tensors[key])
        writer.finish(metadata)
