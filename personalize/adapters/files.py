"""Adapter files: reading them into deltas, and writing them under the export contract (contract.py).

One layer at a time is in memory, if the updates come on demand.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import AdapterError, HostileFileError
from ..families.family import Family, Shape
from ..formats.header import Entry, Header, open_file, read_header, read_scalar, short
from ..formats.tensors import TORCH, add_tensor, one_thread, read_tensor
from . import contract, dialects, kinds
from .build import build
from .delta import Decomposed, Delta, Dense, LowRank, kind_name
from .describe import precisions, weights_in
from .distance import estimate_norm, is_within, relative_difference
from .kinds.kind import shapes_of as shapes_of_tensors
from .lazy import OnDemand, prefetch, shapes_of
from .words import key_inside

Deltas = Mapping[str, Delta]
EXACT = (kinds.ALPHA, kinds.DORA)  # in fp32 in every file: a rounded norm would change all of W, and dW is little of that
Words = Mapping[str, Mapping[str, Tensor]]  # word => key as in words.py => vectors


# ---------------------------------------------------------------- reading


def read(path: Path, allow_unmatched: bool) -> tuple[dict[str, Delta], Mapping[str, str], Words]:
    """The deltas, metadata and words of a file in any dialect. Raises as `Adapter.load` does."""
    deltas, metadata, words = on_demand(path, allow_unmatched)
    return dict(deltas), metadata, words


def on_demand(path: Path, allow_unmatched: bool) -> tuple[OnDemand, Mapping[str, str], Words]:
    """As `read`, but each delta is read whenever it is asked for."""
    header = read_header(dialects.file_of(path))
    reading = contract.read_keys(header, allow_unmatched)
    shapes, scales = contract.find_shapes(header, reading), dialects.configured_scales(header, reading)
    stamp = contract.identify(os.stat(header.path))

    def make(path: str) -> Delta:
        with open_file(header.path) as file:
            if contract.identify(os.fstat(file.fileno())) != stamp:
                raise AdapterError(f"{header.path} has changed since it was opened", "try again")
            if path in reading.shapes:
                return read_delta(file, header, reading.slots[path], scales.get(path), shapes[path])
            module = path.removesuffix(contract.BIAS)
            slot = reading.slots[module]
            bias = read_bias(file, header, slot, scales.get(module))
            return _check_finite(file, {slot.keys[contract.bias_role(slot)]: bias.stored()["diff"]}, bias)

    storage = precisions(weights_in(header, reading))[0]
    return OnDemand(shapes, make, storage), reading.metadata, _read_words(header, reading)


def _read_words(header: Header, reading: dialects.Reading) -> Words:
    """The words inside a file, with their vectors as they are."""
    if not reading.words:
        return {}
    with open_file(header.path) as file:
        return {
            word: {key: _read_finite(file, own, header.tensors[own]) for key, own in keys.items()}
            for word, keys in reading.words.items()
        }


def _read_finite(file: BinaryIO, key: str, entry: Entry) -> Tensor:
    value = read_tensor(file, key, entry)
    if not value.float().isfinite().all():
        raise AdapterError(f"{file.name}: {short(key)} holds NaN or Inf", "the training that made it diverged")
    return value


def read_bias(file: BinaryIO, header: Header, slot: dialects.Slot, scale: float | None) -> Dense:
    """The update of a layer's bias; `scale` is what a config says of the layer's, which peft's goes by."""
    role = contract.bias_role(slot)
    value = dialects.own_rows(slot, role, read_tensor(file, slot.keys[role], header.tensors[slot.keys[role]])).float()
    if role != kinds.UP_BIAS or not slot.kind:
        return Dense(value)
    if scale is None and kinds.ALPHA in slot.keys:
        key = slot.keys[kinds.ALPHA]
        scale = kinds.row(slot.kind).scale(dialects.shapes(header, slot), read_scalar(file, key, header.tensors[key]))
    return Dense(value * (1.0 if scale is None else scale))


def read_delta(file: BinaryIO, header: Header, slot: dialects.Slot, scale: float | None, shape: Shape) -> Delta:
    """One weight's update; `scale` is what a config says of it."""
    own = {role: key for role, key in slot.keys.items() if role not in kinds.BIASES}
    numbers = {role: read_scalar(file, own.pop(role), header.tensors[slot.keys[role]]) for role in kinds.NUMBERS if role in own}
    tensors = {
        role: dialects.own_rows(slot, role, read_tensor(file, key, header.tensors[key], role in kinds.INTEGERS))
        for role, key in own.items()
    }
    try:
        delta = _build_delta(slot.kind, tensors, numbers, scale, shape)
    except AdapterError as error:
        raise HostileFileError(f"{file.name}: {short(next(iter(own.values())))}: {error.what}") from None
    return _check_finite(file, {own[role]: value for role, value in tensors.items()}, delta)


