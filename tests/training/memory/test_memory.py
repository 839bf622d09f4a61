"""How a run fits: pieces, precisions, packed weights, estimates beside real counts, the ladder, the probe, what goes wrong."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import given
from hypothesis import strategies as st
from small import LATENT
from torch import Tensor, nn

from personalize.adapters.adapter import Adapter
from personalize.adapters.describe import describe
from personalize.data.batches import generator
from personalize.data.cache import fingerprint
from personalize.errors import RecipeError, TrainingError
from personalize.families.cond import Cond
from personalize.inference.pipeline import draw
from personalize.models.model import Base
from personalize.models.offload import offload, offload_of
from personalize.models.precision import precision_of
from personalize.models.quantized import FORMATS, NF4, Quantized, _bitsandbytes, quantize
from personalize.recipe.fields import AdapterSpec, Fitting, Objective, Optim, Recipe
from personalize.recipe.resolve import resolve
from personalize.reports.run import write_report
from personalize.training.events import Event, Started, Step, SteppedDown, Warned
from personalize.training.inputs import prepare_data, training_batches
from personalize.training.loop import train
from personalize.training.memory import plan as planning
from personalize.training.memory import recover
from personalize.training.memory.apply import apply_plan
from personalize.training.memory.estimate import Configs, Estimate, Workload, estimate
from personalize.training.memory.ladder import ComputePlan, down, first, pieces
from personalize.training.memory.meter import Count, bytes_of, counting, tensors_of
from personalize.training.memory.pace import LAST, WARM, Pace
from personalize.training.memory.plan import choose_memory_plan, workload_of
from personalize.training.memory.recover import probe
from personalize.training.milestones import probe_run
from personalize.training.objectives.denoise import Denoising, share_of
from personalize.training.objectives.objective import Inputs, make_objective
from personalize.training.optimizers import GROWTH, Optimizer, Scale
from personalize.training.preflight import check, parts
from personalize.training.run import start_run
from personalize.training.rundir import Run
from personalize.training.step import Learner, gradients
from personalize.tuning.attach import attach
from tools.bench import memory, pairs

training = importlib.import_module("personalize.training.loop")  # the package's own `train` is the function
CPU, GPU = torch.device("cpu"), torch.device("cuda")
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def pocket() -> Base:
    return Base.load("pocket")


def weights_of(recipe: Recipe) -> dict[str, Tensor]:
    """dW of a finished run, by path."""
    assert recipe.output
    return {path: delta.delta() for path, delta in Adapter.load(recipe.output / "zwx.safetensors").deltas.items()}


def run(recipe: Recipe) -> list[Event]:
    return list(train(recipe))


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The relative distance of two dW."""
    gap = sum((one[path] - other[path]).square().sum() for path in one)
    return float((gap / sum(delta.square().sum() for delta in other.values())).sqrt())


# ---------------------------------------------------------------- packed weights


ERRORS = {"int8": 0.005, "fp8": 0.03, "nf4": 0.1}  # of a product with normal weights, relative
SIZES = {"int8": 1.02, "fp8": 1.02, "nf4": 0.58}  # bytes per weight, with scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_layer_is_nearly_what_it_was_and_small(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(320, 640).to(dtype).requires_grad_(False)
    x = torch.randn(8, 320, dtype=dtype, requires_grad=True)
    before = layer(x)
    slope = torch.autograd.grad(before.sum(), x)[0]
    before = before.detach()
    model = nn.Sequential(layer)
    assert quantize(model, name) == 1
    after = model(x)
    assert after.dtype == dtype and float((after - before).detach().norm() / before.detach().norm()) < ERRORS[name] + 0.002
    again = torch.autograd.grad(after.sum(), x)[0]
    assert float((again - slope).norm() / slope.norm()) < ERRORS[name] + 0.002
    assert sum(b.nbytes for b in model.buffers()) < SIZES[name] * 320 * 640


def test_nothing_but_the_packed_weight_is_kept_for_the_backward_pass() -> None:
    model, kept = nn.Sequential(nn.Linear(320, 640).requires_grad_(False)), list[Tensor]()
    quantize(model, "int8")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 320, requires_grad=True))
    assert {one.data_ptr() for one in kept} == {one.data_ptr() for one in model.buffers()}


def test_nf4_is_the_layout_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, scale = FORMATS["nf4"].pack(weight)
    assert torch.equal(codes.flatten(), ours) and torch.equal(state.absmax, scale)
    assert torch.equal(state.code, torch.tensor(NF4))
    unpacked = _bitsandbytes(ours, scale, weight.shape, weight.dtype)
    assert torch.equal(unpacked, FORMATS["nf4"].unpack(ours, scale, weight.shape, weight.dtype))


