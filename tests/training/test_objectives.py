"""Losses, held against the papers' algebra and diffusers' schedulers rather than against themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from personalize import registry
from personalize.data.batches import generator
from personalize.families.cond import Cond
from personalize.families.noise import VP, Noise
from personalize.families.pocket import POCKET
from personalize.models.model import Base
from personalize.recipe.fields import Objective
from personalize.training.objectives.denoise import add_noise, share_of
from personalize.training.objectives.draws import timesteps
from personalize.training.objectives.objective import Denoise, Inputs, Off, Rng, answer, make_objective, needs_of

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
ALL_T = torch.arange(1000)


def scheduler(prediction: str, zero_snr: bool) -> DDPMScheduler:
    return DDPMScheduler(**BETAS, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)


def schedule_of(prediction: str, zero_snr: bool = True) -> VP:
    return VP(scheduler(prediction, zero_snr).alphas_cumprod, prediction)


def rng(seed: int = 0, step: int = 0) -> Rng:
    return lambda purpose: generator(seed, purpose, step)


def inputs(b: int = 4, std: float = 0.0) -> Inputs:
    mean = torch.randn(b, 16, 8, 8, generator=torch.Generator().manual_seed(7))
    return Inputs(mean, torch.full_like(mean, std), said(0.0, b))


def weighed(gamma: float) -> Objective:
    """Weighted by min-SNR; what a mask leaves out does not count."""
    return Objective(min_snr=gamma, mask_outside=0.0)


def build(settings: Objective, schedule: Noise, off: Off = contextlib.nullcontext) -> Callable[..., Tensor]:
    """The losses [b] of a batch under a recipe's objective."""
    objective = make_objective(settings, schedule)

    def losses(denoise: Denoise, inputs: Inputs, rng: Rng) -> Tensor:
        return answer([objective.loss(objective.draw(inputs, rng))], denoise, off)[0]

    return losses


def said(value: float, rows: int = 2) -> Cond:
    """Conditioning that is this number everywhere."""
    return Cond(torch.full((rows, 77, 192), value))


