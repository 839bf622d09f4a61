"""Direct Consistency Optimization, held against its paper's formula in fp64, and what the base alone reads meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personalize.data.batches import generator
from personalize.errors import RecipeError
from personalize.families.cond import Cond
from personalize.models.model import Base
from personalize.recipe.fields import Objective, Recipe
from personalize.recipe.resolve import resolve
from personalize.training.events import Shared, Started, Step
from personalize.training.fleet import train_fleet
from personalize.training.inputs import prepare_data, training_batches
from personalize.training.loop import train
from personalize.training.memory.plan import choose_memory_plan, estimate_of
from personalize.training.objectives.dco import consistency
from personalize.training.objectives.denoise import add_noise
from personalize.training.objectives.objective import Inputs, answer, make_objective
from personalize.training.optimizers import Optimizer
from personalize.training.preflight import RunPlan, check, parts
from personalize.training.step import Learner, gradients
from personalize.tuning.attach import Attached, attach

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., Recipe]
Gradients = dict[str, Tensor]
WITH_TEXT = {"text_encoder_lr": 1e-3, "lr": 5e-3, "warmup": 0}


def rng(purpose: str) -> torch.Generator:
    return generator(0, purpose, 0)


def learn_something(attached: Attached, size: float) -> None:
    """Weights as if there had been steps before."""
    for name, p in ((name, p) for group in attached.parameters().values() for name, p in group.items()):
        if name.endswith(".up"):
            torch.nn.init.normal_(p, std=size, generator=torch.Generator().manual_seed(len(name)))


def of_one_step(
    plan: RunPlan, inputs: Inputs, settings: Objective, size: float = 0.05, pieces: int = 1
) -> tuple[Gradients, Tensor]:
    """The gradients of the trainer's own step, and its losses."""
    recipe, base = plan.recipe, plan.base
    with attach(base, recipe.adapter, parts=parts(recipe, base), seed=1) as attached:
        learn_something(attached, size)
        opt = Optimizer(attached.parameters(), recipe.optim, 4)
        learner = Learner(attached, make_objective(settings, base.noise), opt, pieces)
        told = gradients([learner], [[(inputs, rng, lambda _: 0)]])[0]
        return {name: p.grad.clone() for name, p in opt.parameters.items() if p.grad is not None}, told[:-1]


def by_the_paper(plan: RunPlan, inputs: Inputs, settings: Objective, beta: float, size: float = 0.05) -> Gradients:
    """-log sigmoid(-beta (||eps_theta(x_t, c) - eps||^2 - ||eps_base(x_t, c') - eps||^2)), means over elements, in fp64."""
    recipe, base = plan.recipe, plan.base
    x = add_noise(inputs, base.noise, settings, rng)
    assert inputs.class_cond_off is not None

    def errors(predicted: Tensor) -> Tensor:
        error = predicted.double() - x.target.double()
        c = settings.huber
        each = 2 * c * ((error**2 + c**2).sqrt() - c) if c else error**2
        where = torch.ones(len(error), 1, *error.shape[2:]).double() if x.mask is None else x.mask.double()
        return (
            base.noise.weight(x.t, settings.min_snr).double()
            * (each * where).sum((1, 2, 3))
            / where.sum((1, 2, 3))
            / error.shape[1]
        )

    with torch.no_grad():
        held = errors(base.denoise(x.latents, x.t, inputs.class_cond_off))
    with attach(base, recipe.adapter, parts=parts(recipe, base), seed=1) as attached:
        learn_something(attached, size)
        loss = -torch.log(torch.sigmoid(-beta * (errors(base.denoise(x.latents, x.t, inputs.cond)) - held)))
        loss.mean().backward()
        return {name: p.grad for group in attached.parameters().values() for name, p in group.items() if p.grad is not None}


