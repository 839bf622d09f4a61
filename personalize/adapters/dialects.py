"""Dialects: how tools spell an adapter's tensors. Rows that turn a file's keys into addresses, and addresses into keys.

kohya      `lora_unet_down_blocks_0_..._to_q.lora_down.weight`, `.lora_up.weight`, `.alpha`: what UIs want, and our default.
diffusers  `unet.down_blocks.0...to_q.lora_A.weight`, `.lora_B.weight`, and a LoraConfig as JSON in the header.
peft       `base_model.model.down_blocks.0...to_q.lora_A.weight`: what PeftModel.save_pretrained writes for one module.
           An adapter of one part is written just so; one of several parts as peft names a module that holds them:
           `base_model.model.unet...`, `base_model.model.text_encoder...`. No UI reads these files, peft and we do.
omi        `unet.input_blocks.4.1...to_q.lora_down.weight`, `clip_l.text_model...`, `diffusion_model...`: kohya's roles behind
           paths with dots, as OneTrainer and ComfyUI write them. Read only.

Which layer a name means is told by families/spelling.py, for all dialects alike: a layer that no family has is unmatched.

Text encoders say `text_model` whatever transformers calls its modules, since UIs know nothing else; only peft's files use the
names of transformers >= 5.6, or peft would load nothing.

diffusers refuses a file with a key that lacks the word "lora", such as `.alpha`, and peft never looks for one. In these two
dialects the scale is therefore folded into `lora_B` and alpha = rank, which every reader assumes; kohya files keep alpha.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import AdapterError, HostileFileError, UnmatchedKeysError, nearest
from ..families.family import Shape, weights
from ..families.names import DENOISERS, FAMILIES, KOHYA_PREFIXES, PARTS, SPELLED, part_of
from ..families.spelling import CALLED, find_paths, fused_names, tell_apart
from ..formats.header import Header, short
from . import kinds
from .words import vectors_in, words_in

if TYPE_CHECKING:
    from torch import Tensor

DialectName = Literal["kohya", "diffusers", "peft"]
DIALECTS: tuple[str, ...] = get_args(DialectName)  # that are written
DOTTED = ("diffusers", "peft", "omi")  # whose names have dots; `omi` is read only

ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' header key for the LoraConfigs, each key behind its part's name
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # the pair of names that peft looks for

TEXTUAL_INVERSION = "textual inversion"  # the kind of files that are vectors of a word, and no adapter
_ROLES = {"A": kinds.DOWN, "B": kinds.UP, "down": kinds.DOWN, "up": kinds.UP, "alpha": kinds.ALPHA, "bias": kinds.UP_BIAS}
_LEAVES = (  # of dialects that spell module paths with dots; peft puts its adapter's name behind a role
    re.compile(r"(?P<path>[\w.]+)\.lora_(?P<role>[AB])(\.(?!weight|bias)\w+)?(\.weight)?"),
    re.compile(r"(?P<path>[\w.]+)\.lora_B(\.(?!weight|bias)\w+)?\.(?P<role>bias)"),
    re.compile(r"(?P<path>[\w.]+)\.(lora|lora_linear_layer)\.(?P<role>down|up)\.weight"),
    re.compile(r"(?P<path>[\w.]+_lora)\.(?P<role>down|up)\.weight"),
    re.compile(r"(?P<path>[\w.]+)\.(?P<role>lora_magnitude_vector)(\.\w+)?(\.weight)?"),
    re.compile(r"(?P<path>[\w.]+)\.(lora|lora_linear_layer)\.(?P<role>alpha)"),
)
_ADVICE = {  # what an unmatched key is like => what to do
    r"\.lora_B(\.\w+)?\.bias": "peft's lora_bias gives layers a bias that the base has not: train without it",
    r"attn[._]in_proj(_weight)?\.": (
        "q, k and v in one are read where they can be told apart, as in LoRA: bake this one, and extract that"
    ),
}
_MOVED = ("pissa", "olora", "corda", "loftq", "lora")  # peft's starts (lora_ga) that change the base; what is kept is no dW


@dataclass(frozen=True)
class Slot:
    """Where a file keeps the tensors of one module: their keys, by role."""

    kind: str  # a row of kinds, such as "loha"; "" if only the bias is changed
    keys: Mapping[str, str]
    share: tuple[int, int] = (0, 1)  # which of how many equal parts of their rows are the module's, in a layer of several

    @property
    def name(self) -> str:
        """The kind as people call it."""
        return kinds.name_of(self.kind, self.keys)


@dataclass(frozen=True)
class Reading:
    """A file's keys, understood: canonical module path => slot."""

    dialect: str
    kind: str
    slots: Mapping[str, Slot]
    shapes: Mapping[str, Shape]  # of the dW that slots hold, as far as they tell; none of those that change a bias only
    unmatched: tuple[str, ...]
    strangers: tuple[str, ...]  # names of whole updates of layers that no family has
    words: Mapping[str, Mapping[str, str]]  # word => key of its vectors => key in the file
    metadata: Mapping[str, str]  # the file's, and what its spelling tells of its family


