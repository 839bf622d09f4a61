"""A UNet's forward and backward pass as CUDA graphs: one launch each, whatever is in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from personalize.families.cond import Cond
from personalize.models.model import Base
from personalize.training.objectives.objective import Denoise, Inputs


class Positional(nn.Module):
    """A UNet that takes tensors in order, as graphs want it."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor, *added: Tensor) -> Tensor:
        told = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
        result: Tensor = self.unet(latents, timesteps, encoder_hidden_states=tokens, added_cond_kwargs=told, return_dict=False)[0]
        return result


def arguments(base: Base, latents: Tensor, timesteps: Tensor, cond: Cond) -> tuple[Tensor, ...]:
    """What `Positional` takes for what `Base.denoise` takes."""
    plain = latents.to(base.dtype), timesteps, cond.tokens.to(base.dtype)
    if not base.sized:
        return plain
    assert cond.pooled is not None
    return *plain, cond.pooled.to(base.dtype), (base._whole(latents) if cond.sizes is None else cond.sizes)


def capture_graph(base: Base, inputs: Inputs) -> Denoise:
    """`Base.denoise` for batches of the shape of `inputs`, captured on the GPU with what is attached."""
    timesteps = torch.zeros(len(inputs.mean), dtype=torch.long, device=base.device)
    sample: Any = arguments(base, inputs.mean, timesteps, inputs.cond)
    unet: Any = torch.cuda.make_graphed_callables(Positional(base.denoiser), sample)
    return lambda latents, t, cond: unet(*arguments(base, latents, t, cond))
