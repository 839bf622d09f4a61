"""Layers that follow their input's dtype: the bits of peft's in fp32, and one cast for all of them in other dtypes."""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from slow import all_but
from small import LATENT
from torch import Tensor, nn

from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import LowRank
from personalize.adapters.kinds.kind import DOWN
from personalize.adapters.kinds.loha import LOHA
from personalize.adapters.strengths.grammar import Weighting
from personalize.data.batches import generator
from personalize.inference.request import Request
from personalize.inference.sampling import denoise, eval_mode
from personalize.models.model import Base
from personalize.recipe.fields import AdapterSpec, Recipe
from personalize.training.events import Step
from personalize.training.inputs import prepare_data, training_batches
from personalize.training.loop import train
from personalize.training.memory.apply import apply_plan
from personalize.training.memory.ladder import ComputePlan
from personalize.training.objectives.objective import make_objective
from personalize.training.optimizers import Optimizer
from personalize.training.preflight import check, parts
from personalize.training.rundir import Run
from personalize.training.step import Learner, gradients
from personalize.tuning import layers as layers_module
from personalize.tuning.attach import Attached, attach
from personalize.tuning.layers import ActiveRows, AdapterLayer
from personalize.tuning.placement import place_of, put_layers, restore_layers
from personalize.tuning.tunable import LayerAdapter, Tunable
from tools.bench.counting import Work

CPU = torch.device("cpu")
LOW = [torch.bfloat16, torch.float16]
SPEC = AdapterSpec(rank=2, alpha=2, targets=("attention", "feedforward", "conv"))
HALF = AdapterSpec(rank=2, alpha=1, targets=("attention", "feedforward", "conv"), dropout=0.3)
Make = Callable[..., Recipe]


@pytest.fixture(scope="module", params=[torch.float32, *LOW], ids=str)
def base(request: pytest.FixtureRequest, narrow_base: Path) -> Base:
    return Base.load(narrow_base, dtype=request.param)


@pytest.fixture
def make(make: Make) -> Make:
    return partial(make, steps=3)


def started(base: Base, spec: AdapterSpec, parts: tuple[str, ...] = ("unet",)) -> Attached:
    """An adapter whose `up` is not nothing, for that hides the gradient of `down`."""
    attached = attach(base, spec, parts=parts, seed=1)
    for name, p in learned(attached).items():
        if name.endswith(".up"):
            nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return attached


def learned(attached: Attached) -> dict[str, nn.Parameter]:
    return {name: p for group in attached.parameters().values() for name, p in group.items()}


def passed(attached: Attached) -> list[Tensor]:
    """A prediction, and all gradients that it leads to."""
    base, latents = attached.base, torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(1))
    with attached.cast_once(), attached.dropout(3):
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


@contextlib.contextmanager
def by_peft(base: Base, adapter: Adapter, dropout: float, order: list[str]) -> Iterator[dict[str, lora.LoraLayer]]:
    """Inside, an adapter of one rank and alpha is on the UNet by peft's own layers, which cast factors one by one."""
    names = {path.removeprefix("unet."): adapter.deltas[path] for path in order}
    first = next(iter(names.values()))
    assert isinstance(first, LowRank)
    pattern = "|".join(map(re.escape, names))
    config = LoraConfig(r=first.rank, lora_alpha=first.alpha, lora_dropout=dropout, target_modules=pattern)  # type: ignore[arg-type]
    inject_adapter_in_model(config, base.denoiser, "theirs")
    layers = {f"unet.{name}": base.denoiser.get_submodule(name) for name in names}
    for path, layer in layers.items():
        delta = adapter.deltas[path]
        assert isinstance(delta, LowRank)
        for side, values in ((layer.lora_A["theirs"], delta.down), (layer.lora_B["theirs"], delta.up)):
            side.weight.data.copy_(values.reshape(side.weight.shape))
        layer.eval()
        layer.lora_dropout.train()
    try:
        yield layers
    finally:
        for path, layer in layers.items():
            parent, leaf = place_of(base, path)
            setattr(parent, leaf, layer.base_layer)
        del base.denoiser.peft_config


def passed_by_peft(base: Base, adapter: Adapter, dropout: float, order: list[str]) -> list[Tensor]:
    """What `passed` gives, by peft's layers."""
    latents = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(1))
    with by_peft(base, adapter, dropout, order) as layers, torch.random.fork_rng():
        torch.manual_seed(3)
        out = base.denoise(latents, torch.tensor([3, 700]), base.embed(["zwx", "a cat"]))
        out.float().square().mean().backward()
        sides = [side["theirs"] for layer in layers.values() for side in (layer.lora_A, layer.lora_B)]
        return [out.detach(), *(side.weight.grad for side in sides)]  # type: ignore[misc]


