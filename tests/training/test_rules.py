"""Every row of the table of optimizers: it descends, goes on to the bit, keeps to rates, and holds what the estimate says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from personalize import registry
from personalize.adapters.kinds.kind import DORA
from personalize.errors import RecipeError
from personalize.recipe.fields import Optim, Recipe
from personalize.recipe.resolve import from_json, resolve, to_json
from personalize.recipe.rule import rule_of
from personalize.training.memory.meter import bytes_of
from personalize.training.memory.moments import bytes_held, states_held
from personalize.training.optimizers import Optimizer, check_optimizer
from personalize.training.preflight import check
from personalize.tuning.rates import Rate

Make = Callable[..., Recipe]


class Counting(torch.optim.Optimizer):
    """Moves by the learning rate over a count; holds a plain int of each parameter, a float and later a tensor of each group."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0, "size": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["size"] *= 0.9
            group["seen"] = group.get("seen", torch.zeros(1)) + 1
            for p in (p for p in group["params"] if p.grad is not None):
                held = self.state[p]
                held["count"] = held.get("count", 0) + 1
                p -= group["lr"] * group["size"] * p.grad / held["count"] ** 0.1 / group["seen"] ** 0.1


ADDED: dict[str, Any] = {
    "momentum": lambda groups, optim: torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=optim.weight_decay),
    "plain": lambda groups, optim: torch.optim.SGD(groups, lr=0.0),
    "counting": lambda groups, optim: Counting(groups),
}
PACKAGES = {name: row.package for name in registry.table("optimizers") if (row := rule_of(name)).package}


def skipping(names: Any) -> list[Any]:
    """Rows, those left out whose package is not installed."""
    there = {name: find_spec(package) is not None for name, package in PACKAGES.items()}
    missing = [pytest.mark.skipif(True, reason="its package is not installed")]
    return [pytest.param(name, marks=[] if there.get(name, True) else missing) for name in names]


OURS = skipping(registry.table("optimizers"))
ROWS = [*OURS, *skipping(ADDED)]
PLAIN: dict[str, Any] = {"schedule": "constant", "warmup": 0, "weight_decay": 0.0, "clip": 0.0}


@pytest.fixture(autouse=True)
def added() -> Iterator[None]:
    """Rows as another package adds them."""
    for name, row in ADDED.items():
        registry.table("optimizers").add(name, row)
    yield
    for name in ADDED:
        registry.table("optimizers").remove(name)


def lr_of(name: str) -> float:
    """A rate that moves numbers of size 1 in some dozen steps."""
    return {"prodigy": 1.0, "lion": 0.03, "momentum": 0.1, "plain": 0.5, "counting": 1.0}.get(name, 50 * rule_of(name).usual)


def groups() -> dict[str, dict[str, nn.Parameter]]:
    """A layer large enough for 8-bit states, a small one, and one of a text encoder."""
    values = torch.Generator().manual_seed(0)
    return {
        "unet": {
            "unet.a.down": nn.Parameter(torch.randn(64, 64, generator=values)),
            "unet.a.up": nn.Parameter(torch.randn(3, 2, generator=values)),
            f"unet.a.{DORA}": nn.Parameter(torch.randn(5, generator=values)),
        },
        "text_encoder": {"text_encoder.b.down": nn.Parameter(torch.randn(4, 2, generator=values))},
    }


def make_optimizer(name: str, rates: dict[str, Rate] | None = None, **settings: Any) -> Optimizer:
    rate = lr_of(name)
    own = {"optimizer": name, "lr": rate, "text_encoder_lr": rate, **PLAIN, **settings}
    return Optimizer(groups(), Optim(**own), 60, rates=rates or {})


def distance(optimizer: Optimizer) -> float:
    """Mean squared distance from 0.5, of what would be saved."""
    with optimizer.holding_average(), torch.no_grad():
        return float(torch.cat([(p - 0.5).flatten() for p in optimizer.parameters.values()]).square().mean())


def run(optimizer: Optimizer, steps: int, done: int = 0) -> Optimizer:
    """Steps towards 0.5, each from the gradients of some of the numbers, as batches give them."""
    for i in range(done, done + steps):
        optimizer.thaw(i)
        keep = torch.Generator().manual_seed(i)
        parts = [((p - 0.5) * (torch.rand(p.shape, generator=keep) < 0.7)).square().sum() for p in optimizer.parameters.values()]
        optimizer.share(torch.stack(parts)).backward()
        optimizer.step(i, optimizer.norm())
    return optimizer


