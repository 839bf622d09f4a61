"""Another CPU's rounding on this one: `PYTHONPATH=tests pytest -p other_cpu FILES` (takes about three times as long).

Kernels sum in an order that depends on the CPU, and on shapes, strides and alignment. In a test, whatever sums or approximates
answers up to one unit in the last place off, and the same each time that it is asked for the same shapes and strides. A test that
fails compares to the bit what no CPU promises to be equal. OTHER_CPU=2 rounds otherwise. Child processes are not reached.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Generator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SUMS = [
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "vdot", "addr", "convolution",
    "convolution_backward", "mkldnn_convolution", "mkldnn_linear", "linalg_qr", "_linalg_svd", "_linalg_eigh", "linalg_lstsq",
    "linalg_householder_product", "geqrf", "linalg_vector_norm", "norm", "_foreach_norm", "sum", "mean", "var", "std",
    "var_mean", "cumsum", "mse_loss", "native_layer_norm", "native_group_norm", "native_layer_norm_backward",
    "native_group_norm_backward", "_softmax", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward", "exp", "gelu", "silu", "sigmoid", "tanh", "upsample_bilinear2d",
    "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
]  # fmt: skip
PACKETS = {getattr(torch.ops.aten, name) for name in SUMS if hasattr(torch.ops.aten, name)}


def layout(value: Any) -> Any:
    """What a kernel may go by: shapes, strides and options, not the numbers."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return tuple(map(layout, value)) if isinstance(value, tuple | list) else repr(value)


@cache
def factors(key: tuple[Any, ...], count: int, dtype: torch.dtype) -> Tensor:
    """1, or 1 and one unit in the last place more or less."""
    rng = torch.Generator().manual_seed(zlib.crc32(repr((os.environ.get("OTHER_CPU", "1"), key)).encode()))
    return 1 + torch.randint(-1, 2, (count,), generator=rng).to(dtype) * torch.finfo(dtype).eps


def round_otherwise(value: Any, key: tuple[Any, ...]) -> None:
    """Change fp32 and fp64 results in place."""
    if isinstance(value, tuple | list):
        for i, one in enumerate(value):
            round_otherwise(one, (*key, i))
    elif (
        isinstance(value, Tensor)
        and value.dtype in (torch.float32, torch.float64)
        and value.numel()
        and value.device.type == "cpu"
    ):
        row = factors(key, value.shape[-1] if value.ndim else 1, value.dtype)
        value.mul_(row if value.ndim else row[0])


class OtherCPU(TorchDispatchMode):
    """Inside, kernels round as another CPU's might."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in PACKETS:
            round_otherwise(result, (func.overloadpacket.__name__, layout(args)))
        return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    with OtherCPU():
        return (yield)


def run(self: threading.Thread, alone: Any = threading.Thread.run) -> None:
    """Threads have modes of their own."""
    with OtherCPU():
        alone(self)


threading.Thread.run = run  # type: ignore[method-assign]
