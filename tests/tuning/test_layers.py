"""Layers that follow their input's dtype: the bits of peft's in fp32, and one cast for all of them in other dtypes."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn

from personalize.adapters.strengths.grammar import Weighting
from personalize.data.batches import generator
from personalize.inference.sampling import diffuse
from personalize.models.model import Base
from personalize.recipe.fields import AdapterSpec, Recipe
from personalize.recipe.resolve import resolve
from personalize.training.events import Step
from personalize.training.loop import feed, prepare, train
from personalize.training.memory.apply import place
from personalize.training.memory.ladder import Fit
from personalize.training.objectives.denoise import build
from personalize.training.optimizers import Optimizer
from personalize.training.preflight import check, parts
from personalize.training.rundir import Run
from personalize.training.step import gradients
from personalize.tuning.attach import Attached, attach
from personalize.tuning.layers import NAME, Following
from tools.bench.counting import Work

LOW = [torch.bfloat16, torch.float16]
SPEC = AdapterSpec(rank=2, alpha=2, targets=("attention", "feedforward", "conv"))
HALF = AdapterSpec(rank=2, alpha=1, targets=("attention", "feedforward", "conv"), dropout=0.3)
PEFT = {"AdaptedLinear": lora.Linear, "AdaptedConv": lora.Conv2d}
Make = Callable[..., Recipe]


@pytest.fixture(scope="module", params=[torch.float32, *LOW], ids=str)
def base(request: pytest.FixtureRequest, tiny_base: Path) -> Base:
    return Base.load(tiny_base, dtype=request.param)


@pytest.fixture
def make(tiny_base: Path, pictures: Path, tmp_path: Path) -> Make:
    def build(**flags: Any) -> Recipe:
        small = {"base": str(tiny_base), "folder": pictures, "output": tmp_path / "run", "steps": 3, "batch_size": 2, "rank": 2}
        quiet = {"sample_prompts": [], "checkpoint_every": 2, "class": "cat", "choose": "none"}
        return resolve(flags={**small, **quiet, **flags})

    return build


def started(base: Base, spec: AdapterSpec, parts: tuple[str, ...] = ("unet",)) -> Attached:
    """An adapter whose `up` is not nothing, for that hides the gradient of `down`."""
    attached = attach(base, spec, parts=parts, seed=1)
    for name, p in learned(attached).items():
        if name.endswith(".up"):
            nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return attached


def learned(attached: Attached) -> dict[str, nn.Parameter]:
    return {name: p for group in attached.groups().values() for name, p in group.items()}


def passed(attached: Attached) -> list[Tensor]:
    """A prediction, and all gradients that it leads to."""
    base, latents = attached.base, torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    with attached.lowered(), attached.dropping(3):
        out = base.denoise(latents, torch.tensor([3, 700]), base.embed(["zwx", "a cat"]))
        out.float().square().mean().backward()
    grads = [p.grad for p in learned(attached).values()]
    for p in learned(attached).values():
        p.grad = None
    return [out.detach(), *(grad for grad in grads if grad is not None)]


def far(some: list[Tensor], others: list[Tensor]) -> float:
    """The relative distance of all but the first."""
    pairs = [(one.double(), other.double()) for one, other in zip(some[1:], others[1:], strict=True)]
    gaps = [((one - other).square().sum(), other.square().sum()) for one, other in pairs]
    return float((sum(gap for gap, _ in gaps) / sum(size for _, size in gaps)).sqrt())


def as_peft(attached: Attached) -> None:
    """Give the layers their own forward pass back, which casts factors one by one."""
    for layer in attached.layers.values():
        layer.__class__ = PEFT[type(layer).__name__]


# ---------------------------------------------------------------- one pass


@pytest.mark.parametrize("spec", [SPEC, HALF], ids=["scale 1", "scale 0.5, dropout"])
def test_fp32_gives_the_bits_of_peft_and_other_dtypes_their_rounding(base: Base, spec: AdapterSpec) -> None:
    with started(base, spec) as attached:
        ours = passed(attached)
        as_peft(attached)
        theirs = passed(attached)
        assert len(ours) == len(theirs) == 1 + 2 * len(attached.layers)
    if base.dtype == torch.float32:
        assert torch.equal(ours[0], theirs[0]) and far(ours, theirs) < 1e-6  # a gradient comes as a copy or as a view
    else:
        print(f"{base.dtype}: {far(ours, theirs):.4f}")
        assert {one.dtype for one in ours[1:]} == {torch.float32} and ours[0].dtype == base.dtype
        assert 0 < far(ours, theirs) < {torch.bfloat16: 0.04, torch.float16: 0.01}[base.dtype]


def test_casting_all_at_once_gives_the_bits_of_casting_each(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(base, HALF) as attached:
        at_once = passed(attached)
        monkeypatch.setattr(Attached, "lowered", lambda _: contextlib.nullcontext())
        assert all(map(torch.equal, at_once, passed(attached)))


def test_factors_are_low_inside_only_and_as_they_are_then(base: Base) -> None:
    with started(base, SPEC) as attached:
        layer = next(iter(attached.layers.values()))
        down = layer.lora_A[NAME]
        assert isinstance(down, Following)
        for value in (1.0, 2.0):
            down.weight.data.fill_(value)
            with contextlib.suppress(ZeroDivisionError), attached.lowered():
                assert (down.low is None) == (base.dtype == torch.float32)
                assert down.factor(base.dtype).eq(value).all() and down.factor(base.dtype).dtype == base.dtype
                raise ZeroDivisionError
            assert down.low is None and down.weight.dtype == torch.float32


def test_what_is_put_swapped_scaled_or_off_counts_in_every_dtype(base: Base) -> None:
    latents, cond = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)), base.embed(["a cat"])

    def predict(**flags: Any) -> Tensor:
        with torch.no_grad():
            low, t = latents.to(base.dtype), torch.tensor([3])
            return base.unet(low, t, cond.tokens, return_dict=False, **flags)[0].float()  # as diffusers' own pipelines do

    plain = predict()
    with started(base, HALF) as attached:
        one, adapter = predict(), attached.snapshot()
        with attached.off():
            assert torch.equal(predict(), plain)
        with attached.at(0.5):
            half = predict()
        assert torch.equal(predict(cross_attention_kwargs={"scale": 0.5}), half)
        twice = adapter.weighted(Weighting({"unet": 2.0}))
        attached.put(twice)
        double = predict()
        attached.swap([(twice, 0.5)])
        torch.testing.assert_close(predict(), one, rtol=0.05, atol=0.02)
        attached.swap(adapter)
        assert torch.equal(predict(), one)
    assert torch.equal(predict(), plain)
    sizes = [float((other - plain).norm()) for other in (half, one, double)]
    assert sizes[0] < sizes[1] < sizes[2] and sizes[1] > 0.01


def test_drawing_casts_once_a_step(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(base, SPEC) as attached:
        adapter = attached.snapshot()
    with attach(base, [(adapter, 0.5), (adapter, "0@0,1@1")]):  # one that moves from step to step

        def drawn() -> Tensor:
            with torch.no_grad():
                return diffuse(base, ["a cat"], [3], (16, 8, 8), steps=2, guidance=4, negative="")

        with Work() as work:
            at_once = drawn()
        assert work.names["_foreach_copy_"] == (0 if base.dtype == torch.float32 else 2)
        monkeypatch.setattr(Attached, "lowered", lambda _: contextlib.nullcontext())
        assert torch.equal(at_once, drawn())


def test_another_adapter_beside_ours_is_added_by_peft(base: Base) -> None:
    with started(base, SPEC) as attached:
        layer = next(one for path, one in attached.layers.items() if path.endswith("attn1.to_q"))
        x = torch.randn(3, layer.in_features, dtype=base.dtype, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            alone = layer(x)
            layer.update_layer("other", 2, lora_alpha=2, config=lora.LoraConfig(init_lora_weights=False))
            layer.lora_A["other"].to(base.dtype), layer.lora_B["other"].to(base.dtype)
            layer.set_adapter([NAME, "other"])
            both = layer(x)
            change = layer.lora_B["other"](layer.lora_A["other"](x))
        torch.testing.assert_close(both, alone + change, rtol=0.02, atol=0.02)


# ---------------------------------------------------------------- whole steps and runs


@pytest.mark.parametrize("flags", [
    {"accumulate": 3}, {"accumulate": 2, "checkpointing": "yes", "dropout": 0.3}, {"text_encoder_lr": 1e-3, "prior": "output"},
], ids=["accumulated", "checkpointed", "text in pieces"])  # fmt: skip
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_step_has_the_gradient_of_casts_in_each_layer(
    make: Make, monkeypatch: pytest.MonkeyPatch, precision: str, flags: dict[str, Any]
) -> None:
    job = check(make(precision=precision, **flags))
    recipe, base, lesson = job.recipe, job.base, prepare(job)
    place(base, Fit(precision, checkpointing=recipe.fitting.checkpointing == "yes", micro_batch=1), job.device)

    def stepped() -> list[Tensor]:
        with started(base, recipe.adapter, parts(recipe, base)) as attached:
            opt = Optimizer(attached.groups(), recipe.optim, 4, scaled=precision == "float16")
            loss, inputs = build(recipe.objective, base.noise, attached.off), feed(job, lesson, 0)
            seen = ((next(inputs), lambda what, i=i: generator(0, what, i), lambda n: n) for i in range(recipe.optim.accumulate))
            told = gradients(base.denoise, loss, attached, opt, 2, seen)  # type: ignore[arg-type]
            grads = [p.grad for p in learned(attached).values() if p.grad is not None]
            assert len(grads) == 2 * len(attached.layers)
            opt.step(1, told[-1])
            return [told, *grads, *opt.state().values()]

    at_once = stepped()
    monkeypatch.setattr(Attached, "lowered", lambda _: contextlib.nullcontext())
    each = stepped()
    if "prior" in flags:  # the text encoder's factors count for two passes, whose gradients are added before they are cast
        assert far(at_once, each) < {"bfloat16": 0.005, "float16": 0.001}[precision]
    else:
        assert all(map(torch.equal, at_once, each))


def test_a_run_that_stops_and_goes_on_has_the_state_of_casts_in_each_layer(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"precision": "bfloat16", "accumulate": 2, "text_encoder_lr": 1e-3}
    broken, each = (make(output=tmp_path / name, **flags) for name in ("broken", "each"))
    events = train(broken)
    while not isinstance(next(events), Step):
        pass
    events.close()  # type: ignore[attr-defined]
    list(train(broken))
    monkeypatch.setattr(Attached, "lowered", lambda _: contextlib.nullcontext())
    list(train(each))
    one, other = (Run(tmp_path / name, "zwx").load_state() for name in ("broken", "each"))
    assert one and other and set(one.tensors) == set(other.tensors)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert {tensor.dtype for tensor in one.tensors.values()} == {torch.float32}
    files = [(tmp_path / name / "zwx.safetensors").read_bytes() for name in ("broken", "each")]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch 2.13 warns of its own compiler
def test_compiled_blocks_take_factors_that_are_low(tiny_base: Path) -> None:
    if why := importlib.import_module("personalize.training.memory.apply").lacking(torch.device("cpu")):
        pytest.skip(why)
    base = Base.load(tiny_base, dtype=torch.bfloat16)
    with started(base, SPEC) as attached:
        plain = passed(attached)
        base.unet.compile_repeated_blocks()
        compiled = passed(attached)
    assert far(compiled, plain) < 0.05