def values(optimizer: Optimizer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in optimizer.parameters.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ROWS)
def test_every_optimizer_descends(name: str) -> None:
    optimizer = make_optimizer(name)
    before = distance(optimizer)
    assert distance(run(optimizer, 60)) < 0.3 * before


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("stop", [1, 7])
def test_every_optimizer_goes_on_from_named_tensors_to_the_bit(name: str, stop: int) -> None:
    settings = {"weight_decay": 0.1, "lora_plus": 2.0, "warmup": 3}
    unbroken = run(make_optimizer(name, **settings), 12)
    state = load(save(run(make_optimizer(name, **settings), stop).state()))
    second = make_optimizer(name, **settings)
    second.load(state)
    assert same(second.state(), state)
    run(second, 12 - stop, stop)
    assert same(values(second), values(unbroken)) and not same(values(unbroken), values(make_optimizer(name)))
    assert same(second.state(), unbroken.state()) and distance(second) == distance(unbroken)


@pytest.mark.parametrize("name", ROWS)
def test_every_optimizer_goes_back_to_its_beginning(name: str) -> None:
    optimizer = make_optimizer(name)
    before = optimizer.state()
    run(optimizer, 2)
    optimizer.load(before)
    assert same(optimizer.state(), before) and set(before) == set(optimizer.parameters)
    assert same(run(optimizer, 2).state(), run(make_optimizer(name), 2).state())


@pytest.mark.parametrize("name", ROWS)
def test_what_is_averaged_is_drawn_with_and_nothing_else_changes(name: str) -> None:
    optimizer = run(make_optimizer(name), 5)
    trained, state = values(optimizer), optimizer.state()
    with optimizer.holding_average():
        assert same(values(optimizer), trained) is (rule_of(name).average is None)
        assert same(optimizer.state(), state)
        with optimizer.holding_average():  # a second time: the same
            assert same(optimizer.state(), state)
    assert same(optimizer.state(), state) and same(values(optimizer), trained)


def moves(name: str, **settings: Any) -> dict[str, Tensor]:
    """How far the first step takes each parameter."""
    optimizer = make_optimizer(name, **settings)
    before = values(optimizer)
    run(optimizer, 1)
    return {key: value - before[key] for key, value in values(optimizer).items()}


@pytest.mark.parametrize("name", ROWS)
def test_every_optimizer_keeps_to_the_rates_of_parts_and_layers(name: str) -> None:
    plain = moves(name)
    assert not moves(name, text_encoder_lr=0.0)["text_encoder.b.down"].any() and plain["text_encoder.b.down"].any()
    factors = {"unet.a.down": 1.0, "unet.a.up": 4.0, f"unet.a.{DORA}": 1.0, "text_encoder.b.down": 0.5}
    small = {"lr": lr_of(name) / 8, "text_encoder_lr": lr_of(name) / 8}
    plain = moves(name, **small)
    other = moves(name, **small | {"lora_plus": 4.0, "text_encoder_lr": lr_of(name) / 16})
    for key, factor in factors.items():
        assert torch.allclose(other[key], factor * plain[key], rtol=1e-3, atol=1e-6), key
    slower = moves(name, rates={"unet.a": Rate(scale=0.25), "text_encoder.b": Rate(start=1)})
    assert torch.allclose(4 * slower["unet.a.down"], moves(name)["unet.a.down"], rtol=1e-3, atol=1e-6)
    assert not slower["text_encoder.b.down"].any()


@pytest.mark.parametrize("name", OURS)
def test_weights_decay_and_the_norms_of_dora_do_not(name: str) -> None:
    free, held = moves(name), moves(name, weight_decay=0.5)
    assert torch.equal(free[f"unet.a.{DORA}"], held[f"unet.a.{DORA}"])
    assert not torch.equal(free["unet.a.down"], held["unet.a.down"])


@pytest.mark.parametrize("name", OURS)
def test_every_setting_of_the_optimizer_does_something_or_is_refused(name: str, tmp_path: Path) -> None:
    before = run(make_optimizer(name), 3).state()
    for field in ("beta1", "beta2"):
        if field in rule_of(name).betas:
            assert not same(run(make_optimizer(name, **{field: 0.5}), 3).state(), before)
        else:
            with pytest.raises(RecipeError, match=f"--{field} is nothing that --optimizer {name} has"):
                resolve(flags={"folder": tmp_path, "optimizer": name, field: 0.5})


@pytest.mark.parametrize("name", ROWS)
def test_the_estimate_of_what_an_optimizer_holds_is_what_it_holds(name: str) -> None:
    optimizer = run(make_optimizer(name), 2)
    held = [value for state in optimizer.rule.state.values() for value in state.values() if isinstance(value, Tensor)]
    steps = 4 * len(optimizer.parameters) if name == "adamw" else 0  # counts
    assert bytes_of(held) == bytes_held(optimizer.optim, [tuple(p.shape) for p in optimizer.parameters.values()]) + steps


