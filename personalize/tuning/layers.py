"""The layer that every adapter is: a frozen layer of the base, with the tensors of one adapter, or of several for their rows.

The adapter's tensors are fp32 parameters; the layer computes in its input's dtype. Each layer alone would cast its tensors in
every forward pass, and their gradients in every backward pass: `cast_once` casts those of all layers together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.kinds.kind import DOWN, NUMBERS, UP, Kind
from .products import products, siblings_of

Spec = tuple[Mapping[str, Tensor], float | None]  # an adapter's tensors for one layer, by role, and its alpha


class ActiveRows:
    """Whose rows go through the base: those of some adapters, in order and in equal shares; of nobody: the base is alone."""

    def __init__(self, *who: int) -> None:
        self.who = who

    @contextlib.contextmanager
    def of(self, *who: int) -> Iterator[None]:
        """Inside, rows are theirs."""
        before, self.who = self.who, who
        try:
            yield
        finally:
            self.who = before


class Factor(nn.Module):
    """A tensor of an adapter as a trainable fp32 parameter; where a layer has several adapters, that of each: [m, ...]."""

    def __init__(self, values: Sequence[Tensor], device: torch.device) -> None:
        super().__init__()
        whole = torch.stack(list(values)) if len(values) > 1 else values[0]
        self.weight = nn.Parameter(whole.to(device, torch.float32, copy=True).contiguous())
        self.low: Tensor | None = None  # the weight in the base's dtype, inside `cast_once`

    def cast(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype."""
        return (self.weight if self.low is None else self.low).to(dtype)

    def cast_of(self, who: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The weights of some of several adapters in a dtype, [len(who), ...]; a view where they are neighbours."""
        whole, first = self.cast(dtype), who[0]
        return whole[first : first + len(who)] if who == tuple(range(first, first + len(who))) else whole[list(who)]


class AdapterLayer(nn.Module):
    """W x + strength * dW x: a frozen linear or convolution layer, quantized or not, and the adapters of one kind on it.

    One adapter is added by its kind's own formula. Of several, adapter m changes the m-th share of the rows.
    A kind without a formula of its own (`Kind.forward`) computes W + dW.
    """

    def __init__(
        self,
        layer: nn.Module,
        kind: Kind,
        adapters: Sequence[Spec],
        active: ActiveRows,
        device: torch.device,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base_layer, self.kind, self.active, self.dropout = layer, kind, active, dropout
        self.dropping = False
        self.alphas = [alpha for _, alpha in adapters]
        self.strengths = [1.0] * len(adapters)
        first = adapters[0][0]
        self.fixed = {role: float(first[role]) for role in first if role in NUMBERS}  # that no training changes: all have them
        self.factors = {role: Factor([tensors[role] for tensors, _ in adapters], device) for role in first if role not in NUMBERS}
        for role, factor in self.factors.items():
            self.add_module(f"own_{role.replace('.', '_')}", factor)
        self.sums: dict[tuple[Any, ...], Tensor] | None = None  # inside `sum_once`: W + strength * dW by what it was made of
        self.train(layer.training)

    def replace(self, adapter: Spec) -> None:
        """Another adapter of the same kind and of any rank in the place of the only one, as new parameters."""
        tensors, alpha = adapter
        for role, factor in self.factors.items():
            factor.weight = Factor([tensors[role]], factor.weight.device).weight
        self.alphas, self.strengths = [alpha], [1.0]

    @property
    def weight(self) -> Tensor:
        """The frozen layer's, without the adapter."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] => [..., out], or [b, in, h, w] => [b, out, h', w']."""
        who = self.active.who
        if not who:
            return self.base_layer(x)
        if len(who) > 1:
            return self._forward_several(x, who)
        if self.sums is not None:
            return self._forward_sum(x, *who)
        return self._forward_alone(x, *who)

    def _forward_alone(self, x: Tensor, number: int) -> Tensor:
        """All rows are of one adapter."""
        if x.dtype == torch.float32 or not isinstance(self.base_layer, nn.Linear):
            return self._forward_one(x, number)
        if (out := products(self, x)) is not None:
            return out
        return self._forward_one(x.flatten(0, -2), number).unflatten(0, x.shape[:-1])  # rows: a kind can add to W x in place

    def _forward_one(self, x: Tensor, number: int) -> Tensor:
        """Of several adapters, one with all rows gives what it gives alone, to the bit."""
        drops, several = self.dropping and self.dropout > 0, len(self.strengths) > 1
        if self.kind.forward is None:
            own = {role: factor.weight[number] if several else factor.weight for role, factor in self.factors.items()}
            change = self._change(own, number)
            if x.dtype == torch.float32 and not drops and type(self.base_layer) in (nn.Linear, nn.Conv2d):
                return self._compute(x, self.weight + change, self.bias)  # in low precision the sum would round the update away
            seen = F.dropout(x, self.dropout) if drops else x
            return self.base_layer(x) + self._compute(seen, change.to(x.dtype), None)
        out: Tensor = self.base_layer(x)
        seen = F.dropout(x, self.dropout) if drops else x
        tensors = {role: factor.cast(x.dtype) for role, factor in self.factors.items()}
        own = {role: whole[number] for role, whole in tensors.items()} if several else tensors
        return self.kind.forward(self.base_layer, seen, out, own, self.scale(number))

    def _forward_sum(self, x: Tensor, number: int) -> Tensor:
        """(W + strength * dW) x. The sum is made anew where a value or a strength has changed."""
        weight, strength = self.weight, self.strengths[number]
        values = (weight, *(factor.weight for factor in self.factors.values()))
        made_of = number, strength, self.alphas[number], weight.device, *((id(value), value._version) for value in values)
        assert self.sums is not None
        if made_of not in self.sums:
            self.sums = {made_of: torch.add(weight, self._delta(self.tensors(number), number), alpha=strength)}
        return self._compute(x, self.sums[made_of], self.bias)

    def _forward_several(self, x: Tensor, who: tuple[int, ...]) -> Tensor:
        if self.kind.title in BATCHED:
            out: Tensor = self.base_layer(x)
            tensors = {role: factor.cast_of(who, x.dtype) for role, factor in self.factors.items()}
            return BATCHED[self.kind.title](self.base_layer, x, out, tensors, self._scales(who, x))
        return torch.cat([self._forward_alone(rows, m) for m, rows in zip(who, x.chunk(len(who)), strict=True)])

    def _delta(self, tensors: Mapping[str, Tensor], number: int) -> Tensor:
        """dW in fp32, by the row that reads the file."""
        weight, numbers = self.weight, {role: torch.tensor(value) for role, value in self.fixed.items()}
        return self.kind.delta({**tensors, **numbers}, weight.float(), self.alphas[number]).reshape(weight.shape)

    def _change(self, tensors: Mapping[str, Tensor], number: int) -> Tensor:
        """strength * dW."""
        delta, strength = self._delta(tensors, number), self.strengths[number]
        return delta if strength == 1 else strength * delta

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the base's layer makes of x with other values."""
        if isinstance(self.base_layer, nn.Conv2d):
            return self.base_layer._conv_forward(x, weight, bias)
        return F.linear(x, weight, bias)

    def scale(self, number: int) -> float:
        """What multiplies an adapter's update: alpha / rank, and its strength."""
        down, alpha = self.factors.get(DOWN), self.alphas[number]
        if down is None or alpha is None:
            return self.strengths[number]
        return alpha / down.weight.shape[int(len(self.strengths) > 1)] * self.strengths[number]

    def _scales(self, who: tuple[int, ...], x: Tensor) -> Tensor | float:
        """One for all, or [m, 1, 1]."""
        if len(set(self.alphas)) == len(set(self.strengths)) == 1:
            return self.scale(who[0])
        return x.new_tensor([self.scale(m) for m in who])[:, None, None]

    def tensors(self, number: int = 0) -> dict[str, Tensor]:
        """An adapter's trainable tensors by role, on the device: views."""
        several = len(self.strengths) > 1
        return {role: f.weight.detach()[number] if several else f.weight.detach() for role, f in self.factors.items()}

    # What diffusers asks of peft's layers, when a model is called with `cross_attention_kwargs={"scale": 0.5}`.

    @property
    def active_adapters(self) -> list[str]:
        return ["personalize"]

    def scale_layer(self, scale: float) -> None:
        """Multiply all strengths."""
        self.strengths = [strength * scale for strength in self.strengths]

    def unscale_layer(self, scale: float) -> None:
        """Take that back."""
        self.strengths = [strength / scale for strength in self.strengths]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set all strengths."""
        self.strengths = [scale] * len(self.strengths)


# ---------------------------------------------------------------- several LoRAs at once
# Vectorizing a whole step over stacked parameters (torch.func.vmap) gives the same numbers, but takes attention apart on devices
# whose kernel has no batching rule, and knows neither checkpointing nor quantized layers.


def batched_lora(layer: Any, x: Tensor, out: Tensor, tensors: Mapping[str, Tensor], scale: Tensor | float) -> Tensor:
    """W x + scale_m up_m down_m x on the rows of adapter m, by two batched products; the second adds to W x.

    x [m * b, ..., in], out [m * b, ..., o], down [m, r, in], up [m, o, r]; or x [m * b, in, h, w], out [m * b, o, h', w'],
    down [m, r, in, kh, kw], up [m, o, r, 1, 1].
    """
    down, up = tensors[DOWN], tensors[UP]
    if not isinstance(layer, nn.Conv2d):
        low = _times(x.reshape(len(down), -1, x.shape[-1]) @ down.mT, scale)
        return torch.baddbmm(out.view(len(down), -1, out.shape[-1]), low, up.mT).view(out.shape)
    m, r = down.shape[:2]
    side_by_side = x.unflatten(0, (m, -1)).transpose(0, 1).flatten(1, 2)  # [b, m * in, h, w]
    how: Any = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    low = F.conv2d(side_by_side, down.flatten(0, 1), groups=m, **how).unflatten(1, (m, r))  # [b, m, r, h', w']
    low = _times(low.transpose(0, 1).flatten(3), scale if isinstance(scale, float) else scale[..., None])  # [m, b, r, h' w']
    each = up.flatten(2)[:, None].expand(-1, low.shape[1], -1, -1).flatten(0, 1)  # [m * b, o, r]
    return torch.baddbmm(out.flatten(2), each, low.flatten(0, 1)).view(out.shape)


def _times(low: Tensor, scale: Tensor | float) -> Tensor:
    """Scaled, where that changes anything."""
    return low if isinstance(scale, float) and scale == 1 else low * scale


BATCHED = {"LoRA": batched_lora}  # by kind; of other kinds each adapter's rows are computed by themselves


# ---------------------------------------------------------------- drawing

MOST_SUMS = 256 << 20  # bytes that W + dW of all layers may take besides the base


@contextlib.contextmanager
def sum_once(layers: Sequence[AdapterLayer]) -> Iterator[None]:
    """Inside, layers of a base in fp32 compute with W + dW, made once, where all of them together are small: nothing learns.

    In lower precision a sum would round the update away; a big base has no room for a second copy of its weights.
    """
    chosen = [one for one in summable(layers) if one.sums is None]  # another block may be around this one: its sums stay
    for layer in chosen:
        layer.sums = {}
    try:
        yield
    finally:
        for layer in chosen:
            layer.sums = None


def summable(layers: Sequence[AdapterLayer]) -> list[AdapterLayer]:
    """The layers that `sum_once` is for."""
    if sum(layer.weight.nbytes for layer in layers) > MOST_SUMS:
        return []
    return [one for one in layers if type(one.base_layer) in (nn.Linear, nn.Conv2d) and one.weight.dtype == torch.float32]


# ---------------------------------------------------------------- casting


class Cast(torch.autograd.Function):
    """fp32 tensors => the same in another dtype, in one operation; so their gradients come back.

    `runs` are how many of them, in turn, are neighbours in memory.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, runs: Sequence[int], *full: Tensor) -> tuple[Tensor, ...]:
        ctx.full = full
        ctx.set_materialize_grads(False)
        low, each = list[Tensor](), iter(full)
        for count in runs:
            rows, *other = next(each).shape
            low += full[len(low)].new_empty(count * rows, *other, dtype=dtype).chunk(count)
            for _ in range(count - 1):
                next(each)
        torch._foreach_copy_(low, full)
        return tuple(low)

    @staticmethod
    def backward(ctx: Any, *low: Tensor | None) -> tuple[Tensor | None, ...]:
        full = [None if grad is None else torch.empty_like(one) for one, grad in zip(ctx.full, low, strict=True)]
        torch._foreach_copy_([one for one in full if one is not None], [grad for grad in low if grad is not None])
        return None, None, *full


@contextlib.contextmanager
def cast_once(layers: Iterable[AdapterLayer], dtype: torch.dtype) -> Iterator[None]:
    """Inside, the tensors of layers are in a base's dtype as they are at the beginning; gradients reach the parameters."""
    runs = runs_of([layer for layer in layers if layer.kind.forward])
    factors = [factor for run in runs for factor in run]
    if dtype == torch.float32 or not factors:
        yield
        return
    lows = Cast.apply(dtype, [len(run) for run in runs], *(factor.weight for factor in factors))
    for factor, low in zip(factors, lows, strict=True):
        factor.low = low
    try:
        yield
    finally:
        for factor in factors:
            factor.low = None


def runs_of(layers: Sequence[AdapterLayer]) -> list[list[Factor]]:
    """The factors of layers, those together that are to be neighbours: of one role, of layers that are computed at once."""
    runs, seen = list[list[Factor]](), set[int]()
    for layer in layers:
        if id(layer) not in seen:
            siblings = siblings_of(layer)
            seen |= set(map(id, siblings))
            runs += [[one.factors[role] for one in siblings] for role in layer.factors]
    return runs