# ---------------------------------------------------------------- one pass


@pytest.mark.parametrize("spec", [SPEC, HALF], ids=["scale 1", "scale 0.5, dropout"])
def test_fp32_gives_the_bits_of_peft_and_other_dtypes_their_rounding(base: Base, spec: AdapterSpec) -> None:
    with started(base, spec) as attached:
        ours, adapter, order = passed(attached), attached.snapshot(), list(attached.layers)
    theirs = passed_by_peft(base, adapter, spec.dropout, order)
    assert len(ours) == len(theirs) == 1 + 2 * len(adapter.deltas)
    if base.dtype == torch.float32:
        assert all(map(torch.equal, ours, theirs))
    else:
        print(f"{base.dtype}: {far(ours, theirs):.4f}")
        assert {one.dtype for one in ours[1:]} == {torch.float32} and ours[0].dtype == base.dtype
        assert 0 < far(ours, theirs) < {torch.bfloat16: 0.04, torch.float16: 0.01}[base.dtype]


def test_casting_all_at_once_gives_the_bits_of_casting_each(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(base, HALF) as attached:
        at_once = passed(attached)
        monkeypatch.setattr(Attached, "cast_once", lambda _: contextlib.nullcontext())
        assert all(map(torch.equal, at_once, passed(attached)))


def test_factors_are_low_inside_only_and_as_they_are_then(base: Base) -> None:
    with started(base, SPEC) as attached:
        layer = next(iter(attached.layers.values()))
        down = layer.factors[DOWN]
        for value in (1.0, 2.0):
            down.weight.data.fill_(value)
            with contextlib.suppress(ZeroDivisionError), attached.cast_once():
                assert (down.low is None) == (base.dtype == torch.float32)
                assert down.cast(base.dtype).eq(value).all() and down.cast(base.dtype).dtype == base.dtype
                raise ZeroDivisionError
            assert down.low is None and down.weight.dtype == torch.float32


def test_what_is_put_swapped_scaled_or_off_counts_in_every_dtype(base: Base) -> None:
    latents, cond = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(1)), base.embed(["a cat"])

    def predict(**flags: Any) -> Tensor:
        with torch.no_grad():
            low, t = latents.to(base.dtype), torch.tensor([3])
            return base.denoiser(low, t, cond.tokens, return_dict=False, **flags)[0].float()  # as diffusers' own pipelines do

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
                return denoise(base, [Request("a cat", 3, 2, 4)])

        with Work() as work:
            at_once = drawn()
        assert work.names["_foreach_copy_"] == (0 if base.dtype == torch.float32 else 2)
        monkeypatch.setattr(Attached, "cast_once", lambda _: contextlib.nullcontext())
        assert torch.equal(at_once, drawn())


def test_another_adapter_beside_ours_is_added_by_peft(base: Base) -> None:
    with started(base, SPEC) as attached:
        path = next(path for path in attached.layers if path.endswith("attn1.to_q"))
        layer = attached.layers[path]
        x = torch.randn(3, layer.weight.shape[1], dtype=base.dtype, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            alone = layer(x)
            config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["base_layer"])
            inject_adapter_in_model(config, layer, "other")
            theirs: Any = layer.base_layer
            theirs.lora_A["other"].to(base.dtype), theirs.lora_B["other"].to(base.dtype)
            both = layer(x)
            change = theirs.lora_B["other"](theirs.lora_A["other"](x))
            layer.base_layer = theirs.base_layer
        torch.testing.assert_close(both, alone + change, rtol=0.02, atol=0.02)


# ---------------------------------------------------------------- W + dW as one weight, while nothing learns


@pytest.fixture(scope="module")
def plain_base(narrow_base: Path) -> Base:
    return Base.load(narrow_base)


def predictions(base: Base) -> Tensor:
    x, t = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(1)), torch.tensor([300, 300])
    with torch.no_grad():
        return base.denoise(x, t, base.embed(["a cat", "a dog"]))