def file_of(path: Path) -> Path:
    """The adapter's file: `path`, or the one inside it, if it is a folder as peft or diffusers leave it."""
    inside = [path / name for name in (PEFT_FILE, "pytorch_lora_weights.safetensors")] if os.path.isdir(path) else []
    return next((file for file in inside if file.is_file()), path)


def read_keys(header: Header) -> Reading:
    """Understand all keys of a file. Those that belong to another dialect than most, or to no layer of any known family, are
    unmatched."""
    known = kinds.roles()
    parsed = {key: address for key in header.tensors if (address := _parse(key, known))}
    votes = Counter(dialect for dialect, _, _ in parsed.values())
    kohya = votes["kohya"] >= sum(votes.values()) - votes["kohya"]
    dialect = ("kohya" if kohya else max(DOTTED, key=lambda name: votes[name])) if votes else ""
    found: dict[str, dict[str, str]] = {}
    for key, (spoken, name, role) in parsed.items():
        if (spoken == "kohya") == kohya:
            found.setdefault(name, {}).setdefault(role, key)
    held = {tuple(roles): roles for roles in found.values()}  # few sets of roles, of many layers
    kind = {roles: kinds.kind_of(keys) for roles, keys in held.items()}
    slots = {name: Slot(kind[tuple(roles)], roles) for name, roles in found.items()}
    slots = dict(own for name, slot in slots.items() for own in _cut(header, name, slot))
    slots = {name: slot for name, slot in slots.items() if slot.kind or slot.keys.keys() & set(kinds.BIASES)}
    shapes = {name: shape(header, slot) for name, slot in slots.items()}
    names = find_paths(shapes, header.metadata)
    strangers = tuple(name for name, slot in slots.items() if slot.kind and name not in names)
    slots = {names[name]: _with_own_bias(names[name], slot) for name, slot in slots.items() if name in names}
    slots = {path: slot for path, slot in slots.items() if slot.keys}
    shapes = {names[name]: shape for name, shape in shapes.items() if names.get(name) in slots and slots[names[name]].kind}
    words = words_in(header.tensors)
    read = {slot.kind: _roles_read(slot.kind) for slot in slots.values()}
    matched = {key for slot in slots.values() for role, key in slot.keys.items() if role in read[slot.kind]}
    matched |= {key for keys in words.values() for key in keys.values()}
    unmatched = tuple(key for key in header.tensors if key not in matched)
    spelled = tell_apart(names, shapes, header.metadata)
    metadata = ({SPELLED: spelled} if spelled else {}) | dict(header.metadata)
    return Reading(dialect, _kind(header, slots, unmatched, words), slots, shapes, unmatched, strangers, words, metadata)


