"""Fleets: many adapters trained in the same passes are those that runs of their own give, and each run stays its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from small import LATENT

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.kinds.kind import DOWN
from personalize.errors import DataError, TrainingError
from personalize.models.model import Base
from personalize.recipe.fields import AdapterSpec, Recipe
from personalize.training import loop
from personalize.training.events import Event, Failed, Finished, Shared, Started, Step, Warned
from personalize.training.fleet import train_fleet
from personalize.training.loop import train
from personalize.training.memory.apply import apply_plan
from personalize.training.memory.ladder import ComputePlan
from personalize.training.memory.meter import counting, tensors_of
from personalize.training.objectives.objective import Inputs, make_objective
from personalize.training.optimizers import Optimizer
from personalize.training.preflight import check
from personalize.training.rundir import Run
from personalize.training.step import Learner, gradients
from personalize.tuning.attach import attach
from personalize.tuning.fleet import Fleet
from personalize.tuning.targets import fresh

pytestmark = pytest.mark.usefixtures("short_exam", "one_thread")
Make = Callable[..., Recipe]
EVERYTHING = ("attention", "feedforward", "conv")
CLOSE = 2e-4  # of dW: sums in another order, through a few steps of AdamW, whose first ones go by the gradient's sign


@pytest.fixture
def make(make: Make, tmp_path: Path) -> Make:
    """3 steps, in a run folder of its own."""
    return lambda name, **flags: make(**{"output": tmp_path / name, "steps": 3, "warmup": 0, **flags})


def fleet(recipes: list[Recipe], **options: Any) -> dict[int, list[Event]]:
    told: dict[int, list[Event]] = {i: [] for i in range(len(recipes))}
    for i, event in train_fleet(recipes, **options):
        told[i].append(event)
    return told


def adapter(recipe: Recipe) -> Adapter:
    assert recipe.output
    return Adapter.load(recipe.output / "zwx.safetensors")


def same(a: Recipe, b: Recipe) -> bool:
    """To the bit."""
    first, second = (adapter(one).deltas for one in (a, b))
    return all(
        torch.equal(tensor, second[path].stored()[role])
        for path, delta in first.items()
        for role, tensor in delta.stored().items()
    )


def own_events(events: list[Event]) -> list[Event]:
    """A run's own, without what is told of its fleet."""
    return [event for event in events if not isinstance(event, Shared)]


def losses(events: list[Event]) -> list[float]:
    return [loss for event in events if isinstance(event, Step) for loss in event.losses]