def far(a: Gradients, b: Gradients) -> float:
    """Distance of two steps' gradients, relative."""
    assert a.keys() == b.keys()
    joined = [torch.cat([one[name].flatten().double() for name in sorted(one)]) for one in (a, b)]
    return float((joined[0] - joined[1]).norm() / joined[1].norm())


@pytest.fixture
def plan(make: Make) -> RunPlan:
    return check(make(prior="dco", batch_size=3, rank=4))


@pytest.fixture
def inputs(plan: RunPlan) -> Inputs:
    return next(training_batches(plan, prepare_data(plan), 0))


@pytest.mark.parametrize("beta", [3.0, 1000.0])
@pytest.mark.parametrize("how", [
    {"min_snr": 0}, {"min_snr": 1.0}, {"min_snr": 0, "huber": 0.3, "huber_schedule": "constant"}, {"mask_outside": 0.2},
], ids=["plain", "weighted", "huber", "masked"])  # fmt: skip
def test_one_step_has_the_gradient_of_the_papers_formula(plan: RunPlan, inputs: Inputs, how: dict[str, Any], beta: float) -> None:
    if "mask_outside" in how:
        mask = torch.rand(inputs.mean[:, :1].shape, generator=torch.Generator().manual_seed(3)) > 0.6
        inputs = replace(inputs, mask=mask.float())
    settings = Objective(prior="dco", dco_beta=beta, **how)
    ours, losses = of_one_step(plan, inputs, settings)
    theirs = by_the_paper(plan, inputs, settings, beta)
    assert far(ours, {name: 2 / beta * grad for name, grad in theirs.items()}) < 1e-4
    assert losses.shape == (3,)
    for n in (2, 3):
        assert far(of_one_step(plan, inputs, settings, pieces=n)[0], ours) < 1e-4


def test_the_first_step_is_that_of_denoising(plan: RunPlan, inputs: Inputs) -> None:
    """Nothing is learned yet, and where the base reads the same caption, both are equal: loss, and gradient."""
    same = replace(inputs, class_cond_off=inputs.cond)
    ours, losses = of_one_step(plan, same, Objective(prior="dco"), size=0.0)
    theirs, plain = of_one_step(plan, same, Objective(), size=0.0)
    assert far(ours, theirs) < 1e-5 and torch.allclose(losses, plain)


def test_a_small_beta_is_denoising(plan: RunPlan, inputs: Inputs) -> None:
    plain, errors = of_one_step(plan, inputs, Objective())
    distances = []
    for beta in (100.0, 1.0, 1e-2):
        found, losses = of_one_step(plan, inputs, Objective(prior="dco", dco_beta=beta))
        distances.append(far(found, plain))
    assert distances == sorted(distances, reverse=True) and distances[0] > 0.05 and distances[-1] < 1e-3
    assert torch.allclose(losses, errors, atol=1e-3)


def test_an_image_that_is_known_better_than_to_the_base_is_left_alone() -> None:
    """And one that it knows better pulls twice as much as in denoising, whatever beta is."""
    held = torch.tensor([0.3, 0.3, 0.3], dtype=torch.float64)
    own = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    losses = consistency(own, held, 1000.0)
    (pull,) = torch.autograd.grad(losses.sum(), own)
    assert torch.allclose(pull, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), atol=1e-12)
    assert losses.isfinite().all() and losses[1].item() == pytest.approx(0.3)
    assert consistency(own.float() + 1e4, held.float(), 1e6).isfinite().all()


