"""The pocket's UNet on standardised latents; as shipped, it predicts v with zero terminal SNR (Lin et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from personalize.families.noise import VP

from .autoencoder import LATENT
from .pool import shuffled_batches
from .running import Plan, run, team

CONFIG = dict(
    in_channels=LATENT,
    out_channels=LATENT,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=192,
    attention_head_dim=(4, 4, 8),
    norm_num_groups=16,
)
SCHEDULE = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    timestep_spacing="trailing",
    steps_offset=1,  # what StableDiffusionPipeline expects; trailing spacing does not read it
)
DROPOUT = 0.1  # of captions, so that guidance has an unconditional prediction
ENDS = (
    "conv_",
    "down_blocks.0.resnets.0.conv1.",
    "down_blocks.0.resnets.0.norm1.",
)  # what reads or writes a level's own channels


DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {  # uniform numbers in 0..1 => places in the schedule, 0..1
    "uniform": lambda u: u,
    "logit-normal": lambda u: torch.special.ndtri(u).sigmoid(),  # mostly the middle (Esser et al. 2024, arXiv 2403.03206, eq. 19)
}


@dataclass(frozen=True)
class Teaching:
    """What the UNet is, what it predicts, and what counts; the defaults are those of the base that is made here."""

    prediction: str = "v_prediction"
    zero_snr: bool = True  # epsilon cannot be learned where nothing but noise is left
    min_snr: float = 0.0
    density: str = "uniform"
    width: tuple[int, ...] = (48, 96, 192)

    def scheduler(self) -> SchedulerMixin:
        """That of the base's folder. Fresh noise at every step mends what an early one got wrong: fish get eyes."""
        told = {"prediction_type": self.prediction, "rescale_betas_zero_snr": self.zero_snr, **SCHEDULE}
        if self.prediction == "sample":  # which Euler a cannot follow
            return DDIMScheduler(clip_sample=False, **told)
        return EulerAncestralDiscreteScheduler(**told)

    def describe(self) -> str:
        """The objective in words."""
        name = {"v_prediction": "v-prediction", "epsilon": "epsilon prediction", "sample": "sample prediction"}[self.prediction]
        extras = ["zero terminal SNR"] * self.zero_snr + [f"min-SNR {self.min_snr:g}"] * bool(self.min_snr)
        extras += [f"{self.density} timesteps"] * (self.density != "uniform")
        return f"{name} with {', '.join(extras)}" if extras else name

    def build(self, side: int, channels: int = LATENT) -> UNet2DConditionModel:
        """A UNet with random weights for latents `[channels, side, side]`."""
        torch.manual_seed(0)
        latents = {"in_channels": channels, "out_channels": channels}
        return UNet2DConditionModel(sample_size=side, block_out_channels=self.width, **(CONFIG | latents))

    def loss(
        self, unet: Callable, schedule: VP, latents: Tensor, cond: Tensor, generator: torch.Generator, shows: Tensor | float = 1.0
    ) -> Tensor:
        """Mean squared error at one timestep per picture, weighted by `min_snr` and what each channel `shows` [c, 1, 1]."""
        n = len(latents)
        even = (torch.arange(n) + torch.rand(n, generator=generator)) / n  # stratified: less noise in the loss
        places = DENSITIES[self.density](even).clamp(0, 1 - 1e-6)
        t = (places * schedule.steps).long().to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        predicted = unet(schedule.add(latents, noise, t), t, cond).sample.float()
        wrong = (shows * (predicted - schedule.target(latents, noise, t)).square()).mean((1, 2, 3))
        return (schedule.weight(t, self.min_snr) * wrong).mean()