def zero(latents: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return torch.zeros_like(latents)


@pytest.mark.parametrize("zero_snr", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noising_and_targets_are_those_of_diffusers(prediction: str, zero_snr: bool) -> None:
    theirs, ours = scheduler(prediction, zero_snr), schedule_of(prediction, zero_snr)
    x = add_noise(inputs(), ours, weighed(0.0), rng())
    x0 = inputs().mean
    eps = torch.randn(x0.shape, generator=rng()("noise"))
    assert torch.allclose(x.latents, theirs.add_noise(x0, eps, x.t), atol=1e-6)
    wanted = {"epsilon": eps, "sample": x0, "v_prediction": theirs.get_velocity(x0, eps, x.t)}[prediction]
    assert torch.allclose(x.target, wanted, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_no_loss_at_any_timestep(prediction: str, gamma: float) -> None:
    schedule, given = schedule_of(prediction), inputs()

    def perfect(latents: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return add_noise(given, schedule, weighed(0.0), rng()).target

    assert torch.equal(build(Objective(min_snr=gamma), schedule)(perfect, given, rng()), torch.zeros(4))


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_in_x0_by_min_snr_gamma_whatever_is_predicted(prediction: str, gamma: float) -> None:
    schedule = schedule_of(prediction, zero_snr=False)
    t = ALL_T[::50].repeat(1)
    x0, guess, eps = (torch.randn(len(t), 16, 8, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    alpha, sigma = schedule.signal(t).double(), schedule.noise(t).double()
    x_t = alpha * x0 + sigma * eps

    def as_predicted(clean: Tensor) -> Tensor:
        noise = (x_t - alpha * clean) / sigma  # the eps that this x_0 means
        return {"sample": clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean}[prediction]

    squared = (as_predicted(guess) - as_predicted(x0)).square().mean(dim=(1, 2, 3))
    wanted = (alpha / sigma).square().flatten().clamp(max=gamma) * (guess - x0).square().mean(dim=(1, 2, 3))
    assert torch.allclose(schedule.weight(t, gamma).double() * squared, wanted, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_are_finite_and_bounded_with_zero_terminal_snr(prediction: str) -> None:
    schedule = schedule_of(prediction)
    assert schedule.snr(torch.tensor([999])) == 0
    found = schedule.weight(ALL_T, 5.0)
    assert found.isfinite().all() and (found >= 0).all()
    assert found.max() <= (5.0 if prediction == "sample" else 1.0)
    assert found[-1] == (1.0 if prediction == "epsilon" else 0.0)
    assert torch.equal(schedule.weight(ALL_T, 0.0), torch.ones(1000))


def test_one_loss_per_picture_in_fp32() -> None:
    given, schedule = inputs(5), schedule_of("v_prediction")
    losses = build(Objective(), schedule)(lambda x, t, c: zero(x, t, c).bfloat16(), given, rng())
    assert losses.shape == (5,) and losses.dtype == torch.float32
    x = add_noise(given, schedule, weighed(5.0), rng())
    assert torch.allclose(losses, x.weight * x.target.square().flatten(1).mean(1))


def test_timesteps_are_uniform_and_spread_over_the_schedule() -> None:
    schedule = schedule_of("epsilon")
    drawn = torch.stack([timesteps(4, schedule, rng(step=i), Objective()) for i in range(500)])
    assert drawn.min() >= 0 and drawn.max() <= 999
    for column in (drawn[:, 0], drawn[:, 3], drawn.flatten()):
        assert abs(column.float().mean() - 499.5) < 40
        assert abs((column < 250).float().mean() - 0.25) < 0.06
    gaps = drawn.sort(dim=1).values.diff(dim=1)
    assert gaps.min() >= 249 and gaps.max() <= 251


def test_every_draw_depends_on_seed_step_and_purpose_only() -> None:
    given, loss = inputs(std=0.5), build(Objective(), schedule_of("epsilon"))
    first = loss(zero, given, rng(0, 3))
    torch.manual_seed(123)
    assert torch.equal(loss(zero, given, rng(0, 3)), first)
    assert not torch.equal(loss(zero, given, rng(0, 4)), first)
    assert not torch.equal(loss(zero, given, rng(1, 3)), first)


def test_latents_are_drawn_afresh_from_the_posterior() -> None:
    schedule = VP(torch.ones(1000) - 1e-7, "sample")  # hardly any noise: x_t is x_0
    given = inputs(2, std=0.5)
    drawn = torch.stack([add_noise(given, schedule, weighed(0.0), rng(step=i)).target for i in range(200)])
    assert torch.allclose(drawn.mean(0), given.mean, atol=0.25)
    assert abs(drawn.std(0).mean() - 0.5) < 0.02


# ---------------------------------------------------------------- prior preservation


def test_class_images_add_their_own_loss() -> None:
    own, theirs = inputs(3), inputs(2, std=0.1)
    both = Inputs(
        *(torch.cat([getattr(own, name), getattr(theirs, name)]) for name in ("mean", "std")),
        Cond.cat([own.cond, theirs.cond]),
        class_images=2,
    )
    schedule = schedule_of("epsilon")

    def total(weight: float) -> Tensor:
        return build(Objective(prior="images", prior_weight=weight), schedule)(zero, both, rng())

    alone, with_one, with_two = total(0.0), total(1.0), total(2.0)
    assert alone.shape == (3,)
    assert (with_one > alone).all()
    assert torch.allclose(with_two - alone, 2 * (with_one - alone), atol=1e-5)
    x = add_noise(both, schedule, weighed(5.0), rng())
    assert torch.equal(x.t[:2], x.t[3:])
    each = x.weight * x.target.square().flatten(1).mean(1)
    assert torch.allclose(alone, each[:3]) and torch.allclose(with_one - alone, each[3:].mean().expand(3))


class Switched:
    """A network whose prediction is `gain` times its input while the adapter is on, and its input while it is off."""

    def __init__(self) -> None:
        self.gain = torch.tensor(3.0, requires_grad=True)
        self.on, self.calls = True, list[tuple[bool, int]]()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True

    def __call__(self, latents: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls.append((self.on, len(latents)))
        return latents * (self.gain if self.on else 1.0) + cond.tokens.mean(dim=(1, 2))[:, None, None, None]


def with_class(cond: float = 0.0, off: float = 0.0, rows: int = 2) -> Inputs:
    given = inputs(2)
    held = {"class_cond": said(cond, rows), "class_cond_off": said(off, rows)}
    return replace(given, **held)


def test_output_preservation_pulls_towards_the_adapter_off_prediction() -> None:
    schedule = schedule_of("epsilon")
    net = Switched()
    losses = build(Objective(prior="output", prior_weight=1e6, min_snr=0), schedule, net.off)(net, with_class(), rng())
    assert net.calls == [(False, 2), (True, 4)]
    losses.mean().backward()
    assert net.gain.grad is not None and net.gain.grad > 0  # a gain above 1 must fall
    net.gain.data.fill_(1.0)
    kept = build(Objective(prior="output", min_snr=0), schedule, net.off)(net, with_class(), rng())
    plain = build(Objective(min_snr=0), schedule)(net, with_class(), rng())
    assert torch.allclose(kept, plain)  # on = off: nothing to preserve


def test_output_preservation_holds_as_many_rows_as_there_are_class_captions() -> None:
    schedule, net = schedule_of("epsilon"), Switched()
    one = build(Objective(prior="output", min_snr=0), schedule, net.off)(net, with_class(rows=1), rng())
    assert net.calls == [(False, 1), (True, 3)]
    own = build(Objective(min_snr=0), schedule)(net, with_class(), rng())
    assert torch.allclose(one - own, (one - own)[:1].expand(2)) and (one > own).all()  # the mean over the held rows


def test_output_preservation_compares_each_prompt_as_its_own_encoder_reads_it() -> None:
    schedule, net = schedule_of("epsilon"), Switched()
    net.gain.data.fill_(1.0)

    def extra(cond: float, off: float) -> float:
        def loss(weight: float) -> Tensor:
            return build(Objective(prior="output", prior_weight=weight, min_snr=0), schedule, net.off)(
                net, with_class(cond, off), rng()
            )

        return (loss(1.0) - loss(0.0)).mean().item()

    assert extra(0.4, 0.4) == pytest.approx(0.0, abs=1e-6)
    assert extra(0.4, 0.1) == pytest.approx(0.09, rel=1e-3)


@pytest.mark.parametrize("zero_snr", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_follows_the_config_of_a_real_base(
    base_builder: Callable[..., Path], tmp_path: Path, prediction: str, zero_snr: bool
) -> None:
    config: dict[str, Any] = {
        **BETAS,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": zero_snr,
        "_class_name": "DDIMScheduler",
    }
    base = Base("", tmp_path, POCKET, torch.device("cpu"), torch.float32, config, None, None, None, None)  # type: ignore[arg-type]
    losses = build(Objective(), base.noise)(zero, inputs(), rng())
    assert losses.isfinite().all()
    assert torch.equal(losses, build(Objective(), schedule_of(prediction, zero_snr))(zero, inputs(), rng()))


# ---------------------------------------------------------------- masks


def masked(outside: float, prior: str = "none", b: int = 3, **more: Any) -> tuple[Inputs, Tensor, Callable[..., Tensor]]:
    """Inputs with random masks, the weights that these give, and the loss."""
    given = inputs(b)
    mask = (torch.rand(b, 1, 8, 8, generator=torch.Generator().manual_seed(3)) > 0.6).float()
    loss = build(Objective(min_snr=0, mask_outside=outside, prior=prior, **more), schedule_of("epsilon"))
    return replace(given, mask=mask), mask + outside * (1 - mask), loss


@pytest.mark.parametrize("outside", [0.0, 0.1, 1.0])
def test_a_masked_loss_is_the_weighted_mean_over_the_area(outside: float) -> None:
    given, weight, loss = masked(outside)
    x = add_noise(given, schedule_of("epsilon"), weighed(0.0), rng())
    each = x.target.square().mean(dim=1, keepdim=True)
    assert torch.allclose(loss(zero, given, rng()), (weight * each).sum((1, 2, 3)) / weight.sum((1, 2, 3)))


def test_what_lies_outside_a_mask_does_not_count_at_0() -> None:
    given, weight, loss = masked(0.0)

    def wrong_outside(latents: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return zero(latents, t, cond) + 1e3 * (1 - weight)

    assert torch.equal(loss(wrong_outside, given, rng()), loss(zero, given, rng()))
    assert not torch.equal(masked(0.1)[2](wrong_outside, given, rng()), masked(0.1)[2](zero, given, rng()))


def test_a_small_mask_counts_as_much_as_a_large_one() -> None:
    def off_by_one(latents: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return torch.randn(latents.shape, generator=rng()("noise")) + 1  # what `add_noise` drew

    given, _, loss = masked(0.0)
    assert torch.allclose(loss(off_by_one, given, rng()), torch.ones(3))


def test_priors_are_not_masked() -> None:
    given, _, loss = masked(0.0, "images", prior_weight=1.0)
    plain = inputs(5)
    both = replace(plain, mask=given.mask, class_images=2)
    x = add_noise(replace(plain, class_images=2), schedule_of("epsilon"), weighed(0.0), rng())
    prior = x.target[3:].square().mean()
    own = masked(0.0)[2](zero, replace(plain, mask=torch.cat([given.mask, torch.ones(2, 1, 8, 8)])), rng())[:3]
    assert torch.allclose(loss(zero, both, rng()), own + prior)
    held = replace(given, class_cond=said(1.0), class_cond_off=said(0.0))

    def apart(latents: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return zero(latents, t, cond) + cond.tokens.mean((1, 2))[:, None, None, None]

    loss = masked(0.0, "output", prior_weight=1.0)[2]
    assert torch.allclose(loss(apart, held, rng()) - masked(0.0)[2](apart, given, rng()), torch.ones(3))


# ---------------------------------------------------------------- every row of the table


def batch_for(name: str, b: int, seed: int = 7) -> Inputs:
    """A batch with all that an objective needs: b images, 2 rows for its prior."""
    needs = needs_of(Objective(prior=name))
    k = 2 if needs.class_images else 0
    mean = torch.randn(b + k, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    conds = {"class_cond": said(0.3), "class_cond_off": said(0.1)} if needs.class_captions else {}
    conds |= {"class_cond_off": said(0.1, b)} if needs.reference else {}
    return Inputs(mean, torch.full_like(mean, 0.1), said(0.2, b + k), class_images=k, **conds)


ROWS = list(registry.table("objectives"))


@pytest.mark.parametrize("name", ROWS)
def test_every_objective_has_a_loss_for_each_image_that_depends_on_seed_and_step(name: str) -> None:
    net = Switched()
    loss = build(Objective(prior=name), schedule_of("epsilon"), net.off)
    one = loss(net, batch_for(name, 4), rng(0, 3))
    torch.manual_seed(5)
    assert one.shape == (4,) and one.dtype == torch.float32 and one.isfinite().all() and one.requires_grad
    assert torch.equal(loss(net, batch_for(name, 4), rng(0, 3)), one)
    assert not torch.equal(loss(net, batch_for(name, 4), rng(0, 4)), one)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("name", ROWS)
def test_pieces_of_every_objective_have_the_gradient_of_the_whole(name: str, n: int) -> None:
    net, objective = Switched(), make_objective(Objective(prior=name, prior_weight=2.0), schedule_of("epsilon"))
    rows = objective.draw(batch_for(name, 4), rng())
    assert rows.batch == 4 and rows.split(1)[0] is rows
    whole = answer([objective.loss(rows)], net, net.off)[0].mean()
    (wanted,) = torch.autograd.grad(whole, net.gain)
    pieces = [answer([objective.loss(piece)], net, net.off)[0] for piece in rows.split(n)]
    assert [len(piece) for piece in pieces] == [len(range(4)[share_of(4, i, n)]) for i in range(n)]
    total = sum(piece.sum() for piece in pieces) / 4
    (found,) = torch.autograd.grad(total, net.gain)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize("name", ROWS)
def test_batches_of_every_objective_are_answered_side_by_side(name: str) -> None:
    net, objective = Switched(), make_objective(Objective(prior=name), schedule_of("epsilon"))
    rows = [objective.draw(batch_for(name, 3, seed), rng(seed)) for seed in range(3)]
    alone = [answer([objective.loss(one)], net, net.off)[0] for one in rows]
    calls = len(net.calls) // 3
    net.calls.clear()
    together = answer([objective.loss(one) for one in rows], net, net.off)
    assert len(net.calls) == calls
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
