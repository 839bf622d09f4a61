"""The optimizer: what each of its settings does, on a problem small enough to know the answer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from personalize.errors import RecipeError
from personalize.recipe.fields import Optim
from personalize.recipe.resolve import from_json, resolve, to_json, to_toml
from personalize.recipe.settings import flatten
from personalize.training.optimizers import Optimizer, factor

PLAIN: dict[str, Any] = {"lr": 0.1, "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "clip": 0.0}


def groups() -> dict[str, dict[str, nn.Parameter]]:
    return {
        "unet": {"unet.a.up": nn.Parameter(torch.tensor([1.0, -2.0])), "unet.a.down": nn.Parameter(torch.tensor([[0.5]]))},
        "text_encoder": {"text_encoder.b.up": nn.Parameter(torch.tensor([3.0]))},
    }


def losses(optimizer: Optimizer, scale: float = 1.0) -> Tensor:
    return scale * torch.cat([p.flatten().square() for p in optimizer.parameters.values()])


def run(steps: int = 3, total: int = 10, start: Optimizer | None = None, done: int = 0, **settings: Any) -> Optimizer:
    optimizer = start or Optimizer(groups(), Optim(**(PLAIN | settings)), total)
    for i in range(done, done + steps):
        for micro in range(optimizer.optim.accumulate):
            optimizer.share(losses(optimizer, 1.0 + i + micro)).backward()
        optimizer.step(i, optimizer.norm())
    return optimizer


def values(optimizer: Optimizer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in optimizer.parameters.values()])


def test_each_part_has_its_own_learning_rate() -> None:
    before = values(run(0))
    moved = values(run(1, lr=0.1, text_encoder_lr=0.01)) - before
    assert torch.allclose(
        moved.abs(), torch.tensor([0.1, 0.1, 0.1, 0.01]), rtol=1e-4
    )  # AdamW's first step is lr, whatever the gradient
    optimizer = run(0, lr=0.1, text_encoder_lr=0.01)
    assert (optimizer.lr("unet", 0), optimizer.lr("text_encoder", 0), optimizer.lr("text_encoder_2", 0)) == (0.1, 0.01, 0.0)


@pytest.mark.parametrize(
    ("schedule", "warmup", "shares"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("constant", 2, [0.5, 1, 1, 1]),
        ("linear", 2, [0.5, 1, 1, 0.5]),
        ("cosine", 10, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_schedules(schedule: Any, warmup: int, shares: list[float]) -> None:
    settings = Optim(schedule=schedule, warmup=warmup)
    assert [factor(settings, i, 4) for i in range(4)] == pytest.approx(shares)


def test_schedule_moves_the_parameters_that_much() -> None:
    optimizer = Optimizer(groups(), Optim(**(PLAIN | {"warmup": 4})), 10)
    before = values(optimizer)
    optimizer.share(losses(optimizer)).backward()
    optimizer.step(0, optimizer.norm())
    assert torch.allclose((values(optimizer) - before)[:3].abs(), torch.tensor(0.025), rtol=1e-4)


def test_gradients_are_clipped_to_their_norm() -> None:
    def gradient(clip: float) -> Tensor:
        """What AdamW saw at its first step, from its first moment."""
        state = run(1, clip=clip).state()
        return torch.cat([state[name].flatten() for name in state if name.endswith("exp_avg")]) / (1 - 0.9)

    optimizer = run(0)
    optimizer.share(losses(optimizer)).backward()
    free = gradient(0.0)
    assert optimizer.norm() == pytest.approx(free.norm().item(), rel=1e-5)
    assert gradient(0.5).norm() == pytest.approx(0.5, rel=1e-4)
    assert torch.allclose(gradient(0.5) / 0.5, free / free.norm(), atol=1e-4)
    assert torch.allclose(gradient(100.0), free)


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    halves = Optimizer(groups(), Optim(**(PLAIN | {"accumulate": 2})), 10)
    whole = Optimizer(groups(), Optim(**PLAIN), 10)
    per_item = [losses(halves, 1.0), losses(halves, 5.0)]
    for half in per_item:
        halves.share(half).backward()
    whole.share(torch.cat([losses(whole, 1.0), losses(whole, 5.0)])).backward()
    assert halves.norm() == pytest.approx(whole.norm().item())


def test_weight_decay_is_decoupled() -> None:
    free, held = run(1), run(1, weight_decay=0.5)
    start = values(run(0))
    assert torch.allclose((values(free) - values(held))[:3], 0.1 * 0.5 * start[:3], rtol=1e-4)


@pytest.mark.parametrize(("name", "moment"), [("beta1", "exp_avg"), ("beta2", "exp_avg_sq")])
def test_betas_are_the_decay_of_their_moment(name: str, moment: str) -> None:
    for beta in (0.5, 0.9):
        state = run(1, **{name: beta}).state()
        gradient = 2 * 0.5 / 4  # of the mean of four squares, at 0.5
        assert state[f"unet.a.down.{moment}"].item() == pytest.approx(
            (1 - beta) * gradient ** (1 if name == "beta1" else 2), rel=1e-4
        )


def test_going_on_from_a_state_equals_never_stopping() -> None:
    unbroken = run(6, schedule="cosine", weight_decay=0.1)
    state = run(3, schedule="cosine", weight_decay=0.1).state()
    second = Optimizer(groups(), unbroken.optim, 10)
    second.load(state)
    run(3, start=second, done=3)
    assert torch.equal(values(second), values(unbroken))
    assert {name: value.tolist() for name, value in second.state().items()} == {
        name: value.tolist() for name, value in unbroken.state().items()
    }


def test_a_state_before_the_first_step_has_no_moments() -> None:
    state = run(0).state()
    assert set(state) == {"unet.a.up", "unet.a.down", "text_encoder.b.up"}
    second = Optimizer(groups(), Optim(**PLAIN), 10)
    second.load(state)
    assert torch.equal(values(run(2, start=second)), values(run(2)))


def test_the_state_is_a_copy() -> None:
    optimizer = run(1)
    state = optimizer.state()
    before = {name: value.clone() for name, value in state.items()}
    run(1, start=optimizer, done=1)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_skipping_changes_nothing() -> None:
    optimizer = run(2)
    before = optimizer.state()
    optimizer.share(losses(optimizer) * torch.nan).backward()
    assert optimizer.norm().isnan()
    optimizer.skip()
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state().items())
    assert all(p.grad is None for p in optimizer.parameters.values())


def test_an_optimizer_that_there_is_not_is_refused_and_the_default_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--optimizer must be one of adamw, adamw8bit, prodigy, .*not 'adamv'.*adamw"):
        resolve(flags={"folder": tmp_path, "optimizer": "adamv"})
    plain, other = resolve(flags={"folder": tmp_path}), resolve(flags={"folder": tmp_path, "optimizer": "adafactor"})
    assert "optimizer" not in flatten(plain) and "optimizer =" not in to_toml(plain)
    assert flatten(other)["optimizer"] == "adafactor" and 'optimizer = "adafactor"' in to_toml(other)
    assert from_json(to_json(other)).optim == other.optim and from_json(to_json(plain)).optim == plain.optim
