"""Adapter files: reading them into deltas, and writing them under the export contract.

The contract: what was written is read back through the dialect's own key rules and every dW compared, and the hosts that should
read it (hosts.py) are asked where they find each layer and how strong they make it, before the file takes its name. So an
existing file is replaced by a whole and right one or not at all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import AdapterError, HostileFileError, nearest
from ..files import atomic, write_text
from . import deltas as kinds_of_delta
from . import dialects, hosts, keys, kinds
from .deltas import Decomposed, Delta, LowRank, Structured
from .headers import Header, opened, read_header, read_scalar, short
from .nearness import roughly, within
from .tensors import TORCH, one_thread, read_tensor, write_tensors

# Relative error of dW that a storage dtype may cause: a few of its rounding steps; more means it cannot hold the weights.
_TOLERANCE = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2}
BIAS = ".bias"  # behind a module's path: the update of its bias

Deltas = Mapping[str, Delta]


# ---------------------------------------------------------------- reading


def read(path: Path, allow_unmatched: bool) -> tuple[dict[str, Delta], Mapping[str, str]]:
    """The deltas and metadata of a file in any dialect. Raises as `Adapter.load` does."""
    header = read_header(dialects.file_of(path))
    return _read(header, _reading(header, allow_unmatched)), header.metadata


def _reading(header: Header, allow_unmatched: bool) -> dialects.Reading:
    reading = dialects.read(header)
    if not reading.slots or (reading.unmatched and not allow_unmatched):
        raise dialects.unmatched_error(header, reading)
    return reading


def _read(header: Header, reading: dialects.Reading) -> dict[str, Delta]:
    family = keys.family_of(reading.shapes, header.metadata)
    true = {module: keys.resolve_shape(module, shape, family) for module, shape in reading.shapes.items()}
    found: dict[str, Delta] = {}
    with opened(header.path) as file:
        scales = dialects.configured_scales(header, reading)
        for module, slot in reading.slots.items():
            if slot.kind:
                found[module] = read_delta(file, header, slot, scales.get(module), true[module])
            for role in slot.keys.keys() & set(kinds.BIASES):
                key = slot.keys[role]
                bias = read_tensor(file, key, header.tensors[key])
                found[module + BIAS] = _sound(file, {key: bias}, kinds_of_delta.Dense(bias))
    return found


def read_delta(file: BinaryIO, header: Header, slot: dialects.Slot, scale: float | None, shape: keys.Shape) -> Delta:
    """One weight's update. Its alpha is the file's own tensor, else what the config's scale says, else there is none."""
    numbers = {role: key for role, key in slot.keys.items() if role in kinds.NUMBERS}
    weights = {role: key for role, key in slot.keys.items() if role not in (*numbers, *kinds.BIASES)}
    tensors = {role: read_tensor(file, key, header.tensors[key]) for role, key in weights.items()}
    scalars = {role: read_scalar(file, key, header.tensors[key]) for role, key in numbers.items()}
    rank = dialects.rank(header, slot)
    alpha = scalars.pop(kinds.ALPHA, None if scale is None or not rank else scale * rank)
    flags = {role: torch.tensor(value) for role, value in scalars.items()}
    try:
        delta = kinds_of_delta.build(slot.kind, tensors | flags, alpha, shape)
    except AdapterError as error:
        raise HostileFileError(f"{file.name}: {short(next(iter(weights.values())))}: {error.what}") from None
    if scale is not None and not rank:  # peft scales a LoKr of two whole halves too
        delta = delta * scale
    return _sound(file, {weights[role]: value for role, value in tensors.items()}, delta)


def _sound(file: BinaryIO, tensors: Mapping[str, Tensor], delta: Delta) -> Delta:
    if not delta.finite():
        names = [key for key, value in tensors.items() if not value.float().isfinite().all()] or list(tensors)
        raise AdapterError(f"{file.name}: {' or '.join(names)[:300]} holds NaN or Inf", "the training that made it diverged")
    return delta


# ---------------------------------------------------------------- writing


