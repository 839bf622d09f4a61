"""Optimizers on what learns: rates by part and layer, their schedule, clipping, and a state of named tensors.

An optimizer is a row of `registry.table("optimizers")` (rules.py): a function from parameter groups and the recipe's settings to
a torch.optim.Optimizer. Learning rates are set before each step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.kinds.kind import DORA
from ..errors import RecipeError
from ..recipe.adapter import EMBEDDING
from ..recipe.fields import Optim
from ..recipe.rule import Groups, rule_of
from ..tuning.rates import EVEN, Rate
from .averages import Average

GROWTH = 200  # steps without overflow after which float16's loss scale doubles; torch's own 2000 is longer than most runs here
SCALE = "loss scale"  # its name in the state
NUMBER = "="  # ends the names of what an optimizer holds as a plain number


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

    def grow(self) -> None:
        """A step was taken."""
        self.good += 1
        if self.good == GROWTH:
            self.value, self.good = self.value * 2, 0

    def shrink(self) -> None:
        """A gradient was infinite."""
        self.value, self.good = max(1.0, self.value / 2), 0


class Optimizer:
    """The recipe's optimizer with a schedule, gradient clipping and accumulation; its state is plain named tensors.

    With `scaled`, losses are scaled for float16, and gradients are scaled back before anything looks at them. `rates` say how
    layers learn, by path, where that differs.
    """

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, nn.Parameter]],
        optim: Optim,
        steps: int,
        *,
        scaled: bool = False,
        rates: Mapping[str, Rate] = {},
    ) -> None:
        self.optim = optim
        self.scale = Scale() if scaled else None
        self.parameters = {name: p for group in groups.values() for name, p in group.items()}
        text = {part: part.startswith("text_encoder") for part in groups}
        self.peak_lr = {part: optim.text_encoder_lr if is_text else optim.lr for part, is_text in text.items()}
        self.steps = {part: optim.text_encoder_steps(steps) if is_text else steps for part, is_text in text.items()}
        self.steps |= {EMBEDDING: math.ceil(optim.embedding_share * steps)} if EMBEDDING in groups else {}
        made = [one for part, group in groups.items() for one in parameter_groups(part, group, optim, rates)]
        self.row = rule_of(optim.optimizer)
        self.peak_lr |= {EMBEDDING: self.row.words_rate(optim.embedding_lr)}
        self.rule: torch.optim.Optimizer = self.row(made, optim)
        self.ema = Average(self.parameters, optim.ema) if optim.ema else None
        self._at_start = dict(group_values(self.rule))
        self._apart: dict[str, Tensor] = {}  # inside `holding_average`: the parameters as they are trained

    def share(self, losses: Tensor, of: int = 0) -> Tensor:
        """The mean of `losses` [b], to go back from: a scalar, scaled; over `accumulate` of them the gradients average.

        Where they are a piece of a batch of `of` images, theirs is a piece of the mean.
        """
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
        for group in self.rule.param_groups:
            group["lr"] = self.lr(group["part"], done, group.get("start", 0)) * group.get("faster", 1.0) * group.get("scale", 1.0)
        self.rule.step()
        self.skip()
        if self.scale:
            self.scale.grow()

    def follow(self, done: int) -> None:
        """Let the average follow the step after `done` steps, if there is one."""
        if self.ema:
            self.ema.follow(done)

    def skip(self) -> None:
        """Drop the gradients without an update."""
        self.rule.zero_grad()

    def lower_scale(self) -> bool:
        """After an infinite gradient: whether the loss scale was to blame, and is smaller now."""
        if self.scale is None or self.scale.at_floor:
            return False
        self.scale.shrink()
        return True

    def thaw(self, done: int) -> None:
        """Let those parameters have gradients that learn in the step after `done` steps."""
        for group in self.rule.param_groups:
            if start := group.get("start", 0):
                for parameter in group["params"]:
                    parameter.requires_grad_(done >= start)

    def lr(self, part: str, done: int, start: int = 0) -> float:
        """A part's learning rate for the step after `done` steps; 0 for a part that is not trained, or not any more.

        For layers that begin after `start` steps: the schedule's, which they warm up to.
        """
        steps = self.steps.get(part, 0)
        if not start <= done < steps:
            return 0.0
        warming = min(1.0, (done - start + 1) / self.optim.warmup) if start and self.optim.warmup else 1.0
        return self.peak_lr[part] * factor(self.optim, done, steps) * warming

    def state(self) -> dict[str, Tensor]:
        """Parameters and what the optimizer holds of them, on the CPU: name -> parameter, name + '.exp_avg' -> moment, ..."""
        tensors = {name: self._apart.get(name, p.detach()) for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= dict(named_values(name, self.rule.state.get(p, {})))
        tensors |= {key: as_tensor(value) for key, value in group_values(self.rule) if self._has_changed(key, value)}
        tensors |= self.ema.state() if self.ema else {}
        if self.scale:
            tensors[SCALE] = torch.tensor([self.scale.value, self.scale.good], dtype=torch.float64)
        return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises KeyError for a parameter that is not in it."""
        of_parameter: dict[str, dict[str, Any]] = {}
        for key in (key for key in tensors if key not in self.parameters):
            name, _, value = key.rpartition(".")
            of_parameter.setdefault(name, {})[value.removesuffix(NUMBER)] = value_of(key, tensors)
        for name, p in self.parameters.items():
            p.copy_(tensors[name])
            self.rule.state.pop(p, None)
            if held := of_parameter.get(name):  # there is nothing where no step was taken yet
                self.rule.state[p] = {
                    key: value.to(p.device, copy=True) if isinstance(value, Tensor) else value for key, value in held.items()
                }
        for group in self.rule.param_groups:
            for key in group_keys(group):
                del group[key]
            group |= values_of_group(group, self._at_start) | values_of_group(group, tensors)
        if self.ema:
            self.ema.load(tensors)
        if self.scale and SCALE in tensors:
            value, good = tensors[SCALE].tolist()
            self.scale = Scale(value, int(good))

    def _has_changed(self, key: str, value: Any) -> bool:
        """Whether a group's value is not what it was at the beginning; tensors come later, and change in place."""
        return isinstance(value, Tensor) or self._at_start.get(key) != value

    @contextlib.contextmanager
    @torch.no_grad()
    def holding_average(self) -> Iterator[None]:
        """Inside, parameters are what is drawn with, chosen and saved: their average, where there is one; `state` is the same."""
        average = self.average()
        if not average or self._apart:
            yield
            return
        self._apart = {name: self.parameters[name].detach().clone() for name in average}
        for name, value in average.items():
            self.parameters[name].copy_(value)
        try:
            yield
        finally:
            for name, value in self._apart.items():
                self.parameters[name].copy_(value)
            self._apart = {}

    def average(self) -> dict[str, Tensor]:
        """The average of each parameter that has one, by name."""
        if self.ema:
            return self.ema.values
        if not self.row.average:
            return {}
        groups = {p: group for group in self.rule.param_groups for p in group["params"]}
        held = self.rule.state
        return {name: self.row.average(p, held.get(p, {}), groups[p]) for name, p in self.parameters.items()}