def _build_delta(
    kind: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, float], scale: float | None, shape: Shape
) -> Delta:
    """The update that tensors and numbers of a file make, by role. Its alpha is the file's own, else what the config's scale
    says, else there is none."""
    rank = kinds.row(kind).rank(shapes_of_tensors(tensors))
    alpha = numbers.get(kinds.ALPHA, None if scale is None or not rank else scale * rank)
    flags = {role: torch.tensor(value) for role, value in numbers.items() if role != kinds.ALPHA}
    delta = build(kind, {**tensors, **flags}, alpha, shape)
    return delta if scale is None or rank else delta * scale  # peft scales a LoKr of two whole halves too


def _check_finite(file: BinaryIO, tensors: Mapping[str, Tensor], delta: Delta) -> Delta:
    if not delta.finite():
        names = [key for key, value in tensors.items() if not value.float().isfinite().all()] or list(tensors)
        raise AdapterError(f"{file.name}: {' or '.join(names)[:300]} holds NaN or Inf", "the training that made it diverged")
    return delta


# ---------------------------------------------------------------- writing


def write(
    path: Path,
    deltas: Deltas,
    words: Words,
    families: Sequence[Family],
    carried: Mapping[str, str],
    dialect: str,
    extra: Mapping[str, str],
    dtype: str,
) -> contract.Saved:
    """Write deltas, each asked for once, as `contract.write` does."""

    def fill(draft: contract.Draft) -> None:
        for module, delta in prefetch(deltas.items()) if isinstance(deltas, OnDemand) else deltas.items():
            _add(draft, module, delta)
        for word, vectors in words.items():
            for key, value in vectors.items():
                add_tensor(draft.writer, key_inside(word, key), value)

    with one_thread():
        return contract.write(path, shapes_of(deltas), words, families, carried, dialect, extra, dtype, fill)


def _add(draft: contract.Draft, path: str, delta: Delta) -> None:
    """Write one update. Raises AdapterError for what the dialect cannot carry."""
    _check(draft, path, delta)
    portable = delta
    if isinstance(delta, LowRank):
        portable = delta.with_alpha(draft.choose_alpha(path, delta.rank, delta.alpha))
    tensors, numbers = dict[str, Tensor](), dict[str, float]()
    for role, value in portable.stored().items():
        role = _role(draft, path, role, delta)
        if not draft.has(role):
            continue
        kept = value if role in EXACT else value.to(torch.int32 if role in kinds.INTEGERS else TORCH[draft.dtype])
        if role in kinds.NUMBERS:
            numbers[role] = float(kept)
        else:
            tensors[role] = kept
        add_tensor(draft.writer, draft.name(path, role), kept)
    _compare(draft, path, delta, tensors, numbers)


def _check(draft: contract.Draft, path: str, delta: Delta) -> None:
    if not delta.finite():
        raise AdapterError(f"{draft.path} not written: {path} holds NaN or Inf", "train with a lower learning rate")
    if draft.dialect != "kohya" and not isinstance(delta, LowRank):
        what = f"{draft.path} not written: {draft.dialect} files hold LoRA only, and {path} is {kind_name(delta)}"
        hint = f"leave it out: FILE:{path}=0" if len(delta.shape) == 1 else "convert it to LoRA first (--to lora)"
        raise AdapterError(what, f"save it in the kohya dialect, or {hint}")
    if isinstance(delta, Decomposed) and len(delta.magnitude) > 1:
        what = f"{draft.path} not written: {path} is a DoRA with norms of rows, which UIs take for norms of columns"
        raise AdapterError(what, "name the --base, and it is written as a full update")


def _role(draft: contract.Draft, path: str, role: str, delta: Delta) -> str:
    """`diff` of a vector has a name of its own: of a norm's weight, a norm's bias, or another layer's bias."""
    if role != "diff" or len(delta.shape) > 1:
        return role
    module = path.removesuffix(contract.BIAS)
    norm = len(draft.shapes.get(module, (0, 0))) == 1
    return "w_norm" if path == module else "b_norm" if norm else "diff_b"


def _compare(
    draft: contract.Draft, path: str, wanted: Delta, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
) -> None:
    bias = next((tensors[role] for role in kinds.BIASES if role in tensors), None)
    kind = kinds.kind_of({**tensors, **numbers})
    found = Dense(bias) if bias is not None else _build_delta(kind, tensors, numbers, None, wanted.shape)
    draft.norms[path] = norm = estimate_norm(wanted)
    if not found.finite():
        draft.far[path] = math.inf
    elif not is_within(found, wanted, contract.TOLERANCE[draft.dtype] * norm):
        draft.far[path] = relative_difference(found, wanted)
