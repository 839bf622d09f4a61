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
    return precision_on(device, wanted.precision)


def precision_on(device: torch.device, wanted: str = "auto") -> str:
    """A precision by its name; `auto`: what suits the device."""
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def dtype_of(precision: str) -> torch.dtype:
    """float32, bfloat16 or float16."""
    dtype = getattr(torch, precision)
    assert isinstance(dtype, torch.dtype)
    return dtype