def check_optimizer(optim: Optim, device: torch.device) -> None:
    """Raise RecipeError where an optimizer's package is missing, or does not work on a device: it takes a step there."""
    name, row = optim.optimizer, rule_of(optim.optimizer)
    if missing := row.missing_package(name):
        raise missing
    if not row.package:
        return
    parameter = nn.Parameter(torch.zeros(64, 64, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        row([{"params": [parameter], "part": "unet"}], optim).step()
    except (ImportError, OSError, RuntimeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"--optimizer {name} does not work on {device}: {why}", "--optimizer adamw does") from error


def parameter_groups(part: str, named: Mapping[str, nn.Parameter], optim: Optim, rates: Mapping[str, Rate]) -> Groups:
    """A part's parameters in groups that learn alike.

    `up` has its own rate (LoRA+), norms of DoRA do not decay (at 0 they take W away), and layers may have rates of their own.
    """
    groups: dict[str, dict[str, Any]] = {}
    order = sorted(set(rates.values()))  # their place is the same when a run is given more steps
    for name, parameter in named.items():
        path, _, role = name.rpartition(".")
        sort, more = kind_of_group(role, optim)
        if (rate := rates.get(path, EVEN)) != EVEN:
            sort, more = f"{sort} rate {order.index(rate)}", more | {"start": rate.start, "scale": rate.scale}
        group = groups.setdefault(sort, {"params": [], "part": part} | ({"called": part + sort} if sort else {}) | more)
        group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: "called" in group)


def kind_of_group(role: str, optim: Optim) -> tuple[str, dict[str, Any]]:
    """What parameters of a role are called, and what their group has of its own."""
    if role == "up" and optim.lora_plus != 1:
        return " up", {"faster": optim.lora_plus}
    return (" norms", {"weight_decay": 0.0}) if role == DORA else ("", {})


def named_values(name: str, held: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What an optimizer holds of a parameter, as named tensors; what is None is left out."""
    for key, value in held.items():
        if value is not None:
            yield state_name(f"{name}.{key}", value), as_tensor(value)


def group_values(rule: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Numbers and tensors that an optimizer holds of a whole group, some of which it changes, by name; rates are the loop's."""
    for group in rule.param_groups:
        yield from ((state_name(group_name(group, key), group[key]), group[key]) for key in group_keys(group))


def group_keys(group: Mapping[str, Any]) -> list[str]:
    """The keys of a group's numbers and tensors."""
    return [key for key, value in group.items() if key not in ("lr", "start") and isinstance(value, int | float | Tensor)]


def group_name(group: Mapping[str, Any], key: str) -> str:
    """What a group's value is called in the state."""
    return f"group {group.get('called', group['part'])} {key}"


def values_of_group(group: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A group's own of named values, by their keys; tensors as copies on its device."""
    begins, device, found = group_name(group, ""), group["params"][0].device, dict[str, Any]()
    for name in values:
        key = name.removeprefix(begins).removesuffix(NUMBER)
        if name.startswith(begins) and " " not in key:  # another group's name may begin alike
            value = value_of(name, values)
            found[key] = value.to(device, copy=True) if isinstance(value, Tensor) else value
    return found


def state_name(name: str, value: Any) -> str:
    """The name of a tensor, or of a plain number, in the state."""
    return name if isinstance(value, Tensor) else name + NUMBER


def as_tensor(value: float | Tensor) -> Tensor:
    """A number as a tensor that keeps it exactly: int64, bool or float64."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def value_of(key: str, tensors: Mapping[str, Any]) -> Any:
    """A tensor, or the plain number that it stands for."""
    value = tensors[key]
    return value.item() if key.endswith(NUMBER) and isinstance(value, Tensor) else value


def factor(optim: Optim, done: int, steps: int) -> float:
    """The share of the peak learning rate for the step after `done` of `steps` steps.

    >>> [round(factor(Optim(warmup=2, schedule="linear"), i, 6), 2) for i in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if done < optim.warmup:
        return (done + 1) / optim.warmup
    progress = (done - optim.warmup) / max(1, steps - optim.warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[optim.schedule]
