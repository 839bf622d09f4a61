"""LoRA files side by side, as bytes: their weighted sum without torch, which takes longer to load than such a merge to make.

Of plain LoRA files in one dtype of 16 bits. What a strength makes of such a number is looked up in a table of all 65,536; it is
computed in fp32, step by step as by merge.py, and the file is the same to the byte (tests/adapters/ops/test_concat.py), under the
same contract. All that is not as plain raises NeedsDeltas, before a file has changed: merge.py does it, or refuses.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ...errors import AdapterError, HostileFileError
from ...families.family import Shape
from ...families.names import candidates, kin
from ...formats.header import Entry, Header, open_file, read_header
from ...formats.writer import with_ending
from .. import contract, dialects, kinds
from ..describe import read_alphas
from ..strengths.grammar import Weighting
from .report import Line

if TYPE_CHECKING:
    from numpy import ndarray

    Bits = ndarray[Any, Any]  # uint16: numbers of 16 bits as a file holds them
    Floats = ndarray[Any, Any]  # float32

PLAIN = {kinds.UP, kinds.DOWN, kinds.ALPHA}
STEPS = {"fp16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134)}  # rounding: at most this share, or this much near zero
NAMES = {"fp16": "F16", "bf16": "BF16"}
SMALL = 1e9  # no product of four numbers below it is beyond fp32


class NeedsDeltas(Exception):
    """What the bytes alone cannot do."""


@dataclass(frozen=True)
class Source:
    """A plain LoRA file, and how much of each of its layers is wanted."""

    header: Header
    reading: dialects.Reading
    shapes: Mapping[str, Shape]
    alphas: Mapping[str, float]
    strengths: Mapping[str, float]  # those that are not 0
    stamp: tuple[int, ...]

    def rank(self, path: str) -> int:
        """That of a layer."""
        return dialects.rank(self.header, self.reading.slots[path])

    def entry(self, path: str, role: str) -> Entry:
        """Where a tensor lies."""
        return self.header.tensors[self.reading.slots[path].keys[role]]

    def read(self, file: BinaryIO, path: str, role: str, into: Bits) -> Bits:
        """A tensor's numbers, in a contiguous array of their size. Raises HostileFileError if the file has become shorter."""
        file.seek(self.entry(path, role).start)
        if file.readinto(into.data.cast("B")) != into.nbytes:  # type: ignore[attr-defined]
            raise HostileFileError(f"{file.name} became shorter while it was read", "try again")
        return into


@dataclass(frozen=True)
class Stack:
    """The sum of LoRA files that are plain."""

    sources: Sequence[Source]
    dtype: str

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What all say alike."""
        return contract.shared_metadata(source.reading.metadata for source in self.sources)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Path => the shape of dW."""
        found = {path: source.shapes[path] for source in self.sources for path in source.strengths}
        return dict(sorted(found.items()))

    def lines(self) -> list[Line]:
        """What became of the ranks: they add up."""
        ranks = dict.fromkeys(self.shapes, 0)
        for source in self.sources:
            for path in source.strengths:
                ranks[path] += source.rank(path)
        return [Line(path, rank, rank, _no_values) for path, rank in ranks.items()]

    def save(self, path: Path, dialect: str, metadata: Mapping[str, str]) -> contract.Saved:
        """As `Adapter.save_with_report`. Raises NeedsDeltas, and nothing has changed, if a layer is less plain than it seemed."""
        families = candidates(self.shapes, {**self.metadata, **metadata})
        fill = partial(_fill, self)
        return contract.write(with_ending(path), self.shapes, {}, families, self.metadata, dialect, metadata, self.dtype, fill)


def _no_values() -> Any:
    raise NeedsDeltas


# ---------------------------------------------------------------- reading


def stack(files: Iterable[tuple[Path, Weighting]], dtype: str | None = None) -> Stack:
    """The sum of adapter files, each as much as is wanted; `dtype` is what it is to be written in, if not as they are.

    Raises NeedsDeltas if one is not plain, or they do not go together; AdapterError as `Adapter.open` and `weighted` do.
    """
    sources = [_open(path, weighting) for path, weighting in files]
    known = {entry.dtype for source in sources for entry in _weights(source)}
    same = next((name for name in NAMES if known == {NAMES[name]} and dtype in (None, name)), None)
    shapes = {item for source in sources for item in source.shapes.items()}
    if not same or len(dict(shapes)) < len(shapes) or not kin(source.shapes for source in sources):
        raise NeedsDeltas
    return Stack(sources, same)


def _open(path: Path, weighting: Weighting) -> Source:
    header = read_header(dialects.file_of(path.expanduser()))
    stamp = contract.identify(os.stat(header.path))
    reading = contract.read_keys(header, allow_unmatched=False)
    if reading.words or not all(_is_plain(slot) for slot in reading.slots.values()):
        raise NeedsDeltas
    shapes = contract.find_shapes(header, reading)
    family = next(iter(candidates(shapes, reading.metadata)), None)
    strengths = {path: weight for path, weight in weighting.of(sorted(shapes), family).items() if weight}
    return Source(header, reading, shapes, read_alphas(header, reading), strengths, stamp)


def _is_plain(slot: dialects.Slot) -> bool:
    return slot.kind == "lora" and slot.keys.keys() <= PLAIN and slot.share[1] == 1


def _weights(source: Source) -> Iterable[Any]:
    slots = source.reading.slots.values()
    return (source.header.tensors[key] for slot in slots for role, key in slot.keys.items() if role != kinds.ALPHA)