def test_what_lies_outside_a_mask_counts_for_neither() -> None:
    """Where the mask is 0, neither the base's errors nor one's own change the loss."""
    mean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :4] = 1
    noise = Base.load("pocket").noise
    zeros = Cond(torch.zeros(2, 77, 8))
    given = Inputs(mean, torch.zeros_like(mean), zeros, class_cond_off=zeros, mask=mask)
    objective = make_objective(Objective(prior="dco", mask_outside=0.0), noise)

    def losses(inside: float, outside: float) -> Tensor:
        def denoise(latents: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return inside * mask + outside * (1 - mask) + torch.zeros_like(latents)

        return answer([objective.loss(objective.draw(given, rng))], denoise)[0]

    assert torch.equal(losses(0.5, 0.0), losses(0.5, 100.0)) and not torch.equal(losses(0.5, 0.0), losses(0.6, 0.0))


# ---------------------------------------------------------------- what the base alone reads


def read(base: Base, *captions: str) -> Tensor:
    with torch.no_grad():
        return torch.cat([base.embed([caption], weighted=True).tokens for caption in captions])


def test_every_image_has_its_caption_without_the_trigger_or_none_where_it_was_dropped(make: Make) -> None:
    plan = check(make(prior="dco", batch_size=4, prior_share=0.25, caption_dropout=0.5, prior_prompts=["a house"]))
    wanted, own = read(plan.base, "cat", ""), read(plan.base, "zwx cat", "")
    told = list(islice(training_batches(plan, prepare_data(plan), 0), 4))
    dropped = [[bool(torch.equal(row, own[1])) for row in inputs.cond.tokens] for inputs in told]
    assert {True, False} <= set(itertools.chain(*dropped))
    for inputs, rows in zip(told, dropped, strict=True):
        assert inputs.class_cond is None and inputs.class_cond_off is not None
        assert torch.equal(inputs.class_cond_off.tokens, torch.stack([wanted[int(one)] for one in rows]))


@pytest.mark.parametrize("flags", [{}, {"text_encoder_lr": 1e-3}], ids=["frozen", "learning"])
def test_tags_that_are_shuffled_and_left_out_are_read_as_they_come(make: Make, flags: dict[str, Any]) -> None:
    """By the base alone, whatever the text encoder has learned."""
    varied = {"caption": "{trigger} cat, mat, night, ink", "caption_shuffle": True, "tag_dropout": 0.4}
    plan = check(make(prior="dco", batch_size=4, **varied, **flags))
    possible = [", ".join(["cat", *some]) for n in range(4) for some in itertools.permutations(["mat", "night", "ink"], n)]
    known = {one: read(plan.base, one)[0] for one in possible}
    data = prepare_data(plan)
    with attach(plan.base, plan.recipe.adapter, parts=parts(plan.recipe, plan.base), seed=1) as attached:
        learn_something(attached, 0.3)
        told = list(islice(training_batches(plan, data, 0, attached.off), 4))
        rows = [row for inputs in told if inputs.class_cond_off for row in inputs.class_cond_off.tokens]
        found = [next((one for one, kept in known.items() if torch.equal(row, kept)), None) for row in rows]
        own = [row for inputs in told for row in inputs.cond.tokens]
        with attached.off():
            plain = [read(plan.base, f"zwx {one}")[0] for one in found]
    assert len(found) == 16 and None not in found and len(set(found)) > 3
    assert all(torch.equal(a, b) for a, b in zip(own, plain, strict=True)) == (not flags)


@pytest.mark.parametrize("flags", [WITH_TEXT, {"vectors": 1, "embedding_lr": 0.1}], ids=["text", "words"])
def test_the_base_reads_as_ever_while_what_reads_captions_learns(
    make: Make, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    seen: list[tuple[bool, Cond]] = []
    real = Base.denoise

    def spy(self: Base, latents: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if torch.is_grad_enabled() or not cond.tokens.requires_grad:
            seen.append((torch.is_grad_enabled(), Cond(cond.tokens.detach().clone())))
        return real(self, latents, t, cond)

    recipe = make(prior="dco", steps=3, checkpoint_every=0, **flags)
    wanted = read(check(recipe).base, "cat")[0]
    with monkeypatch.context() as patch:
        patch.setattr(Base, "denoise", spy)
        steps = [event for event in train(recipe) if isinstance(event, Step)]
    assert len(steps) == 3
    held, own = ([cond.tokens for grad, cond in seen if grad == which][:3] for which in (False, True))
    assert len(held) == len(own) == 3
    assert all(torch.allclose(row, wanted, atol=1e-6) for tokens in held for row in tokens)
    assert not torch.allclose(own[0], own[2], atol=1e-4)


# ---------------------------------------------------------------- runs


EVERYTHING = {"prior": "dco", "caption_dropout": 0.3, "accumulate": 2, "dropout": 0.1, **WITH_TEXT}
VARIED = {"caption": "{trigger} cat, mat, night, ink", "caption_shuffle": True, "micro_batch": 1}


@pytest.mark.parametrize("flags", [EVERYTHING, {"prior": "dco", "vectors": 1, **VARIED}], ids=["text", "words"])
def test_a_stopped_run_ends_with_the_same_bytes(make: Make, tmp_path: Path, flags: dict[str, Any]) -> None:
    whole, broken = (make(**flags, steps=3, output=tmp_path / name) for name in ("whole", "broken"))
    list(train(whole))
    events = train(broken)
    next(event for event in events if isinstance(event, Step) and event.step == 2)
    events.close()  # type: ignore[attr-defined]
    assert next(event for event in list(train(broken)) if isinstance(event, Started)).resumed == 2
    assert (tmp_path / "whole/zwx.safetensors").read_bytes() == (tmp_path / "broken/zwx.safetensors").read_bytes()


@pytest.mark.parametrize("more", [{}, {"text_encoder_lr": 1e-3, **VARIED, "micro_batch": 0}], ids=["plain", "text"])
def test_members_of_a_fleet_learn_what_they_learn_alone(make: Make, tmp_path: Path, more: dict[str, Any]) -> None:
    """Each with a beta of its own, beside one with another objective."""
    own: list[dict[str, Any]] = [{"prior": "dco", "lr": 5e-3}, {"prior": "dco", "dco_beta": 5.0, "lr": 5e-3}, {"prior": "none"}]

    def recipes(where: str) -> list[Recipe]:
        return [make(**one, **more, seed=i, steps=3, warmup=0, output=tmp_path / where / str(i)) for i, one in enumerate(own)]

    told = list(train_fleet(recipes("fleet")))
    assert any(isinstance(event, Shared) and event.members == 3 for _, event in told)
    for i, recipe in enumerate(recipes("alone")):
        losses = [[e.loss for e in events if isinstance(e, Step)] for events in ([e for n, e in told if n == i], train(recipe))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3


def test_what_it_takes_is_estimated(make: Make) -> None:
    """One more pass without a gradient, of all images: what it leaves is a row of answers."""
    small = {"memory": "900MB", "batch_size": 4, "min_snr": 0}
    plain, ours, output = (check(make(**small, prior=prior)) for prior in ("none", "dco", "output"))
    peaks = [estimate_of(plan, choose_memory_plan(plan).compute).peak for plan in (plain, ours, output)]
    assert peaks[0] < peaks[1] < peaks[2]


def test_refused_in_one_line(pictures: Path) -> None:
    for flags, why in (
        ({"dco_beta": 10.0}, "--dco-beta is of --prior dco, which is not asked for"),
        ({"dco_beta": 10.0, "prior": "output"}, "--dco-beta is of --prior dco, which is not asked for"),
        ({"dco_beta": 0.0, "prior": "dco"}, "--dco-beta must be more than 0, not 0.0"),
        ({"prior": "dco", "kind": "embedding"}, "--prior dco keeps what has no trigger as it is"),
    ):
        with pytest.raises(RecipeError, match=why):
            resolve(flags={"folder": pictures, **flags})


def test_a_preset_may_name_it_for_adapters_alone(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('prior = "dco"\ndco_beta = 10.0\n')
    recipe = resolve(tmp_path / "mine.toml", {"folder": pictures, "kind": "embedding"})
    assert (recipe.objective.prior, recipe.objective.dco_beta) == ("none", 1000.0)
