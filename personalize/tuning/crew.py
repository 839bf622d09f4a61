"""Many adapters of one shape on one frozen base: their rows go through it side by side, and each meets its own factors.

A layer's rows are its members' in order and in equal shares, so the base computes one large batch, and two batched products add
every member's update to its own rows. Vectorizing a whole step over stacked parameters (torch.func.vmap) gives the same numbers,
but takes attention apart on devices whose kernel has no batching rule, and knows neither checkpointing nor quantized layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.adapter import Adapter
from ..adapters.delta import LowRank, as_low_rank
from ..families.names import native
from ..models.model import Base
from .attach import Attached
from .layers import Following, lowered


class Rows:
    """Whose rows go through the base: some members, each with as many as the others; nobody: the base is alone."""

    def __init__(self) -> None:
        self.who: tuple[int, ...] = ()

    @contextlib.contextmanager
    def of(self, *who: int) -> Iterator[None]:
        """Inside, rows are theirs."""
        before, self.who = self.who, who
        try:
            yield
        finally:
            self.who = before


class Stack(Following, nn.Module):
    """The same factor of every member: [m, ...]."""

    def __init__(self, factors: Sequence[Tensor], device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack(list(factors)).to(device))

    def of(self, who: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Those of some members, in a dtype; a view where they stand together."""
        whole, first = self.factor(dtype), who[0]
        return whole[first : first + len(who)] if who == tuple(range(first, first + len(who))) else whole[list(who)]


class Shared(nn.Module):
    """A frozen layer with one low-rank update per member: W x + scale_m up_m down_m x on the rows of member m."""

    def __init__(self, layer: nn.Module, rows: Rows, deltas: Sequence[LowRank], device: torch.device) -> None:
        super().__init__()
        self.base_layer, self.rows = layer, rows
        self.down = Stack([delta.down for delta in deltas], device)  # [m, r, in(, kh, kw)]
        self.up = Stack([delta.up for delta in deltas], device)  # [m, out, r(, 1, 1)]
        self.scales = [delta.scale for delta in deltas]
        self.strengths = [1.0] * len(deltas)

    def forward(self, x: Tensor) -> Tensor:
        """[n, ..., in] or [n, in, h, w] => the same rows of the layer's outputs."""
        y: Tensor = self.base_layer(x)
        who = self.rows.who
        if not who:
            return y
        update = self._convolved if isinstance(self.base_layer, nn.Conv2d) else self._projected
        return y + update(x, self.down.of(who, x.dtype), self.up.of(who, x.dtype), self._scale(who, x)).reshape(y.shape)

    def _scale(self, who: tuple[int, ...], x: Tensor) -> Tensor | float:
        """One for all, or [m, 1, 1]."""
        scales = [self.scales[m] * self.strengths[m] for m in who]
        return scales[0] if len(set(scales)) == 1 else x.new_tensor(scales)[:, None, None]

    @staticmethod
    def _projected(x: Tensor, down: Tensor, up: Tensor, scale: Tensor | float) -> Tensor:
        """x [m * b, ..., in], down [m, r, in], up [m, out, r] => [m, rows, out]."""
        return times(x.reshape(len(down), -1, x.shape[-1]) @ down.mT, scale) @ up.mT

    def _convolved(self, x: Tensor, down: Tensor, up: Tensor, scale: Tensor | float) -> Tensor:
        """x [m * b, in, h, w], down [m, r, in, kh, kw], up [m, out, r, 1, 1] => [m, b, out, h', w']."""
        layer: Any = self.base_layer
        m, r = down.shape[:2]
        side_by_side = x.unflatten(0, (m, -1)).transpose(0, 1).flatten(1, 2)  # [b, m * in, h, w]
        how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        low = F.conv2d(side_by_side, down.flatten(0, 1), groups=m, **how)  # [b, m * r, h', w']
        low = low.unflatten(1, (m, r)).permute(1, 2, 0, 3, 4)  # [m, r, b, h', w']
        return (up.flatten(2) @ times(low.flatten(2), scale)).unflatten(2, low.shape[2:]).transpose(1, 2)