# ---------------------------------------------------------------- the layers


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_meet_their_own_factors_forward_and_backward(narrow_base: Path, b: int, checkpointing: bool) -> None:
    base, spec, n = Base.load(narrow_base), AdapterSpec(rank=3, alpha=1.5, targets=EVERYTHING), 3
    if checkpointing:
        apply_plan(base, ComputePlan("float32", checkpointing=True), base.device)
        base.denoiser.train()  # diffusers checkpoints nothing outside of training
    starts = [fresh(base, spec, ("unet",), seed) for seed in range(n)]
    for start in starts:
        for delta in start.values():
            delta.up.normal_(std=0.1)
    x, t, cond = torch.randn(n * b, *LATENT), torch.arange(n * b) * 100, base.embed(["a", "b", "c"] * b)
    wanted, gradients = [], []
    for m, start in enumerate(starts):
        rows = slice(m * b, (m + 1) * b)
        with attach(base, Adapter(start)) as attached:
            y = base.denoise(x[rows], t[rows], cond[rows])
            y.square().mean().backward()
            wanted.append(y.detach())
            gradients.append({name: p.grad for group in attached.parameters().values() for name, p in group.items()})
    with torch.no_grad():
        plain = base.denoise(x, t, cond)
    with Fleet(base, starts) as company:
        with company.active.of(0, 1, 2):
            y = base.denoise(x, t, cond)
            y.square().mean(dim=(1, 2, 3)).view(n, b).mean(1).sum().backward()
        for member in company.members:
            member.collect_gradients()
        assert torch.allclose(y, torch.cat(wanted), atol=1e-4 * float(plain.abs().max()))
        assert not torch.allclose(y, plain, atol=1e-3)
        for member, theirs in zip(company.members, gradients, strict=True):
            own = {name: p.grad for group in member.parameters().values() for name, p in group.items()}
            assert own.keys() == theirs.keys()
            for name, gradient in own.items():
                assert gradient is not None and theirs[name] is not None
                assert (gradient - theirs[name]).norm() <= 1e-3 * theirs[name].norm(), name
        with torch.no_grad(), company.active.of(2, 0):
            order = [*range(2 * b, 3 * b), *range(b)]
            some = base.denoise(x[order], t[order], cond[order])
        assert torch.allclose(some, torch.cat([wanted[2], wanted[0]]), atol=1e-4 * float(plain.abs().max()))
        with torch.no_grad():
            assert torch.equal(base.denoise(x, t, cond), plain)  # nobody's rows are the base's
    with torch.no_grad():
        assert torch.equal(base.denoise(x, t, cond), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_other_dtypes_factors_are_cast_all_at_once(narrow_base: Path, dtype: torch.dtype) -> None:
    base, spec = Base.load(narrow_base, dtype=dtype), AdapterSpec(rank=2, alpha=1, targets=EVERYTHING)
    starts = [fresh(base, spec, ("unet",), seed) for seed in range(2)]
    for start in starts:
        for delta in start.values():
            delta.up.normal_(std=0.1)
    x, t, cond = torch.randn(2, *LATENT, dtype=dtype), torch.tensor([200, 800]), base.embed(["a", "b"])
    found = []
    with Fleet(base, starts) as company:
        for lower in (contextlib.nullcontext, company.cast_once):
            with company.active.of(0, 1), lower():
                base.denoise(x, t, cond).float().square().mean().backward()
            for member in company.members:
                member.collect_gradients()
            learned = [p for one in company.members for group in one.parameters().values() for p in group.values()]
            found.append([p.grad.clone() for p in learned if p.grad is not None])
            company.members[0].drop_gradients()
        layer = company.layers["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
        down = layer.factors[DOWN]
        assert down.weight.dtype == torch.float32 and down.low is None
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(*found, strict=True)) and len(found[0]) > 100


def test_a_member_is_an_adapter_that_is_attached(narrow_base: Path) -> None:
    base, spec = Base.load(narrow_base), AdapterSpec(rank=2, targets=EVERYTHING)
    starts = [fresh(base, spec, ("unet", "text_encoder"), seed) for seed in range(2)]
    other = {path: delta.with_alpha(1.0) for path, delta in fresh(base, spec, ("unet", "text_encoder"), 7).items()}
    for delta in other.values():
        delta.up.normal_(std=0.1)
    x, t = torch.randn(2, *LATENT), torch.tensor([300, 700])

    def seen() -> torch.Tensor:
        with torch.no_grad():
            return base.denoise(x, t, base.embed(["a cat", "a dog"]))

    plain = seen()
    with attach(base, [(Adapter(other), 0.5)]):
        half = seen()
    with Fleet(base, starts) as company:
        one = company.members[1]
        assert distance(one.snapshot(), Adapter(starts[1])) == 0
        with company.active.of(1):
            one.put(Adapter(other))
            assert distance(one.snapshot(), Adapter(other)) < 1e-6
            with one.off():
                assert torch.equal(seen(), plain)
            with one.at(0.5):
                assert torch.allclose(seen(), half, atol=1e-4)
        with company.active.of(0):
            assert torch.equal(seen(), plain)  # still nothing


# ---------------------------------------------------------------- whole runs


def test_a_fleet_gives_what_runs_of_their_own_give(make: Make) -> None:
    differing = [
        {"seed": 1, "lr": 1e-3, "steps": 2},
        {"seed": 2, "lr": 3e-3, "steps": 4, "clip": 0.1, "schedule": "constant"},
        {"seed": 3, "lr": 2e-3, "steps": 3, "alpha": 1.0, "min_snr": 0, "flip": False},
        {"seed": 4, "steps": 2, "batch_size": 1, "accumulate": 2},
    ]
    common = {"targets": EVERYTHING, "prior": "output", "prior_share": 0.5}
    together = [make(f"fleet{i}", **common, **one) for i, one in enumerate(differing)]
    told = fleet(together)
    for i, one in enumerate(differing):
        recipe = make(f"solo{i}", **common, **one)
        events = list(train(recipe))
        assert losses(told[i]) == pytest.approx(losses(events), rel=1e-4)
        assert distance(adapter(together[i]), adapter(recipe)) < CLOSE
        assert [type(event) for event in own_events(told[i])] == [type(event) for event in events]
        ours, theirs = (next(e for e in side if isinstance(e, Started)) for side in (told[i], events))
        assert (ours.parameters, ours.base) == (theirs.parameters, theirs.base)
    assert distance(adapter(together[0]), adapter(together[1])) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["output", "images"])
