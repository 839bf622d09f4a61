"""A Fit, done to a base."""

from __future__ import annotations

import shutil

import torch

from ...models.model import Base
from ...models.quantized import quantize
from .ladder import Fit


def place(base: Base, fit: Fit, device: torch.device) -> None:
    """Make a base compute as a Fit says, with or without adapters on it. What is quantized or compiled already stays so."""
    base.place(device, lean=fit.lean, tiled=fit.tiled)
    if fit.quantize != "none":
        quantize(base.denoiser, fit.quantize)
    if fit.checkpointing:
        base.denoiser.enable_gradient_checkpointing()
    else:
        base.denoiser.disable_gradient_checkpointing()
    if fit.channels_last:
        base.denoiser.to(memory_format=torch.channels_last)
    if fit.compile and not lacking(device) and not compiled(base):
        base.denoiser.compile_repeated_blocks()


def compiled(base: Base) -> bool:
    """Whether the denoiser's blocks are compiled."""
    return any(module._compiled_call_impl is not None for module in base.denoiser.modules())


def lacking(device: torch.device) -> str:
    """Why nothing can be compiled for a device; empty where it can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "triton is not installed"
    return "" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "there is no C++ compiler"
