"""Weights in the host's memory: a step on a small SDXL has the bits of one without, and nothing computes with what is away."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from personalize.models.model import Base, quiet
from personalize.models.offload import Offloaded, blocks_of, bring_back, offload, offload_of
from personalize.models.quantized import Quantized, quantize
from personalize.recipe.fields import Fitting
from personalize.training.memory.apply import apply_plan, is_compiled, obstacle_to_compiling
from personalize.training.memory.estimate import ghost
from personalize.training.memory.ladder import ComputePlan, first
from personalize.training.memory.meter import bytes_of, counting, tensors_of
from personalize.training.optimizers import Optimizer
from personalize.tuning.attach import attach
from tools.bench import step, throughput
from tools.bench.scripts import fill

module = importlib.import_module("personalize.models.offload")
CPU = torch.device("cpu")
RECIPE = step.recipe_of(2, 4)


@dataclass
class Copies:
    """What was copied to the device: the tensors in the host's memory, in order."""

    made: list[int]

    def blocks(self, held: Offloaded) -> list[int]:
        """The blocks of these, by number; one that was sent twice in a row is there twice."""
        first_of = {id(block.host[0]): number for number, block in enumerate(held.order)}
        return [first_of[one] for one in self.made if one in first_of]


@pytest.fixture(scope="module")
def small_sdxl() -> Base:
    """Random weights, in narrow layers; on loan: tests leave it as it was."""
    with quiet():
        base = ghost(throughput.tiny("sdxl")[1], ComputePlan())
    torch.manual_seed(0)
    for model in (base.denoiser, *(text.model for text in base.texts)):
        fill(model, CPU)
    base.device = CPU
    return base


@pytest.fixture
def base(small_sdxl: Base) -> Base:
    return replace(small_sdxl, denoiser=copy.deepcopy(small_sdxl.denoiser))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Copies:
    made, fill_there = Copies([]), module.fill

    def count(there: list[Tensor], host: list[Tensor]) -> None:
        made.made += map(id, host)
        fill_there(there, host)

    monkeypatch.setattr(module, "fill", count)
    return made