def write(
    path: Path,
    deltas: Deltas,
    family: keys.Family | None,
    carried: Mapping[str, str],
    dialect: str,
    extra: Mapping[str, str],
    dtype: str,
) -> Path:
    """Write deltas; raises and describes as `Adapter.save` does. `carried` is metadata of old, `extra` what to say above all."""
    closest = family or _closest(deltas)
    names = keys.kohya_names(closest)
    _check(path, deltas, names, dialects.check(dialect), dtype)
    portable = _portable(deltas, dialect)
    described = _described(path, portable, family, dialect, carried) | dict(extra)
    with one_thread(), atomic(path) as temporary:
        write_tensors(temporary, _tensors(portable, dialect, names, TORCH[dtype]), described)
        _check_same(path, temporary, deltas, dtype, closest)
    if dialect == "peft" and path.name == dialects.PEFT_FILE and len(parts := {keys.part_of(module) for module in deltas}) == 1:
        config = _configs(portable)[parts.pop()]
        write_text(path.with_name(dialects.PEFT_CONFIG), json.dumps(config, indent=2) + "\n")
    return path


def _closest(deltas: Deltas) -> keys.Family:
    """The family that has most of the paths, when the widths are strange: whose names kohya's files use."""
    return max(keys.FAMILIES, key=lambda one: len(deltas.keys() & keys.weights(one).keys()))


def _check(path: Path, deltas: Deltas, names: Mapping[str, str], dialect: str, dtype: str) -> None:
    """Raise AdapterError for what the dialect or dtype cannot carry."""
    if dtype not in TORCH:
        raise AdapterError(f"no storage dtype is called {dtype!r}", nearest(dtype, TORCH))
    if not deltas:
        raise AdapterError(f"{path} not written: the adapter changes nothing")
    if sick := [module for module, delta in deltas.items() if not delta.finite()]:
        raise AdapterError(f"{path} not written: {_some(sick)} holds NaN or Inf", "train with a lower learning rate")
    if dialect == "kohya":
        if strange := sorted({module.removesuffix(BIAS) for module in deltas} - names.keys()):
            raise AdapterError(f"{path} not written: kohya has no name for {_some(strange)}", "save with dialect='diffusers'")
        if rows := [module for module, delta in deltas.items() if isinstance(delta, Decomposed) and len(delta.magnitude) > 1]:
            what = f"{path} not written: {_some(rows)} is a DoRA with norms of rows, which UIs take for norms of columns"
            raise AdapterError(what, "name the --base, and it is written as a full update")
    elif others := [module for module, delta in deltas.items() if not isinstance(delta, LowRank)]:
        what = f"{path} not written: {dialect} files hold LoRA only, and {_some(others)} is {_name(deltas[others[0]])}"
        raise AdapterError(what, "save with dialect='kohya', or convert to LoRA first")


def _portable(deltas: Deltas, dialect: str) -> dict[str, Delta]:
    """The same updates under the alphas that a dialect's readers understand (see dialects.py).

    kohya: one positive alpha per part. Tools take alpha 0 for alpha = rank, and diffusers drops the alphas of attention layers
    where they differ. Elsewhere: alpha = rank.
    """
    low = {path: delta for path, delta in deltas.items() if isinstance(delta, LowRank)}
    if dialect != "kohya":
        return {**deltas, **{path: delta.with_alpha(delta.rank) for path, delta in low.items()}}
    alphas = {part: Counter(delta.alpha for path, delta in low.items() if keys.part_of(path) == part) for part in keys.PARTS}
    usual = {part: next((alpha for alpha, _ in counts.most_common() if alpha > 0), 1.0) for part, counts in alphas.items()}
    return {**deltas, **{path: delta.with_alpha(usual[keys.part_of(path)]) for path, delta in low.items()}}


