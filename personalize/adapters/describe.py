"""What an adapter file is, told from its header in milliseconds and without torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeVar

from ..errors import AdapterError, check_type
from ..families.names import family_of, part_of
from ..formats.header import Header, open_file, read_header, read_scalar
from . import dialects
from .kinds import ALPHA, NUMBERS

T = TypeVar("T")
_PRECISIONS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}


@dataclass(frozen=True)
class Description:
    """A file seen from outside. `parts`, `ranks` and `alphas` count modules; `unmatched` lists keys that would not load."""

    path: Path
    dialect: str  # "kohya", "diffusers", "peft"; "" if no key is an adapter's
    kind: str  # "LoRA", "LoHa + full", "textual inversion", ... or "unknown"
    family: str  # "pocket", "sd1", ..., "unknown"
    parts: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    dtype: str  # of the weights, such as "fp16"
    tensors: int
    parameters: int
    bytes: int  # of the file
    title: str
    trigger: str
    thumbnail: str  # a data URL, or ""
    metadata: Mapping[str, str]
    unmatched: tuple[str, ...]


def describe(path: str | Path) -> Description:
    """Read what a file says about itself: its header and alphas, no weights.

    Unmatched keys are listed rather than refused. Raises AdapterError for a missing file, HostileFileError for an unsound one.
    """
    check_type(path, (str, PathLike), "what is described", 'a path: p.describe("rex.safetensors")', AdapterError)
    path = dialects.file_of(Path(path).expanduser())
    header = read_header(path)
    reading = dialects.read_keys(header)
    family = family_of(reading.shapes, header.metadata)
    stored = [(role, key) for slot in reading.slots.values() for role, key in slot.keys.items()]
    weights = [header.tensors[key] for role, key in stored if role not in NUMBERS]
    return Description(
        path=path,
        dialect=reading.dialect,
        kind=reading.kind,
        family=family.name if family else "unknown",
        parts=_count(map(part_of, reading.slots)),
        ranks=_count(rank for slot in reading.slots.values() if (rank := dialects.rank(header, slot))),
        alphas=_count(_alphas(header, reading)),
        dtype=", ".join(_count(_PRECISIONS.get(entry.dtype, entry.dtype) for entry in weights)),
        tensors=len(header.tensors),
        parameters=sum(math.prod(entry.shape) for entry in weights),
        bytes=header.size,
        title=header.metadata.get("modelspec.title") or header.metadata.get("ss_output_name") or path.stem,
        trigger=header.metadata.get("modelspec.trigger_phrase", ""),
        thumbnail=header.metadata.get("modelspec.thumbnail", ""),
        metadata=header.metadata,
        unmatched=reading.unmatched,
    )


def _alphas(header: Header, reading: dialects.Reading) -> list[float]:
    """Every module's alpha as Adapter.load would have it."""
    slots = {module: slot for module, slot in reading.slots.items() if dialects.rank(header, slot)}
    with open_file(header.path) as file:
        scales = dialects.configured_scales(header, reading)
        kept = {module: slot.keys[ALPHA] for module, slot in slots.items() if ALPHA in slot.keys}
        stored = {module: read_scalar(file, key, header.tensors[key]) for module, key in kept.items()}
    return [stored.get(module, scales.get(module, 1.0) * dialects.rank(header, slot)) for module, slot in slots.items()]


def _count(values: Iterable[T]) -> dict[T, int]:
    return dict(Counter(values).most_common())
