"""AdamW on an adapter's parameters, one learning rate per part, and its schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .recipe import Optim

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # torch's names for AdamW's state


class Optimizer:
    """AdamW (Loshchilov & Hutter 2017) with a schedule, gradient clipping and accumulation; its state is plain named tensors."""

    def __init__(self, groups: Mapping[str, Mapping[str, nn.Parameter]], optim: Optim, steps: int) -> None:
        self.optim = optim
        self.parameters = {name: p for group in groups.values() for name, p in group.items()}
        text = {part: part.startswith("text_encoder") for part in groups}
        self.peak_lr = {part: optim.text_encoder_lr if is_text else optim.lr for part, is_text in text.items()}
        self.steps = {part: optim.text_encoder_steps(steps) if is_text else steps for part, is_text in text.items()}
        self.adamw = torch.optim.AdamW(
            [{"params": list(group.values()), "part": part} for part, group in groups.items()],
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def backward(self, losses: Tensor) -> None:
        """Add the gradient of the mean of `losses` [b]; over `accumulate` calls the gradients average."""
        (losses.mean() / self.optim.accumulate).backward()

    def norm(self) -> Tensor:
        """The gradient's norm over all parameters, before clipping; a scalar that stays on the device."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    def step(self, done: int, norm: Tensor) -> None:
        """Clip and update, as the step after `done` steps; the gradients are spent."""
        if self.optim.clip:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.optim.clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr(group["part"], done)
        self.adamw.step()
        self.skip()

    def skip(self) -> None:
        """Drop the gradients without an update."""
        self.adamw.zero_grad()

    def lr(self, part: str, done: int) -> float:
        """A part's learning rate for the step after `done` steps; 0 for a part that is not trained, or not any more."""
        steps = self.steps.get(part, 0)
        return self.peak_lr[part] * factor(self.optim, done, steps) if done < steps else 0.0

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments, on the CPU: name -> parameter, name + '.exp_avg' -> moment, ..."""
        tensors = {name: p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{name}.{moment}": value for moment, value in self.adamw.state[p].items()}
        return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises KeyError for a parameter that is not in it."""
        for name, p in self.parameters.items():
            p.copy_(tensors[name])
            moments = {m: tensors[f"{name}.{m}"].to(p.device, copy=True) for m in MOMENTS if f"{name}.{m}" in tensors}
            if moments:  # there are none where no step was taken yet
                self.adamw.state[p] = moments


def factor(optim: Optim, done: int, steps: int) -> float:
    """The share of the peak learning rate for the step after `done` of `steps` steps.

    >>> [round(factor(Optim(warmup=2, schedule="linear"), i, 6), 2) for i in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if done < optim.warmup:
        return (done + 1) / optim.warmup
    progress = (done - optim.warmup) / max(1, steps - optim.warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[optim.schedule]
