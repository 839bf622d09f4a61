"""Adapter files: reading them into deltas, and writing them under the export contract.

The contract: each update is compared, as dW, with what its rounded tensors make when they are read; then the file's bytes, keys
and shapes are read back through the dialect's own key rules, and the hosts that should read it (hosts.py) are asked where they
find each layer and how strong they make it, before the file takes its name. So an existing file is replaced by a whole and right
one or not at all. One layer at a time is in memory, if the updates come on demand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterError, HostileFileError, nearest
from ..families.family import Family, Shape, weights
from ..families.names import FAMILIES, SPELLED, candidates, canonical, claims, kohya_names, part_of, resolve_shape, says
from ..formats.header import Entry, Header, open_file, read_header, read_scalar, short
from ..formats.tensors import HASHES, TORCH, Writer, one_thread, read_tensor
from ..io import atomic, weights_hash, write_text
from . import dialects, hosts, kinds
from .build import build
from .delta import Decomposed, Delta, Dense, LowRank, kind_name
from .describe import precisions, weights_in
from .distance import estimate_norm, is_within, relative_difference
from .kinds.kind import shapes_of as shapes_of_tensors
from .lazy import OnDemand, prefetch, shapes_of
from .words import key_inside

# Relative error of dW that a storage dtype may cause: a few of its rounding steps; more means it cannot hold the weights.
_TOLERANCE = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2}
BIAS = ".bias"  # behind a module's path: the update of its bias


class PrecisionError(AdapterError):
    """A storage dtype rounds more of an update off than it may."""


class Saved(NamedTuple):
    """A file that was written: where, what its layers hold ("LoRA", "LoHa + full", ...), and its bytes."""

    path: Path
    kind: str
    size: int


Deltas = Mapping[str, Delta]
Words = Mapping[str, Mapping[str, Tensor]]  # word => key as in words.py => vectors


# ---------------------------------------------------------------- reading


def read(path: Path, allow_unmatched: bool) -> tuple[dict[str, Delta], Mapping[str, str], Words]:
    """The deltas, metadata and words of a file in any dialect. Raises as `Adapter.load` does."""
    deltas, metadata, words = on_demand(path, allow_unmatched)
    return dict(deltas), metadata, words


def on_demand(path: Path, allow_unmatched: bool) -> tuple[OnDemand, Mapping[str, str], Words]:
    """As `read`, but each delta is read whenever it is asked for."""
    header = read_header(dialects.file_of(path))
    reading = _read_keys(header, allow_unmatched)
    shapes, scales, stamp = _shapes(header, reading), dialects.configured_scales(header, reading), _stamp(os.stat(header.path))

    def make(path: str) -> Delta:
        with open_file(header.path) as file:
            if _stamp(os.fstat(file.fileno())) != stamp:
                raise AdapterError(f"{header.path} has changed since it was opened", "try again")
            if path in reading.shapes:
                return read_delta(file, header, reading.slots[path], scales.get(path), shapes[path])
            module = path.removesuffix(BIAS)
            slot = reading.slots[module]
            bias = read_bias(file, header, slot, scales.get(module))
            return _check_finite(file, {slot.keys[_bias_role(slot)]: bias.stored()["diff"]}, bias)

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


def _read_keys(header: Header, allow_unmatched: bool) -> dialects.Reading:
    reading = dialects.read_keys(header)
    if not reading.slots or (reading.unmatched and not allow_unmatched):
        raise dialects.unmatched_error(header, reading)
    return reading


def _shapes(header: Header, reading: dialects.Reading) -> dict[str, Shape]:
    """Path => the true shape of dW, as far as all families agree that it can be of, and those of biases."""
    families = candidates(reading.shapes, reading.metadata)
    biases = [path + BIAS for path, slot in reading.slots.items() if slot.keys.keys() & set(kinds.BIASES)]
    told = {path: {resolve_shape(path, shape, one) for one in families} for path, shape in reading.shapes.items()}
    known = {path: next(iter(told[path])) if len(told[path]) == 1 else shape for path, shape in reading.shapes.items()}
    slots = {path: reading.slots[path.removesuffix(BIAS)] for path in biases}
    return known | {path: dialects.shapes(header, slot)[_bias_role(slot)] for path, slot in slots.items()}


def _bias_role(slot: dialects.Slot) -> str:
    return next(role for role in slot.keys if role in kinds.BIASES)


def read_bias(file: BinaryIO, header: Header, slot: dialects.Slot, scale: float | None) -> Dense:
    """The update of a layer's bias; `scale` is what a config says of the layer's, which peft's goes by."""
    role = _bias_role(slot)
    value = dialects.own_rows(slot, role, read_tensor(file, slot.keys[role], header.tensors[slot.keys[role]])).float()
    if role != kinds.UP_BIAS or not slot.kind:
        return Dense(value)
    if scale is None and kinds.ALPHA in slot.keys:
        key = slot.keys[kinds.ALPHA]
        scale = kinds.row(slot.kind).scale(dialects.shapes(header, slot), read_scalar(file, key, header.tensors[key]))
    return Dense(value * (1.0 if scale is None else scale))


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


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
) -> Saved:
    """Write deltas, each asked for once; raises and describes as `Adapter.save` does. `families` are all that they can be of,
    `carried` is metadata of old, `extra` what to say above all."""
    closest = families[0] if families else _closest_family(deltas)
    stems = _stems(path, deltas, dialects.check_dialect(dialect), families or (closest,), dtype)
    _check_words(path, words, dialect)
    carried = {key: value for key, value in carried.items() if key not in (dialects.ADAPTER_METADATA, *HASHES)}
    with one_thread(), atomic(path) as temporary, temporary.open("w+b") as file:
        draft = _Draft(path, dialect, dtype, stems, shapes_of(deltas))
        draft.writer = Writer(file, _room(draft, _metadata(draft, families, carried) | dict(extra)))
        for module, delta in prefetch(deltas.items()) if isinstance(deltas, OnDemand) else deltas.items():
            draft.add(module, delta)
        draft.judge()
        for word, vectors in words.items():
            for key, value in vectors.items():
                draft.writer.add(key_inside(word, key), value)
        draft.writer.finish(_metadata(draft, families, carried) | dict(extra))
        file.flush()
        kind, size = _check_same(temporary, draft, closest, words), file.seek(0, os.SEEK_END)
    if dialect == "peft" and path.name == dialects.PEFT_FILE and len(parts := {part_of(module) for module in stems}) == 1:
        config = dialects.lora_configs(draft.ranks)[parts.pop()]
        write_text(path.with_name(dialects.PEFT_CONFIG), json.dumps(config, indent=2) + "\n")
    return Saved(path, kind, size)