class AttentionInFloats(TorchFunctionMode):
    """Inside, attention computes in fp32 whatever autocast says: its backward in bf16 costs a CPU more than all else saves."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*(one.float() for one in args[:3]), *args[3:], **(kwargs or {}))


@torch.no_grad()
def deepen(old: UNet2DConditionModel) -> UNet2DConditionModel:
    """A trained UNet's body as the inner levels of one with a level more, whose latents are twice as fine; its ends are new.

    All levels of `old` have attention; the new one above them has none, and half as many channels as the next.
    Timesteps are told by fewer numbers: what each block was told of them is fitted, by least squares over all timesteps.
    """
    inner = tuple(old.config.block_out_channels)
    new = Teaching(width=(inner[0] // 2, *inner)).build(2 * old.config.sample_size)
    before, after = old.state_dict(), new.state_dict()
    for name, weight in before.items():
        to = _one_level_down(name)
        if to in after and "time_emb" not in name and not name.startswith(ENDS):
            part = tuple(slice(0, min(pair)) for pair in zip(weight.shape, after[to].shape, strict=True))
            after[to][part] = weight[part]  # the last layer reads fewer channels from above it
    _spread_out(after)
    told, heard = _told_of_time(before), _told_of_time(after)
    ridge = 30 * torch.eye(heard.shape[1], dtype=heard.dtype)
    for name in (name for name in before if name.endswith("time_emb_proj.weight")):
        bias = name.removesuffix("weight") + "bias"
        wanted = told[:, :-1] @ before[name].double().T + before[bias].double()
        fitted = torch.linalg.solve(heard.T @ heard + ridge, heard.T @ wanted)
        after[_one_level_down(name)].copy_(fitted[:-1].T)
        after[_one_level_down(bias)].copy_(fitted[-1])
    new.load_state_dict(after)
    return new


def _one_level_down(name: str) -> str:
    """Where a parameter lies with one more level above it; going up, levels are counted from below."""
    head, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    return f"{head}.{int(number) + 1}.{rest}" if head == "down_blocks" else name


def _spread_out(weights: dict[str, Tensor]) -> None:
    """Random weights of the timestep's embedding that tell timesteps apart better than the usual ones."""
    generator = torch.Generator().manual_seed(1)
    for name, deviation in (("linear_1", 0.4), ("linear_2", 0.25)):
        weight = weights[f"time_embedding.{name}.weight"]
        weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)


def _told_of_time(weights: dict[str, Tensor]) -> Tensor:
    """What blocks are told of each timestep `[1000, d + 1]`: the embedding, and a 1 for the bias."""
    first, second = (weights[f"time_embedding.linear_{n}.weight"].double() for n in (1, 2))
    biases = [weights[f"time_embedding.linear_{n}.bias"].double() for n in (1, 2)]
    waves = get_timestep_embedding(torch.arange(1000), first.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0).double()
    told = F.silu(F.silu(waves @ first.T + biases[0]) @ second.T + biases[1])
    return torch.cat([told, torch.ones(len(told), 1, dtype=told.dtype)], 1)


def redraw(
    unet: UNet2DConditionModel, teaching: Teaching, empty: Tensor, device: str, until: float = 0.3
) -> Callable[[Tensor, torch.Generator], Tensor]:
    """What makes of latents `[n, c, h, w]` those that the UNet tells from a noised image: the noise is some of the schedule's
    first `until`, another for each image. `empty` is the embedded empty caption `[1, 77, d]`."""
    unet, schedule = unet.to(device).eval(), VP.of(teaching.scheduler().config)

    @torch.no_grad()
    def tell(latents: Tensor, generator: torch.Generator) -> Tensor:
        t = (torch.rand(len(latents), generator=generator) * until * schedule.steps).long().to(device)
        noisy = schedule.add(latents, torch.randn(latents.shape, generator=generator).to(device), t)
        return schedule.clean(unet(noisy, t, empty.to(device).expand(len(latents), -1, -1)).sample, noisy, t)

    return tell


def train(
    folder: Path,
    unet: UNet2DConditionModel,
    teaching: Teaching,
    latents: np.ndarray,
    conditions: np.ndarray,
    empty: Tensor,
    plan: Plan,
    device: str,
    bf16: bool,
    compiled: bool,
    shows: Tensor | float = 1.0,
    picture: Callable[[UNet2DConditionModel, int], None] | None = None,
) -> UNet2DConditionModel:
    """Train on encoded pictures `[n, c, h, w]` and embedded captions `[n, 77, d]`, resumably; return the averaged UNet.

    In a team (`running.join_team`), each process takes its part of every batch.
    """
    unet, shown = unet.to(device).train(), UNet2DConditionModel.from_config(unet.config).to(device).eval()
    forward = torch.compile(unet) if compiled else unet
    schedule, (rank, count) = VP.of(teaching.scheduler().config), team()

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, batch in enumerate(shuffled_batches(len(latents), plan.batch, 3, start), start):
            i, generator = batch[rank::count], torch.Generator().manual_seed(step * count + rank)
            drawn = torch.from_numpy(latents[i]).to(device).float()
            cond = torch.from_numpy(conditions[i]).to(device).float()
            dropped = (torch.rand(len(i), generator=generator) < DROPOUT).to(device)
            yield drawn, torch.where(dropped[:, None, None], empty.to(device), cond)

    def loss_of(batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step * count + rank + 10**9)
        with AttentionInFloats() if device == "cpu" else nullcontext(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            return teaching.loss(forward, schedule, *batch, generator, shows)

    def show(weights: dict[str, Tensor], step: int) -> None:
        shown.load_state_dict(weights)
        if picture:
            picture(shown, step)

    unet.load_state_dict(run(folder, unet, plan, batches, loss_of, show))
    return unet.eval()