EXPECTED = {"adamw": 2.0, "adamw8bit": 0.63, "prodigy": 4.0, "adafactor": 0.03, "lion": 1.0, "schedulefree": 2.0, "came": 1.06}


@pytest.mark.parametrize("name", OURS)
def test_what_is_held_of_a_large_parameter(name: str) -> None:
    assert states_held(Optim(optimizer=name)) == pytest.approx(EXPECTED[name], abs=0.02)


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize(("name", "lr"), [("adamw", 1e-3), ("prodigy", 1.0), ("adafactor", 1e-3), ("lion", 2e-4)])
def test_each_optimizer_has_a_usual_rate(tmp_path: Path, name: str, lr: float) -> None:
    assert resolve(flags={"folder": tmp_path, "optimizer": name}).optim.lr == pytest.approx(lr)
    assert Optim(optimizer=name).lr == pytest.approx(lr) and Optim(optimizer=name, lr=0.3).lr == 0.3
    recipe = resolve(flags={"folder": tmp_path, "optimizer": name, "lr": 0.25})
    assert recipe.optim.lr == 0.25 and from_json(to_json(recipe)).optim == recipe.optim


def test_rates_of_a_preset_are_converted_to_another_optimizer(tmp_path: Path) -> None:
    def rates(**flags: Any) -> tuple[float, float, str]:
        optim = resolve("sd15-subject", {"folder": tmp_path, **flags}).optim
        return optim.lr, optim.text_encoder_lr, optim.schedule

    assert rates() == (1e-4, 5e-5, "cosine")
    assert rates(optimizer="prodigy") == (1.0, 0.5, "cosine")
    assert rates(optimizer="lion") == (2e-5, 1e-5, "cosine")
    assert rates(optimizer="schedulefree")[2] == "constant"
    assert rates(optimizer="prodigy", lr=0.7) == (0.7, 0.5, "cosine")
    assert rates(optimizer="prodigy", lr=0.0, text_encoder_share=1.0)[1] == 0.5
    found = resolve("sd15-subject", {"folder": tmp_path, "optimizer": "prodigy"})
    again = resolve(None, {"optimizer": "adamw"}, start=found).optim
    assert (again.lr, again.text_encoder_lr) == (1e-3, 5e-4)  # what prodigy found is not known here
    assert resolve(None, {}, start=found).optim == found.optim


def test_a_tiny_rate_of_an_optimizer_that_finds_its_own_is_remarked(tmp_path: Path) -> None:
    tiny = resolve(flags={"folder": tmp_path, "optimizer": "prodigy", "lr": 1e-4})
    assert any("--lr 0.0001 is a factor of the rate that --optimizer prodigy finds" in one for one in tiny.remarks)
    assert not resolve(flags={"folder": tmp_path, "optimizer": "prodigy"}).remarks


@pytest.mark.parametrize(("flags", "why"), [
    ({"schedule": "cosine"}, "--schedule cosine and --optimizer schedulefree exclude each other"),
    ({"beta1": 0.0}, "--beta1 0 leaves --optimizer schedulefree nothing to average"),
])  # fmt: skip
def test_what_schedule_free_makes_no_sense_with_is_refused(tmp_path: Path, flags: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        resolve(flags={"folder": tmp_path, "optimizer": "schedulefree", **flags})


# ---------------------------------------------------------------- where it cannot be had


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_told_before_anything_else(make: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    row = rule_of(name)
    monkeypatch.setitem(sys.modules, row.package, None)
    with pytest.raises(RecipeError, match=rf"--optimizer {name} needs the package {row.package} \(pip install .*\[{row.extra}\]"):
        check(make(optimizer=name))


def test_what_does_not_work_on_a_device_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def step(self) -> None:
            raise RuntimeError("no kernel for this device\nand more")

    monkeypatch.setattr(registry.table("optimizers")["lion"].__class__, "__call__", lambda row, groups, optim: Broken())
    with pytest.raises(RecipeError, match=r"^--optimizer lion does not work on cpu: no kernel for this device \(--opt"):
        check_optimizer(Optim(optimizer="lion"), torch.device("cpu"))


@pytest.mark.parametrize("name, rate", [("adamw", 5e-3), ("lion", 5e-3 * rule_of("lion").rate), ("prodigy", 1.0)])
def test_a_words_rate_is_converted_too(name: str, rate: float) -> None:
    optim = Optim(optimizer=name, warmup=0, schedule="constant")
    held = Optimizer({"embedding": {"zwx": nn.Parameter(torch.zeros(2, 8))}}, optim, 4)
    assert held.lr("embedding", 1) == pytest.approx(rate)
