"""What a run does to fit into memory, and the order in which it gives way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...models.precision import precision_of
from ...recipe.fields import Fitting


@dataclass(frozen=True)
class ComputePlan:
    """How a run computes. Every field changes what it takes, and next to nothing of what it learns."""

    precision: str = "float32"
    checkpointing: bool = False  # activations are computed again in the backward pass
    lean: bool = False  # encoders are off the GPU while they have nothing to do
    tiled: bool = False  # pictures are drawn one at a time, and decoded in tiles
    quantize: str = "none"
    micro_batch: int = 1  # pictures at once
    compile: bool = False
    channels_last: bool = False
    offload: bool = False  # frozen weights are in the host's memory, and come to the GPU block by block
    joined: bool = False  # layers that read the same input are computed by one product

    def record(self) -> dict[str, Any]:
        """Its fields, as files have them: what is newer than the first files is left out where it is not so."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("offload", "joined")}

    def words(self, batch: int) -> str:
        """What was chosen, in a few words, for batches of so many pictures."""
        said = {
            "checkpointing": self.checkpointing,
            "encoders freed": self.lean,
            "pictures in tiles": self.tiled,
            f"UNet in {self.quantize}": self.quantize != "none",
            f"{self.micro_batch} of {batch} pictures at once": self.micro_batch < batch,
            "UNet's weights in the host's memory": self.offload,
            "compiled": self.compile and not self.offload,
        }
        return ", ".join([self.precision, *(word for word, true in said.items() if true)])


@dataclass(frozen=True)
class Rung:
    """One thing that can give way, where the recipe leaves it open."""

    name: str
    cost: str
    setting: str  # of the recipe, open while it is "auto" or 0
    field: str  # of ComputePlan
    value: Callable[[ComputePlan], Any]  # what the field becomes
    cpu: bool = True  # whether it helps on a CPU

    def open(self, wanted: Fitting, device: torch.device) -> bool:
        """Whether this may give way."""
        return getattr(wanted, self.setting) in ("auto", 0) and (self.cpu or device.type != "cpu")

    def of(self, compute: ComputePlan) -> ComputePlan:
        """A plan with this given way."""
        return replace(compute, **{self.field: self.value(compute)})


LADDER = (
    Rung(
        "checkpointing",
        "activations are computed twice: a step takes about a third longer, its gradients are the same",
        "checkpointing",
        "checkpointing",
        lambda compute: True,
    ),
    Rung(
        "free encoders",
        "the VAE and text encoders travel to the GPU and back for each set of sample pictures",
        "free_encoders",
        "lean",
        lambda compute: True,
        cpu=False,  # there is nowhere to go
    ),
    Rung(
        "tiled VAE",
        "sample pictures are drawn one at a time and decoded in tiles, whose seams are blended",
        "tile_vae",
        "tiled",
        lambda compute: True,
    ),
    Rung(
        "quantize",
        "the UNet's frozen linear layers are held in 8 bits: 0.4 % off, and unpacked at each use",
        "quantize",
        "quantize",
        lambda compute: "int8" if compute.quantize == "none" else compute.quantize,
    ),
    Rung(
        "smaller batch",
        "half as many pictures at once; their gradients add up to the batch's",
        "micro_batch",
        "micro_batch",
        lambda compute: -(-compute.micro_batch // 2),
    ),
    Rung(
        "offload",
        "the UNet's frozen weights stay in the host's memory, and travel to the GPU twice a step, while it computes",
        "offload",
        "offload",
        lambda compute: True,
        cpu=False,
    ),
)


def first(wanted: Fitting, batch: int, device: torch.device, before: ComputePlan | None = None) -> ComputePlan:
    """What is tried first: what the recipe forces, and where it forces nothing, what an earlier part of the run came to."""
    kept, precision = before or ComputePlan(micro_batch=batch), precision_of(wanted, device)
    chosen = {"auto": None, "yes": True, "no": False}
    forced: dict[str, Any] = {
        "checkpointing": chosen[wanted.checkpointing],
        "lean": False if device.type == "cpu" else chosen[wanted.free_encoders],
        "tiled": chosen[wanted.tile_vae],
        "quantize": None if wanted.quantize == "auto" else wanted.quantize,
        "micro_batch": wanted.micro_batch or None,
        "offload": False if device.type == "cpu" else chosen[wanted.offload],
    }
    gpu = device.type == "cuda" and precision != "float32"  # what tensor cores read; a CPU gains nothing
    joined = gpu and not wanted.compile  # a compiler joins by itself what pays
    compute = replace(kept, precision=precision, compile=wanted.compile, channels_last=gpu, joined=joined)
    return replace(compute, **{name: value for name, value in forced.items() if value is not None})


def down(compute: ComputePlan, wanted: Fitting, device: torch.device) -> tuple[Rung, ComputePlan] | None:
    """The next rung and what it makes of a plan; None on the lowest."""
    for rung in LADDER:
        if rung.open(wanted, device) and (lower := rung.of(compute)) != compute:
            return rung, lower
    return None


def pieces(compute: ComputePlan, batch: int) -> int:
    """In how many pieces a batch is computed."""
    return -(-batch // compute.micro_batch)