def test_in_eval_mode_a_layer_is_the_sum_as_its_values_are_now(plain_base: Base) -> None:
    before = predictions(plain_base)
    with started(plain_base, SPEC) as attached:
        adapter = attached.snapshot()
        changes: list[Callable[[], Any]] = [lambda: None, lambda: attached.put(adapter.weighted(Weighting({"unet": 2.0})))]
        for change in changes:
            with eval_mode(plain_base):
                change()
                summed = predictions(plain_base)
                assert all(len(layer.sums or ()) == 1 for layer in attached.layers.values())
                with attached.at(0.5):
                    half = predictions(plain_base)
                with attached.off():
                    assert torch.equal(predictions(plain_base), before)
                assert torch.equal(predictions(plain_base), summed)
            apart = predictions(plain_base)
            assert all(layer.sums is None for layer in attached.layers.values()) and not torch.equal(apart, summed)
            torch.testing.assert_close(summed, apart, rtol=1e-4, atol=1e-4)
            with attached.at(0.5):
                torch.testing.assert_close(half, predictions(plain_base), rtol=1e-4, atol=1e-4)
    assert torch.equal(predictions(plain_base), before)


def test_strengths_that_move_give_another_sum_at_each_step(plain_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(plain_base, SPEC) as attached:
        adapter = attached.snapshot()
    with attach(plain_base, [(adapter, 0.5), (adapter, "0@0,1@1")]), torch.no_grad():
        with eval_mode(plain_base):
            summed = denoise(plain_base, [Request("a cat", 3, 3, 4)])
        monkeypatch.setattr(layers_module, "MOST_SUMS", 0)
        with eval_mode(plain_base):
            apart = denoise(plain_base, [Request("a cat", 3, 3, 4)])
    torch.testing.assert_close(summed, apart, rtol=1e-3, atol=1e-3)
    assert not torch.equal(summed, apart)


def test_low_precision_and_large_bases_make_no_sums(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(base, SPEC) as attached:
        own = list(attached.layers.values())
        with layers_module.sum_once(own):
            with layers_module.sum_once(own):
                pass
            assert all((layer.sums is None) == (base.dtype != torch.float32) for layer in own)
        assert all(layer.sums is None for layer in own)
        monkeypatch.setattr(layers_module, "MOST_SUMS", 1)
        with layers_module.sum_once(own):
            assert all(layer.sums is None for layer in own)


# ---------------------------------------------------------------- any kind, one adapter or several


def loha_delta(tensors: Any, weight: Tensor | None, alpha: float | None) -> Tensor:
    """LoHa (Hyeon-Woo et al. 2021): (w1_a @ w1_b) * (w2_a @ w2_b), scaled by alpha / rank."""
    a, b = (tensors[f"hada_w{i}_a"] @ tensors[f"hada_w{i}_b"] for i in (1, 2))
    return a * b * ((alpha or 0) / len(tensors["hada_w1_b"]))


def loha(out: int, inside: int, seed: int) -> dict[str, Tensor]:
    """Tensors of rank 2."""
    shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, inside), "hada_w2_a": (out, 2), "hada_w2_b": (2, inside)}
    generator = torch.Generator().manual_seed(seed)
    return {role: torch.randn(shape, generator=generator) for role, shape in shapes.items()}


