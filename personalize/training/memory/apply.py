"""A compute plan, applied to a base."""

from __future__ import annotations

import shutil

import torch

from ...models.joined import join_projections
from ...models.model import Base
from ...models.offload import bring_back, offload
from ...models.quantized import quantize
from ...models.useless import write_divisions
from .ladder import ComputePlan


def apply_plan(base: Base, compute: ComputePlan, device: torch.device) -> None:
    """Make a base compute as a plan says, with or without adapters on it. What is quantized or compiled already stays so."""
    base.place(device, lean=compute.lean, tiled=compute.tiled)
    if compute.quantize != "none":
        quantize(base.denoiser, compute.quantize)
    if compute.checkpointing:
        base.denoiser.enable_gradient_checkpointing()
    else:
        base.denoiser.disable_gradient_checkpointing()
    if compute.channels_last:
        base.denoiser.to(memory_format=torch.channels_last)
    if compute.joined and not compute.offload:
        base.denoiser.to(device)  # what is side by side would be taken apart on its way
        join_projections(base.denoiser)
    if compute.offload and device.type == "cuda":
        stop_compiling(base)
        offload(base.denoiser, device)
    else:
        bring_back(base.denoiser, device)
    if compute.compile and not obstacle_to_compiling(compute, device) and not is_compiled(base):
        write_divisions(base.denoiser)
        base.denoiser.compile_repeated_blocks()


def is_compiled(base: Base) -> bool:
    """Whether the denoiser's blocks are compiled."""
    return any(module._compiled_call_impl is not None for module in base.denoiser.modules())


def stop_compiling(base: Base) -> None:
    """Let compiled blocks compute as they are written."""
    for module in base.denoiser.modules():
        module._compiled_call_impl = None


def obstacle_to_compiling(compute: ComputePlan, device: torch.device) -> str:
    """Why nothing is compiled of what computes as a plan says; empty where it can be."""
    return "the UNet's weights come from the host's memory at each use" if compute.offload else missing_compiler(device)


def missing_compiler(device: torch.device) -> str:
    """Why nothing can be compiled for a device; empty where it can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "triton is not installed"
    return "" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "there is no C++ compiler"
