"""What a recipe knows of an optimizer: a row of `registry.table("optimizers")`, without torch and its own package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Groups = list[dict[str, Any]]  # torch's parameter groups
ADAMW = "adamw"
RATE = 1e-3  # AdamW's, where nothing is said
WORDS_RATE = 5e-3  # the same of vectors for words
BETAS = ("beta1", "beta2")
SMALL_SHARE = 0.1  # of a rate that is a factor of what the optimizer finds; below it hardly anything is learned


@dataclass(frozen=True)
class Rule:
    """How parameters follow their gradients, and what the recipe must know of it.

    `make` takes parameter groups and the recipe's section [optim]. A row can be such a function alone: then all else is as here.
    """

    make: Callable[[Groups, Any], Optimizer]
    rate: float = 1.0  # the learning rate that does what 1 does with AdamW
    finds_rate: bool = False  # the learning rate is a factor of what it finds by itself: 1
    scheduled: bool = True  # False: it averages instead, and wants a constant rate
    betas: tuple[str, ...] = BETAS  # which of these settings it has
    package: str = ""  # that it is imported from, where that is not one of ours
    extra: str = ""  # of ours that brings it
    average: Callable[[Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor] | None = None  # parameter, state, group -> weights

    def __call__(self, groups: Groups, optim: Any) -> Optimizer:
        return self.make(groups, optim)

    @property
    def usual(self) -> float:
        """The learning rate where nothing is said."""
        return 1.0 if self.finds_rate else RATE * self.rate

    def words_rate(self, rate: float) -> float:
        """The learning rate of vectors for which AdamW's would be `rate`; of one that finds it, a share of what it finds."""
        return rate / WORDS_RATE if self.finds_rate else rate * self.rate

    def missing_package(self, name: str) -> RecipeError | None:
        """Where its package is missing: what to say of that."""
        return missing_package(f"--optimizer {name}", self.package, self.extra) if self.package else None


def missing_package(what: str, package: str, extra: str) -> RecipeError | None:
    """Where a package is missing that an extra of ours brings: what to say of that."""
    if find_spec(package) is not None:
        return None
    return RecipeError(f"{what} needs the package {package}", f"pip install 'personalize[{extra}]'")


def rule_of(name: str) -> Rule:
    """The row of an optimizer. Raises RecipeError for a name that is none."""
    row = registry.table("optimizers")[name]
    return row if isinstance(row, Rule) else Rule(row)


def with_usual(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of [optim] with the rate and the schedule that the optimizer wants, where they say nothing of it."""
    name = values.get("optimizer", ADAMW)
    if name == ADAMW or name not in registry.table("optimizers"):
        return dict(values)
    rule = rule_of(name)
    return {"lr": rule.usual} | ({} if rule.scheduled else {"schedule": "constant"}) | dict(values)


def convert_rates(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Settings that were made for another optimizer, such as a preset's, as they are for this one: rates keep their ratio.

    >>> convert_rates({"lr": 1e-4, "text_encoder_lr": 5e-5, "rank": 8}, "prodigy")
    {'lr': 1.0, 'text_encoder_lr': 0.5, 'rank': 8}
    """
    was = values.get("optimizer", ADAMW)
    if name == was or name not in registry.table("optimizers"):
        return dict(values)
    before, now = rule_of(was), rule_of(name)
    rates = {key: float(values[key]) for key in ("lr", "text_encoder_lr") if isinstance(values.get(key), int | float)}
    largest = rates.get("lr", before.usual) or rates.get("text_encoder_lr", 0.0)
    either = before.finds_rate or now.finds_rate
    factor = (now.usual / largest if largest else 1.0) if either else now.rate / before.rate
    left = {key: value for key, value in values.items() if now.scheduled or key != "schedule"}
    return left | {key: float(f"{rate * factor:.6g}") for key, rate in rates.items()}


def check_rule(optim: Any) -> None:
    """Raise RecipeError for settings of [optim] that its optimizer does not have."""
    name, defaults = optim.optimizer, type(optim).model_fields
    if name == ADAMW:
        return
    rule = rule_of(name)
    for field in BETAS:
        if field not in rule.betas and getattr(optim, field) != defaults[field].default:
            raise RecipeError(f"--{field} is nothing that --optimizer {name} has", "leave it out")
    if not rule.scheduled and optim.schedule != "constant":
        what = f"--schedule {optim.schedule} and --optimizer {name} exclude each other: it averages instead"
        raise RecipeError(what, "leave the schedule out, or say constant")
    if rule.average and optim.scale_weight_norms:
        raise RecipeError(f"--scale-weight-norms scales what --optimizer {name} does not go on from", "leave it out")
    if rule.average and optim.ema:
        raise RecipeError(f"--ema averages what --optimizer {name} averages by itself", "leave it out")
    if rule.average and not optim.beta1:
        raise RecipeError(f"--beta1 0 leaves --optimizer {name} nothing to average", "0.9 is usual")


def remarks_on_rates(optim: Any) -> list[str]:
    """What is allowed, and most likely not meant."""
    name, largest = optim.optimizer, max(optim.lr, optim.text_encoder_lr)
    if name == ADAMW or not rule_of(name).finds_rate or largest >= SMALL_SHARE:
        return []
    return [f"--lr {largest:g} is a factor of the rate that --optimizer {name} finds, so that hardly anything is learned: --lr 1"]