def test_text_encoders_and_priors_learn_in_a_fleet_as_alone(make: Make, prior: str) -> None:
    flags = {"text_encoder_lr": 1e-3, "prior": prior, "prior_images": 2, "caption_dropout": 0.3}
    together = [make(f"fleet{i}", **flags, seed=i) for i in range(2)]
    told = fleet(together)
    for i in range(2):
        events = list(train(recipe := make(f"solo{i}", **flags, seed=i)))
        assert losses(told[i]) == pytest.approx(losses(events), rel=1e-4)
        assert distance(adapter(together[i]), adapter(recipe)) < CLOSE
        assert any(path.startswith("text_encoder") for path in adapter(recipe).deltas)


def test_pictures_checkpoints_and_the_choice_are_each_members_own(make: Make) -> None:
    flags = {
        "sample_prompts": ["{trigger} cat"],
        "sample_seeds": [3],
        "choose": "best",
        "steps": 2,
        "checkpoint_every": 1,
        "lr": 1e-2,
    }
    together = [make(f"fleet{i}", **flags, seed=i) for i in range(2)]
    told = fleet(together)
    events = list(train(recipe := make("solo", **flags, seed=1)))
    assert [type(event) for event in own_events(told[1])] == [type(event) for event in events]
    assert together[1].output and recipe.output
    names = [sorted(path.name for path in folder.rglob("*") if path.is_file()) for folder in (together[1].output, recipe.output)]
    assert names[0] == names[1]
    sweeps = [(one.output or Path()) / "samples" for one in together]
    sweeps = [next(folder.glob("*-zwx-cat-s3-x0.75.png")) for folder in sweeps]
    assert sweeps[0].read_bytes() != sweeps[1].read_bytes()


def test_a_stopped_fleet_goes_on_and_so_does_a_run_of_its_own(make: Make) -> None:
    whole, broken = [make(f"{name}{i}", seed=i, steps=4) for name in ("whole", "broken") for i in range(2)], 2
    fleet(whole[:2])
    with closing(train_fleet(whole[broken:])) as events:
        for _, event in events:
            if isinstance(event, Step) and event.step == 2:
                break
    again = fleet(whole[broken:])
    assert next(event for event in again[0] if isinstance(event, Started)).resumed in (1, 2)
    for i in range(2):
        assert same(whole[i], whole[broken + i])
    with closing(train_fleet(short := [make(f"short{i}", seed=i, steps=4) for i in range(2)])) as events:
        for _, event in events:
            if isinstance(event, Step) and event.step == 3:
                break
    list(train(short[0]))
    assert distance(adapter(short[0]), adapter(whole[0])) < CLOSE
    assert [type(event) for event in fleet(whole[:2])[1]] == [Finished]  # nothing is left to do


@pytest.mark.slow
def test_fewer_at_once_change_nothing_but_rounding(make: Make) -> None:
    all_of_them, one_by_one = ([make(f"{name}{i}", seed=i) for i in range(3)] for name in "ab")
    fleet(all_of_them)
    fleet(one_by_one, together=1)
    for a, b in zip(all_of_them, one_by_one, strict=True):
        assert distance(adapter(a), adapter(b)) < CLOSE


