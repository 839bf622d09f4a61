"""Stacks of adapters that a session has drawn with: kept ready to be put back, with W + dW of every layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.strengths.grammar import Weighting
from ..models.model import Base
from ..tuning.attach import Attached, attach
from ..tuning.layers import summable

MOST = 256 << 20  # bytes that stacks besides the one in use may take

Stack = Sequence[tuple[Adapter, Weighting]]


@dataclass
class Kept:
    """A stack's layers; the adapters that it is of, so that no others get their ids; and the sums in its layers."""

    attached: Attached
    adapters: tuple[Adapter, ...]
    sums: dict[str, dict[tuple[Any, ...], Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of its tensors; what moves from step to step is there twice."""
        factors = sum(factor.weight.nbytes for layer in self.attached.layers.values() for factor in layer.factors.values())
        moving = sum(rows.whole.nbytes for rows in self.attached.moving.rows.values())
        return factors + moving + sum(tensor.nbytes for sums in self.sums.values() for tensor in sums.values())


@dataclass
class Stacks:
    """The stacks that one base was drawn with last."""

    base: Base
    most: int = MOST
    _kept: dict[Any, Kept] = field(default_factory=dict, repr=False)  # the last one used stands last

    @contextlib.contextmanager
    def use(self, stack: Stack) -> Iterator[None]:
        """Inside, a stack is on the base, exactly as `attach` puts it there. Raises what `attach` raises."""
        key = (self.base.device, self.base.dtype, *((id(adapter), str(weighting)) for adapter, weighting in stack))
        kept = self._kept.pop(key, None)
        if kept is None or not kept.attached.put_back():
            kept = Kept(attach(self.base, stack), tuple(adapter for adapter, _ in stack))
        summed = set(map(id, summable(list(kept.attached.layers.values()))))
        own = {path: layer for path, layer in kept.attached.layers.items() if id(layer) in summed}
        for path, layer in own.items():
            layer.sums = kept.sums.get(path, {})
        try:
            yield
        finally:
            kept.sums = {path: layer.sums or {} for path, layer in own.items()}
            for layer in own.values():
                layer.sums = None
            kept.attached.take_off()
            self._kept[key] = kept
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Let go of the stacks that were used longest ago, where all together take too much."""
        room = self.most - sum(kept.nbytes for kept in self._kept.values())
        for key in list(self._kept):
            if room >= 0:
                return
            room += self._kept.pop(key).nbytes