# ---------------------------------------------------------------- writing


def _fill(whole: Stack, draft: contract.Draft) -> None:
    """Write every layer, files side by side."""
    import contextlib

    with contextlib.ExitStack() as files:
        opened = [files.enter_context(open_file(source.header.path)) for source in whole.sources]
        for source, file in zip(whole.sources, opened, strict=True):
            if contract.identify(os.fstat(file.fileno())) != source.stamp:
                raise AdapterError(f"{source.header.path} has changed since it was opened", "try again")
        for path in whole.shapes:
            terms = [pair for pair in zip(whole.sources, opened, strict=True) if path in pair[0].strengths]
            _add(draft, path, terms, whole.dtype)


def _add(draft: contract.Draft, path: str, terms: Sequence[tuple[Source, BinaryIO]], dtype: str) -> None:
    """Write one layer: what `delta.add`, `LowRank.with_alpha` and rounding make of it, and whether that is close enough."""
    ranks = [source.rank(path) for source, _ in terms]
    alpha = float(sum(ranks)) if len(terms) > 1 else terms[0][0].alphas[path]
    told = draft.choose_alpha(path, sum(ranks), alpha)
    chains = []
    for (source, _), rank in zip(terms, ranks, strict=True):
        factors = source.strengths[path], source.alphas[path] / rank if len(terms) > 1 else 1.0, alpha / told
        chains.append(tuple(factor for factor in factors if factor != 1))
    if not all(abs(size) < SMALL for size in (*ranks, *(source.alphas[path] for source, _ in terms))):
        raise NeedsDeltas
    up, down = _side_by_side(path, terms, chains, ranks, dtype)
    draft.norms[path] = 0.0
    if any(chains) and up.any() and not _is_close(up, down.reshape(len(down), -1), dtype):
        raise NeedsDeltas
    draft.writer.add(draft.name(path, kinds.UP), NAMES[dtype], [*up.shape, *[1] * (down.ndim - 2)], up.data.cast("B"))
    draft.writer.add(draft.name(path, kinds.DOWN), NAMES[dtype], down.shape, down.data.cast("B"))
    if draft.has(kinds.ALPHA):
        draft.writer.add(draft.name(path, kinds.ALPHA), "F32", [], struct.pack("<f", told))


def _side_by_side(
    path: str, terms: Sequence[tuple[Source, BinaryIO]], chains: Sequence[tuple[float, ...]], ranks: Sequence[int], dtype: str
) -> tuple[Bits, Bits]:
    """up [out, sum of ranks], each part times the factors of its chain, and down [sum of ranks, in(, kh, kw)]."""
    import numpy as np

    sides = {(source.entry(path, kinds.UP).shape[0], source.entry(path, kinds.DOWN).shape[1:]) for source, _ in terms}
    if len(sides) > 1:
        raise NeedsDeltas
    ((out, inside),) = sides
    up, down = np.empty((out, sum(ranks)), np.uint16), np.empty((sum(ranks), *inside), np.uint16)
    first = 0
    for (source, file), chain, rank in zip(terms, chains, ranks, strict=True):
        own = source.read(file, path, kinds.UP, np.empty((out, rank), np.uint16))
        source.read(file, path, kinds.DOWN, down[first : first + rank])
        up[:, first : first + rank] = table(dtype, chain).take(own, mode="clip") if chain else own
        first += rank
    if not all(_largest(bits, dtype) < SMALL for bits in (up, down)):  # NaN is not
        raise NeedsDeltas
    return up, down


def _is_close(up: Bits, down: Bits, dtype: str) -> bool:
    """Whether rounding `up` [out, r] cannot have moved dW by more than the contract allows: its largest possible error times the
    largest singular value of `down` [r, n], which norms of the Gram matrix bound."""
    import numpy as np

    left, right = floats(dtype).take(up, mode="clip"), floats(dtype).take(down, mode="clip")
    outer, inner = left.T @ left, right @ right.T
    square = float((outer * inner).sum())
    if not 1e-30 < square < math.inf:
        return False
    share, least = STEPS[dtype]
    moved = share * math.sqrt(float(np.trace(outer))) + least * math.sqrt(up.size)
    largest = min(float(np.abs(inner).sum(1).max()), float(np.linalg.norm(inner.astype(np.float64))))
    far, norm = 1.01 * moved * math.sqrt(largest), 0.99 * math.sqrt(square)  # both without alpha / rank; with room for fp32
    return far <= contract.TOLERANCE[dtype] * (norm - far)


def _largest(bits: Bits, dtype: str) -> float:
    """The largest magnitude; inf or NaN if one is."""
    return float(floats(dtype)[int((bits & 0x7FFF).max())])


# ---------------------------------------------------------------- numbers of 16 bits


@lru_cache(maxsize=4)
def floats(dtype: str) -> Floats:
    """Every number of 16 bits as fp32."""
    import numpy as np

    bits = np.arange(1 << 16, dtype=np.uint32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32) if dtype == "fp16" else (bits << 16).view(np.float32)


@lru_cache(maxsize=256)
def table(dtype: str, steps: tuple[float, ...]) -> Bits:
    """What every number of 16 bits becomes when it is multiplied step by step in fp32, and rounded to the nearest, or even."""
    import numpy as np

    with np.errstate(all="ignore"):  # what is not finite is found by `_largest`
        made = floats(dtype)
        for step in steps:
            made = made * np.float32(step)
        if dtype == "fp16":
            return made.astype(np.float16).view(np.uint16)
        bits = made.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
