"""What one looks at in an adapter file: each weight's update, read without refusing NaN and Inf, and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from ...errors import AdapterError, HostileFileError
from ...families.family import Family, Shape
from ...families.names import FAMILIES, PARTS, part_of, resolve_shape
from ...formats.header import Header, open_file
from ...formats.tensors import read_tensor
from .. import contract, dialects, files, kinds
from ..delta import Decomposed, Delta, Dense
from ..describe import Description
from ..ops import linalg
from ..ops.report import Line
from ..ops.resize import can_factor
from ..strengths import blocks

Weights = Mapping[str, Tensor] | Callable[[str], Tensor]  # the base's, by canonical path
SHARE = 0.99  # of ||dW||^2: what "needed" ranks hold
_DENSE = 512  # singular values of full updates that are larger on both sides take too long to be worth it


@dataclass(frozen=True)
class Module:
    """One weight's update, measured. What is unknown is None."""

    path: str
    block: str
    kind: str
    shape: tuple[int, ...]
    rank: int  # 0: full
    norm: float  # ||dW||; of what is stored, where dW depends on a base that is not given
    exact: bool  # whether `norm` is that of dW
    effective: float | None = None  # rank: exp of the entropy of the singular values' shares of ||dW||^2
    needed: int | None = None  # ranks that hold SHARE of ||dW||^2
    ratio: float | None = None  # ||dW|| / ||W||, with a base


class Exam(NamedTuple):
    """What checks look at."""

    header: Header
    reading: dialects.Reading
    about: Description
    family: Family | None
    modules: Sequence[Module]
    sick: Sequence[str]  # keys of tensors that hold NaN or Inf
    needed: int | None
    based: bool  # whether the base was given


# ---------------------------------------------------------------- blocks


def block_of(family: Family | None, path: str) -> str:
    """A layer's block as strengths/blocks.py names it, or its part where the family is unknown."""
    return blocks.block_of(family, path) if family else part_of(path)


def block_norms(family: str, norms: Mapping[str, float]) -> dict[str, float]:
    """Path => norm, summed up to block => norm in the family's order; blocks without layers are left out."""
    row = family_named(family)
    found: dict[str, list[float]] = {}
    for path, norm in norms.items():
        found.setdefault(block_of(row, path), []).append(norm)
    return {block: math.hypot(*found[block]) for block in in_family_order(family, found)}


def in_family_order(family: str, found: Iterable[str]) -> tuple[str, ...]:
    """Blocks as the family runs through them."""
    row = family_named(family)
    return tuple(block for block in (blocks.names(row) if row else PARTS) if block in set(found))


def family_named(name: str) -> Family | None:
    """The row of that name, the first of several ("sd1 or sd2" share their blocks); None for "unknown"."""
    return next((one for one in FAMILIES if one.name == name.partition(" or ")[0]), None)


# ---------------------------------------------------------------- reading


class Update(NamedTuple):
    """One weight's update as a file holds it; no delta if some of its tensors are sick."""

    path: str
    kind: str
    delta: Delta | None
    sick: tuple[str, ...]


def read_updates(header: Header, reading: dialects.Reading, family: Family | None) -> Iterator[Update]:
    """As files.read, but NaN and Inf are passed on by name instead of refused."""
    with open_file(header.path) as file:
        scales = dialects.configured_scales(header, reading)
        for path, slot in reading.slots.items():
            if slot.kind:
                yield _update(file, header, path, slot, scales.get(path), resolve_shape(path, reading.shapes[path], family))
            for key in (slot.keys[role] for role in slot.keys.keys() & set(kinds.BIASES)):
                bias = files.read_bias(file, header, slot, scales.get(path))
                yield Update(path + contract.BIAS, "bias", *((bias, ()) if bias.finite() else (None, (key,))))


def _update(file: BinaryIO, header: Header, path: str, slot: dialects.Slot, scale: float | None, shape: Shape) -> Update:
    """Raises as storage does for all but NaN, Inf and what is beyond fp32."""
    try:
        return Update(path, slot.name, files.read_delta(file, header, slot, scale, shape), ())
    except HostileFileError:
        raise
    except AdapterError as error:
        weights = [key for role, key in slot.keys.items() if role not in (*kinds.NUMBERS, *kinds.BIASES)]
        sick = [key for key in weights if not read_tensor(file, key, header.tensors[key]).float().isfinite().all()]
        if not sick and "NaN" not in error.what:
            raise
        return Update(path, slot.name, None, tuple(sick or weights))


# ---------------------------------------------------------------- measuring


def measure(update: Update, block: str, weights: Weights | None) -> tuple[Module, Line | None]:
    """The facts of one update, and its singular values where a resize could use them."""
    stored = update.delta
    assert stored is not None
    base = _weight(weights, update.path)
    delta = Dense(stored.delta(base)) if base is not None and stored.needs_base else stored
    known = known_part(delta)
    values = _values(known) if known else None
    exact = not delta.needs_base
    norm = float(torch.linalg.norm(values)) if values is not None else (known or delta).norm()
    effective, needed = _spectrum(values) if values is not None and norm else (None, None)
    rank = inner_rank(stored)
    size = float(base.double().norm()) if base is not None and exact else 0.0
    module = Module(
        update.path, block, update.kind, stored.shape, rank, norm, exact, effective, needed, norm / size if size else None
    )
    return module, Line(update.path, rank, rank, values) if values is not None and exact else None


def known_part(delta: Delta) -> Delta | None:
    """What of an update is known without the base: all of most, the direction that DoRA turns to, nothing of OFT, GLoRA, IA3."""
    if isinstance(delta, Decomposed):
        return None if delta.inner.needs_base else delta.inner * delta.strength
    return None if delta.needs_base else delta


def inner_rank(delta: Delta) -> int:
    """The rank of its factors; 0 without any."""
    pair = (delta.inner if isinstance(delta, Decomposed) else delta).low_rank()
    return pair.rank if pair else 0


def _values(delta: Delta) -> Tensor | None:
    cheap = can_factor(delta) and (delta.low_rank() or min(linalg.sides(delta.shape)) <= _DENSE)
    return linalg.singular_values(delta) if cheap else None


def _spectrum(values: Tensor) -> tuple[float, int]:
    """The effective rank, and how many ranks hold SHARE of the squared norm."""
    shares = (values / values.max()).square()  # by the largest first: squares of what is tiny are nothing
    shares = shares / shares.sum()
    behind = shares.flip(0).cumsum(0).flip(0)
    return float(torch.special.entr(shares).sum().exp()), int((behind > 1 - SHARE).sum())


def _weight(weights: Weights | None, path: str) -> Tensor | None:
    if weights is None:
        return None
    try:
        return weights(path) if callable(weights) else weights[path]
    except KeyError:
        raise AdapterError(f"the base has no {path}", "name the base that the adapter was made for") from None
