"""Averages of the weights: what is drawn, chosen and saved, in whole runs that are broken off, in fleets, and in memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from personalize.adapters.adapter import Adapter, distance
from personalize.errors import RecipeError
from personalize.recipe.fields import Optim, Recipe
from personalize.recipe.resolve import resolve
from personalize.training.averages import Average, kept_after
from personalize.training.events import Event, Finished, Sample, Saved
from personalize.training.fleet import train_fleet
from personalize.training.inputs import prepare_data
from personalize.training.loop import train
from personalize.training.memory.plan import choose_memory_plan, estimate_of
from personalize.training.memory.recover import probe
from personalize.training.optimizers import Optimizer
from personalize.training.preflight import check
from personalize.training.run import start_run
from personalize.training.rundir import Run
from personalize.tuning.attach import attach

pytestmark = pytest.mark.usefixtures("short_exam", "one_thread")
Make = Callable[..., Recipe]
FREE = pytest.mark.skipif(find_spec("pytorch_optimizer") is None, reason="its package is not installed")
WAYS: dict[str, dict[str, Any]] = {"ema": {"ema": 0.9}, "schedulefree": {"optimizer": "schedulefree"}}
EACH = [pytest.param(name, marks=[FREE] if name == "schedulefree" else []) for name in WAYS]


def run(recipe: Recipe) -> list[Event]:
    return list(train(recipe))


def files(recipe: Recipe) -> dict[str, bytes]:
    """Everything drawn and saved, but the state."""
    assert recipe.output
    paths = [path for path in recipe.output.rglob("*") if path.suffix in (".png", ".safetensors") and path.stem != "state"]
    return {path.relative_to(recipe.output).as_posix(): path.read_bytes() for path in paths}


def adapter_of(recipe: Recipe, name: str = "zwx.safetensors") -> Adapter:
    assert recipe.output
    return Adapter.load(recipe.output / name)


def test_the_average_is_that_of_diffusers() -> None:
    def grow(take: Callable[[nn.Parameter, int], None]) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        for step in range(30):
            with torch.no_grad():
                parameter += torch.randn(3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            take(parameter, step)
        return parameter

    theirs: list[EMAModel] = []
    ours: list[Average] = []

    def take(parameter: nn.Parameter, step: int) -> None:
        if not theirs:
            theirs.append(EMAModel([parameter], decay=0.7))
            ours.append(Average({"a": parameter}, 0.7))
        theirs[0].step([parameter])
        ours[0].follow(step)
        assert torch.allclose(ours[0].values["a"], theirs[0].shadow_params[0], rtol=1e-12)
        assert kept_after(0.7, step) == theirs[0].cur_decay_value

    grow(take)


@pytest.mark.parametrize("way", EACH)
def test_broken_off_anywhere_it_ends_with_the_same_bytes(make: Make, tmp_path: Path, way: str) -> None:
    flags = {
        **WAYS[way],
        "steps": 5,
        "checkpoint_every": 2,
        "sample_every": 2,
        "sample_prompts": ["{trigger}"],
        "text_encoder_lr": 1e-3,
    }
    whole, broken = (make(**flags, output=tmp_path / name) for name in ("whole", "broken"))
    events = run(whole)
    for _ in range(3):  # in training, in the middle of pictures, after a checkpoint
        part = train(broken)
        list(islice(part, 6))
        part.close()
    assert isinstance(run(broken)[-1], Finished)
    assert files(whole) == files(broken)
    assert {event.step for event in events if isinstance(event, Sample)} == {0, 2, 4, 5}
    last = Run(tmp_path / "whole", "zwx").load_state()
    again = Run(tmp_path / "broken", "zwx").load_state()
    assert last and again and last.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(last.tensors[name], again.tensors[name]) for name in last.tensors)


@pytest.mark.parametrize("way", EACH)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_saved_is_the_average_and_what_goes_on_is_not(make: Make, tmp_path: Path, way: str, kind: str) -> None:
    more = {"targets": ["self-attention"]} if kind == "full" else {}
    recipe = make(**WAYS[way], **more, kind=kind, steps=3, checkpoint_every=3)
    saved = [event for event in run(recipe) if isinstance(event, Saved)]
    assert len(saved) >= 2
    state = Run(tmp_path / "run", "zwx").load_state()
    assert state
    plan = check(make(**WAYS[way], **more, kind=kind, steps=3, output=tmp_path / "other"))
    with attach(plan.base, recipe.adapter) as attached:
        opt = Optimizer(attached.parameters(), recipe.optim, recipe.steps, rates=plan.rates)
        opt.load(state.tensors)
        trained = attached.snapshot()
        with opt.holding_average():
            average = attached.snapshot()
    assert distance(adapter_of(recipe), average) < 1e-6 < 1e-2 < distance(adapter_of(recipe), trained)
    by_hand = {name: opt.average()[name] for name in opt.parameters}
    assert set(by_hand) == set(state.tensors) & set(opt.parameters)


def test_without_an_average_nothing_of_it_is_there(make: Make) -> None:
    optimizer = Optimizer({"unet": {"unet.a.up": nn.Parameter(torch.ones(2))}}, Optim(), 3)
    assert optimizer.ema is None and not optimizer.average()
    assert "ema" not in make().optim.model_dump()


@pytest.mark.parametrize("way", EACH)
def test_members_of_a_fleet_have_averages_of_their_own(make: Make, tmp_path: Path, way: str) -> None:
    def recipes(where: str) -> list[Recipe]:
        settings: list[dict[str, Any]] = [WAYS[way], {"lr": 2e-3}, {**WAYS[way], "seed": 1}]
        return [make(**one, steps=3, warmup=0, output=tmp_path / where / str(i)) for i, one in enumerate(settings)]

    together, alone = recipes("together"), recipes("alone")
    told = list(train_fleet(together))
    assert sum(isinstance(event, Finished) for _, event in told) == 3
    for one, other in zip(together, alone, strict=True):
        run(other)
        assert distance(adapter_of(one), adapter_of(other)) < 2e-4


@pytest.mark.parametrize("way", EACH)
def test_the_average_is_counted_in_memory(make: Make, way: str) -> None:
    flags = {"memory": "900MB", "rank": 16, "batch_size": 1}
    plain, averaged = (check(make(**flags, **more)) for more in ({}, WAYS[way]))
    without, kept = (estimate_of(plan, choose_memory_plan(plan).compute) for plan in (plain, averaged))
    size = without.adapter // 4
    assert kept.adapter == without.adapter + (size if way == "ema" else 0)
    assert kept.sampling - without.sampling == size + (size if way == "ema" else 0)
    assert (kept.weights, kept.activations) == (without.weights, without.activations)


def test_a_probe_leaves_the_average_as_it_was(make: Make) -> None:
    plan = check(make(**WAYS["ema"]))
    data = prepare_data(plan)
    with attach(plan.base, plan.recipe.adapter) as attached:
        active = start_run(plan, data, attached, choose_memory_plan(plan))
        before = active.opt.state()
        probe(active, next(active.batches), lambda: None)
        after = active.opt.state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@FREE
def test_two_averages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--ema averages what --optimizer schedulefree averages by itself"):
        resolve(flags={"folder": tmp_path, "optimizer": "schedulefree", "ema": 0.9})