def test_only_large_frozen_linear_layers_are_packed(tiny_base: Path) -> None:
    base = Base.load(tiny_base)
    with attach(base, AdapterSpec(rank=2, targets=("attention",))) as attached:
        before = {name: p.detach().clone() for name, p in base.denoiser.named_parameters() if p.requires_grad}
        assert quantize(base.denoiser, "int8") > 20 and quantize(base.denoiser, "int8") == 0
        after = {name: p for name, p in base.denoiser.named_parameters() if p.requires_grad}
        assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
        assert not any(isinstance(one, Quantized) for layer in attached.layers.values() for one in layer.factors.values())
        assert isinstance(next(iter(attached.layers.values())).base_layer, Quantized)
    assert type(base.denoiser.conv_in) is nn.Conv2d
    facts = base.facts
    assert facts["dtypes"]["unet"] == "float32 and int8"
    assert facts["parameters"] == Base.load(tiny_base).facts["parameters"]  # packed, not lost
    assert facts["bytes"] < 0.8 * Base.load(tiny_base).facts["bytes"]


# ---------------------------------------------------------------- a batch in pieces


@given(st.integers(1, 12), st.integers(1, 12))
def test_pieces_are_a_partition(rows: int, n: int) -> None:
    shares = [list(range(rows))[share_of(rows, i, n)] for i in range(n)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def step_of(job: Any, data: Any, n: int) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and what is told, of one step in n pieces."""
    recipe, base = job.recipe, job.base
    with attach(base, recipe.adapter, parts=parts(recipe, base), seed=1) as attached:
        for name, p in ((name, p) for group in attached.parameters().values() for name, p in group.items()):
            if name.endswith(".up"):  # which starts at nothing, and hides the gradient of the other half
                nn.init.normal_(p, std=0.01, generator=torch.Generator().manual_seed(len(name)))
        opt = Optimizer(attached.parameters(), recipe.optim, 4)
        learner = Learner(attached, make_objective(recipe.objective, base.noise), opt, n)
        batch = (next(training_batches(job, data, 0)), lambda purpose: generator(0, purpose, 0), lambda i: i)
        told = gradients([learner], [[batch]])[0]
        return {name: p.grad.clone() for name, p in opt.parameters.items() if p.grad is not None}, told


@pytest.mark.parametrize("flags", [
    {}, {"prior": "images", "prior_images": 2}, {"prior": "output"}, {"prior": "output", "prior_share": 0.25},
    {"text_encoder_lr": 1e-3, "prior": "output"}, {"prior": "dco", "dco_beta": 10.0},
], ids=["none", "images", "output", "few", "text", "dco"])  # fmt: skip
def test_pieces_have_the_gradient_of_the_whole(make: Make, flags: dict[str, Any]) -> None:
    job = check(make(batch_size=4, **flags))
    data = prepare_data(job)
    whole, told = step_of(job, data, 1)
    assert max(float(g.abs().max()) for g in whole.values()) > 0
    for n in (3, 4):  # uneven pieces, and single rows
        parted, said = step_of(job, data, n)
        assert set(parted) == set(whole) and far(parted, whole) < 1e-5
        assert said[:-1].mean() == pytest.approx(float(told[:-1].mean()), rel=1e-2 if n == 3 else 1e-5)
        assert float(said[-1]) == pytest.approx(float(told[-1]), rel=1e-4)


def test_a_micro_batch_changes_nothing_but_the_rounding(make: Make, tmp_path: Path) -> None:
    whole, parted = (make(batch_size=4, micro_batch=n, output=tmp_path / str(n)) for n in (4, 1))
    run(whole)
    events = run(parted)
    assert far(weights_of(parted), weights_of(whole)) < 1e-4
    assert [len(event.losses) for event in events if isinstance(event, Step)] == [4] * 4
    with pytest.raises(RecipeError, match="--micro-batch 5 is more than --batch-size 4"):
        make(batch_size=4, micro_batch=5)


def test_checkpointing_gives_the_same_bits(make: Make) -> None:
    job = check(make())
    data = prepare_data(job)
    kept, told = step_of(job, data, 1)
    apply_plan(job.base, ComputePlan(checkpointing=True, micro_batch=2), CPU)
    assert job.base.denoiser.is_gradient_checkpointing
    again, said = step_of(job, data, 1)
    assert torch.equal(told, said) and all(torch.equal(kept[name], again[name]) for name in kept)


# ---------------------------------------------------------------- precision


# How far dW is from float32's after six steps of pocket at a steady 1e-3, relative. Early steps of Adam are nearly signs,
# and where a gradient is nearly 0 its sign is noise. Measured: 0.079, 0.012, 0.069 and 0.532.
NEAR = {
    ("bfloat16", "none"): 0.2,
    ("float16", "none"): 0.05,
    ("float32", "int8"): 0.15,
    ("float32", "nf4"): 0.7,
}  # fmt: skip


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    recipe = on_pocket(tmp_path_factory.mktemp("exact"))
    run(recipe)
    return weights_of(recipe)


def on_pocket(output: Path, **flags: Any) -> Recipe:
    folder = Path(__file__).parents[3] / "sample_data" / "subject"
    steady = {
        "steps": 6,
        "batch_size": 2,
        "rank": 2,
        "warmup": 0,
        "schedule": "constant",
        "sample_prompts": [],
        "sample_steps": 1,
        "choose": "none",
    }
    return resolve(flags={"folder": folder, "output": output, "trigger": "zwx", "class": "cat", **steady, **flags})


@pytest.mark.parametrize(
    ("precision", "packed"), [pytest.param(*row, marks=pytest.mark.slow if row[1] == "none" else ()) for row in NEAR]
)
def test_other_precisions_learn_nearly_the_same(exact: dict[str, Tensor], tmp_path: Path, precision: str, packed: str) -> None:
    recipe = on_pocket(tmp_path, precision=precision, quantize=packed)
    events = run(recipe)
    gap = far(weights_of(recipe), exact)
    print(f"{precision}, {packed}: {gap:.3f}")
    assert 0 < gap < NEAR[precision, packed]
    assert not any(event.skipped for event in events if isinstance(event, Step))
    started = next(event for event in events if isinstance(event, Started))
    assert started.dtype == precision and started.fit["precision"] == precision
    assert started.base["dtypes"]["vae"] == ("float32" if precision == "float16" else precision)
    about = describe(tmp_path / "zwx.safetensors").metadata
    assert about["ss_mixed_precision"] == {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision]
    assert about["ss_gradient_checkpointing"] == about["ss_full_fp16"] == "False"
    assert f'"quantize": "{packed}"' in about["personalize.fit"] and '"adapter": "float32"' in about["personalize.fit"]


def test_the_adapter_stays_float32_in_a_half_base(narrow_base: Path) -> None:
    base = Base.load(narrow_base, dtype=torch.bfloat16)
    with attach(base, AdapterSpec(rank=2, targets=("attention", "conv"))) as attached:
        cond = base.embed(["a cat"])
        out = base.denoise(torch.randn(1, *LATENT), torch.tensor([3]), cond)
        out.float().square().mean().backward()
        learned = [p for group in attached.parameters().values() for p in group.values()]
        assert out.dtype == torch.bfloat16 and {p.dtype for p in learned} == {torch.float32}
        assert {p.grad.dtype for p in learned if p.grad is not None} == {torch.float32}


def test_the_vae_is_never_float16(narrow_base: Path) -> None:
    base = Base.load(narrow_base, dtype=torch.float16)
    assert base.vae.dtype == torch.float32 and base.denoiser.dtype == torch.float16
    assert base.decode(torch.randn(1, *LATENT)).isfinite().all()


@pytest.mark.parametrize(("wanted", "device", "bf16", "chosen"), [
    ("auto", "cpu", True, "float32"), ("auto", "cuda", True, "bfloat16"), ("auto", "cuda", False, "float16"),
    ("float16", "cpu", True, "float16"), ("float32", "cuda", True, "float32"),
])  # fmt: skip
def test_precision_on_auto(monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, bf16: bool, chosen: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    assert precision_of(Fitting(precision=wanted), torch.device(device)) == chosen  # type: ignore[arg-type]


def test_the_loss_scale_halves_and_doubles() -> None:
    scale = Scale()
    for _ in range(GROWTH):
        scale.grow()
    assert (scale.value, scale.good) == (2.0**17, 0)
    for _ in range(30):
        scale.shrink()
    assert scale.value == 1 and scale.at_floor


def test_a_scaled_gradient_is_scaled_back_exactly() -> None:
    def stepped(scaled: bool) -> tuple[Tensor, Tensor]:
        p = nn.Parameter(torch.tensor([0.3, -2.0]))
        opt = Optimizer({"unet": {"p": p}}, Optim(warmup=0, clip=0.1), 4, scaled=scaled)
        opt.share((p * torch.tensor([1.7, 0.2])).square()).backward()
        norm = opt.norm()
        opt.step(0, norm)
        return p.detach(), norm

    (plain, size), (scaled, same) = stepped(False), stepped(True)
    assert torch.equal(plain, scaled) and torch.equal(size, same)


def test_an_overflow_is_told_lowers_the_scale_and_counts_for_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(precision="float16", batch_size=1, resolution=32, steps=6)
    first_norm, called = Optimizer.norm, list[float]()

    def overflowing(self: Optimizer) -> Tensor:
        assert self.scale
        called.append(self.scale.value)
        return first_norm(self) * (torch.inf if len(called) <= 4 else 1)

    monkeypatch.setattr(Optimizer, "norm", overflowing)
    steps = [event for event in run(recipe) if isinstance(event, Step)]
    assert [step.skipped for step in steps] == [True] * 4 + [False] * 2  # more than three, and the run goes on
    assert "overflowed in float16: its scale is 32768 from now on" in steps[0].cause
    assert called == [2.0 ** (16 - min(i, 4)) for i in range(6)]


@pytest.mark.parametrize("stop", [3])
def test_a_float16_run_that_was_stopped_ends_with_the_same_bytes(make: Make, tmp_path: Path, stop: int) -> None:
    whole, broken = (
        make(precision="float16", batch_size=1, resolution=32, output=tmp_path / name) for name in ("whole", "broken")
    )
    run(whole)
    events = train(broken)
    list(islice(events, stop))
    events.close()  # type: ignore[attr-defined]
    run(broken)
    one, other = ((tmp_path / name / "zwx.safetensors").read_bytes() for name in ("whole", "broken"))
    assert one == other
    tensors = Run(tmp_path / "broken", "zwx").load_state().tensors  # type: ignore[union-attr]
    assert tensors["loss scale"].tolist() == [2.0**16, 4.0]


# ---------------------------------------------------------------- estimates and the ladder


@pytest.mark.parametrize("fit", [
    ComputePlan(micro_batch=4),
    pytest.param(ComputePlan(checkpointing=True, micro_batch=2), marks=pytest.mark.slow),
    pytest.param(ComputePlan(quantize="nf4", micro_batch=4), marks=pytest.mark.slow),
    pytest.param(ComputePlan("bfloat16", micro_batch=4), marks=pytest.mark.slow),
    ComputePlan(checkpointing=True, micro_batch=4, offload=True),
    ComputePlan("bfloat16", micro_batch=4, joined=True),
], ids=["plain", "checkpointing", "nf4", "bfloat16", "offload", "joined"])  # fmt: skip
def test_the_estimate_is_what_a_real_step_takes(tiny_base: Path, pictures: Path, fit: ComputePlan) -> None:
    recipe = resolve(flags={"folder": pictures, "rank": 2, "batch_size": 4})
    base = Base.load(tiny_base, dtype=getattr(torch, fit.precision))
    apply_plan(base, fit, CPU)
    if fit.offload:
        offload(base.denoiser, CPU)
    away = bytes_of(held.host) if (held := offload_of(base.denoiser)) else 0
    told = estimate(Configs.of(base), Workload(recipe, 8, 8, drawn=2), fit, ("unet",))
    zeros = torch.zeros(4, *LATENT)
    inputs = Inputs(zeros, zeros, Cond(torch.zeros(4, 77, 192, dtype=base.dtype)))
    with attach(base, recipe.adapter) as attached:
        opt = Optimizer(attached.parameters(), recipe.optim, 4)
        models = [base.denoiser, base.vae, *(text.model for text in base.texts)]
        moments = [torch.zeros_like(p) for p in opt.parameters.values() for _ in range(2)]
        learner = Learner(attached, make_objective(recipe.objective, base.noise), opt, pieces(fit, 4))
        batch = (inputs, lambda purpose: generator(0, purpose), lambda i: i)
        with counting(tensors_of(models), moments) as count:
            there = count.now - away
            gradients([learner], [[batch]])
            assert told.weights + told.adapter // 4 * 3 == there
            assert told.weights + told.adapter + told.activations == pytest.approx(count.peak - away, rel=0.01)
            opt.skip()
            count.peak = count.now
            with torch.no_grad():
                base.denoise(zeros, torch.zeros(4, dtype=torch.long), inputs.cond)
                base.decode(zeros[:2])
            assert told.sampling == pytest.approx(count.peak - away, rel=0.01)


def test_counting_forgets_what_is_gone() -> None:
    with counting() as count:
        kept = torch.zeros(256)
        torch.zeros(1024).view(32, 32).sum()
        del kept
        assert (count.now, count.peak) == (0, 4 * (256 + 1024 + 1))


@pytest.mark.slow
def test_sdxl_fits_into_five_gigabytes() -> None:
    configs, recipe = memory.configs_of(pairs.family("sdxl"), 1024), resolve(flags={"batch_size": 1, "rank": 8})
    rows = dict((rung, (fit, told)) for rung, fit, told in memory.walk(configs, Workload(recipe, 128, 128), "bfloat16"))
    fit, told = rows["quantize"]
    assert told.peak < memory.GOAL and fit.checkpointing and fit.lean and fit.tiled and fit.quantize == "int8"
    assert rows["everything at once"][1].peak > 3 * told.peak
    assert rows["nf4"][1].weights < told.weights
    assert rows["offload, nothing packed"][1].peak < 2.2 * 2**30 and rows["offload, nothing packed"][0].quantize == "none"


@pytest.fixture(scope="module")
def needs(narrow_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a run takes on each rung."""
    flags = {"base": str(narrow_base), "folder": pictures, "output": tmp_path_factory.mktemp("needs"), "batch_size": 4, "rank": 2}
    job = check(resolve(flags={**flags, "sample_prompts": ["a cat", "a dog"], "sample_steps": 1}))
    fit, found = first(job.recipe.fitting, 4, CPU), {}
    while True:
        found[fit.words(4)] = planning.estimate_of(job, fit).peak
        step = down(fit, job.recipe.fitting, CPU)
        if step is None:
            return found
        fit = step[1]


@pytest.mark.slow
def test_the_ladder_goes_down(needs: dict[str, int]) -> None:
    names = list(needs)
    assert names == [
        "float32",
        "float32, checkpointing",
        "float32, checkpointing, pictures in tiles",
        "float32, checkpointing, pictures in tiles, UNet in int8",
        "float32, checkpointing, pictures in tiles, UNet in int8, 2 of 4 pictures at once",
        "float32, checkpointing, pictures in tiles, UNet in int8, 1 of 4 pictures at once",
    ]
    assert list(needs.values()) == sorted(needs.values(), reverse=True)
    assert needs[names[0]] > 1.5 * needs[names[-1]]


def test_on_a_gpu_the_encoders_go_before_anything_is_packed() -> None:
    fit, names = first(Fitting(precision="bfloat16"), 2, GPU), list[str]()
    while step := down(fit, Fitting(), GPU):
        names.append(step[0].name)
        fit = step[1]
    assert names == ["checkpointing", "free encoders", "tiled VAE", "quantize", "smaller batch", "offload"]
    assert fit.channels_last and fit.lean and not first(Fitting(free_encoders="yes"), 2, CPU).lean


def test_what_is_forced_does_not_give_way() -> None:
    forced = Fitting(checkpointing="no", tile_vae="no", quantize="none", micro_batch=3)
    assert down(first(forced, 4, CPU), forced, CPU) is None
    asked = first(Fitting(checkpointing="yes", tile_vae="yes", quantize="nf4", micro_batch=3), 4, CPU)
    assert (asked.checkpointing, asked.tiled, asked.quantize, asked.micro_batch) == (True, True, "nf4", 3)


@pytest.mark.slow
def test_a_budget_is_kept_to_and_told(make: Make, needs: dict[str, int]) -> None:
    budget = needs["float32, checkpointing, pictures in tiles, UNet in int8"] + 2000
    recipe = make(batch_size=4, memory=str(budget), sample_prompts=["a cat", "a dog"], steps=2)
    started = next(event for event in run(recipe) if isinstance(event, Started))
    fit = started.fit
    assert fit["estimate"]["peak"] <= budget and fit["probe"] <= budget == fit["budget"]
    assert fit["probe"] == pytest.approx(fit["estimate"]["peak"], rel=0.05)
    assert fit["quantize"] == "int8" and any(why.startswith("quantize: without it") for why in fit["why"])
    assert recipe.output and not list(recipe.output.glob(".*"))
    page = write_report(recipe.output).read_text(encoding="utf-8")
    assert "UNet in int8" in page and "(probe)" in page
    about = describe(recipe.output / "zwx.safetensors").metadata["personalize.fit"]
    assert f'"peak": {fit["estimate"]["peak"]}' in about and "probe" not in about


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of 100 bytes, 60 if packed; a picture takes 40, or 10 with checkpointing; samples take 150, or 20 in tiles."""

    def guess(configs: Configs, load: Workload, fit: ComputePlan, parts: tuple[str, ...]) -> Estimate:
        weights = 100 if fit.quantize == "none" else 60
        return Estimate(weights, 0, fit.micro_batch * (10 if fit.checkpointing else 40), weights + (20 if fit.tiled else 150))

    monkeypatch.setattr(planning, "estimate", guess)


BUDGETS = {
    300: ("float32", 0),
    259: ("float32, checkpointing", 1),
    145: ("float32, checkpointing, pictures in tiles", 2),
    110: ("float32, checkpointing, pictures in tiles, UNet in int8", 3),
    85: ("float32, checkpointing, pictures in tiles, UNet in int8, 2 of 4 pictures at once", 4),
}


@pytest.mark.usefixtures("guessed")
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_ladder_is_walked_until_it_fits(make: Make, budget: int) -> None:
    choice = choose_memory_plan(check(make(batch_size=4, memory=str(budget))))
    assert (choice.compute.words(4), len(choice.why)) == BUDGETS[budget]
    assert choice.estimate and choice.estimate.peak <= budget == choice.budget


@pytest.mark.usefixtures("guessed")
def test_what_did_not_help_is_taken_back(make: Make) -> None:
    choice = choose_memory_plan(check(make(batch_size=1, memory="140")))  # it is the samples that do not fit
    assert choice.compute == ComputePlan(tiled=True) and len(choice.why) == 1
    assert choice.why[0].startswith("tiled VAE: without it, 250 B of 140 B")


@pytest.mark.usefixtures("guessed")
def test_what_cannot_fit_is_said_before_the_run(make: Make) -> None:
    recipe = make(memory="65", checkpointing="no")
    told = r"100 B are needed and 65 B are there .*--resolution below 64.*--checkpointing on auto"
    with pytest.raises(TrainingError, match=told):
        next(train(recipe))


@pytest.mark.parametrize(
    ("text", "count"), [("6GB", 6 * 10**9), ("5.5 GiB", int(5.5 * 2**30)), ("800m", 8 * 10**8), ("123", 123)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert Fitting(memory=text).budget == count and Fitting().budget is None


@pytest.mark.parametrize("text", ["much", "0", "-1GB", "6 TB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(RecipeError, match="write 6GB"):
        resolve(flags={"memory": text})


# ---------------------------------------------------------------- the probe


@pytest.mark.usefixtures("guessed")
def test_the_probe_leaves_no_trace(make: Make) -> None:
    job = check(make(memory="1GB", sample_prompts=["a cat"], precision="float16", dropout=0.1))
    job.run.make()
    data, choice = prepare_data(job), choose_memory_plan(job)
    with attach(job.base, job.recipe.adapter, seed=0) as attached:
        work = start_run(job, data, attached, choice)
        batch = (next(training_batches(job, data, 0)), lambda _: generator(0, "x"), lambda i: i)
        work.opt.step(0, gradients([work.learner], [[batch]])[0][-1])  # moments and a scale that could be spoiled
        before, rng = work.opt.state(), torch.get_rng_state()
        marks = [fingerprint(dict(model.state_dict())) for model in (job.base.denoiser, job.base.vae)]
        files = sorted(job.run.folder.rglob("*"))
        probe_run(work)
        after = work.opt.state()
        assert work.probe and set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(rng, torch.get_rng_state()) and files == sorted(job.run.folder.rglob("*"))
        assert marks == [fingerprint(dict(model.state_dict())) for model in (job.base.denoiser, job.base.vae)]
        assert all(p.grad is None for p in work.opt.parameters.values())


@pytest.mark.usefixtures("guessed")
def test_a_probed_run_ends_as_one_that_was_not(make: Make, plain_run: Recipe) -> None:
    run(probed := make(memory="1GB"))
    assert far(weights_of(probed), weights_of(plain_run)) == 0


@pytest.mark.usefixtures("guessed")
def test_out_of_memory_in_the_probe_takes_the_next_rung(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(work: Any, *rest: Any) -> int:
        if not work.compute.checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return probe(work, *rest)

    monkeypatch.setattr(recover, "probe", short)
    started = next(event for event in run(make(memory="1GB", steps=1)) if isinstance(event, Started))
    assert started.fit["checkpointing"] and not started.fit["tiled"]
    assert started.fit["why"] == [
        "checkpointing: CUDA out of memory (activations are computed twice: a step takes about a third longer, "
        "its gradients are the same)"
    ]


# ---------------------------------------------------------------- when it goes wrong on the way


def failing(monkeypatch: pytest.MonkeyPatch, at: set[int]) -> None:
    """Run out of memory in the calls with these numbers."""
    calls = iter(range(1, 100))

    def gradients_or_not(*given: Any) -> list[Tensor]:
        told = gradients(*given)
        if next(calls) in at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return told

    monkeypatch.setattr(training, "gradients", gradients_or_not)


def test_out_of_memory_steps_down_and_goes_on_from_the_last_checkpoint(
    make: Make, plain_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = make(output=tmp_path / "short")
    failing(monkeypatch, {4})
    events = run(short)
    fell = next(event for event in events if isinstance(event, SteppedDown))
    assert (fell.step, fell.what, fell.why) == (2, "checkpointing", "CUDA out of memory") and fell.fit["checkpointing"]
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2, 3, 3, 4]
    assert far(weights_of(short), weights_of(plain_run)) == 0  # checkpointing gives the same bits
    state = Run(tmp_path / "short", "zwx").load_state()
    assert state and state.more["fit"]["checkpointing"] is True
    kinds = [record["event"] for record in Run(tmp_path / "short", "zwx").history()]
    assert kinds.count("step") == 4 and kinds.count("steppeddown") == 1
    page = write_report(tmp_path / "short").read_text(encoding="utf-8")
    assert "memory ran out (CUDA out of memory): checkpointing gave way" in page


def test_a_run_that_stepped_down_goes_on_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(steps=6)
    failing(monkeypatch, {2})
    events = train(recipe)
    while not isinstance(event := next(events), Step) or event.step < 3:
        pass
    events.close()  # type: ignore[attr-defined]
    again = next(event for event in run(recipe) if isinstance(event, Started))
    assert again.resumed == 3 and again.fit["checkpointing"]


def test_out_of_memory_on_the_lowest_rung_ends_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, {2})
    recipe = make(checkpointing="yes", tile_vae="no", quantize="none", micro_batch=2)
    with pytest.raises(TrainingError, match=r"lowest rung: CUDA out of memory .*--quantize nf4"):
        run(recipe)


def spoiled(monkeypatch: pytest.MonkeyPatch, at: set[int]) -> None:
    """Make the first loss of these steps not a number."""
    draw, loss = Denoising.draw, Denoising.loss
    bad: dict[int, bool] = {}

    def draw_spoiled(self: Denoising, inputs: Inputs, rng: Any) -> Any:
        rows, seed = draw(self, inputs, rng), rng("noise").initial_seed()
        bad[id(rows)] = any(seed == generator(0, "noise", step - 1).initial_seed() for step in at)
        return rows

    def spoil(self: Denoising, rows: Any) -> Any:
        losses = yield from loss(self, rows)
        return losses * torch.tensor([torch.nan if bad[id(rows)] else 1.0] + [1.0] * (len(losses) - 1))

    monkeypatch.setattr(Denoising, "draw", draw_spoiled)
    monkeypatch.setattr(Denoising, "loss", spoil)


def test_a_loss_that_is_not_finite_goes_back_to_the_last_checkpoint(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(steps=5)
    spoiled(monkeypatch, {4})
    saved, taken = dict[str, Tensor](), dict[str, Tensor]()
    for event in train(recipe):
        if isinstance(event, Step) and event.step in (2, 4):
            state = Run(recipe.output, "zwx").load_state() if event.step == 4 else None  # type: ignore[arg-type]
            saved = state.tensors if state else saved
            if event.step == 4:
                assert event.skipped and "the loss of " in event.cause and f"at timestep {event.timesteps[0]} was" in event.cause
        if isinstance(event, Step) and event.step == 5:
            assert not event.skipped
    taken = Run(recipe.output, "zwx").load_state().tensors  # type: ignore[arg-type, union-attr]
    assert {float(value) for name, value in saved.items() if name.endswith(".step")} == {2.0}  # what was gone back to
    assert {float(value) for name, value in taken.items() if name.endswith(".step")} == {3.0}  # and one step from there


def test_stopped_before_or_after_a_rollback_it_ends_with_the_same_bytes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, {4, 8})
    whole, *broken = (make(steps=9, checkpoint_every=5, output=tmp_path / name) for name in ("whole", "before", "after"))
    run(whole)
    for recipe, stop in zip(broken, (4, 7), strict=True):
        events: Iterator[Event] = train(recipe)
        list(islice(events, stop))
        events.close()  # type: ignore[attr-defined]
        run(recipe)
    one, *others = ((tmp_path / name / "zwx.safetensors").read_bytes() for name in ("whole", "before", "after"))
    assert others == [one, one]


def test_slow_steps_are_told_once() -> None:
    pace = Pace()
    calm = [pace.slower(seconds) for seconds in [60.0] * WARM + [1.0] * 3 * LAST]
    assert set(calm) == {0.0}  # the first ones, which compile, are no measure
    slow = [pace.slower(4.0) for _ in range(3 * LAST)]
    assert [factor for factor in slow if factor] == [4.0]


def test_a_collapse_is_in_the_diary_and_the_report(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Pace, "slower", lambda self, seconds: 5.0 if len(self.seconds) == 0 and not self.seconds.append(1) else 0.0
    )
    recipe = make(steps=2)
    told = [event for event in run(recipe) if isinstance(event, Warned)]
    assert len(told) == 1 and "5.0 times as long" in told[0].text and "--memory" in told[0].text
    assert recipe.output and "5.0 times as long" in write_report(recipe.output).read_text(encoding="utf-8")


# ---------------------------------------------------------------- the base


class Model:
    """Says where it is, and goes where it is told."""

    def __init__(self, learning: bool = False) -> None:
        self.device, self.learning, self.moves = CPU, learning, list[str]()

    def parameters(self) -> Iterator[Any]:
        yield SimpleNamespace(device=self.device, requires_grad=self.learning)

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.moves.append(self.device.type)


def test_encoders_come_and_go(narrow_base: Path) -> None:
    base = Base.load(narrow_base)
    vae, text, learning = Model(), Model(), Model(learning=True)
    texts = tuple(replace(base.texts[0], model=model) for model in (text, learning))
    lean = replace(base, vae=vae, texts=texts)
    lean.place(GPU, lean=True)
    with lean.using(vae):
        assert vae.device == GPU and text.device == CPU
    assert vae.moves == ["cuda", "cpu"]
    with lean.keeping():
        for _ in range(3):
            with lean.using(vae), lean.using(text):
                pass
        assert vae.device == text.device == GPU
    assert vae.moves == ["cuda", "cpu"] * 2 and text.moves == ["cuda", "cpu"]
    with lean.using(learning):
        pass
    assert learning.moves == ["cuda"]  # what learns stays
    lean.place(GPU, lean=False)
    with lean.using(vae):
        pass
    assert vae.device == GPU


def test_a_picture_in_tiles_is_nearly_the_same(pocket: Base) -> None:
    plain = draw(pocket, ["a red cat"], [0], steps=4)[0]
    latents = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0))
    pixels = torch.zeros(1, 3, 64, 64)
    encoded = pocket.encode(pixels)
    try:
        pocket.place(tiled=True)
        tiled = draw(pocket, ["a red cat"], [0], steps=4)[0]
        assert not torch.equal(pocket.decode(latents), latents) and not pocket.vae.use_tiling  # only inside
        assert all(torch.equal(one, other) for one, other in zip(pocket.encode(pixels), encoded, strict=True))
    finally:
        pocket.place()
    one, other = (torch.tensor(list(picture.tobytes()), dtype=torch.float32) / 255 for picture in (plain, tiled))
    gap = float((one - other).abs().mean())
    print(f"tiles: {gap:.4f}")
    assert 0 < gap < 0.06  # of 1, on average; each tile of 32 pixels normalizes over itself: measured 0.039


def test_attention_is_fused_with_and_without_an_adapter(narrow_base: Path) -> None:
    base = Base.load(narrow_base)
    assert {type(one) for one in base.denoiser.attn_processors.values()} == {AttnProcessor2_0}
    with attach(base, AdapterSpec(rank=2)):
        assert {type(one) for one in base.denoiser.attn_processors.values()} == {AttnProcessor2_0}


def test_a_step_waits_for_the_device_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    job = check(make())
    data = prepare_data(job)
    with attach(job.base, job.recipe.adapter, seed=0) as attached:
        opt = Optimizer(attached.parameters(), job.recipe.optim, 4)
        learner = Learner(attached, make_objective(Objective(), job.base.noise), opt)
        batch = (next(training_batches(job, data, 0)), lambda purpose: generator(0, purpose), lambda i: i)
        asked = list[int]()
        tolist = Tensor.tolist
        monkeypatch.setattr(Tensor, "tolist", lambda self: asked.append(self.numel()) or tolist(self))
        with Count() as count:
            told = gradients([learner], [[batch]])[0]
            told.tolist()
            opt.step(0, told[-1])
        assert asked == [3] and count.waits == 0  # two losses and the gradient's norm


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch 2.13 warns of its own compiler
def test_compiled_blocks_learn_the_same(make: Make, tmp_path: Path) -> None:
    plain, compiled = make(output=tmp_path / "plain"), make(output=tmp_path / "compiled", compile=True)
    run(plain)
    run(compiled)
    assert 0 <= far(weights_of(compiled), weights_of(plain)) < 0.1


def test_without_a_compiler_nothing_is_compiled_and_that_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    started = next(event for event in run(make(compile=True, steps=1)) if isinstance(event, Started))
    assert "nothing is compiled: there is no C++ compiler" in started.warnings


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_every_rung_learns_nearly_the_same(make: Make, tmp_path: Path) -> None:
    plain = make(device="cuda", precision="float32", output=tmp_path / "plain")
    run(plain)
    flags = {"checkpointing": "yes", "free_encoders": "yes", "tile_vae": "yes", "micro_batch": 1}
    for name in ("bfloat16", "float16"):
        lean = make(device="cuda", precision=name, output=tmp_path / name, **flags)
        started = next(event for event in run(lean) if isinstance(event, Started))
        assert started.fit["lean"] and started.fit["probe"] <= started.fit["budget"]
        assert far(weights_of(lean), weights_of(plain)) < 0.5


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_on_a_gpu_bitsandbytes_reads_what_torch_packed() -> None:
    weight = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    codes, scale = FORMATS["nf4"].pack(weight)
    fast = FORMATS["nf4"].unpack(codes, scale, weight.shape, weight.dtype)
    slow = FORMATS["nf4"].unpack(codes.cpu(), scale.cpu(), weight.shape, weight.dtype)
    assert torch.allclose(fast.cpu(), slow, atol=0.02)


def test_what_the_run_asks_of_the_base(make: Make) -> None:
    load = workload_of(check(make(sample_prompts=["a", "b"], sample_seeds=[0, 1, 2, 3, 4])))
    assert (load.height, load.width, load.windows, load.drawn) == (8, 8, 1, 8)
