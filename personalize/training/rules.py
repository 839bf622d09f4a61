"""The optimizers that come along: rows of `registry.table("optimizers")`. torch and their packages are imported when one is made.

A rate of Lion or CAME is a fifth of AdamW's: Lion's authors advise a third to a tenth, and CAME's first steps are several times
as long as its rate says, for its confidence begins at nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..recipe.rule import Groups, Rule

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from ..recipe.fields import Optim


def adamw(groups: Groups, optim: Optim) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2017)."""
    import torch

    return torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay, fused=True)


def adamw8bit(groups: Groups, optim: Optim) -> Optimizer:
    """AdamW whose moments are held in 8 bits, in blocks (Dettmers et al. 2021); those of tensors below 4096 numbers are not."""
    from bitsandbytes.optim import AdamW8bit

    made: Optimizer = AdamW8bit(groups, lr=0.0, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
    return made


def prodigy(groups: Groups, optim: Optim) -> Optimizer:
    """Prodigy (Mishchenko & Defazio 2023), with Adam's bias correction and the safeguard for a warm-up, as its authors advise
    for diffusion models. Each group finds its own rate: the package's has one for all, and would pass over theirs."""
    from pytorch_optimizer import Prodigy

    class ByGroup(Prodigy):
        param_groups: Groups

        def step(self, closure: Any = None) -> None:
            every = self.param_groups
            try:
                for group in every:
                    self.param_groups = [group]
                    super().step()
            finally:
                self.param_groups = every

    betas, decay = (optim.beta1, optim.beta2), optim.weight_decay
    made: Optimizer = ByGroup(groups, betas=betas, weight_decay=decay, bias_correction=True, safeguard_warmup=True)
    return made


def adafactor(groups: Groups, optim: Optim) -> Optimizer:
    """Adafactor (Shazeer & Stern 2018): second moments by rows and columns, no first ones; at the recipe's rate, not its own."""
    from transformers.optimization import Adafactor

    decay = optim.weight_decay
    made: Optimizer = Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False, weight_decay=decay)
    return made


def lion(groups: Groups, optim: Optim) -> Optimizer:
    """Lion (Chen et al. 2023): the sign of a momentum."""
    from pytorch_optimizer import Lion

    made: Optimizer = Lion(groups, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
    return made


def schedule_free(groups: Groups, optim: Optim) -> Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024): gradients are taken between the steps' end and their average."""
    from pytorch_optimizer import ScheduleFreeAdamW

    made: Optimizer = ScheduleFreeAdamW(groups, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
    return made


def schedule_free_average(parameter: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """x of y = beta1 x + (1 - beta1) z: what is drawn with and saved."""
    return parameter.lerp(state["z"], 1 - 1 / group["betas"][0]) if "z" in state else parameter.clone()


def came(groups: Groups, optim: Optim) -> Optimizer:
    """CAME (Luo et al. 2023): Adafactor with a momentum that counts where it agrees with the gradients."""
    from pytorch_optimizer import CAME

    made: Optimizer = CAME(groups, betas=(optim.beta1, optim.beta2, 0.9999), weight_decay=optim.weight_decay)
    return made


PACKAGE: Any = {"package": "pytorch_optimizer", "extra": "optimizers"}
ADAMW = Rule(adamw)
ADAMW_8BIT = Rule(adamw8bit, package="bitsandbytes", extra="quantize")
PRODIGY = Rule(prodigy, finds_rate=True, **PACKAGE)
ADAFACTOR = Rule(adafactor, betas=())
LION = Rule(lion, rate=0.2, **PACKAGE)
SCHEDULE_FREE = Rule(schedule_free, scheduled=False, average=schedule_free_average, **PACKAGE)
CAME = Rule(came, rate=0.2, **PACKAGE)
