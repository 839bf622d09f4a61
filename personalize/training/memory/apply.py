"""A compute plan, applied to a base."""

from __future__ import annotations

import shutil

import torch

from ...models.model import Base
from ...models.quantized import quantize
from .ladder import ComputePlan


def apply_plan(base: Base, compute: ComputePlan, device: torch.device) -> None:
    """Make a base compute as a plan says, with or without adapters on it. What is quantized or compiled already stays so."""
    base.place(device, lean=compute.lean, tiled=compute.tiled)
    if compute.quantize != "none":
        quantize(base.unet, compute.quantize)
    if compute.checkpointing:
        base.unet.enable_gradient_checkpointing()
    else:
        base.unet.disable_gradient_checkpointing()
    if compute.channels_last:
        base.unet.to(memory_format=torch.channels_last)
    if compute.compile and not lacking(device) and not compiled(base):
        base.unet.compile_repeated_blocks()


def compiled(base: Base) -> bool:
    """Whether the UNet's blocks are compiled."""
    return any(module._compiled_call_impl is not None for module in base.unet.modules())


def lacking(device: torch.device) -> str:
    """Why nothing can be compiled for a device; empty where it can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "triton is not installed"
    return "" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "there is no C++ compiler"
