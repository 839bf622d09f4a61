"""What noise and which timesteps are drawn: as the base was trained, or otherwise where the recipe says so."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import RecipeError
from ...families.noise import Noise, spread_evenly
from ...recipe.objective import Objective as Settings
from .objective import Rng

LEVELS = 10  # of pyramid noise, at most


def draw_noise(like: Tensor, settings: Settings, rng: Rng) -> Tensor:
    """eps [b, c, h, w]: what is added to x_0 and is to be told."""
    eps = normal(like, rng("noise"))
    if settings.noise_offset:
        eps = eps + settings.noise_offset * normal(like[:, :, :1, :1], rng("noise offset"))
    if settings.pyramid_noise:
        eps = add_pyramid(eps, settings.pyramid_noise, rng("pyramid noise"))
    return eps


def add_pyramid(eps: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Noise with coarser noise in it, of unit variance over all (Whitaker 2023, "Multi-resolution noise for diffusion model
    training"): level i is a random factor of 2 to 4, to the power of i, coarser than the last, and counts discount^i."""
    height, width = size = eps.shape[2:]
    for level in range(LEVELS):
        factor = float(2 + 2 * torch.rand((), generator=generator)) ** level
        height, width = max(1, int(height / factor)), max(1, int(width / factor))
        coarse = torch.randn(*eps.shape[:2], height, width, generator=generator)
        eps = eps + discount**level * F.interpolate(coarse, size=size, mode="bilinear").to(eps)
        if 1 in (height, width):
            break
    return eps / eps.std()


def draw_input_noise(eps: Tensor, settings: Settings, rng: Rng) -> Tensor:
    """What is added to x_0 in the network's input: eps, perturbed (Ning et al. 2023, arXiv 2301.11706)."""
    if not settings.input_perturbation:
        return eps
    return eps + settings.input_perturbation * normal(eps, rng("input perturbation"))


def logit_normal(even: Tensor, settings: Settings) -> Tensor:
    """The logistic function of normal numbers (Esser et al. 2024, arXiv 2403.03206, section 3.1)."""
    return (settings.logit_mean + settings.logit_std * torch.special.ndtri(even.double())).sigmoid()


# Evenly spread numbers [b] in 0..1 => how far each timestep lies between the first and the last.
DENSITIES: dict[str, Callable[[Tensor, Settings], Tensor]] = {
    "uniform": lambda even, settings: even,
    "logit-normal": logit_normal,
    "cubic": lambda even, settings: 1 - even**3,  # T2I-Adapter (Mou et al. 2023, arXiv 2302.08453)
}


def timesteps(b: int, noise: Noise, rng: Rng, settings: Settings) -> Tensor:
    """[b] timesteps, as the base's noise draws them where the recipe says nothing else."""
    first, end = settings.min_timestep, settings.max_timestep or noise.steps
    if settings.density == "auto" and (first, end) == (0, noise.steps):
        return noise.draw_t(b, rng("timesteps"))
    density = noise.density if settings.density == "auto" else settings.density
    share = DENSITIES[density](spread_evenly(b, rng("timesteps")), settings)
    return (first + share * (end - first)).long().clamp(max=end - 1)


def check_timesteps(settings: Settings, noise: Noise) -> None:
    """Raise RecipeError for timesteps that a base does not have."""
    if max(settings.min_timestep + 1, settings.max_timestep) > noise.steps:
        name, number = ("max", settings.max_timestep) if settings.max_timestep > noise.steps else ("min", settings.min_timestep)
        raise RecipeError(f"--{name}-timestep {number}: the base has the timesteps 0 to {noise.steps - 1}", "choose among them")


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of a tensor's shape, drawn on the CPU so that it is the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like.device)