@pytest.mark.parametrize(
    "make_layer", [lambda: nn.Linear(6, 5), lambda: nn.Conv2d(6, 5, 3, padding=1, stride=2)], ids=["linear", "conv"]
)
@pytest.mark.parametrize("count", [1, 3])
def test_a_kind_without_a_formula_of_its_own_adds_its_dw(make_layer: Callable[[], Any], count: int) -> None:
    torch.manual_seed(0)
    layer = make_layer().requires_grad_(False)
    x = torch.randn(2 * count, 6, 4, 4) if isinstance(layer, nn.Conv2d) else torch.randn(2 * count, 7, 6)
    specs = [(loha(5, layer.weight[0].numel(), m), 1.0) for m in range(count)]
    adapted = AdapterLayer(layer, LOHA, specs, ActiveRows(*range(count)), CPU)
    wanted = []
    for rows, (tensors, alpha) in zip(x.chunk(count), specs, strict=True):
        merged = copy.deepcopy(layer)
        merged.weight += loha_delta(tensors, None, alpha).reshape(layer.weight.shape)
        wanted.append(merged(rows))
    out = adapted(x)
    torch.testing.assert_close(out, torch.cat(wanted), rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    assert all(factor.weight.grad is not None and factor.weight.grad.abs().sum() > 0 for factor in adapted.factors.values())
    with adapted.active.of():
        assert torch.equal(adapted(x), layer(x))
    adapted.strengths = [0.0] * count
    torch.testing.assert_close(adapted(x), layer(x))


def test_a_kind_is_a_tunable_like_any_other(narrow_base: Path) -> None:
    base = Base.load(narrow_base)
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    parent, leaf = place_of(base, path)
    own: Any = parent.get_submodule(leaf)
    active = ActiveRows(0)
    layers = {path: AdapterLayer(own, LOHA, [(loha(*own.weight.shape, 0), 1.0)], active, CPU)}
    tunable: Tunable = LayerAdapter(base, layers, active)
    assert sorted(tunable.parameters()["unet"]) == [f"{path}.hada_w{i}_{side}" for i in (1, 2) for side in "ab"]
    saved = tunable.snapshot()
    torch.testing.assert_close(saved.deltas[path].delta(), loha_delta(loha(*own.weight.shape, 0), None, 1.0))
    put_layers(base, layers)
    try:
        x, t, cond = torch.randn(1, *LATENT), torch.tensor([300]), base.embed(["a cat"])
        with torch.no_grad():
            one = base.denoise(x, t, cond)
            tunable.put(Adapter({path: saved.deltas[path] * 2.0}))
            twice = base.denoise(x, t, cond)
            tunable.put(saved)
            with tunable.at(2.0):
                torch.testing.assert_close(base.denoise(x, t, cond), twice)
            assert torch.equal(base.denoise(x, t, cond), one)
            with tunable.off():
                assert not torch.equal(base.denoise(x, t, cond), one)
    finally:
        restore_layers(base, layers)


# ---------------------------------------------------------------- whole steps and runs


@pytest.mark.parametrize("flags", [
    {"accumulate": 3}, {"accumulate": 2, "checkpointing": "yes", "dropout": 0.3},
    pytest.param({"text_encoder_lr": 1e-3, "prior": "output"}, marks=pytest.mark.slow),  # equal but for rounding
], ids=["accumulated", "checkpointed", "text in pieces"])  # fmt: skip
@pytest.mark.parametrize("precision", all_but({"bfloat16"}, ["bfloat16", "float16"]))
def test_a_step_has_the_gradient_of_casts_in_each_layer(
    make: Make, monkeypatch: pytest.MonkeyPatch, precision: str, flags: dict[str, Any]
) -> None:
    job = check(make(precision=precision, **flags))
    recipe, base, data = job.recipe, job.base, prepare_data(job)
    apply_plan(base, ComputePlan(precision, checkpointing=recipe.fitting.checkpointing == "yes", micro_batch=1), job.device)

    def stepped() -> list[Tensor]:
        with started(base, recipe.adapter, parts(recipe, base)) as attached:
            opt = Optimizer(attached.parameters(), recipe.optim, 4, scaled=precision == "float16")
            learner, inputs = (
                Learner(attached, make_objective(recipe.objective, base.noise), opt, 2),
                training_batches(job, data, 0),
            )
            seen = ((next(inputs), lambda what, i=i: generator(0, what, i), lambda n: n) for i in range(recipe.optim.accumulate))
            told = gradients([learner], [seen])[0]  # type: ignore[list-item]
            grads = [p.grad for p in learned(attached).values() if p.grad is not None]
            assert len(grads) == 2 * len(attached.layers)
            opt.step(1, told[-1])
            return [told, *grads, *opt.state().values()]

    at_once = stepped()
    monkeypatch.setattr(Attached, "cast_once", lambda _: contextlib.nullcontext())
    each = stepped()
    if "prior" in flags:  # the text encoder's factors count for two passes, whose gradients are added before they are cast
        assert far(at_once, each) < {"bfloat16": 0.005, "float16": 0.001}[precision]
    else:
        assert all(map(torch.equal, at_once, each))


@pytest.mark.slow  # resuming: test_loop; casts: the steps above
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
    monkeypatch.setattr(Attached, "cast_once", lambda _: contextlib.nullcontext())
    list(train(each))
    one, other = (Run(tmp_path / name, "zwx").load_state() for name in ("broken", "each"))
    assert one and other and set(one.tensors) == set(other.tensors)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert {tensor.dtype for tensor in one.tensors.values()} == {torch.float32}
    files = [(tmp_path / name / "zwx.safetensors").read_bytes() for name in ("broken", "each")]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch 2.13 warns of its own compiler
def test_compiled_blocks_take_factors_that_are_low(narrow_base: Path) -> None:
    if why := importlib.import_module("personalize.training.memory.apply").missing_compiler(torch.device("cpu")):
        pytest.skip(why)
    base = Base.load(narrow_base, dtype=torch.bfloat16)
    with started(base, SPEC) as attached:
        plain = passed(attached)
        base.denoiser.compile_repeated_blocks()
        compiled = passed(attached)
    assert far(compiled, plain) < 0.05
