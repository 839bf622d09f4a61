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
from ...formats.header import Header, open_file, read_header
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

    def factors(self, file: BinaryIO, path: str) -> tuple[Bits, Bits]:
        """up [out, r] and down [r, in(, kh, kw)] of a layer. Raises HostileFileError if the file has become shorter."""
        up, down = (self._read(file, self.reading.slots[path].keys[role]) for role in (kinds.UP, kinds.DOWN))
        return up.reshape(up.shape[:2]), down

    def _read(self, file: BinaryIO, key: str) -> Bits:
        import numpy as np

        entry = self.header.tensors[key]
        bits = np.empty(entry.shape, np.uint16)
        file.seek(entry.start)
        if file.readinto(bits.data.cast("B")) != bits.nbytes:  # type: ignore[attr-defined]
            raise HostileFileError(f"{file.name} became shorter while it was read", "try again")
        return bits


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
                ranks[path] += dialects.rank(source.header, source.reading.slots[path])
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
    import numpy as np

    pairs = [source.factors(file, path) for source, file in terms]
    if len({down.shape[1:] for _, down in pairs}) > 1:
        raise NeedsDeltas
    rank = sum(len(down) for _, down in pairs)
    alpha = float(rank) if len(terms) > 1 else terms[0][0].alphas[path]
    told = draft.choose_alpha(path, rank, alpha)
    ups, exact = [], True
    for (source, _), (up, down) in zip(terms, pairs, strict=True):
        own = source.alphas[path]
        if not max(abs(own), len(down), _largest(up, dtype), _largest(down, dtype)) < SMALL:
            raise NeedsDeltas  # to be refused, if it is NaN
        factors = source.strengths[path], own / len(down) if len(terms) > 1 else 1.0, alpha / told
        steps = tuple(factor for factor in factors if factor != 1)
        exact = exact and (not steps or not up.any())
        ups.append(table(dtype, steps)[up] if steps else up)
    up, down = np.concatenate(ups, 1), np.concatenate([down for _, down in pairs])
    draft.norms[path] = 0.0
    if not exact and not _is_close(up, down, abs(told) / rank, dtype):
        raise NeedsDeltas
    ones = [1] * (down.ndim - 2)
    draft.writer.add(draft.name(path, kinds.UP), NAMES[dtype], [*up.shape, *ones], up.data.cast("B"))
    draft.writer.add(draft.name(path, kinds.DOWN), NAMES[dtype], down.shape, down.data.cast("B"))
    if draft.has(kinds.ALPHA):
        draft.writer.add(draft.name(path, kinds.ALPHA), "F32", [], struct.pack("<f", told))


def _is_close(up: Bits, down: Bits, scale: float, dtype: str) -> bool:
    """Whether rounding `up` cannot have moved dW by more than the contract allows: by its largest possible error, and ||down||_2
    from above by the norms of its Gram matrix."""
    import numpy as np

    if not _largest(up, dtype) < SMALL:
        return False
    left, right = floats(dtype)[up], floats(dtype)[down.reshape(len(down), -1)]
    grams = left.T @ left, right @ right.T
    square = float((grams[0] * grams[1]).sum())
    if not 1e-30 < square < math.inf:
        return False
    share, least = STEPS[dtype]
    moved = share * math.sqrt(float(np.trace(grams[0]))) + least * math.sqrt(up.size)
    sizes = float(np.abs(grams[1]).sum(1).max()), float(np.sqrt(np.square(grams[1], dtype=np.float64).sum()))
    far, norm = 1.01 * moved * math.sqrt(min(sizes)), 0.99 * math.sqrt(square)
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
