"""The Adapter: an immutable value. What is added to which module, and what the file says about it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from numbers import Real
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..errors import AdapterError, FamilyMismatchError, OutputError, check_type, nearest
from ..families.family import Family, Shape
from ..families.names import (
    ESSENTIAL,
    PARTS,
    ROWS,
    TEXT_PARTS,
    candidates,
    canonical,
    claims,
    kin,
    names_of,
    part_of,
)
from ..formats.header import short
from ..formats.tensors import one_thread
from ..formats.writer import with_ending
from . import files
from .contract import BY_TIMESTEP, Saved, shared_metadata, without_order
from .delta import Delta, Dense
from .distance import relative_difference
from .lazy import OnDemand, map_deltas, shapes_of
from .strengths.grammar import Weighting

SHOWN = ("modelspec.title", "modelspec.trigger_phrase", "modelspec.description", "ss_base_model_version")  # in a notebook
Words = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Module path => update, with metadata as in the file. Never changes; every operation makes a new one.

    Paths begin with the part (`unet`, `text_encoder`, `text_encoder_2`); text encoders always say `text_model`. A path names
    the module's weight; the update of its bias is an entry of its own, `<path>.bias`.
    """

    deltas: Mapping[str, Delta]
    metadata: Mapping[str, str] = field(default_factory=dict)
    words: Words = field(
        default_factory=dict
    )  # that it brings along: word => key as in words.py => vectors, as the file has them

    def __post_init__(self) -> None:
        check_type(
            self.deltas, Mapping, "an adapter's deltas", 'updates by path: p.Adapter.load("rex.safetensors")', AdapterError
        )
        object.__setattr__(self, "words", MappingProxyType(dict(self.words)))
        object.__setattr__(self, "metadata", MappingProxyType({str(key): str(value) for key, value in self.metadata.items()}))
        if isinstance(self.deltas, OnDemand):  # its paths come from an adapter or a file that was read
            return
        deltas = {canonical(path): delta for path, delta in self.deltas.items()}
        for path in deltas:
            _check_part(part_of(path))
        if len(deltas) < len(self.deltas):
            raise AdapterError("two updates of one module: text encoders are the same with and without text_model")
        object.__setattr__(self, "deltas", MappingProxyType(dict(sorted(deltas.items()))))

    def __reduce__(self) -> tuple[Any, ...]:
        return Adapter, (dict(self.deltas), dict(self.metadata), dict(self.words))  # read-only mappings cannot be pickled

    def __repr__(self) -> str:
        return f"Adapter({self.family}, {len(self.deltas)} modules of {' + '.join(self.parts) or 'nothing'})"

    @classmethod
    def load(cls, path: str | Path, *, allow_unmatched: bool = False) -> Adapter:
        """Read an adapter in any known dialect; which one is told from all keys. Weights become fp32.

        Raises HostileFileError for a file that is not what it says, UnmatchedKeysError for keys of no known module (with
        `allow_unmatched` they are left out), AdapterError for a missing file or weights that are not finite.
        """
        _check_path(path)
        with one_thread():
            return cls(*files.read(Path(path).expanduser(), allow_unmatched))

    @classmethod
    def open(cls, path: str | Path, *, allow_unmatched: bool = False) -> Adapter:
        """As `load`, but each update is read whenever it is asked for, and so is what is computed from it by `weighted`, `*`,
        `part`, `resolve` and `merging.on_demand`: `save` then holds one layer at a time.

        Raises what `load` does, for weights that are not finite only when they are read; AdapterError if the file has changed.
        """
        _check_path(path)
        return cls(*files.on_demand(Path(path).expanduser(), allow_unmatched))

    def save(
        self,
        path: str | Path,
        dialect: str = "kohya",
        metadata: Mapping[str, Any] | None = None,
        dtype: str = "fp32",
    ) -> Path:
        """Write the adapter and return its path, which always ends in .safetensors.

        The export contract: the file is read back through the dialect's own key rules and every dW compared, and A1111, ComfyUI,
        Forge and diffusers are asked what they would make of it (hosts.py), before it takes its name; so an existing file is
        replaced by a whole and right one or not at all. `metadata` goes into the header (values
        as text) over what the file says by itself. `dtype` fp32 is the default because it is exact: the file is what was
        trained; fp16 halves it at a relative error of about 3e-4, and is refused where it would be worse than 2e-3.
        In the peft dialect, a file named adapter_model.safetensors gets the adapter_config.json that peft wants beside it.

        Raises AdapterError if dialect or dtype cannot carry the adapter, OutputError if the disk refuses.
        """
        return self.save_with_report(path, dialect, metadata, dtype).path

    def save_with_report(
        self, path: str | Path, dialect: str = "kohya", metadata: Mapping[str, Any] | None = None, dtype: str = "fp32"
    ) -> Saved:
        """As `save`, with what the file was found to hold when it was read back: its path, kind and size in bytes."""
        _check_path(path)
        if os.path.isdir(path):  # which is no error for a name that is too long: the disk says so later
            raise OutputError(f"{path} is a folder", "name a file in it")
        said = {key: str(value) for key, value in (metadata or {}).items()}
        families = candidates(self.shapes, {**self.metadata, **said})
        return files.write(with_ending(path), self.deltas, self.words, families, self.metadata, dialect, said, dtype)

    def resolve(self, weights: Mapping[str, Tensor] | Callable[[str], Tensor]) -> Adapter:
        """The same update without what depends on the base: DoRA, OFT, GLoRA and IA3 become full updates of these weights.

        Raises AdapterError for a module that the base does not have.
        """
        find = weights if callable(weights) else weights.__getitem__

        def plain(path: str, delta: Delta) -> Delta:
            if not delta.needs_base:
                return delta
            try:
                return Dense(delta.delta(find(path)))
            except KeyError:
                raise AdapterError(f"the base has no {path}", "name the base that the adapter was made for") from None

        return self._of(map_deltas(self.deltas, plain))

    def with_deltas(self, deltas: Mapping[str, Delta]) -> Adapter:
        """The same adapter with other updates; what it says and the words that it brings are carried along, but for what is
        true of its ranks in their order alone."""
        return Adapter(deltas, without_order(self.metadata), self.words)

    def _of(self, deltas: Mapping[str, Delta]) -> Adapter:
        """The same adapter with updates whose ranks are its own, in their order."""
        return Adapter(deltas, self.metadata, self.words)

    def for_family(self, name: str) -> Adapter:
        """The same adapter, that says it is of this family. Raises AdapterError for one that lacks some of its layers."""
        if name not in ROWS:
            raise AdapterError(f"no model family is called {short(name)!r}", nearest(name, ROWS))
        told = {key: value for key, value in self.metadata.items() if key not in ESSENTIAL} | claims(ROWS[name])
        if ROWS[name] not in candidates(self.shapes, told):
            raise AdapterError(f"its layers are not those of {name}", f"by their shapes they are of {self.family}")
        return Adapter(self.deltas, told, self.words)

    def strip_metadata(self) -> Adapter:
        """The same adapter without what its file says, but for its family."""
        return Adapter(self.deltas, {key: self.metadata[key] for key in ESSENTIAL if key in self.metadata}, self.words)

    @property
    def least_ranks(self) -> float:
        """The share of its ranks in the denoiser that counts at every timestep, where others join as noise falls (T-LoRA); 1: all
        always count."""
        try:
            share = float(self.metadata.get(BY_TIMESTEP, 1))
        except ValueError:
            return 1.0
        return share if 0 < share < 1 else 1.0

    @property
    def family(self) -> str:
        """The model family whose modules and weight shapes these are: "pocket", "sd1", ..., "sd1 or sd2" where neither these nor
        the metadata tell, or "unknown"."""
        return names_of(self.families)

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """The rows of all families that it can be of."""
        return candidates(self.shapes, self.metadata)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that it changes, such as ("unet", "text_encoder")."""
        return tuple(part for part in PARTS if any(part_of(path) == part for path in self.deltas))

    def part(self, name: str) -> Adapter:
        """What it adds to one part of the model; empty if nothing."""
        _check_part(name)
        own = [path for path in self.deltas if part_of(path) == name]
        return Adapter(
            map_deltas(self.deltas, lambda _, delta: delta, own), self.metadata, self.words if name in TEXT_PARTS else {}
        )

    def scaled(self, weights: Mapping[str, float]) -> Adapter:
        """Each part times its own strength; parts that are not named stay as they are."""
        for name, weight in weights.items():
            _check_part(name)
            _check_weight(weight)
        return self._of(map_deltas(self.deltas, lambda path, delta: delta * weights.get(part_of(path), 1.0)))

    def weighted(self, weighting: Weighting) -> Adapter:
        """As much of it as a weighting says, by part, block and pattern; updates at 0 are left out.

        Raises AdapterError for blocks and patterns that it does not have.
        """
        kept = {path: strength for path, strength in weighting.of(self.deltas, self.model).items() if strength}
        for strength in set(kept.values()):
            _check_weight(strength)
        return self._of(map_deltas(self.deltas, lambda path, delta: _times(delta, kept[path]), kept))

    def __mul__(self, weight: float) -> Adapter:
        _check_weight(weight)
        return self._of(map_deltas(self.deltas, lambda _, delta: delta * weight))

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1.0

    def __add__(self, other: Adapter) -> Adapter:
        """The exact sum of both updates, by concatenation: ranks add up. Metadata that both agree on is kept."""
        check_type(other, Adapter, "what is added to an adapter", 'an Adapter: p.Adapter.load("ink.safetensors")', AdapterError)
        check_kin([self, other])
        deltas = dict(self.deltas)
        for path, delta in other.deltas.items():
            try:
                deltas[path] = deltas[path] + delta if path in deltas else delta
            except AdapterError as error:
                raise AdapterError(f"{path}: {error.what}", "both adapters must be made for the same base") from error
        return Adapter(deltas, shared_metadata([self.metadata, other.metadata]), all_words([self, other]))

    def __radd__(self, other: object) -> Adapter:
        """`sum` begins with 0."""
        return self if other == 0 else self + other  # type: ignore[operator]

    def __sub__(self, other: Adapter) -> Adapter:
        check_type(other, Adapter, "what is taken from an adapter", 'an Adapter: p.Adapter.load("ink.safetensors")', AdapterError)
        return self + -other

    def _repr_html_(self) -> str:
        """In a notebook: what it is, and what its file says about it."""
        says = {name.rpartition(".")[2].removeprefix("ss_"): self.metadata.get(name, "") for name in SHOWN}
        rows = {"for": self.family, "changes": f"{len(self.deltas)} modules of {' + '.join(self.parts) or 'nothing'}"} | says
        lines = (f"<tr><th>{escape(name)}</th><td>{escape(short(text))}</td></tr>" for name, text in rows.items() if text)
        thumbnail = self.metadata.get("modelspec.thumbnail", "")
        picture = f'<img src="{escape(thumbnail)}" alt="" width="128">' if thumbnail.startswith("data:image/") else ""
        return f'<div class="personalize-adapter">{picture}<table>{"".join(lines)}</table></div>'

    @property
    def model(self) -> Family | None:
        """The row of its family, the first of several that it can be of; None if it is unknown."""
        return self.families[0] if self.families else None

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Path => the shape of its dW."""
        return shapes_of(self.deltas)