@pytest.mark.slow
def test_where_memory_runs_out_fewer_go_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    denoise, most = Base.denoise, 4

    def scarce(self: Base, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(latents) > most:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB")
        return denoise(self, latents, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Base, "denoise", scarce)
        told = fleet(recipes := [make(f"scarce{i}", seed=i) for i in range(4)])
    assert [event.text for event in told[3] if isinstance(event, Warned)] == [
        "memory ran out (out of memory): 2 of 4 members at a time from now on"
    ]
    list(train(alone := make("alone", seed=3)))
    assert distance(adapter(recipes[3]), adapter(alone)) < CLOSE
    most = 1
    monkeypatch.setattr(Base, "denoise", scarce)
    with pytest.raises(TrainingError, match="not even one member"):
        fleet([make(f"none{i}", seed=i) for i in range(2)])


@pytest.mark.slow
def test_a_budget_limits_how_many_go_at_once(make: Make) -> None:
    told = fleet([make(f"{i}", seed=i, memory="400MB") for i in range(2)])
    assert all(isinstance(events[-1], Finished) for events in told.values())


@pytest.mark.parametrize("rank", [2, 16])
def test_what_each_member_takes_is_told_before_it_trains(make: Make, narrow_base: Path, rank: int) -> None:
    recipes = [make(f"{i}", seed=i, rank=rank, base=str(narrow_base), targets=EVERYTHING) for i in range(4)]
    with closing(train_fleet(recipes)) as events:
        number, told = next(events)
    assert isinstance(told, Shared) and (number, told.members, told.at_once) == (0, 4, 4)
    plans = [check(recipe) for recipe in recipes]
    base, peaks = plans[0].base, {}
    for size in (2, 4):
        with Fleet(base, [plan.start for plan in plans[:size]]) as company:
            learners = [
                Learner(one, make_objective(plan.recipe.objective, base.noise), Optimizer(one.parameters(), plan.recipe.optim, 3))
                for one, plan in zip(company.members, plans, strict=False)
            ]
            held = [p for one in learners for p in one.opt.parameters.values()]
            moments = [torch.zeros_like(p) for p in held for _ in range(2)]
            inputs = Inputs(torch.zeros(2, *LATENT), torch.ones(2, *LATENT), base.embed(["a", "b"]))
            with counting(tensors_of([base.denoiser, base.vae, *(text.model for text in base.texts)]), held, moments) as count:
                gradients(learners, [[(inputs, lambda _: torch.Generator().manual_seed(0), lambda i: i)] for _ in learners])
                peaks[size] = count.peak
    assert told.adapter + told.batch == pytest.approx((peaks[4] - peaks[2]) / 2, rel=0.15)
    assert told.peak == pytest.approx(peaks[4], rel=0.1)


def test_what_differs_in_shape_is_trained_all_the_same(make: Make) -> None:
    shapes: list[dict[str, Any]] = [{}, {"rank": 4}, {"targets": ["attention"]}, {"dropout": 0.1}, {"seed": 2}]
    recipes = [make(f"{i}", steps=2, **shape) for i, shape in enumerate(shapes)]
    told = fleet(recipes)
    assert all(isinstance(events[-1], Finished) for events in told.values())
    list(train(alone := make("alone", steps=2, dropout=0.1)))
    assert same(recipes[3], alone)  # trained by itself
    said = {
        i: event.text for i, events in told.items() for event in events if isinstance(event, Warned) and "alone" in event.text
    }
    assert said.keys() == {1, 2, 3} and said[3].endswith("is trained alone: --dropout draws for a whole batch")
    assert said[1] == f"{recipes[1].output} is trained alone: no other has its base, kind, shape and --memory"


def test_a_run_that_fails_leaves_the_others_alone(make: Make) -> None:
    recipes = [make("good", steps=6), make("wild", steps=6, lr=1e30, clip=0)]
    told = fleet(recipes)
    assert isinstance(told[0][-1], Finished)
    assert isinstance(told[1][-1], Failed) and "not finite" in told[1][-1].message
    assert recipes[1].output
    assert Run(recipes[1].output, "zwx").history()[-1]["event"] == "error"
    list(train(alone := make("alone", steps=6)))
    assert distance(adapter(recipes[0]), adapter(alone)) < CLOSE


def test_a_folder_that_somebody_trains_into_is_told_and_the_others_go_on(make: Make) -> None:
    with closing(train(make("busy"))) as first:
        next(first)
        told = fleet([make("busy"), make("free")])
    assert isinstance(told[0][-1], Failed) and "busy is in use: by process" in told[0][-1].message
    assert isinstance(told[1][-1], Finished)


def test_what_is_wrong_with_a_recipe_is_told_before_any_is_trained(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    recipes = [make("good"), make("bad", folder=tmp_path / "empty"), make("good")]
    told = list(train_fleet(recipes))
    assert [(i, type(event)) for i, event in told[:2]] == [(1, Failed), (2, Failed)]
    assert "empty" in told[0][1].message and "two recipes" in told[1][1].message  # type: ignore[union-attr]
    assert told[-1][0] == 0 and isinstance(told[-1][1], Finished)


def test_where_no_member_can_begin_each_says_why(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: Any) -> Any:
        raise DataError(f"{plan.run.folder.name} cannot be encoded")

    monkeypatch.setattr(loop, "prepare_data", fail)
    told = fleet([make("a"), make("b", seed=1)])
    for i, name in enumerate("ab"):
        assert isinstance(told[i][-1], Failed) and f"{name} cannot be encoded" in told[i][-1].message
