"""The export contract: a file takes its name when it is known to say what it was written for, or not at all. No torch.

Each update is compared, as dW, with what its rounded tensors make when they are read (by who writes it: files.py, ops/concat.py);
then the file's bytes, keys and shapes are read back through the dialect's own key rules, and the hosts that should read it
(hosts.py) are asked where they find each layer and how strong they make it, before the file takes its name. So an existing file
is replaced by a whole and right one or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import AdapterError, nearest
from ..families.family import Family, Shape, weights
from ..families.names import FAMILIES, SPELLED, candidates, canonical, claims, kohya_names, part_of, resolve_shape, same, says
from ..formats.header import Header, read_header, short
from ..formats.writer import HASHES, Writer
from ..io import atomic, weights_hash, write_text
from . import dialects, hosts, kinds

# Relative error of dW that a storage dtype may cause: a few of its rounding steps; more means it cannot hold the weights.
TOLERANCE = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2}
BIAS = ".bias"  # behind a module's path: the update of its bias
BY_TIMESTEP = "personalize.rank_by_timestep"  # metadata: the share of a LoRA's ranks that counts at every timestep (T-LoRA)

Words = Mapping[str, Mapping[str, object]]  # word => key as in words.py => vectors


class PrecisionError(AdapterError):
    """A storage dtype rounds more of an update off than it may."""


class Saved(NamedTuple):
    """A file that was written: where, what its layers hold ("LoRA", "LoHa + full", ...), and its bytes."""

    path: Path
    kind: str
    size: int


# ---------------------------------------------------------------- reading


def read_keys(header: Header, allow_unmatched: bool) -> dialects.Reading:
    """The keys of an adapter. Raises UnmatchedKeysError for a file that is none, and unless they are to be left out for keys that
    belong to no known layer."""
    reading = dialects.read_keys(header)
    if not reading.slots or (reading.unmatched and not allow_unmatched):
        raise dialects.unmatched_error(header, reading)
    return reading


def find_shapes(header: Header, reading: dialects.Reading) -> dict[str, Shape]:
    """Path => the true shape of dW, as far as all families agree that it can be of, and those of biases."""
    families = candidates(reading.shapes, reading.metadata)
    biases = [path + BIAS for path, slot in reading.slots.items() if slot.keys.keys() & set(kinds.BIASES)]
    possible = {path: {resolve_shape(path, shape, one) for one in families} for path, shape in reading.shapes.items()}
    known = {path: next(iter(possible[path])) if len(possible[path]) == 1 else shape for path, shape in reading.shapes.items()}
    slots = {path: reading.slots[path.removesuffix(BIAS)] for path in biases}
    return known | {path: dialects.shapes(header, slot)[bias_role(slot)] for path, slot in slots.items()}


def bias_role(slot: dialects.Slot) -> str:
    """The role of the update of a layer's bias, which there must be."""
    return next(role for role in slot.keys if role in kinds.BIASES)


def identify(stat: os.stat_result) -> tuple[int, ...]:
    """What tells one state of a file from another."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def shared_metadata(each: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What all say alike, in order of the keys; nothing about ranks, which are others in a sum."""
    return without_order(dict(sorted(set.intersection(*(set(one.items()) for one in each)))))