def _closest_family(deltas: Deltas) -> Family:
    """The family that has most of the paths, when the widths are strange: whose names kohya's files use."""
    return max(FAMILIES, key=lambda one: len(deltas.keys() & weights(one).keys()))


def _stems(path: Path, deltas: Deltas, dialect: str, families: Sequence[Family], dtype: str) -> Mapping[str, str]:
    """Module path => what its keys begin with. Raises AdapterError for what can be refused by names alone."""
    if dtype not in TORCH:
        raise AdapterError(f"no storage dtype is called {dtype!r}", nearest(dtype, TORCH))
    modules = {module.removesuffix(BIAS) for module in deltas}
    if not modules:
        raise AdapterError(f"{path} not written: the adapter changes nothing")
    names = kohya_names(families[0])
    if strange := sorted(modules - names.keys()):
        raise AdapterError(f"{path} not written: no known family has {_first_of(strange)}", "name layers as diffusers does")
    for other in families[1:] if dialect == "kohya" else ():
        if torn := sorted(module for module in modules if kohya_names(other)[module] != names[module]):
            what = f"{torn[0]} is {names[torn[0]]} in files of {families[0].name}, and {kohya_names(other)[torn[0]]} in those"
            hint = f"say it: --family {families[0].name} or --family {other.name}; in Python adapter.for_family(...)"
            raise AdapterError(f"{path} not written: {what} of {other.name}, and nothing tells which it is of", hint)
    return dialects.stems(dialect, modules, names)


def _check_words(path: Path, words: Words, dialect: str) -> None:
    if words and dialect != "kohya":
        what = f"{path} not written: {dialect} files hold LoRA only, and it brings the word {short(next(iter(words)))!r}"
        raise AdapterError(what, "take its words out into files of their own: personalize convert --words FOLDER")


