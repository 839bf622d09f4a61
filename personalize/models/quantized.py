"""Frozen linear layers whose weights are held in 8 or 4 bits, and read as floats only while they are used.

The layers compute in their own dtype: only what is stored is small. Nothing but the packed weight is kept for the backward
pass (Dettmers et al. 2023, section 3), where torchao's weight-only layers keep the unpacked one of every layer.
Plain torch, so that it runs on any device and can be counted on shapes alone; nf4 is bitsandbytes' own layout, and its
kernels read it where they are installed (`pip install personalize[quantize]`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # weights that share one scale, in nf4
SMALLEST = 4096  # weights: smaller layers are not worth it
# Quantiles of a normal distribution, with an exact zero (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

Packed = tuple[Tensor, Tensor]  # codes, scales


@dataclass(frozen=True)
class Format:
    """How weights [out, in] are packed, and read again."""

    pack: Callable[[Tensor], Packed]
    unpack: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]


def _by_rows(largest: float, code: Callable[[Tensor], Tensor]) -> Format:
    """A scale for each row, its largest weight being `largest`."""

    def pack(weight: Tensor) -> Packed:
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / largest
        return code(weight.float() / scale), scale

    def unpack(codes: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype) * scale.to(dtype)

    return Format(pack, unpack)


def _pack_nf4(weight: Tensor) -> Packed:
    """Two weights in a byte, the first in its upper half."""
    blocks = weight.float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1)
    table = torch.tensor(NF4, device=weight.device)
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(blocks / scale.clamp(min=1e-12)[:, None], middles).to(torch.uint8).reshape(-1)
    return (codes[::2] << 4) | codes[1::2], scale


def _unpack_nf4(codes: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if codes.is_cuda and importlib.util.find_spec("bitsandbytes"):
        return _bitsandbytes(codes, scale, shape, dtype)
    table = torch.tensor(NF4, device=codes.device, dtype=dtype)
    halves = torch.stack([codes >> 4, codes & 15], dim=-1)
    return (table[halves.int()].reshape(-1, BLOCK) * scale.to(dtype)[:, None]).reshape(shape)


def _bitsandbytes(codes: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The same by one kernel."""
    import bitsandbytes.functional as bnb  # an extra

    table = torch.tensor(NF4, device=codes.device)
    state = bnb.QuantState(scale, shape, table, BLOCK, "nf4", dtype)
    unpacked: Tensor = bnb.dequantize_4bit(codes[:, None], state)
    return unpacked


FORMATS = {
    "int8": _by_rows(127, lambda weight: weight.round().to(torch.int8)),
    "fp8": _by_rows(448, lambda weight: weight.to(torch.float8_e4m3fn)),
    "nf4": Format(_pack_nf4, _unpack_nf4),
}


class Quantized(nn.Linear):
    """A frozen linear layer with a packed weight. `weight` is what it stands for, unpacked anew each time."""

    def __init__(self, layer: nn.Linear, name: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format = layer.in_features, layer.out_features, name
        self.dtype = layer.weight.dtype
        codes, scales = FORMATS[name].pack(layer.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        assert isinstance(self.codes, Tensor) and isinstance(self.scales, Tensor)
        return self.unpack(self.codes, self.scales)

    def unpack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The weight that a packed one stands for, [out, in]."""
        return FORMATS[self.format].unpack(codes, scales, torch.Size((self.out_features, self.in_features)), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] => [..., out]."""
        result: Tensor = _Product.apply(x, self.codes, self.scales, self)
        return result if self.bias is None else result + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.format}"


class _Product(torch.autograd.Function):
    """x W^T, whose backward pass unpacks W once more: from what the forward pass read, wherever the layer's own is by then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, layer: Quantized) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(codes, scales)
        return nn.functional.linear(x, layer.unpack(codes, scales))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] @ ctx.layer.unpack(*ctx.saved_tensors), None, None, None


def quantize(model: nn.Module, name: str) -> int:
    """Pack every large frozen linear layer of a model, under adapters too; returns how many. What is packed stays as it is."""
    found = [
        (parent, child, layer)
        for parent in model.modules()
        for child, layer in parent.named_children()
        if isinstance(layer, nn.Linear) and not isinstance(layer, Quantized) and packable(layer)
    ]
    for parent, child, layer in found:
        setattr(parent, child, Quantized(layer, name))
    return len(found)


def packable(layer: nn.Linear) -> bool:
    """Whether a layer is frozen, large enough, and of whole blocks."""
    size = layer.in_features * layer.out_features
    return not layer.weight.requires_grad and size >= SMALLEST and size % BLOCK == 0