def times(low: Tensor, scale: Tensor | float) -> Tensor:
    """Scaled, where that changes anything."""
    return low if isinstance(scale, float) and scale == 1 else low * scale


class Crew:
    """The members of a fleet on their base, until the end of the `with` block; the base's own weights never change."""

    def __init__(self, base: Base, starts: Sequence[Mapping[str, LowRank]]) -> None:
        self.base, self.rows = base, Rows()
        self.at_once: int | None = None  # so many members go through the base together; None: all
        self.layers: dict[str, Shared] = {}
        self._homes: list[tuple[nn.Module, str]] = []
        for path in starts[0] if starts else ():
            part, own = native(path, base.parts)
            parent, _, leaf = own.rpartition(".")
            home = base.parts[part].get_submodule(parent)
            layer = Shared(home.get_submodule(leaf), self.rows, [start[path] for start in starts], base.device)
            setattr(home, leaf, layer)
            self.layers[path] = layer
            self._homes.append((home, leaf))
        self.members = [Member(self, number) for number in range(len(starts))]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for home, leaf in self._homes:
            setattr(home, leaf, home.get_submodule(leaf).base_layer)

    def lowered(self) -> contextlib.AbstractContextManager[None]:
        """As `Attached.lowered`."""
        return lowered([side for layer in self.layers.values() for side in (layer.down, layer.up)], self.base.dtype)

    def share_out(self) -> None:
        """Give every member its part of the gradients that the shared factors have got."""
        for member in self.members:
            for path, layer in self.layers.items():
                for side, whole in (("down", layer.down.weight), ("up", layer.up.weight)):
                    member.parameters[path][side].grad = None if whole.grad is None else whole.grad[member.number]

    def forget(self) -> None:
        """Drop all gradients."""
        for layer in self.layers.values():
            layer.down.weight.grad = layer.up.weight.grad = None


class Member(Attached):
    """One adapter of a crew, for whatever takes an adapter that is attached: its parameters are views of the shared ones."""

    def __init__(self, crew: Crew, number: int) -> None:
        super().__init__(crew.base)
        self.crew, self.number = crew, number
        self.parameters = {
            path: {side: nn.Parameter(getattr(layer, side).weight.data[number]) for side in ("down", "up")}
            for path, layer in crew.layers.items()
        }

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        groups: dict[str, dict[str, nn.Parameter]] = {}
        for path, sides in self.parameters.items():
            groups.setdefault(path.partition(".")[0], {}).update({f"{path}.{side}": sides[side] for side in ("down", "up")})
        return groups

    def snapshot(self, metadata: Mapping[str, str] | None = None) -> Adapter:
        deltas = {}
        for path, sides in self.parameters.items():
            rank = len(sides["down"])
            deltas[path] = LowRank(sides["up"], sides["down"], self.crew.layers[path].scales[self.number] * rank)
        return Adapter(deltas, metadata or {})

    @torch.no_grad()
    def put(self, adapter: Adapter) -> None:
        for path, sides in self.parameters.items():
            delta = as_low_rank(adapter.deltas[path])
            sides["down"].copy_(delta.down.reshape(sides["down"].shape))
            sides["up"].copy_(delta.up.reshape(sides["up"].shape))
            self.crew.layers[path].scales[self.number] = delta.scale

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        with self.crew.rows.of():
            yield

    @contextlib.contextmanager
    def at(self, strength: float) -> Iterator[None]:
        before = {path: layer.strengths[self.number] for path, layer in self.crew.layers.items()}
        for path, layer in self.crew.layers.items():
            layer.strengths[self.number] = before[path] * strength
        try:
            yield
        finally:
            for path, layer in self.crew.layers.items():
                layer.strengths[self.number] = before[path]
