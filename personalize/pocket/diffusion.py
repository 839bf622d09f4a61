"""The pocket's UNet: v-prediction with zero terminal SNR (Lin et al. 2023) on standardised latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from .pool import shuffled
from .running import Plan, run

CONFIG = dict(
    in_channels=16,
    out_channels=16,
    block_out_channels=(96, 192),
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    layers_per_block=1,
    cross_attention_dim=192,
    attention_head_dim=(4, 8),
    norm_num_groups=16,
)
SCHEDULE = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    clip_sample=False,
    set_alpha_to_one=True,
    steps_offset=1,  # what StableDiffusionPipeline expects; trailing spacing does not read it
)
DROPOUT = 0.1  # of captions, so that guidance has an unconditional prediction


def diffusion_loss(unet: Callable, alphas: Tensor, latents: Tensor, cond: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of v = sqrt(a) noise - sqrt(1-a) x (Salimans & Ho 2022) at one uniform timestep per picture."""
    n = len(latents)
    t = (torch.arange(n) + torch.rand(n, generator=generator)) / n  # stratified: less noise in the loss
    t = (t * len(alphas)).long().to(latents.device)
    a = alphas[t][:, None, None, None]
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    noisy, v = a.sqrt() * latents + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * latents
    return F.mse_loss(unet(noisy, t, cond).sample.float(), v)


def build(side: int) -> UNet2DConditionModel:
    """A UNet with random weights for latents of `side`."""
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=side, **CONFIG)


def train(
    folder: Path,
    unet: UNet2DConditionModel,
    latents: np.ndarray,
    conditions: np.ndarray,
    empty: Tensor,
    plan: Plan,
    device: str,
    bf16: bool,
    compiled: bool,
    picture: Callable[[UNet2DConditionModel, int], None] | None = None,
) -> UNet2DConditionModel:
    """Train on encoded pictures `[n, 2, 16, h, w]` and embedded captions `[n, 77, d]`, resumably; return the averaged UNet."""
    unet, shown = unet.to(device).train(), build(latents.shape[-1]).to(device).eval()
    forward = torch.compile(unet) if compiled else unet
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(device)

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, i in enumerate(shuffled(len(latents), plan.batch, 3, start), start):
            generator = torch.Generator().manual_seed(step)
            moments = torch.from_numpy(latents[i]).to(device).float()
            drawn = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 0].shape, generator=generator).to(device)
            cond = torch.from_numpy(conditions[i]).to(device).float()
            dropped = (torch.rand(len(i), generator=generator) < DROPOUT).to(device)
            yield drawn, torch.where(dropped[:, None, None], empty.to(device), cond)

    def loss_of(batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step + 10**9)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return diffusion_loss(forward, alphas, *batch, generator)

    def show(weights: dict[str, Tensor], step: int) -> None:
        shown.load_state_dict(weights)
        if picture:
            picture(shown, step)

    unet.load_state_dict(run(folder, unet, plan, batches, loss_of, show))
    return unet.eval()
