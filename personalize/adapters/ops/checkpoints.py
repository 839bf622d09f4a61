"""What extract.py and bake.py share: checkpoints to read, and the report of what became of each parameter.

Both stream: one parameter at a time is read, worked on in fp32 and written, so that memory is bounded by the largest layer.
Inputs are paths or open Weights, and are never changed. The VAE stays the base's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...errors import AdapterError, BaseModelError, FamilyMismatchError, nearest
from ...families.checkpoint import open_weights
from ...families.names import PARTS, part_of, same
from ...formats.checkpoint import Weights
from ...formats.header import short

Source = Weights | str | Path


@dataclass(frozen=True)
class Change:
    """What became of one parameter: Frobenius norms of its update and of what was lost of that, and the rank that holds it."""

    norm: float
    lost: float
    rank: int = 0


@dataclass(frozen=True)
class Report:
    """What was done, by canonical path, which changed parameters were left out => norm of their update, and what was written."""

    changes: Mapping[str, Change]
    left_out: Mapping[str, float] = field(default_factory=dict)
    path: Path | None = None
    copies: int = 0  # how many second copies of parameters were changed as well (EMA)

    def part(self, name: str) -> Report:
        """The same for one part of the model."""
        changes = {path: change for path, change in self.changes.items() if part_of(path) == name}
        return Report(changes, {path: norm for path, norm in self.left_out.items() if part_of(path) == name})

    @property
    def error(self) -> float:
        """Relative error of all updates together: by truncation, or by the rounding of the checkpoint's dtype."""
        total = math.hypot(*(change.norm for change in self.changes.values()))
        return math.hypot(*(change.lost for change in self.changes.values())) / total if total else 0.0


def open_source(source: Source) -> Weights:
    """A checkpoint that is open already, or the one at a path."""
    return source if isinstance(source, Weights) else open_weights(source)


def shared_paths(
    tuned: Weights, base: Weights, parts: Sequence[str], wanted: Callable[[str], bool] = lambda path: True
) -> list[str]:
    """The parameters of `parts`, or of all parts that both have; both must have all that are wanted."""
    if base.family != tuned.family and "unknown" not in (base.family, tuned.family):
        raise FamilyMismatchError(f"{tuned.path} is {tuned.family} and {base.path} is {base.family}: nothing can be compared")
    for part in parts:
        if part not in PARTS:
            raise AdapterError(f"no part of a model is called {short(part)!r}", nearest(part, PARTS))
        for one in (tuned, base):
            if part not in one.parts:
                raise BaseModelError(f"{one.path} has no {part}", f"it has {' and '.join(one.parts)}")
    common = parts or [part for part in base.parts if part in tuned.parts]
    if not common:
        raise BaseModelError(f"{tuned.path} and {base.path} have no part of a model in common")
    ours, theirs = ({path for path in one if part_of(path) in common} for one in (base, tuned))
    if missing := sorted(path for path in ours ^ theirs if wanted(path)):
        lacking, having = (tuned, base) if missing[0] in ours else (base, tuned)
        more = f" and {len(missing) - 1} more differ" if len(missing) > 1 else ""
        raise BaseModelError(f"{lacking.path} lacks {missing[0]}, which {having.path} has{more}", "is the download complete?")
    return [path for path in base if path in ours & theirs]


def check_same_shapes(tuned: Weights, base: Weights, paths: Iterable[str]) -> None:
    """Raises AdapterError unless both have these parameters in the same shapes."""
    if wrong := [path for path in paths if not same(tuned.shape(path), base.shape(path))]:
        path = wrong[0]
        shapes = f"{list(tuned.shape(path))} in {tuned.path} and {list(base.shape(path))} in {base.path}"
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise AdapterError(f"{path} is {shapes}{more}", "both must be of one architecture")


def in_fp32(tensor: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