def without_order(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file says, without what is true of its ranks in their order alone."""
    return {key: value for key, value in metadata.items() if key != BY_TIMESTEP}


# ---------------------------------------------------------------- writing


class Draft:
    """A file in the making: one update after the other is written, and held against what was meant as a reader would see it."""

    writer: Writer

    def __init__(self, path: Path, dialect: str, dtype: str, stems: Mapping[str, str], shapes: Mapping[str, Shape]) -> None:
        self.path, self.dialect, self.dtype, self.stems, self.shapes = path, dialect, dtype, stems, shapes
        self.roles: dict[str, tuple[str, str]] = {}  # key => module and role
        self.low: dict[str, tuple[int, float]] = {}  # path of a LoRA => rank and alpha
        self.norms: dict[str, float] = {}
        self.far: dict[str, float] = {}  # updates that the dtype has moved by more than usual => how far
        self._alphas: dict[str, float] = {}  # part => alpha

    @property
    def ranks(self) -> dict[str, int]:
        return {path: rank for path, (rank, _) in self.low.items()}

    def choose_alpha(self, path: str, rank: int, alpha: float) -> float:
        """One that a dialect's readers understand (see dialects.py), for a LoRA of this rank and alpha.

        kohya: one positive alpha per part, that of its first layer. Tools take alpha 0 for alpha = rank, and diffusers drops
        the alphas of attention layers where they differ. Elsewhere: alpha = rank.
        """
        usual = self._alphas.setdefault(part_of(path), alpha if alpha > 0 else 1.0)
        self.low[path] = rank, usual if self.dialect == "kohya" else float(rank)
        return self.low[path][1]

    def has(self, role: str) -> bool:
        """Whether the dialect writes this role."""
        return role != kinds.ALPHA or self.dialect == "kohya"

    def name(self, path: str, role: str) -> str:
        """The key of an update's tensor, which is now to be found there."""
        module = path.removesuffix(BIAS)
        key = f"{self.stems[module]}.{dialects.spell_role(self.dialect, role)}"
        self.roles[key] = module, role
        return key

    def judge(self) -> None:
        """Raise PrecisionError if the dtype cannot hold what was added."""
        floor = 1e-6 * max(self.norms.values())  # what is a millionth of the rest may be rounded off
        for path, far in self.far.items():
            if not far <= TOLERANCE[self.dtype] * max(self.norms[path], floor):
                what = f"{self.path} not written: {self.dtype} cannot hold {path} exactly enough"
                raise PrecisionError(what, "save it as fp32")


def write(
    path: Path,
    shapes: Mapping[str, Shape],
    words: Words,
    families: Sequence[Family],
    carried: Mapping[str, str],
    dialect: str,
    extra: Mapping[str, str],
    dtype: str,
    fill: Callable[[Draft], None],
) -> Saved:
    """Write what `fill` adds to a draft: updates of these shapes, and words. Raises and describes as `Adapter.save` does.

    `families` are all that they can be of, `carried` is metadata of old, `extra` what to say above all.
    """
    closest = families[0] if families else _closest_family(shapes)
    stems = _stems(path, shapes, dialects.check_dialect(dialect), families or (closest,), dtype)
    _check_words(path, words, dialect)
    carried = {key: value for key, value in carried.items() if key not in (dialects.ADAPTER_METADATA, *HASHES)}
    with atomic(path) as temporary, temporary.open("w+b") as file:
        draft = Draft(path, dialect, dtype, stems, shapes)
        draft.writer = Writer(file, _room(draft, _metadata(draft, families, carried) | dict(extra)))
        fill(draft)
        draft.judge()
        draft.writer.finish(_metadata(draft, families, carried) | dict(extra))
        file.flush()
        kind, size = _check_same(temporary, draft, closest, words), file.seek(0, os.SEEK_END)
    if dialect == "peft" and path.name == dialects.PEFT_FILE and len(parts := {part_of(module) for module in stems}) == 1:
        config = dialects.lora_configs(draft.ranks)[parts.pop()]
        write_text(path.with_name(dialects.PEFT_CONFIG), json.dumps(config, indent=2) + "\n")
    return Saved(path, kind, size)


def _closest_family(paths: Iterable[str]) -> Family:
    """The family that has most of the paths, when the widths are strange: whose names kohya's files use."""
    return max(FAMILIES, key=lambda one: len(set(paths) & weights(one).keys()))


def _stems(path: Path, paths: Iterable[str], dialect: str, families: Sequence[Family], dtype: str) -> Mapping[str, str]:
    """Module path => what its keys begin with. Raises AdapterError for what can be refused by names alone."""
    if dtype not in TOLERANCE:
        raise AdapterError(f"no storage dtype is called {dtype!r}", nearest(dtype, TOLERANCE))
    modules = {module.removesuffix(BIAS) for module in paths}
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


def _room(draft: Draft, metadata: Mapping[str, str]) -> int:
    """Bytes for a header of LoRA: rather a few too many; one that needs more is moved for."""
    kohya = draft.dialect == "kohya"
    tensors = sum((3 if kohya else 2) * (len(stem) + 104) for stem in draft.stems.values())
    config = 0 if kohya else sum(len(module) + 6 for module in draft.stems)
    return tensors + config + len(json.dumps(metadata)) + 320  # the hashes


def _metadata(draft: Draft, families: Sequence[Family], carried: Mapping[str, str]) -> dict[str, str]:
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


def _check_same(temporary: Path, draft: Draft, family: Family, words: Words) -> str:
    """The export contract: the file holds these bytes, and its keys, shapes and scales mean what they were written for. Returns
    what it holds, as people call it."""
    path = draft.path
    try:
        header = read_header(temporary)
        reading = read_keys(header, allow_unmatched=False)
        scales, shapes = dialects.configured_scales(header, reading), find_shapes(header, reading)
    except AdapterError as error:
        raise AdapterError(f"{path} not written: it does not read back: {error.what}") from error
    found = {key: (canonical(module), role) for module, slot in reading.slots.items() for role, key in slot.keys.items()}
    wrong = [module for _, (module, _) in found.items() ^ draft.roles.items()]
    wrong += [module for module in shapes.keys() | draft.shapes.keys() if not _is_shape(shapes, draft.shapes, module)]
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


def _is_shape(found: Mapping[str, Shape], wanted: Mapping[str, Shape], module: str) -> bool:
    """Whether a module reads back in its shape, as far as its tensors tell where no family knows it (a LoHa is flat)."""
    return module in found and module in wanted and same(found[module], wanted[module])


def _check_hosts(draft: Draft, reading: dialects.Reading, family: Family) -> None:
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
