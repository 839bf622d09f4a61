"""The Adapter: an immutable value. What is added to which module, and what the file says about it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch

from ..errors import AdapterError, FamilyMismatchError, nearest
from ..files import atomic, write_text
from . import dialects, keys
from .deltas import LowRank
from .headers import Header, opened, read_header, read_scalar, short
from .tensors import TORCH, read_tensor, write_tensors

# Relative error of dW that a storage dtype may cause: a few of its rounding steps; more means it cannot hold the weights.
_TOLERANCE = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2}


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Module path => update, with metadata as in the file. Never changes; every operation makes a new one.

    Paths begin with the part (`unet`, `text_encoder`, `text_encoder_2`); text encoders always say `text_model`.
    """

    deltas: Mapping[str, LowRank]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        deltas = {keys.canonical(path): delta for path, delta in self.deltas.items()}
        for path in deltas:
            _check_part(keys.part_of(path))
        if len(deltas) < len(self.deltas):
            raise AdapterError("two updates of one module: text encoders are the same with and without text_model")
        object.__setattr__(self, "deltas", MappingProxyType(dict(sorted(deltas.items()))))
        object.__setattr__(self, "metadata", MappingProxyType({str(key): str(value) for key, value in self.metadata.items()}))

    def __reduce__(self) -> tuple[Any, ...]:
        return Adapter, (dict(self.deltas), dict(self.metadata))  # read-only mappings cannot be pickled

    def __repr__(self) -> str:
        return f"Adapter({self.family}, {len(self.deltas)} modules of {' + '.join(self.parts) or 'nothing'})"

    @classmethod
    def load(cls, path: str | Path, *, allow_unmatched: bool = False) -> Adapter:
        """Read an adapter in any known dialect; which one is told from all keys. Weights become fp32.

        Raises HostileFileError for a file that is not what it says, UnmatchedKeysError for keys of no known module (with
        `allow_unmatched` they are left out), AdapterError for a missing file or weights that are not finite.
        """
        path = Path(path).expanduser()
        header = read_header(path)
        reading = dialects.read(header)
        if not reading.slots or (reading.unmatched and not allow_unmatched):
            raise dialects.unmatched_error(header, reading)
        return cls(_read_deltas(header, reading), header.metadata)

    def save(
        self,
        path: str | Path,
        dialect: str = "kohya",
        metadata: Mapping[str, Any] | None = None,
        dtype: str = "fp32",
    ) -> Path:
        """Write the adapter and return its path, which always ends in .safetensors.

        The export contract: the file is read back through the dialect's own key rules and every dW compared before it takes
        its name, so an existing file is replaced by a whole and right one or not at all. `metadata` goes into the header (values
        as text) over what the file says by itself. `dtype` fp32 is the default because it is exact: the file is what was
        trained; fp16 halves it at a relative error of about 3e-4, and is refused where it would be worse than 2e-3.
        In the peft dialect, a file named adapter_model.safetensors gets the adapter_config.json that peft wants beside it.

        Raises AdapterError if dialect or dtype cannot carry the adapter, OutputError if the disk refuses.
        """
        path = Path(path).expanduser()
        path = path if path.suffix == ".safetensors" else path.parent / f"{path.name}.safetensors"
        self._check_savable(path, dialects.check(dialect), dtype)
        deltas = _portable(self.deltas, dialect)
        described = self._described(path, deltas, dialect) | {key: str(value) for key, value in (metadata or {}).items()}
        with atomic(path) as temporary:
            write_tensors(temporary, self._tensors(deltas, dialect, TORCH[dtype]), described)
            _check_same(path, temporary, self, dtype)
        if dialect == "peft" and path.name == dialects.PEFT_FILE and len(self.parts) == 1:
            write_text(path.with_name(dialects.PEFT_CONFIG), json.dumps(_configs(deltas)[self.parts[0]], indent=2) + "\n")
        return path

    @property
    def family(self) -> str:
        """The model family whose modules and weight shapes these are: "pocket", "sd1", ... or "unknown"."""
        family = self._family
        return family.name if family else "unknown"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that it changes, such as ("unet", "text_encoder")."""
        return tuple(part for part in keys.PARTS if any(keys.part_of(path) == part for path in self.deltas))

    def part(self, name: str) -> Adapter:
        """What it adds to one part of the model; empty if nothing."""
        _check_part(name)
        return Adapter({path: delta for path, delta in self.deltas.items() if keys.part_of(path) == name}, self.metadata)

    def scaled(self, weights: Mapping[str, float]) -> Adapter:
        """Each part times its own strength; parts that are not named stay as they are."""
        for name, weight in weights.items():
            _check_part(name)
            _check_weight(weight)
        scaled = {path: delta * weights.get(keys.part_of(path), 1.0) for path, delta in self.deltas.items()}
        return Adapter(scaled, self.metadata)

    def __mul__(self, weight: float) -> Adapter:
        _check_weight(weight)
        return Adapter({path: delta * weight for path, delta in self.deltas.items()}, self.metadata)

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1.0

    def __add__(self, other: Adapter) -> Adapter:
        """The exact sum of both updates, by concatenation: ranks add up. Metadata that both agree on is kept."""
        mine, theirs = (set(keys.families_of(one._shapes)) for one in (self, other))
        if mine and theirs and not mine & theirs:
            raise FamilyMismatchError(f"an adapter of {self.family} cannot be added to one of {other.family}")
        deltas = dict(self.deltas)
        for path, delta in other.deltas.items():
            try:
                deltas[path] = deltas[path] + delta if path in deltas else delta
            except AdapterError as error:
                raise AdapterError(f"{path}: {error.what}", "both adapters must be made for the same base") from error
        return Adapter(deltas, dict(self.metadata.items() & other.metadata.items()))

    def __sub__(self, other: Adapter) -> Adapter:
        return self + -other

    @cached_property
    def _family(self) -> keys.Family | None:
        return keys.family_of(self._shapes, self.metadata)

    @property
    def _shapes(self) -> dict[str, keys.Shape]:
        return {path: delta.shape for path, delta in self.deltas.items()}

    def _kohya_names(self) -> Mapping[str, str]:
        """kohya's names in its family or, when the widths are strange, in the family that has most of its paths."""
        closest = max(keys.FAMILIES, key=lambda family: len(self.deltas.keys() & keys.modules(family).keys()))
        return keys.kohya_names(self._family or closest)

    def _check_savable(self, path: Path, dialect: str, dtype: str) -> None:
        if dtype not in TORCH:
            raise AdapterError(f"no storage dtype is called {dtype!r}", nearest(dtype, TORCH))
        if not self.deltas:
            raise AdapterError(f"{path} not written: the adapter changes nothing")
        if sick := [module for module, delta in self.deltas.items() if not delta.finite()]:
            raise AdapterError(f"{path} not written: {_some(sick)} holds NaN or Inf", "train with a lower learning rate")
        if dialect == "kohya" and (strange := sorted(self.deltas.keys() - self._kohya_names().keys())):
            raise AdapterError(f"{path} not written: kohya has no name for {_some(strange)}", "save with dialect='diffusers'")

    def _tensors(self, deltas: Mapping[str, LowRank], dialect: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """File key => tensor, weights in the storage dtype and alphas in fp32."""
        tensors = {}
        for module, slot in dialects.keys_of(dialect, deltas.keys(), self._kohya_names()).items():
            tensors[slot.up], tensors[slot.down] = deltas[module].up.to(dtype), deltas[module].down.to(dtype)
            if slot.alpha:
                tensors[slot.alpha] = torch.tensor(deltas[module].alpha)
        return tensors

    def _described(self, path: Path, deltas: Mapping[str, LowRank], dialect: str) -> dict[str, str]:
        """The header's metadata: what was carried along, and on top facts about these tensors."""
        carried = {key: value for key, value in self.metadata.items() if key != dialects.ADAPTER_METADATA}
        general = {"format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.title": path.stem}
        facts = {
            "ss_output_name": path.stem,
            "ss_network_module": "networks.lora",
            "ss_network_dim": _common(f"{delta.rank}" for delta in deltas.values()),
            "ss_network_alpha": _common(f"{delta.alpha:g}" for delta in deltas.values()),
        }
        if (family := self._family) and not keys.says(carried, family):
            facts |= {"ss_base_model_version": family.base_version, "modelspec.architecture": family.architecture}
            facts["ss_v2"] = str(family.base_version.startswith("sd_v2"))  # what A1111 asks
        if dialect != "kohya":
            flat = {f"{part}.{key}": value for part, config in _configs(deltas).items() for key, value in config.items()}
            facts[dialects.ADAPTER_METADATA] = json.dumps(flat, sort_keys=True)
        return general | carried | facts


def distance(a: Adapter, b: Adapter) -> float:
    """Relative distance of two adapters as updates: ||dW_a - dW_b|| / max(||dW_a||, ||dW_b||) over all modules together.

    Factors, alphas and dialects do not matter, only what is added to the weights. In fp64: equal ones are 1e-15 apart.
    """
    apart = math.hypot(*(_apart(a.deltas.get(path), b.deltas.get(path)) for path in a.deltas.keys() | b.deltas.keys()))
    largest = max(math.hypot(*(delta.norm() for delta in one.deltas.values())) for one in (a, b))
    return apart / largest if largest else 0.0


def _apart(a: LowRank | None, b: LowRank | None) -> float:
    """||dW_a - dW_b||, where a missing update is zero."""
    if a is None or b is None:
        return (a or b).norm()  # type: ignore[union-attr]
    return (a + b * -1.0).norm()


def _read_deltas(header: Header, reading: dialects.Reading) -> dict[str, LowRank]:
    with opened(header.path) as file:
        scales = dialects.configured_scales(header, reading)
        return {module: _read_delta(file, header, slot, scales.get(module, 1.0)) for module, slot in reading.slots.items()}


def _read_delta(file: BinaryIO, header: Header, slot: dialects.Slot, scale: float) -> LowRank:
    """One module's update. Its alpha is the file's own tensor, else what the config's scale says, else the rank."""
    up, down = (read_tensor(file, key, header.tensors[key]) for key in (slot.up, slot.down))
    alpha = read_scalar(file, slot.alpha, header.tensors[slot.alpha]) if slot.alpha else scale * len(down)
    delta = LowRank(up, down, alpha)
    if not delta.finite():
        raise AdapterError(f"{file.name}: {slot.down} or {slot.up} holds NaN or Inf", "the training that made it diverged")
    return delta


def _portable(deltas: Mapping[str, LowRank], dialect: str) -> dict[str, LowRank]:
    """The same updates under the alphas that a dialect's readers understand (see dialects.py).

    kohya: one positive alpha per part. Tools take alpha 0 for alpha = rank, and diffusers drops the alphas of attention layers
    where they differ. Elsewhere: alpha = rank.
    """
    if dialect != "kohya":
        return {path: delta.with_alpha(delta.rank) for path, delta in deltas.items()}
    alphas = {part: Counter(delta.alpha for path, delta in deltas.items() if keys.part_of(path) == part) for part in keys.PARTS}
    usual = {part: next((alpha for alpha, _ in counts.most_common() if alpha > 0), 1.0) for part, counts in alphas.items()}
    return {path: delta.with_alpha(usual[keys.part_of(path)]) for path, delta in deltas.items()}


def _check_same(path: Path, temporary: Path, wanted: Adapter, dtype: str) -> None:
    """The export contract: what was written, read back, is what was meant."""
    try:
        read = Adapter.load(temporary)
    except AdapterError as error:
        raise AdapterError(f"{path} not written: it does not read back: {error.what}") from error
    if read.deltas.keys() != wanted.deltas.keys():
        raise AdapterError(f"{path} not written: {_some(sorted(read.deltas.keys() ^ wanted.deltas.keys()))} does not read back")
    norms = {module: delta.norm() for module, delta in wanted.deltas.items()}
    floor = 1e-6 * max(norms.values())
    for module, norm in norms.items():
        weighty = max(norm, floor)  # what is a millionth of the rest may be rounded off
        if _apart(read.deltas[module], wanted.deltas[module]) > _TOLERANCE[dtype] * weighty:
            raise AdapterError(f"{path} not written: {dtype} cannot hold {module} exactly enough", "save with dtype='fp32'")


def _configs(deltas: Mapping[str, LowRank]) -> dict[str, dict[str, Any]]:
    return dialects.lora_configs({module: delta.rank for module, delta in deltas.items()})


def _check_part(name: str) -> None:
    if name not in keys.PARTS:
        raise AdapterError(f"no part of a model is called {short(name)!r}", nearest(name, keys.PARTS))


def _check_weight(weight: float) -> None:
    if not math.isfinite(weight):
        raise AdapterError(f"a strength of {weight} makes no sense", "use a finite number")


def _common(values: Iterable[str]) -> str:
    """The one value that all share, or kohya's word for there being several."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
