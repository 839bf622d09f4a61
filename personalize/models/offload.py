"""A model's frozen weights in the host's memory, brought to the device block by block, just before they are used.

While a block computes, the next one's weights are on their way (on a CUDA stream of their own, out of pinned memory). With
checkpointing a block's forward pass runs again right before its backward pass, and what that pass has read is there until the
backward pass has used it: two or three blocks are on the device at once. Without checkpointing the graph keeps those of all.

The operations are those of a model on the device, so the bits are its own. (diffusers' `apply_group_offloading` is made for
drawing: it also moves parameters that learn, and knows the order of the forward pass alone.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .quantized import Quantized

Slot = tuple[dict[str, Any], str]  # a module's parameters or its buffers, and the name of one of them
HELD = "offloaded"  # under this name a model knows its blocks


@dataclass(eq=False)
class Block:
    """Frozen weights that come and go together."""

    slots: list[Slot]
    host: list[Tensor]

    def put(self, tensors: list[Tensor]) -> None:
        """Let the modules compute with these."""
        for (where, name), tensor in zip(self.slots, tensors, strict=True):
            where[name] = tensor


class Offloaded:
    """The blocks of a model, the order in which it uses them, and the one that is on its way."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device, self.handles = device, list[Any]()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.blocks: list[Block] = []
        self.order: list[Block] = []  # as the first forward pass met them
        self.last = -1  # of `order`, the one that was used last
        self.ahead: tuple[Block, list[Tensor], Any] | None = None  # with the event of its arrival
        for module in blocks_of(model):
            self._hook(module)

    @property
    def host(self) -> list[Tensor]:
        """All weights in the host's memory."""
        return [tensor for block in self.blocks for tensor in block.host]

    def _hook(self, module: nn.Module) -> None:
        """Let a block's weights come before its forward pass, and go behind it, also if that is broken off."""
        slots = slots_of(module)
        block = Block(slots, [on_host(where[name], self.device) for where, name in slots])
        block.put(block.host)
        self.blocks.append(block)
        self.handles.append(module.register_forward_pre_hook(lambda *_: self.bring(block)))
        self.handles.append(module.register_forward_hook(lambda *_: block.put(block.host), always_call=True))

    def bring(self, block: Block) -> None:
        """Put a block's weights on the device, and send for the next one's."""
        (ahead, tensors, arrival), self.ahead = self.ahead or (None, [], None), None
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)  # also if nobody wants it: its memory is given back
        block.put(tensors if ahead is block else copies(block.host, self.device))
        if (following := self._follower(block)) is not None:
            self.ahead = (following, *self._send(following))

    def _follower(self, block: Block) -> Block | None:
        """What is used next: a forward pass goes up the order, a backward pass down."""
        if block not in self.order:
            self.order.append(block)
        before, self.last = self.last, self.order.index(block)
        up = self.last == before + 1 or (self.last == 0 and before != 1)
        number = self.last + (1 if up else -1)
        return self.order[number] if 0 <= number < len(self.order) else None

    def _send(self, block: Block) -> tuple[list[Tensor], Any]:
        """Copies of a block's weights on the device, and the event after which they are whole; None: they are."""
        if self.stream is None:
            return copies(block.host, self.device), None
        here = torch.cuda.current_stream(self.device)  # the copies' memory is its own: it is free once that has come here
        there = empties(block.host, self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            fill(there, block.host)
        return there, self.stream.record_event()


# ---------------------------------------------------------------- on and off


def offload(model: nn.Module, device: torch.device) -> None:
    """Keep the frozen weights of a model's blocks in the host's memory; all else of it goes to `device`. May be repeated."""
    bring_back(model)
    held = Offloaded(model, device)
    vars(model)[HELD] = held
    move_rest(model, held, device)


def bring_back(model: nn.Module, device: torch.device | None = None) -> None:
    """Undo `offload`, and move the model to a device, if one is named; nothing for a model that is not offloaded."""
    held = offload_of(model)
    if held is None:
        return
    for handle in held.handles:
        handle.remove()
    del vars(model)[HELD]
    if device is not None:
        model.to(device)


def offload_of(model: nn.Module) -> Offloaded | None:
    """What is offloaded of a model."""
    held = vars(model).get(HELD)
    assert held is None or isinstance(held, Offloaded)
    return held


def move_rest(model: nn.Module, held: Offloaded, device: torch.device) -> None:
    """Move all of a model but what is in the host's memory."""
    staying = set(map(id, held.host))
    if all(one.device == device for one in (*model.parameters(), *model.buffers()) if id(one) not in staying):
        return
    for block in held.blocks:
        for where, name in block.slots:
            where[name] = None
    try:
        model.to(device)
    finally:
        for block in held.blocks:
            block.put(block.host)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The smallest modules that a device computes at a stretch, by the names that diffusers' models declare."""
    names = {*(getattr(model, "_no_split_modules", None) or ()), *(getattr(model, "_repeated_blocks", None) or ())}
    found = [module for module in model.modules() if type(module).__name__ in names]
    return [module for module in found if not any(type(inner).__name__ in names for inner in list(module.modules())[1:])]


def slots_of(block: nn.Module) -> list[Slot]:
    """The frozen weights of a block's linear and convolution layers, packed or not, under adapters too."""
    slots: list[Slot] = []
    for module in block.modules():
        if isinstance(module, Quantized):
            slots += [(module._buffers, name) for name in module._buffers]
        elif isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
            slots.append((module._parameters, "weight"))
    return slots


# ---------------------------------------------------------------- tensors


@torch.no_grad()
def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in the host's memory, from where a copy to a GPU need not be waited for."""
    host = tensor.detach().cpu()
    if device.type == "cuda" and not host.is_pinned():
        host = host.pin_memory()
    return nn.Parameter(host, requires_grad=False) if isinstance(tensor, nn.Parameter) else host


def copies(host: list[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors on a device."""
    there = empties(host, device)
    fill(there, host)
    return there


@torch.inference_mode(False)
def empties(host: list[Tensor], device: torch.device) -> list[Tensor]:
    """Room for these on a device; parameters for parameters."""
    made = [(one, torch.empty_like(one, device=device, requires_grad=False)) for one in host]
    return [nn.Parameter(new, requires_grad=False) if isinstance(one, nn.Parameter) else new for one, new in made]


@torch.inference_mode(False)
@torch.no_grad()
def fill(there: list[Tensor], host: list[Tensor]) -> None:
    """Copy, without waiting for it where the host's memory is pinned."""
    for new, one in zip(there, host, strict=True):
        new.copy_(one, non_blocking=True)
