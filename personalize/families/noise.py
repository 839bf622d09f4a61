"""Noise schedules: how a clean image becomes noise on the way, and what a network's prediction says about it.

x_0 clean latents, eps standard normal noise, x_t what the network sees. Timesteps `t` are indices 0 .. steps - 1, from hardly any
noise to all of it; what a network is told of them is `time(t)`. No sampler and no objective asks for a prediction type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOST = 100.0  # noise / signal. Samplers that take two looks at a step overshoot from 4096, and Karras' steps are wasted above
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# What every scheduler of diffusers must share with the base's own.
_SHARED = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
_SHARED |= {"timestep_spacing", "steps_offset", "set_alpha_to_one"}
Self = TypeVar("Self", bound="Noise")


class Noise(Protocol):
    """What samplers and objectives may ask of a base's noise."""

    @property
    def prediction(self) -> str:
        """What the network predicts, in diffusers' word: for people, and for files that say so."""

    @property
    def steps(self) -> int:
        """How many timesteps there are."""

    @property
    def zero_snr(self) -> bool:
        """Whether nothing of the image is left at the last timestep."""

    def to(self: Self, device: str | torch.device) -> Self:
        """The same on a device."""

    def draw_t(self, b: int, generator: torch.Generator) -> Tensor:
        """[b] timesteps to train on, on the CPU; each is drawn from the density, and together they are spread evenly over it."""

    def add(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t [b, c, h, w] at timesteps [b]."""

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should predict [b, c, h, w]."""

    def clean(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_0 [b, c, h, w] as a prediction tells it."""

    @property
    def density(self) -> str:
        """How `draw_t` draws: uniform or logit-normal."""

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio [b] at timesteps [b]: of the powers of x_0 and eps in x_t."""

    def in_eps(self, t: Tensor) -> Tensor:
        """The squared error in eps [b] that a squared error of 1 in the prediction stands for."""

    def weight(self, t: Tensor, gamma: float) -> Tensor:
        """Weights [b] of squared errors in the prediction. With a gamma, min(SNR, gamma) on the error in x_0 that it stands for
        (min-SNR, Hang et al. 2023, arXiv 2303.09556, section 3.4), as far as it is finite; at 0 as the family was trained."""

    def time(self, t: Tensor) -> Tensor:
        """What the network is told of timesteps [b]."""

    def scheduler(self, name: str, options: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The class and config of a diffusers scheduler on this noise, after the base's own `config`: `name` is a class without
        `Scheduler`, `options` are its own. Raises LookupError, which says why, where there is none."""

    def native(self, kind: str) -> str:
        """The class, without `Scheduler`, that `scheduler` takes for what the base's config calls `kind`."""


@dataclass(frozen=True)
class VP:
    """x_t = signal(t) x_0 + noise(t) eps, with signal^2 + noise^2 = 1 (variance preserving: Ho et al. 2020, arXiv 2006.11239)."""

    alphas_cumprod: Tensor  # [T], signal^2; its last entry is 0 with zero-terminal SNR (Lin et al. 2023, arXiv 2305.08891)
    prediction: str = "epsilon"  # or v_prediction, or sample
    density: ClassVar[str] = "uniform"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> VP:
        """The noise and prediction type of a scheduler's config."""
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler.from_config(dict(config))
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def to(self, device: str | torch.device) -> VP:
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def zero_snr(self) -> bool:
        return bool(self.alphas_cumprod[-1] == 0)

    def finite(self) -> Tensor:
        """Betas [T] in fp64 of the same noise; where it ends without signal, its last timesteps go evenly to MOST instead."""
        import torch

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

    def in_eps(self, t: Tensor) -> Tensor:
        """v stands for an error in eps by the share of the signal, x_0 by the signal-to-noise ratio."""
        snr = self.snr(t)
        if self.prediction == "epsilon":
            return snr.new_ones(snr.shape)
        return self.alphas_cumprod.to(t.device)[t] if self.prediction == "v_prediction" else snr

    def draw_t(self, b: int, generator: torch.Generator) -> Tensor:
        """Uniform (Kingma et al. 2021, appendix I.1)."""
        return (spread_evenly(b, generator) * self.steps).long()

    def add(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.signal(t) * x0 + self.noise(t) * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """v = signal eps - noise x_0 (Salimans & Ho 2022, appendix D)."""
        if self.prediction == "v_prediction":
            return self.signal(t) * eps - self.noise(t) * x0
        return {"epsilon": eps, "sample": x0}[self.prediction]

    def clean(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "v_prediction":
            return self.signal(t) * x_t - self.noise(t) * predicted
        return (x_t - self.noise(t) * predicted) / self.signal(t) if self.prediction == "epsilon" else predicted

    def weight(self, t: Tensor, gamma: float) -> Tensor:
        """An error in eps weighs SNR times that in x_0, one in v SNR + 1 times: divided out. For eps at SNR = 0 the limit is 1.
        At 0 all timesteps weigh 1."""
        snr = self.snr(t)
        if gamma == 0:
            return snr.new_ones(snr.shape)
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1)
        return snr.clamp(max=gamma) / (snr + 1 if self.prediction == "v_prediction" else 1)

    def time(self, t: Tensor) -> Tensor:
        """The index itself."""
        return t

    def scheduler(self, name: str, options: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        shared = {key: value for key, value in config.items() if key in _SHARED} | {"clip_sample": False}
        noise = {"trained_betas": self.finite().tolist()} if self.zero_snr else {}  # most samplers divide by the signal
        return f"{name}Scheduler", shared | noise | dict(options)

    def native(self, kind: str) -> str:
        return kind


@dataclass(frozen=True)
class Flow:
    """x_t = (1 - sigma) x_0 + sigma eps; the network predicts eps - x_0 (rectified flow: Liu et al. 2022, arXiv 2209.03003).

    Training draws timesteps from a logit-normal density and weighs all errors in x_0 alike, as Stable Diffusion 3 was trained
    (Esser et al. 2024, arXiv 2403.03206, section 3.1).
    """

    sigmas: Tensor  # [T], ascending to 1
    times: Tensor  # [T], what the network is told
    prediction: ClassVar[str] = "flow"
    density: ClassVar[str] = "logit-normal"
    samplers: ClassVar[Mapping[str, str]] = {"EulerDiscrete": "FlowMatchEulerDiscrete", "HeunDiscrete": "FlowMatchHeunDiscrete"}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Flow:
        """The noise of a scheduler's config, shifted as it says (section 5.3.2: more noise for larger images)."""
        import torch

        count, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
        even = torch.arange(1, count + 1, dtype=torch.float32) / count
        sigmas = shift * even / (1 + (shift - 1) * even)
        return cls(sigmas, sigmas * count)

    def to(self, device: str | torch.device) -> Flow:
        return Flow(self.sigmas.to(device), self.times.to(device))

    @property
    def steps(self) -> int:
        return len(self.sigmas)

    @property
    def zero_snr(self) -> bool:
        return bool(self.sigmas[-1] == 1)

    def noise(self, t: Tensor) -> Tensor:
        """sigma [b, 1, 1, 1] at timesteps `t` [b]."""
        return self.sigmas.to(t.device)[t][:, None, None, None]

    def snr(self, t: Tensor) -> Tensor:
        """((1 - sigma) / sigma)^2 [b] at timesteps [b]."""
        sigma = self.sigmas.to(t.device)[t]
        return ((1 - sigma) / sigma).square()

    def in_eps(self, t: Tensor) -> Tensor:
        """eps = x_t + (1 - sigma) times the flow."""
        return (1 - self.sigmas.to(t.device)[t]).square()

    def draw_t(self, b: int, generator: torch.Generator) -> Tensor:
        """Logit-normal, before the shift: the logistic function of standard normal numbers."""
        import torch

        normal = torch.special.ndtri(spread_evenly(b, generator).double())
        return (normal.sigmoid() * self.steps).long().clamp(max=self.steps - 1)

    def add(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return (1 - self.noise(t)) * x0 + self.noise(t) * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0

    def clean(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t - self.noise(t) * predicted

    def weight(self, t: Tensor, gamma: float) -> Tensor:
        """An error in the flow is 1 / sigma times that in x_0, whose SNR is ((1 - sigma) / sigma)^2."""
        sigma = self.sigmas.to(t.device)[t]
        return (1 - sigma).square().clamp(max=gamma * sigma.square()) if gamma else sigma.square()

    def time(self, t: Tensor) -> Tensor:
        return self.times.to(t.device)[t]

    def scheduler(self, name: str, options: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if name not in self.samplers or any(options.values()):
            raise LookupError("which follows a rectified flow")
        shared = {key: value for key, value in config.items() if key in ("num_train_timesteps", "shift")}
        return f"{self.samplers[name]}Scheduler", shared

    def native(self, kind: str) -> str:
        return {flow: plain for plain, flow in self.samplers.items()}.get(kind, kind)


def spread_evenly(b: int, generator: torch.Generator) -> Tensor:
    """[b] numbers in [0, 1), each uniform, and together spread evenly."""
    import torch

    offset = torch.rand((), generator=generator)
    return (offset + torch.arange(b) / b) % 1