def check_kin(adapters: Sequence[Adapter]) -> None:
    """Raises FamilyMismatchError, with the names of all, for adapters that no one family can have."""
    if not kin(adapter.shapes for adapter in adapters):
        names = [short(one.metadata.get("ss_output_name", f"number {i}")) for i, one in enumerate(adapters, 1)]
        told = ", ".join(f"{name} is for {one.family}" for name, one in zip(names, adapters, strict=True))
        raise FamilyMismatchError(f"adapters of different families do not go together: {told}", "leave the strangers out")


def all_words(adapters: Sequence[Adapter]) -> Words:
    """The words of all. A word that two bring with different vectors keeps both: the later one's gets a number, and is told."""
    found: dict[str, Mapping[str, Tensor]] = {}
    for word, vectors in ((word, vectors) for one in adapters for word, vectors in one.words.items()):
        names = (word, *(f"{word}-{i}" for i in range(2, len(adapters) + 2)))
        name = next(name for name in names if name not in found or _same_vectors(found[name], vectors))
        if name != word:
            warnings.warn(f"two adapters bring the word {short(word)!r}: the later one is called {short(name)!r}", stacklevel=2)
        found[name] = vectors
    return found


def _same_vectors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and a[key].equal(b[key]) for key in a)


def distance(a: Adapter, b: Adapter) -> float:
    """Relative distance of two adapters as updates: ||dW_a - dW_b|| / max(||dW_a||, ||dW_b||) over all modules together.

    Factors, alphas and dialects do not matter, only what is added to the weights. In fp64: equal ones are 1e-15 apart.
    """
    paths = a.deltas.keys() | b.deltas.keys()
    difference = math.hypot(*(relative_difference(a.deltas.get(path), b.deltas.get(path)) for path in paths))
    largest = max(math.hypot(*(delta.norm() for delta in one.deltas.values())) for one in (a, b))
    return difference / largest if largest else 0.0


def _times(delta: Delta, weight: float) -> Delta:
    return delta if weight == 1 else delta * weight


def _check_part(name: str) -> None:
    if name not in PARTS:
        raise AdapterError(f"no part of a model is called {short(name)!r}", nearest(name, PARTS))


def _check_path(path: object) -> None:
    check_type(path, (str, PathLike), "an adapter's file", 'a path: p.Adapter.load("rex.safetensors")', AdapterError)


def _check_weight(weight: float) -> None:
    check_type(weight, Real, "a strength", 'a number: p.Adapter.load("rex.safetensors") * 0.8', AdapterError)
    if not math.isfinite(weight):
        raise AdapterError(f"a strength of {weight} makes no sense", "use a finite number")