def _room(draft: _Draft, metadata: Mapping[str, str]) -> int:
    """Bytes for a header of LoRA: rather a few too many; one that needs more is moved for."""
    kohya = draft.dialect == "kohya"
    tensors = sum((3 if kohya else 2) * (len(stem) + 104) for stem in draft.stems.values())
    config = 0 if kohya else sum(len(module) + 6 for module in draft.stems)
    return tensors + config + len(json.dumps(metadata)) + 320  # the hashes


class _Draft:
    """A file in the making: one update after the other is written, and held against what was meant as a reader would see it."""

    writer: Writer

    def __init__(self, path: Path, dialect: str, dtype: str, stems: Mapping[str, str], shapes: Mapping[str, Shape]) -> None:
        self.path, self.dialect, self.dtype, self.stems, self.shapes = path, dialect, dtype, stems, shapes
        self.roles: dict[str, tuple[str, str]] = {}  # key => module and role
        self.low: dict[str, tuple[int, float]] = {}  # path of a LoRA => rank and alpha
        self._alphas: dict[str, float] = {}  # part => alpha
        self._norms: dict[str, float] = {}
        self._far: dict[str, float] = {}  # updates that the dtype has moved by more than usual => how far

    @property
    def ranks(self) -> dict[str, int]:
        return {path: rank for path, (rank, _) in self.low.items()}

    def add(self, path: str, delta: Delta) -> None:
        """Write one update. Raises AdapterError for what the dialect cannot carry."""
        self._check(path, delta)
        portable = delta
        if isinstance(delta, LowRank):
            portable = delta.with_alpha(self._alpha(path, delta))
            self.low[path] = portable.rank, portable.alpha
        module, tensors, numbers = path.removesuffix(BIAS), dict[str, Tensor](), dict[str, float]()
        for role, value in portable.stored().items():
            role = self._role(path, role, delta)
            if role == kinds.ALPHA and self.dialect != "kohya":
                continue
            kept = value if role == kinds.ALPHA else value.to(torch.int32 if role in kinds.INTEGERS else TORCH[self.dtype])
            if role in kinds.NUMBERS:
                numbers[role] = float(kept)
            else:
                tensors[role] = kept
            key = f"{self.stems[module]}.{dialects.spell_role(self.dialect, role)}"
            self.roles[key] = module, role
            self.writer.add(key, kept)
        self._compare(path, delta, tensors, numbers)

    def judge(self) -> None:
        """Raise AdapterError if the dtype cannot hold what was added."""
        floor = 1e-6 * max(self._norms.values())  # what is a millionth of the rest may be rounded off
        for path, far in self._far.items():
            if not far <= _TOLERANCE[self.dtype] * max(self._norms[path], floor):
                what = f"{self.path} not written: {self.dtype} cannot hold {path} exactly enough"
                raise PrecisionError(what, "save it as fp32")

    def _check(self, path: str, delta: Delta) -> None:
        if not delta.finite():
            raise AdapterError(f"{self.path} not written: {path} holds NaN or Inf", "train with a lower learning rate")
        if self.dialect != "kohya" and not isinstance(delta, LowRank):
            what = f"{self.path} not written: {self.dialect} files hold LoRA only, and {path} is {kind_name(delta)}"
            hint = f"leave it out: FILE:{path}=0" if len(delta.shape) == 1 else "convert it to LoRA first (--to lora)"
            raise AdapterError(what, f"save it in the kohya dialect, or {hint}")
        if isinstance(delta, Decomposed) and len(delta.magnitude) > 1:
            what = f"{self.path} not written: {path} is a DoRA with norms of rows, which UIs take for norms of columns"
            raise AdapterError(what, "name the --base, and it is written as a full update")

    def _alpha(self, path: str, delta: LowRank) -> float:
        """One that a dialect's readers understand (see dialects.py).

        kohya: one positive alpha per part, that of its first layer. Tools take alpha 0 for alpha = rank, and diffusers drops
        the alphas of attention layers where they differ. Elsewhere: alpha = rank.
        """
        usual = self._alphas.setdefault(part_of(path), delta.alpha if delta.alpha > 0 else 1.0)
        return usual if self.dialect == "kohya" else delta.rank

    def _role(self, path: str, role: str, delta: Delta) -> str:
        """`diff` of a vector has a name of its own: of a norm's weight, a norm's bias, or another layer's bias."""
        if role != "diff" or len(delta.shape) > 1:
            return role
        module = path.removesuffix(BIAS)
        norm = len(self.shapes.get(module, (0, 0))) == 1
        return "w_norm" if path == module else "b_norm" if norm else "diff_b"

    def _compare(self, path: str, wanted: Delta, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        bias = next((tensors[role] for role in kinds.BIASES if role in tensors), None)
        kind = kinds.kind_of({**tensors, **numbers})
        found = Dense(bias) if bias is not None else _build_delta(kind, tensors, numbers, None, wanted.shape)
        self._norms[path] = norm = estimate_norm(wanted)
        if not found.finite():
            self._far[path] = math.inf
        elif not is_within(found, wanted, _TOLERANCE[self.dtype] * norm):
            self._far[path] = relative_difference(found, wanted)


def _metadata(draft: _Draft, families: Sequence[Family], carried: Mapping[str, str]) -> dict[str, str]:
    """The header's metadata: what was carried along, and on top facts about these tensors."""
    general = {"format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.title": draft.path.stem}
    facts = {
        "ss_output_name": draft.path.stem,
        "ss_network_module": "networks.lora" if len(draft.low) == len(draft.shapes) else "lycoris.kohya",
        "ss_network_dim": _common_value(f"{rank}" for rank, _ in draft.low.values()),
        "ss_network_alpha": _common_value(f"{alpha:g}" for _, alpha in draft.low.values()),
    }
    if len(families) == 1:  # what is not known is not said
        carried = {key: value for key, value in carried.items() if key != SPELLED}
        facts |= {} if says(carried, families[0]) else claims(families[0])
    if draft.dialect != "kohya":
        configs = dialects.lora_configs(draft.ranks)
        flat = {f"{part}.{key}": value for part, config in configs.items() for key, value in config.items()}
        facts[dialects.ADAPTER_METADATA] = json.dumps(flat, sort_keys=True)
    return general | dict(carried) | facts


def _check_same(temporary: Path, draft: _Draft, family: Family, words: Words) -> str:
    """The export contract: the file holds these bytes, and its keys, shapes and scales mean what they were written for. Returns
    what it holds, as people call it."""
    path = draft.path
    try:
        header = read_header(temporary)
        reading = _read_keys(header, allow_unmatched=False)
        scales, shapes = dialects.configured_scales(header, reading), _shapes(header, reading)
    except AdapterError as error:
        raise AdapterError(f"{path} not written: it does not read back: {error.what}") from error
    found = {key: (canonical(module), role) for module, slot in reading.slots.items() for role, key in slot.keys.items()}
    wrong = [module for _, (module, _) in found.items() ^ draft.roles.items()]
    wrong += [module for module in shapes.keys() | draft.shapes.keys() if shapes.get(module) != draft.shapes.get(module)]
    wrong += [module for module, scale in scales.items() if scale * draft.low[module][0] != draft.low[module][1]]
    wrong += [
        word for word in words.keys() | reading.words.keys() if words.get(word, {}).keys() != reading.words.get(word, {}).keys()
    ]
    if wrong:
        raise AdapterError(f"{path} not written: {_first_of(sorted(set(wrong)))} does not read back")
    if weights_hash(temporary) != draft.writer.digest:
        raise AdapterError(f"{path} not written: the disk gives back other bytes", "try another disk")
    _check_hosts(draft, reading, family)
    return reading.kind


def _check_hosts(draft: _Draft, reading: dialects.Reading, family: Family) -> None:
    """The export contract, others' side: each host that should read the file finds the same dW at the same layers."""
    hint = f"save it in the {'diffusers' if reading.dialect == 'kohya' else 'kohya'} dialect"
    for host, layer, at in hosts.misread_layers(reading.dialect, family, reading.slots):
        missed = f"would take {layer} for {at}" if at else f"would not find {layer}"
        raise AdapterError(f"{draft.path} not written: {host.name} {missed}", hint)
    for host in hosts.readers(reading.dialect, family, reading.slots):
        if off := hosts.wrong_scales(host, reading.dialect, draft.low):
            raise AdapterError(f"{draft.path} not written: {host.name} would take {off[0]} at another strength", hint)


def _common_value(values: Iterable[str]) -> str:
    """The one value that all share, or kohya's word for there being several."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