def _tensors(deltas: Deltas, dialect: str, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """File key => tensor, weights in the storage dtype and alphas in fp32."""
    stems = dialects.stems(dialect, {path.removesuffix(BIAS) for path in deltas}, names)
    tensors = {}
    for path, delta in deltas.items():
        module, one = path.removesuffix(BIAS), len(delta.shape) == 1
        for role, value in delta.stored().items():
            if role == "diff" and one:
                norm = path == module or (module in deltas and len(deltas[module].shape) == 1)
                role = ("b_norm" if norm else "diff_b") if path != module else "w_norm"
            if dialect == "kohya" or role != kinds.ALPHA:
                tensors[f"{stems[module]}.{dialects.spelled(dialect, role)}"] = value if role == kinds.ALPHA else value.to(dtype)
    return tensors


def _described(
    path: Path, deltas: Deltas, family: keys.Family | None, dialect: str, carried: Mapping[str, str]
) -> dict[str, str]:
    """The header's metadata: what was carried along, and on top facts about these tensors."""
    kept = {key: value for key, value in carried.items() if key != dialects.ADAPTER_METADATA}
    general = {"format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.title": path.stem}
    low = [delta for delta in deltas.values() if isinstance(delta, LowRank)]
    facts = {
        "ss_output_name": path.stem,
        "ss_network_module": "networks.lora" if len(low) == len(deltas) else "lycoris.kohya",
        "ss_network_dim": _common(f"{delta.rank}" for delta in low),
        "ss_network_alpha": _common(f"{delta.alpha:g}" for delta in low),
    }
    if family and not keys.says(kept, family):
        facts |= {"ss_base_model_version": family.base_version, "modelspec.architecture": family.architecture}
        facts["ss_v2"] = str(family.base_version.startswith("sd_v2"))  # what A1111 asks
    if dialect != "kohya":
        flat = {f"{part}.{key}": value for part, config in _configs(deltas).items() for key, value in config.items()}
        facts[dialects.ADAPTER_METADATA] = json.dumps(flat, sort_keys=True)
    return general | kept | facts


def _check_same(path: Path, temporary: Path, wanted: Deltas, dtype: str, family: keys.Family) -> None:
    """The export contract: what was written, read back, is what was meant."""
    try:
        header = read_header(temporary)
        reading = _reading(header, allow_unmatched=False)
        found = _read(header, reading)
    except AdapterError as error:
        raise AdapterError(f"{path} not written: it does not read back: {error.what}") from error
    found = {keys.canonical(module): delta for module, delta in found.items()}
    if found.keys() != wanted.keys():
        raise AdapterError(f"{path} not written: {_some(sorted(found.keys() ^ wanted.keys()))} does not read back")
    norms = {module: roughly(delta) for module, delta in wanted.items()}
    floor = 1e-6 * max(norms.values())
    for module, norm in norms.items():
        weighty = max(norm, floor)  # what is a millionth of the rest may be rounded off
        if not within(found[module], wanted[module], _TOLERANCE[dtype] * weighty):
            raise AdapterError(f"{path} not written: {dtype} cannot hold {module} exactly enough", "save with dtype='fp32'")
    _check_hosts(path, reading, found, family)


def _check_hosts(path: Path, reading: dialects.Reading, found: Deltas, family: keys.Family) -> None:
    """The export contract, others' side: each host that should read the file finds the same dW at the same layers."""
    hint = f"save with dialect={'diffusers' if reading.dialect == 'kohya' else 'kohya'!r}"
    for host, layer, at in hosts.misread(reading.dialect, family, reading.slots):
        missed = f"would take {layer} for {at}" if at else f"would not find {layer}"
        raise AdapterError(f"{path} not written: {host.name} {missed}", hint)
    low = {layer: (delta.rank, delta.alpha) for layer, delta in found.items() if isinstance(delta, LowRank)}
    for host in hosts.readers(reading.dialect, family, reading.slots):
        if off := hosts.mistaken(host, reading.dialect, low):
            raise AdapterError(f"{path} not written: {host.name} would take {off[0]} at another strength", hint)


def _configs(deltas: Deltas) -> dict[str, dict[str, Any]]:
    return dialects.lora_configs({module: delta.rank for module, delta in deltas.items() if isinstance(delta, LowRank)})


def _name(delta: Delta) -> str:
    """A delta's kind, as people call it."""
    named: tuple[tuple[type, Callable[[Any], str]], ...] = (
        (LowRank, lambda one: "LoRA"),
        (Structured, lambda one: str(one.kind)),
        (Decomposed, lambda one: "DoRA"),
    )
    return next((say(delta) for kind, say in named if isinstance(delta, kind)), "a full update")


def _common(values: Iterable[str]) -> str:
    """The one value that all share, or kohya's word for there being several."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
