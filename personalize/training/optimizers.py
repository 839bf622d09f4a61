"""AdamW on an adapter's parameters, one learning rate per part, and its schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..recipe.fields import Optim

GROWTH = 200  # steps without overflow after which float16's loss scale doubles; torch's own 2000 is longer than most runs here
SCALE = "loss scale"  # its name in the state
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # torch's names for AdamW's state


@dataclass
class Scale:
    """Float16's dynamic loss scale (Micikevicius et al. 2018, section 3.2); powers of two, so that scaling rounds nothing.

    Gradients below 6e-8 would be 0 in float16, and those above 65504 infinite: the scale halves at each infinite gradient.
    """

    value: float = 2.0**16
    good: int = 0  # steps since it changed last

    @property
    def at_floor(self) -> bool:
        return self.value <= 1

    def grew(self) -> None:
        """A step was taken."""
        self.good += 1
        if self.good == GROWTH:
            self.value, self.good = self.value * 2, 0

    def shrank(self) -> None:
        """A gradient was infinite."""
        self.value, self.good = max(1.0, self.value / 2), 0


class Optimizer:
    """AdamW (Loshchilov & Hutter 2017) with a schedule, gradient clipping and accumulation; its state is plain named tensors.

    With `scaled`, losses are scaled for float16, and gradients are scaled back before anything looks at them.
    """

    def __init__(
        self, groups: Mapping[str, Mapping[str, nn.Parameter]], optim: Optim, steps: int, *, scaled: bool = False
    ) -> None:
        self.optim = optim
        self.scale = Scale() if scaled else None
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

    def backward(self, losses: Tensor, of: int = 0, again: bool = False) -> None:
        """Add the gradient of the mean of `losses` [b]; over `accumulate` calls the gradients average.

        Where they are a piece of a batch of `of` pictures, theirs is a piece of the mean. `again` keeps what a later piece needs.
        """
        self.share(losses, of).backward(retain_graph=again)

    def share(self, losses: Tensor, of: int = 0) -> Tensor:
        """What `backward` differentiates: a scalar."""
        share = len(losses) / (of or len(losses)) * (self.scale.value if self.scale else 1)
        return losses.mean() * share / self.optim.accumulate

    def norm(self) -> Tensor:
        """The gradient's norm over all parameters, before clipping; a scalar that stays on the device. Undoes the loss scale."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.scale:
            torch._foreach_mul_(grads, 1 / self.scale.value)
        return nn.utils.get_total_norm(grads)

    def step(self, done: int, norm: Tensor) -> None:
        """Clip and update, as the step after `done` steps; the gradients are spent."""
        if self.optim.clip:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.optim.clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr(group["part"], done)
        self.adamw.step()
        self.skip()
        if self.scale:
            self.scale.grew()

    def skip(self) -> None:
        """Drop the gradients without an update."""
        self.adamw.zero_grad()

    def overflowed(self) -> bool:
        """After an infinite gradient: whether the loss scale was to blame, and is smaller now."""
        if self.scale is None or self.scale.at_floor:
            return False
        self.scale.shrank()
        return True

    def lr(self, part: str, done: int) -> float:
        """A part's learning rate for the step after `done` steps; 0 for a part that is not trained, or not any more."""
        steps = self.steps.get(part, 0)
        return self.peak_lr[part] * factor(self.optim, done, steps) if done < steps else 0.0

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments, on the CPU: name -> parameter, name + '.exp_avg' -> moment, ..."""
        tensors = {name: p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{name}.{moment}": value for moment, value in self.adamw.state.get(p, {}).items()}
        if self.scale:
            tensors[SCALE] = torch.tensor([self.scale.value, self.scale.good], dtype=torch.float64)
        return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises KeyError for a parameter that is not in it."""
        for name, p in self.parameters.items():
            p.copy_(tensors[name])
            moments = {m: tensors[f"{name}.{m}"].to(p.device, copy=True) for m in MOMENTS if f"{name}.{m}" in tensors}
            self.adamw.state.pop(p, None)
            if moments:  # there are none where no step was taken yet
                self.adamw.state[p] = moments
        if self.scale and SCALE in tensors:
            value, good = tensors[SCALE].tolist()
            self.scale = Scale(value, int(good))


def factor(optim: Optim, done: int, steps: int) -> float:
    """The share of the peak learning rate for the step after `done` of `steps` steps.

    >>> [round(factor(Optim(warmup=2, schedule="linear"), i, 6), 2) for i in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if done < optim.warmup:
        return (done + 1) / optim.warmup
    progress = (done - optim.warmup) / max(1, steps - optim.warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[optim.schedule]
