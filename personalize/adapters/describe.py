"""What an adapter file is, told from its header in milliseconds and without torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TypeVar

from ..errors import AdapterError, check_type
from ..families.names import candidates, names_of, part_of
from ..formats.header import Entry, Header, open_file, read_header, read_scalar
from . import dialects
from .dialects import TEXTUAL_INVERSION
from .kinds import ALPHA, INTEGERS, NUMBERS
from .words import families_of_vectors, vectors_in

T = TypeVar("T")
HEAVY = 1 << 14  # bytes of metadata that nobody minds
_PRECISIONS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}


@dataclass(frozen=True)
class Description:
    """A file seen from outside. `parts`, `ranks` and `alphas` count modules; `unmatched` lists keys that would not load."""

    path: Path
    dialect: str  # "kohya", "diffusers", "peft"; "" if no key is an adapter's
    kind: str  # "LoRA", "LoHa + full", "textual inversion", ... or "unknown"
    family: str  # "pocket", "sd1", ..., "sd1 or sd2" where nothing tells, "unknown"
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
    words: Mapping[str, int] = field(default_factory=dict)  # words inside, or of a textual inversion => how many vectors
    weight_bytes: int = 0

    @property
    def is_learned(self) -> bool:
        """Whether it is an adapter, or a textual inversion."""
        return bool(self.dialect) or self.kind == TEXTUAL_INVERSION

    @property
    def heaviest(self) -> tuple[str, int, int] | None:
        """The largest entry of the metadata with its bytes, and those of all metadata, where they outweigh the tensors."""
        sizes = {key: len(key.encode()) + len(value.encode("utf-8", "replace")) for key, value in self.metadata.items()}
        total = sum(sizes.values())
        if total <= max(self.weight_bytes, HEAVY):
            return None
        key = max(sizes, key=lambda name: sizes[name])
        return key, sizes[key], total


def describe(path: str | Path) -> Description:
    """Read what a file says about itself: its header and alphas, no weights.

    Unmatched keys are listed rather than refused. Raises AdapterError for a missing file, HostileFileError for an unsound one.
    """
    check_type(path, (str, PathLike), "what is described", 'a path: p.describe("rex.safetensors")', AdapterError)
    path = dialects.file_of(Path(path).expanduser())
    header = read_header(path)
    reading = dialects.read_keys(header)
    weights, families = weights_in(header, reading), candidates(reading.shapes, reading.metadata)
    words = {word: _count_vectors(header, keys) for word, keys in reading.words.items()}
    if reading.kind == TEXTUAL_INVERSION:
        keys = vectors_in(header.tensors)
        weights, families = [header.tensors[key] for key in keys.values()], families_of_vectors(header.tensors, header.metadata)
        words = {path.stem: _count_vectors(header, keys)}
    return Description(
        path=path,
        dialect=reading.dialect,
        kind=reading.kind,
        family=names_of(families),
        parts=_count(map(part_of, reading.slots)),
        ranks=_count(rank for slot in reading.slots.values() if (rank := dialects.rank(header, slot))),
        alphas=_count(read_alphas(header, reading).values()),
        dtype=", ".join(precisions(weights)),
        tensors=len(header.tensors),
        parameters=sum(math.prod(entry.shape) for entry in weights),
        bytes=header.size,
        title=header.metadata.get("modelspec.title") or header.metadata.get("ss_output_name") or path.stem,
        trigger=header.metadata.get("modelspec.trigger_phrase", ""),
        thumbnail=header.metadata.get("modelspec.thumbnail", ""),
        metadata=header.metadata,
        unmatched=() if reading.kind == TEXTUAL_INVERSION else reading.unmatched,
        words=words,
        weight_bytes=sum(entry.end - entry.start for entry in header.tensors.values()),
    )


def weights_in(header: Header, reading: dialects.Reading) -> list[Entry]:
    """The tensors that updates are made of, without their alphas and flags; each once, as layers may share them."""
    stored = {key: role for slot in reading.slots.values() for role, key in slot.keys.items()}
    return [header.tensors[key] for key, role in stored.items() if role not in (*NUMBERS, *INTEGERS)]


def precisions(weights: Iterable[Entry]) -> list[str]:
    """How they are stored, as people say it ("fp16"); what most have comes first."""
    return list(_count(_PRECISIONS.get(entry.dtype, entry.dtype) for entry in weights))


def _count_vectors(header: Header, keys: Mapping[str, str]) -> int:
    shape = header.tensors[next(iter(keys.values()))].shape
    return shape[0] if len(shape) == 2 else 1


def read_alphas(header: Header, reading: dialects.Reading) -> dict[str, float]:
    """Path => alpha as Adapter.load would have it, of every module with a rank."""
    slots = {module: slot for module, slot in reading.slots.items() if dialects.rank(header, slot)}
    with open_file(header.path) as file:
        scales = dialects.configured_scales(header, reading)
        kept = {module: slot.keys[ALPHA] for module, slot in slots.items() if ALPHA in slot.keys}
        stored = {module: read_scalar(file, key, header.tensors[key]) for module, key in kept.items()}
    ranks = {module: dialects.rank(header, slot) for module, slot in slots.items()}
    return {module: stored.get(module, scales.get(module, 1.0) * rank) for module, rank in ranks.items()}


def _count(values: Iterable[T]) -> dict[T, int]:
    return dict(Counter(values).most_common())