def _cut(header: Header, name: str, slot: Slot) -> Iterator[tuple[str, Slot]]:
    """A slot under its name; of q, k and v in one tensor (OpenCLIP), that of each, where it is exactly three of its kind."""
    modules = fused_names(name)
    sizes = {role: header.tensors[key].shape for role, key in slot.keys.items()}
    biases = [size for role, size in sizes.items() if role in kinds.BIASES]
    weights = {role: size for role, size in sizes.items() if role not in kinds.BIASES}
    if not modules:
        yield name, slot
    elif (not slot.kind or kinds.row(slot.kind).can_be_cut(weights, len(modules))) and all(
        size[0] % len(modules) == 0 for size in biases if size
    ):
        yield from ((one, replace(slot, share=(i, len(modules)))) for i, one in enumerate(modules))


def _with_own_bias(path: str, slot: Slot) -> Slot:
    """A slot without the bias of peft's `lora_bias` where the base's layer has none: no file can give it one."""
    if kinds.UP_BIAS not in slot.keys or any(f"{path}.bias" in weights(family) for family in FAMILIES):
        return slot
    return replace(slot, keys={role: key for role, key in slot.keys.items() if role != kinds.UP_BIAS})


def _roles_read(kind: str) -> frozenset[str]:
    """The roles of a slot's tensors that are read."""
    return frozenset(kinds.BIASES) | (kinds.row(kind).roles if kind else frozenset())


def shapes(header: Header, slot: Slot) -> dict[str, Shape]:
    """The shapes of a slot's tensors, by role."""
    return {role: _own_shape(slot, role, header.tensors[key].shape) for role, key in slot.keys.items()}


