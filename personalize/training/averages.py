"""An average of the weights on the way: steadier than where the last step has led."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

AVERAGE = "average "  # begins the names of its tensors in the state


class Average:
    """An exponential moving average of parameters (Polyak & Juditsky 1992): what is drawn with, chosen and saved.

    It forgets its beginning, as diffusers' EMAModel does: after n steps it keeps min(decay, (1 + n) / (10 + n)) of itself.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def follow(self, done: int) -> None:
        """Take in what the step after `done` steps has led to."""
        share = 1 - kept_after(self.decay, done)
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.parameters.values()], share)

    def state(self) -> dict[str, Tensor]:
        """Its tensors, by name."""
        return {AVERAGE + name: value for name, value in self.values.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, value in self.values.items():
            value.copy_(tensors[AVERAGE + name])


def kept_after(decay: float, done: int) -> float:
    """What an average keeps of itself in the step after `done` steps.

    >>> [round(kept_after(0.9, done), 2) for done in (0, 1, 10, 80, 1000)]
    [0.0, 0.18, 0.55, 0.9, 0.9]
    """
    return min(decay, (1 + done) / (10 + done)) if done else 0.0
