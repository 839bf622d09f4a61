"""In what a base's weights are held and computed with."""

from __future__ import annotations

from typing import Protocol

import torch


class Wanted(Protocol):
    """The part of a recipe that says it."""

    @property
    def precision(self) -> str: ...


def precision_of(wanted: Wanted, device: torch.device) -> str:
    """The precision that the recipe asks for, on a device."""
    if wanted.precision != "auto":
        return wanted.precision
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def dtype_of(precision: str) -> torch.dtype:
    """float32, bfloat16 or float16."""
    dtype = getattr(torch, precision)
    assert isinstance(dtype, torch.dtype)
    return dtype