def _own_shape(slot: Slot, role: str, shape: Shape) -> Shape:
    return (shape[0] // slot.share[1], *shape[1:]) if slot.share[1] > 1 and _has_rows(slot, role) and shape else shape


def _has_rows(slot: Slot, role: str) -> bool:
    """Whether the rows of a tensor are those of the layer, or of parts of it."""
    return role in kinds.BIASES or (slot.kind != "" and role in kinds.row(slot.kind).rows)


def own_rows(slot: Slot, role: str, value: Tensor) -> Tensor:
    """What of a tensor in the file is the slot's."""
    number, count = slot.share
    return value.chunk(count)[number] if count > 1 and _has_rows(slot, role) else value


def rank(header: Header, slot: Slot) -> int:
    """The rank of the update that a slot holds; 0 for a full one."""
    return kinds.row(slot.kind).rank(shapes(header, slot)) if slot.kind else 0


def shape(header: Header, slot: Slot) -> tuple[int, ...]:
    """The shape of the dW that a slot holds, as far as it tells. HostileFileError if its tensors do not fit."""
    try:
        return kinds.shape_of(slot.kind, shapes(header, slot))
    except kinds.MisfitError as error:
        raise HostileFileError(f"{header.path}: {short(next(iter(slot.keys.values())))}: {error}") from None


def unmatched_error(header: Header, reading: Reading) -> UnmatchedKeysError:
    """The error that lists a file's unmatched keys."""
    listed = ", ".join(short(key) for key in reading.unmatched[:3]) + (", …" if len(reading.unmatched) > 3 else "")
    count = f"{len(reading.unmatched)} of {len(header.tensors)}"
    what = f"{header.path}: {count} tensors belong to no known module or lack their other half: {listed}"
    if reading.kind == TEXTUAL_INVERSION:
        return UnmatchedKeysError(f"{header.path} is a textual inversion, not an adapter", "Embedding.load reads it")
    for part, hint in _ADVICE.items():
        if any(re.search(part, key) for key in reading.unmatched):
            return UnmatchedKeysError(what, hint + ", or --allow-unmatched reads the rest" * bool(reading.slots))
    families = ", ".join(family.name for family in FAMILIES)
    if reading.strangers and not reading.slots:
        return UnmatchedKeysError(what, f"no known family has a layer {short(reading.strangers[0])} (known: {families})")
    if not reading.slots:
        holds = "no adapter: name another file" if reading.kind == "unknown" else f"parts of {reading.kind} updates, none whole"
        return UnmatchedKeysError(what, f"it holds {holds}")
    return UnmatchedKeysError(what, f"known families: {families}; --allow-unmatched reads the rest")


def configured_scales(header: Header, reading: Reading) -> dict[str, float]:
    """Module path => alpha / rank, as a LoraConfig in the header, or peft's beside the file, says; empty without one.

    Raises AdapterError if the config cannot be honoured exactly.
    """
    config = {} if reading.dialect == "kohya" else _lora_config(header)
    owns = {part: _own_config(header, config, part) for part in set(map(part_of, reading.slots))}
    scales = {}
    for module, slot in reading.slots.items():
        part, _, inside = module.partition(".")
        own = owns[part]
        if str(own.get("init_lora_weights")).split("_")[0] in _MOVED:
            what = f"{header.path}: {short(own['init_lora_weights'])} has moved the base's weights, so the file does not tell dW"
            raise AdapterError(what, "convert it to plain LoRA with peft (path_initial_model_for_weight_conversion)")
        if named := [own[name] for name in ("lora_alpha", "alpha") if name in own]:  # peft's LoHa and LoKr say alpha
            alpha = _pattern_value(header, own, "alpha_pattern", inside, named[0])
            r = _pattern_value(header, own, "rank_pattern", inside, rank(header, slot) or own.get("r", 1))
            scales[module] = alpha / (r**0.5 if own.get("use_rslora") else r)
    return scales


def stems(dialect: str, paths: Collection[str], names: Mapping[str, str]) -> dict[str, str]:
    """Module path => what stands before the dot of its tensors' keys in a dialect; `names` are kohya's names of the modules."""
    if dialect == "kohya":
        return {path: names[path] for path in paths}
    if dialect == "diffusers":
        return {path: path for path in paths}
    parts = set(map(part_of, paths))
    alone = len(parts) == 1 and parts <= {*DENOISERS, "text_encoder"}  # the part can be told from the path behind it
    native = {path: path.replace("text_encoder.text_model.", "text_encoder.") for path in paths}
    return {path: f"base_model.model.{name.partition('.')[2] if alone else name}" for path, name in native.items()}


def spell_role(dialect: str, role: str) -> str:
    """A role behind a stem, in a dialect."""
    return role if dialect == "kohya" else {kinds.UP: "lora_B.weight", kinds.DOWN: "lora_A.weight"}[role]


def check_dialect(dialect: str) -> str:
    """The dialect's name, or an error with the nearest valid one."""
    if dialect not in DIALECTS:
        raise AdapterError(f"no dialect is called {dialect!r}", nearest(dialect, DIALECTS))
    return dialect


def lora_configs(ranks: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Part => the LoraConfig fields that peft needs to rebuild these modules (path => rank), with alpha = rank.

    Text encoders are named without `text_model`, as a suffix that fits transformers before and after 5.6.
    """
    configs = {}
    for part in dict.fromkeys(map(part_of, ranks)):
        own = {path: rank for path, rank in ranks.items() if part_of(path) == part}
        inside = {path.partition(".")[2].removeprefix("text_model."): rank for path, rank in own.items()}
        usual = Counter(inside.values()).most_common(1)[0][0]
        unusual = {path: rank for path, rank in inside.items() if rank != usual}
        shared = {"r": usual, "lora_alpha": usual, "rank_pattern": unusual, "alpha_pattern": unusual}
        configs[part] = {"peft_type": "LORA", "target_modules": sorted(inside), **shared}
    return configs


def _parse(key: str, roles: frozenset[str]) -> tuple[str, str, str] | None:
    """A file key => (dialect, name of the layer in the file, role); None if no dialect has it. `roles`: those of the kinds."""
    if key.startswith(KOHYA_PREFIXES):
        name, _, role = key.partition(".")
        return ("kohya", name, role) if role in roles else None
    for pattern in (*_LEAVES, _any_role(roles)):
        if found := pattern.fullmatch(key):
            role = _ROLES.get(found["role"], found["role"])
            return _dotted_dialect(found["path"], found["role"]), found["path"], role
    return None


@cache
def _any_role(roles: frozenset[str]) -> re.Pattern[str]:
    """A role as LyCORIS and ComfyUI spell it, behind a path with dots. IA3's `weight` is every checkpoint's."""
    words = "|".join(sorted(map(re.escape, roles - {"weight", "on_input"}), key=len, reverse=True))
    return re.compile(rf"(?P<path>[\w.]+?)\.(?P<role>{words})(\.(?!weight)\w+)?")


def _dotted_dialect(path: str, role: str) -> str:
    """What a path with dots is in: a part in front is diffusers', unless kohya's roles are behind it (OneTrainer, ComfyUI)."""
    lead = part_of(path)
    if role in kinds.KOHYA_ONLY or (lead in CALLED and lead not in PARTS):
        return "omi"
    return "diffusers" if lead in PARTS else "peft"


def _kind(header: Header, slots: Mapping[str, Slot], unmatched: Iterable[str], words: Mapping[str, object]) -> str:
    """What most modules hold, the rest behind a plus sign."""
    counts = Counter(slot.name or "bias" for slot in slots.values())
    if counts:
        return " + ".join(name for name, _ in counts.most_common())
    known = kinds.roles()
    lone = [hint for key in unmatched if (address := _parse(key, known)) and (hint := kinds.hint_of(address[2]))]
    alone = words or (not lone and vectors_in(header.tensors))
    return TEXTUAL_INVERSION if alone else (*lone, "unknown")[0]


def _lora_config(header: Header) -> dict[str, Any]:
    """The LoraConfig table of a file, from its header or from peft's file beside it; empty without one."""
    beside = header.path.with_name(PEFT_CONFIG)
    text = header.metadata.get(ADAPTER_METADATA, "")
    if not text and header.path.name == PEFT_FILE and beside.is_file() and beside.stat().st_size < 1 << 20:
        text = beside.read_text(encoding="utf-8", errors="replace")
    try:
        config = json.loads(text or "{}")
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise HostileFileError(f"{header.path}: its LoraConfig is not sound JSON", "save it again with the tool that made it")
    return config


def _own_config(header: Header, config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """One part's fields; its patterns as `.end of a path` or `^whole path` => their place, and what they say."""
    own = {key.removeprefix(f"{part}."): value for key, value in config.items()}  # peft's have no part in front
    return own | {table: _plain_names(header, table, own.get(table)) for table in ("alpha_pattern", "rank_pattern")}


def _plain_names(header: Header, table: str, patterns: Any) -> tuple[dict[str, tuple[int, Any]], set[int]]:
    """And their lengths. peft takes them for regular expressions; only plain names are honoured: others may never end."""
    found: dict[str, tuple[int, Any]] = {}
    for place, (pattern, told) in enumerate(patterns.items() if isinstance(patterns, dict) else ()):
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise AdapterError(f"{header.path}: its {table} {short(pattern)} is no plain name", "save it with plain names")
        found.setdefault(f"{'^' if pattern.startswith('^') else '.'}{name}", (place, told))
    return found, set(map(len, found))


def _pattern_value(header: Header, config: Mapping[str, Any], table: str, module: str, usual: Any) -> float:
    """The number that a LoraConfig gives a module: that of the first pattern that names the end of its path, or the usual."""
    patterns, lengths = config[table]
    ends = {f".{module}"[-length:] for length in lengths}  # looked up: there may be many of both
    found = [patterns[end] for end in (*ends, f"^{module}") if end in patterns]
    value = min(found, key=lambda one: one[0])[1] if found else usual
    least = 0 if table == "rank_pattern" else -1e30
    if type(value) not in (int, float) or not least < value < 1e30:
        raise HostileFileError(f"{header.path}: its LoraConfig gives the {table.removesuffix('_pattern')} {short(value)}")
    return float(value)
