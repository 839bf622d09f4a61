"""How much the errors of a timestep weigh, and from where on large errors count less."""

from __future__ import annotations

import torch
from torch import Tensor

from ...families.noise import Noise
from ...recipe.objective import Objective as Settings

LEAST = 1e-8  # SNR; below, debiased estimation would divide by nothing


def weights(noise: Noise, t: Tensor, settings: Settings) -> Tensor:
    """Weights [b] of squared errors in the prediction. The papers weigh errors in eps; one in anything else weighs as the
    error in eps that it stands for."""
    if settings.weighting == "min-snr":
        return noise.weight(t, settings.min_snr)
    snr = noise.snr(t)
    if settings.weighting == "p2":  # Choi et al. 2022, arXiv 2204.00227; k = 1
        return noise.in_eps(t) / (1 + snr) ** settings.p2_gamma
    return noise.in_eps(t) / snr.clamp(min=LEAST).sqrt()  # Yu et al. 2023, arXiv 2310.08442


def bends(noise: Noise, t: Tensor, settings: Settings) -> Tensor | None:
    """From which error on the loss of each row grows evenly [b]; None where it is squared."""
    c = settings.huber
    if not c:
        return None
    if settings.huber_schedule == "constant":
        return torch.full_like(noise.snr(t), c)
    if settings.huber_schedule == "exponential":
        return c ** (t / noise.steps)
    return (1 - c) / (1 + noise.snr(t) ** -0.5) ** 2 + c


def powers(error: Tensor, bend: Tensor | None) -> Tensor:
    """The squares of errors [b, ...]; with a bend [b], the pseudo-Huber loss 2 c (sqrt(error^2 + c^2) - c), which is the square
    of small ones and 2 c times large ones."""
    if bend is None:
        return error.square()
    c = bend.to(error).reshape(-1, *[1] * (error.ndim - 1))
    return 2 * c * ((error.square() + c.square()).sqrt() - c)