def take_steps(base: Base, count: int = 2) -> Iterator[list[Tensor]]:
    """After each step of a fresh adapter: its loss, its gradient's norm and its weights."""
    with attach(base, RECIPE.adapter) as attached:
        opt, inputs = Optimizer(attached.parameters(), RECIPE.optim, 4), step.batch_of(base, RECIPE, 8)
        for done in range(count):
            told = step.step(base, attached, opt, RECIPE, inputs, done)
            yield [torch.tensor(told), *(p.detach().clone() for p in opt.parameters.values())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def poison_host(held: Offloaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is in the host's memory be nonsense for whoever computes with it; only copies on the device are right."""
    true = {id(host): host.clone() for host in held.host}
    for host in held.host:
        host.fill_(float("nan") if host.is_floating_point() else 77)

    def fill_truly(there: list[Tensor], host: list[Tensor]) -> None:
        for new, one in zip(there, host, strict=True):
            new.copy_(true[id(one)])

    monkeypatch.setattr(module, "fill", torch.no_grad()(fill_truly))


@pytest.mark.parametrize(("precision", "packed", "checkpointing"), [
    ("float32", "none", True), ("float32", "int8", True), ("float32", "none", False),
    pytest.param("bfloat16", "nf4", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_steps_have_the_same_bits_and_nothing_computes_on_the_host(
    base: Base, monkeypatch: pytest.MonkeyPatch, precision: str, packed: str, checkpointing: bool
) -> None:
    base.dtype = getattr(torch, precision)
    base.denoiser.to(base.dtype)
    apply_plan(base, ComputePlan(precision, checkpointing=checkpointing, quantize=packed), CPU)
    plain = list(take_steps(base))
    offload(base.denoiser, CPU)
    held = offload_of(base.denoiser)
    assert held
    poison_host(held, monkeypatch)
    assert all(same(*pair) for pair in zip(take_steps(base), plain, strict=True))
    assert all(where[name] is host for block in held.blocks for (where, name), host in zip(block.slots, block.host, strict=True))


def test_a_block_travels_twice_a_step_and_the_next_one_is_ahead(base: Base, copied: Copies) -> None:
    apply_plan(base, ComputePlan(checkpointing=True), CPU)
    offload(base.denoiser, CPU)
    held = offload_of(base.denoiser)
    assert held
    steps = take_steps(base)
    next(steps)
    count = len(held.order)
    assert len(held.blocks) == count > 20, "every block was met in the first step"
    copied.made.clear()
    next(steps)
    way = copied.blocks(held)
    assert way == [*range(count), *reversed(range(2, count))], "up, and down to what lies before the first layer that learns"
    copied.made.clear()
    with torch.no_grad():
        for _ in range(2):
            base.denoise(torch.zeros(1, 4, 8, 8), torch.tensor([3]), step.batch_of(base, step.recipe_of(1, 4), 8).cond)
    assert copied.blocks(held) == [*range(count)] * 2, "a picture's steps go up only"


def test_what_is_ahead_and_not_wanted_does_not_stay(base: Base) -> None:
    model = nn.ModuleList([nn.Linear(8, 8).requires_grad_(False) for _ in range(3)])
    model._no_split_modules = ["Linear"]  # type: ignore[assignment]
    assert blocks_of(model) == list(model)
    offload(model, CPU)
    held, x = offload_of(model), torch.ones(1, 8)
    assert held
    for number in (0, 1, 2, 0, 2, 1, 2, 2, 0):  # in any order the weights are the right ones
        assert torch.equal(model[number](x), nn.functional.linear(x, held.blocks[number].host[0], model[number].bias))
        assert held.ahead is None or held.ahead[0] is not held.blocks[number]


def test_few_blocks_are_on_the_device_at_once(base: Base) -> None:
    apply_plan(base, ComputePlan(checkpointing=True), CPU)
    offload(base.denoiser, CPU)
    held = offload_of(base.denoiser)
    assert held
    away, largest = bytes_of(held.host), max(bytes_of(block.host) for block in held.blocks)
    with counting(tensors_of([base.denoiser])) as count:
        rest = count.now - away
        with torch.no_grad():
            base.denoise(torch.zeros(1, 4, 8, 8), torch.tensor([3]), step.batch_of(base, step.recipe_of(1, 4), 8).cond)
        assert count.now - away < rest + 3 * largest < rest + away / 3


def test_a_block_that_is_broken_off_leaves_its_weights_in_place(base: Base) -> None:
    offload(base.denoiser, CPU)
    held = offload_of(base.denoiser)
    assert held
    block = blocks_of(base.denoiser)[0]
    with pytest.raises(TypeError):
        block(torch.zeros(1), nonsense=True)
    assert all(where[name] is host for (where, name), host in zip(held.blocks[0].slots, held.blocks[0].host, strict=True))


def test_off_and_on_again_under_adapters_and_after_packing(base: Base) -> None:
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    offload(base.denoiser, CPU)
    offload(base.denoiser, CPU)  # as each rung of a ladder does anew
    assert {name: tensor.shape for name, tensor in base.denoiser.state_dict().items()} == {n: t.shape for n, t in before.items()}
    with attach(base, RECIPE.adapter):
        quantize(base.denoiser, "int8")
        offload(base.denoiser, CPU)
        held = offload_of(base.denoiser)
        assert held and all(sum(not p.requires_grad for p in block.host) == len(block.host) for block in held.blocks)
        codes = [m.codes for m in base.denoiser.modules() if isinstance(m, Quantized)]
        assert codes and {id(one) for one in codes} & set(map(id, held.host)), "what is packed is what travels"
    bring_back(base.denoiser, CPU)
    assert offload_of(base.denoiser) is None and not any(m._forward_pre_hooks for m in base.denoiser.modules())


def test_what_learns_norms_and_biases_stay(base: Base) -> None:
    with attach(base, RECIPE.adapter) as attached:
        offload(base.denoiser, CPU)
        held = offload_of(base.denoiser)
        assert held
        away = set(map(id, held.host))
        learned = [p for group in attached.parameters().values() for p in group.values()]
        assert not away & set(map(id, learned)) and all(host.ndim > 1 for host in held.host)
        left = [p for p in base.denoiser.parameters() if id(p) not in away and not p.requires_grad]
        assert bytes_of(left) < bytes_of(held.host) / 4


# ---------------------------------------------------------------- as a plan


def test_a_plan_offloads_on_a_gpu_alone_and_compiles_nothing_then(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("personalize.training.memory.apply.offload", lambda model, device: asked.append((model, device)))
    for one in blocks_of(base.denoiser):
        one._compiled_call_impl = lambda *_: None
    apply_plan(base, ComputePlan(offload=True), CPU)
    assert not asked and is_compiled(base)
    gpu, plan = torch.device("cuda"), ComputePlan(offload=True, compile=True)
    apply_plan(base, plan, gpu)
    assert asked == [(base.denoiser, gpu)] and not is_compiled(base)
    assert "host's memory" in obstacle_to_compiling(plan, gpu) and "compiled" not in plan.words(1)
    assert plan.words(1).endswith("UNet's weights in the host's memory")


def test_the_recipe_forces_or_forbids_it() -> None:
    gpu = torch.device("cuda")
    wanted = {choice: Fitting(precision="float32", offload=choice) for choice in ("auto", "yes", "no")}  # type: ignore[arg-type]
    assert [first(one, 1, gpu).offload for one in wanted.values()] == [False, True, False]
    assert not first(wanted["yes"], 1, CPU).offload, "there is nowhere to go"
    assert "offload" not in wanted["auto"].model_dump() and wanted["yes"].model_dump()["offload"] == "yes"
    assert "offload" not in ComputePlan().record() and ComputePlan(offload=True).record()["offload"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_steps_have_the_same_bits(base: Base) -> None:
    gpu = torch.device("cuda")
    base.dtype = torch.bfloat16
    base.denoiser.to(gpu, base.dtype)
    base.place(gpu)
    base.denoiser.enable_gradient_checkpointing()
    plain = list(take_steps(base, 3))
    offload(base.denoiser, gpu)
    held = offload_of(base.denoiser)
    assert held and {host.device.type for host in held.host} == {"cpu"} and all(host.is_pinned() for host in held.host)
    assert all(same(*pair) for pair in zip(take_steps(base, 3), plain, strict=True))
