"""The noise schedule that a base was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST = 100.0  # noise / signal. Samplers that take two looks at a step overshoot from 4096, and Karras' steps are wasted above


@dataclass(frozen=True)
class Schedule:
    """x_t = signal(t) x_0 + noise(t) eps, with signal^2 + noise^2 = 1."""

    alphas_cumprod: Tensor  # [T], signal^2; its last entry is 0 with zero-terminal SNR (Lin et al. 2023, arXiv 2305.08891)
    prediction: str  # epsilon, v_prediction or sample

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Schedule:
        """The schedule and prediction type of a scheduler's config."""
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler.from_config(dict(config))
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def finite(self) -> Tensor:
        """Betas [T] in fp64 of the same noise; where it ends without signal, its last timesteps go evenly to MOST instead."""
        signal = self.alphas_cumprod.cpu().double()
        if signal[-1] == 0:
            ratio = ((1 - signal) / signal).sqrt()
            above = int((ratio > MOST).sum())
            last = ratio[-above - 1]
            ratio[-above:] = last * (MOST / last) ** (torch.arange(1, above + 1) / above)
            signal = 1 / (1 + ratio**2)
        return 1 - signal / torch.cat([torch.ones(1), signal[:-1]])

    def signal(self, t: Tensor) -> Tensor:
        """sqrt(alpha-bar) [b, 1, 1, 1] at timesteps `t` [b]."""
        return self.alphas_cumprod.to(t.device)[t].sqrt()[:, None, None, None]

    def noise(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha-bar) [b, 1, 1, 1] at timesteps `t` [b]."""
        return (1 - self.alphas_cumprod.to(t.device)[t]).sqrt()[:, None, None, None]

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio [b] at timesteps `t` [b]: alpha-bar / (1 - alpha-bar), 0 at a zero-terminal end."""
        signal = self.alphas_cumprod.to(t.device)[t]
        return signal / (1 - signal)
