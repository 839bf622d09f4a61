"""Noise, timesteps and weights that a recipe asks for, each held against its paper's formula in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from personalize.data.batches import generator
from personalize.errors import RecipeError
from personalize.families.cond import Cond
from personalize.families.noise import VP, Flow, Noise
from personalize.recipe.fields import Objective, Recipe
from personalize.recipe.resolve import resolve
from personalize.training.events import Step
from personalize.training.loop import train
from personalize.training.memory.plan import choose_memory_plan, estimate_of
from personalize.training.objectives.denoise import add_noise, errors
from personalize.training.objectives.draws import LEVELS, draw_noise, timesteps
from personalize.training.objectives.objective import Inputs, Rng
from personalize.training.objectives.weights import bends, powers, weights
from personalize.training.preflight import check

Make = Callable[..., Recipe]
T = torch.arange(0, 990, 37)


def vp(prediction: str = "epsilon", zero_snr: bool = False) -> VP:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr)
    return VP(scheduler.alphas_cumprod.double(), prediction)


FLOW = Flow.of({"num_train_timesteps": 1000, "shift": 3.0})
NOISES: dict[str, Noise] = {name: vp(name) for name in ("epsilon", "v_prediction", "sample")} | {"flow": FLOW}


def rng(step: int = 0) -> Rng:
    return lambda purpose: generator(0, purpose, step)


def inputs(b: int = 4, side: int = 8) -> Inputs:
    mean = torch.randn(b, 16, side, side, generator=torch.Generator().manual_seed(7))
    return Inputs(mean, torch.zeros_like(mean), Cond(torch.zeros(b, 77, 192)))


def normal(purpose: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng()(purpose))


# ---------------------------------------------------------------- noise


def test_offset_noise_is_the_same_over_a_channel() -> None:
    given, noise = inputs(), vp()
    x = add_noise(given, noise, Objective(noise_offset=0.3), rng())
    eps = normal("noise", 4, 16, 8, 8).double() + 0.3 * normal("noise offset", 4, 16, 1, 1).double()
    assert torch.allclose(x.target.double(), eps, atol=1e-6)
    signal = noise.alphas_cumprod[x.t].reshape(-1, 1, 1, 1)
    assert torch.allclose(x.latents.double(), signal.sqrt() * given.mean + (1 - signal).sqrt() * eps, atol=1e-5)
    plain = add_noise(given, noise, Objective(), rng())
    assert torch.equal(plain.t, x.t)
    change = x.target - plain.target
    assert torch.allclose(change, change[:, :, :1, :1].expand_as(change), atol=1e-6) and change.std() == pytest.approx(
        0.3, rel=0.2
    )


@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (2, 4, 8, 32)])
def test_pyramid_noise_adds_coarser_and_coarser_levels(shape: tuple[int, ...]) -> None:
    like, drawn = torch.zeros(shape), rng()("pyramid noise")
    whole = normal("noise", *shape).double()
    height, width = shape[2:]
    for i in range(LEVELS):
        factor = 2 + 2 * float(torch.rand((), generator=drawn))
        height, width = max(1, int(height / factor**i)), max(1, int(width / factor**i))
        coarse = torch.randn(*shape[:2], height, width, generator=drawn)
        whole += 0.6**i * F.interpolate(coarse, size=shape[2:], mode="bilinear").double()
        if height == 1 or width == 1:
            break
    found = draw_noise(like, Objective(pyramid_noise=0.6), rng())
    assert torch.allclose(found.double(), whole / whole.std(), atol=1e-5)
    assert float(found.std()) == pytest.approx(1.0, abs=1e-5)
    assert found.mean(dim=(2, 3)).std() > 1.5 * draw_noise(like, Objective(), rng()).mean(dim=(2, 3)).std()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_perturbed_input_is_noisier_than_what_is_to_be_told(prediction: str) -> None:
    given, noise = inputs(), vp(prediction)
    x = add_noise(given, noise, Objective(input_perturbation=0.2), rng())
    plain = add_noise(given, noise, Objective(), rng())
    assert torch.equal(x.target, plain.target) and torch.equal(x.t, plain.t)
    xi = normal("input perturbation", 4, 16, 8, 8).double()
    power = (1 - noise.alphas_cumprod[x.t]).sqrt().reshape(-1, 1, 1, 1)
    assert torch.allclose(x.latents.double() - plain.latents, 0.2 * power * xi, atol=1e-5)


# ---------------------------------------------------------------- weights


def squared_errors(noise: Noise, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of some guess of x_0: squared errors in what is predicted and in eps [b], and the SNR, all in fp64."""
    x0, guess, eps = (
        torch.randn(len(t), 4, 4, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)
    )
    if isinstance(noise, Flow):
        power = noise.sigmas[t].double()
        signal = 1 - power
    else:
        assert isinstance(noise, VP)
        signal, power = noise.alphas_cumprod[t].double().sqrt(), (1 - noise.alphas_cumprod[t].double()).sqrt()
    s, n = signal.reshape(-1, 1, 1, 1), power.reshape(-1, 1, 1, 1)
    x_t = s * x0 + n * eps
    other = (x_t - s * guess) / n
    predict: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "epsilon": lambda clean, noise: noise,
        "sample": lambda clean, noise: clean,
        "v_prediction": lambda clean, noise: s * noise - n * clean,
        "flow": lambda clean, noise: noise - clean,
    }
    says = predict[noise.prediction]
    error = (says(guess, other) - says(x0, eps)).square().mean(dim=(1, 2, 3))
    return error, (other - eps).square().mean(dim=(1, 2, 3)), (signal / power).square()


@pytest.mark.parametrize("name", NOISES)
def test_debiased_estimation_weighs_errors_in_eps_by_the_root_of_the_snr(name: str) -> None:
    """Yu et al. 2023."""
    predicted, in_eps, snr = squared_errors(NOISES[name], T)
    found = weights(NOISES[name], T, Objective(weighting="debiased")).double() * predicted
    assert torch.allclose(found, in_eps / snr.sqrt(), rtol=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("name", NOISES)
def test_p2_weighs_errors_in_eps_by_its_formula(name: str, gamma: float) -> None:
    """Choi et al. 2022: lambda' = lambda / (k + SNR)^gamma, k = 1."""
    predicted, in_eps, snr = squared_errors(NOISES[name], T)
    found = weights(NOISES[name], T, Objective(weighting="p2", p2_gamma=gamma)).double() * predicted
    assert torch.allclose(found, in_eps / (1 + snr) ** gamma, rtol=1e-4)


@pytest.mark.parametrize("weighting", ["debiased", "p2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_are_finite_where_nothing_is_left_of_the_image(prediction: str, weighting: Any) -> None:
    found = weights(vp(prediction, zero_snr=True), torch.arange(1000), Objective(weighting=weighting))
    assert found.isfinite().all() and (found >= 0).all()


def test_without_a_weighting_it_is_min_snr() -> None:
    for noise in NOISES.values():
        assert torch.equal(weights(noise, T, Objective(min_snr=3.0)), noise.weight(T, 3.0))


def test_huber_is_square_for_small_errors_and_even_for_large_ones() -> None:
    """2 c (sqrt(error^2 + c^2) - c): Charbonnier et al. 1997, and kohya's trainer."""
    error = torch.tensor([[1e-3, -0.05, 0.4, -30.0]], dtype=torch.float64)
    found = powers(error, torch.tensor([0.1]))[0]
    for value, one in zip(error[0].tolist(), found.tolist(), strict=True):
        assert one == pytest.approx(0.2 * (math.sqrt(value**2 + 0.1**2) - 0.1), rel=1e-6)
    assert found[0] == pytest.approx(1e-6, rel=1e-3) and found[3] == pytest.approx(0.2 * 30, rel=1e-2)
    assert torch.equal(powers(error, None), error.square())


@pytest.mark.parametrize("name", NOISES)
def test_the_bend_of_huber_follows_the_noise_as_in_kohyas_trainer(name: str) -> None:
    noise = NOISES[name]
    snr = squared_errors(noise, T)[2]
    wanted = {
        "constant": torch.full((len(T),), 0.1, dtype=torch.float64),
        "exponential": torch.exp(math.log(0.1) * T.double() / 1000),
        "snr": 0.9 / (1 + (1 / snr).sqrt()) ** 2 + 0.1,
    }
    for schedule, values in wanted.items():
        found = bends(noise, T, Objective(huber=0.1, huber_schedule=schedule))  # type: ignore[arg-type]
        assert found is not None and torch.allclose(found.double(), values, rtol=1e-4)
    assert bends(noise, T, Objective()) is None


def test_huber_is_the_loss_of_each_image_with_its_own_bend() -> None:
    x = add_noise(inputs(), vp(), Objective(huber=0.1, min_snr=0.0), rng())
    assert x.bend is not None and len(set(x.bend.tolist())) == 4
    wanted = powers(1 - x.target.double(), x.bend.double()).mean(dim=(1, 2, 3))
    assert torch.allclose(errors(torch.ones_like(x.target), x).double(), wanted, rtol=1e-5)
    half = x[slice(2, 4)]
    assert half.bend is not None and torch.equal(half.bend, x.bend[2:])
    assert torch.equal(errors(torch.ones_like(half.target), half), errors(torch.ones_like(x.target), x)[2:])


# ---------------------------------------------------------------- timesteps


def drawn(noise: Noise, **settings: Any) -> Tensor:
    """4,000 timesteps, as shares of all."""
    each = [timesteps(8, noise, rng(i), Objective(**settings)) for i in range(500)]
    return torch.cat(each).double() / 1000


def phi(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


CDF: dict[str, tuple[dict[str, Any], Callable[[float], float]]] = {
    "uniform": ({"density": "uniform"}, lambda x: x),
    "cubic": ({"density": "cubic"}, lambda x: 1 - (1 - x) ** (1 / 3)),
    "logit-normal": ({"density": "logit-normal"}, lambda x: phi(math.log(x / (1 - x)))),
    "shifted": (
        {"density": "logit-normal", "logit_mean": 1.0, "logit_std": 0.5},
        lambda x: phi((math.log(x / (1 - x)) - 1) / 0.5),
    ),
}


@pytest.mark.parametrize("name", CDF)
@pytest.mark.parametrize("noise", [vp(), FLOW], ids=["vp", "flow"])
def test_timesteps_are_drawn_from_their_density(noise: Noise, name: str) -> None:
    settings, cdf = CDF[name]
    found = drawn(noise, **settings)
    assert found.min() >= 0 and found.max() < 1
    for x in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert float((found < x).double().mean()) == pytest.approx(cdf(x), abs=0.01)


def test_a_range_is_kept_and_holds_the_bases_own_density() -> None:
    found = drawn(vp(), min_timestep=200, max_timestep=400)
    assert (float(found.min()), float(found.max())) == (0.2, 0.399)
    assert float((found < 0.25).double().mean()) == pytest.approx(0.25, abs=0.01)
    middle = drawn(FLOW, min_timestep=500)
    assert middle.min() >= 0.5 and float((middle < 0.75).double().mean()) == pytest.approx(0.5, abs=0.01)
    assert float((middle < 0.6).double().mean()) == pytest.approx(phi(math.log(0.2 / 0.8)), abs=0.01)


def test_where_nothing_is_asked_for_the_base_draws_as_ever() -> None:
    for noise in NOISES.values():
        assert torch.equal(timesteps(8, noise, rng(), Objective()), noise.draw_t(8, rng()("timesteps")))
        whole = Objective(max_timestep=1000, density=noise.density)  # type: ignore[arg-type]
        assert torch.equal(timesteps(8, noise, rng(), whole), noise.draw_t(8, rng()("timesteps")))


# ---------------------------------------------------------------- in a run


def test_a_run_draws_what_it_tells(make: Make) -> None:
    recipe = make(min_timestep=300, max_timestep=500, density="cubic", noise_offset=0.1, huber=0.2, weighting="p2")
    steps = [event for event in train(recipe) if isinstance(event, Step)]
    told = [t for step in steps for t in step.timesteps]
    assert len(told) == 8 and all(300 <= t < 500 for t in told)
    assert all(not step.skipped for step in steps)


def test_what_random_levels_take_can_be_estimated(make: Make) -> None:
    plan = check(make(memory="900MB", pyramid_noise=0.4))
    assert estimate_of(plan, choose_memory_plan(plan).compute).peak > 0


@pytest.mark.parametrize(("flags", "why"), [
    ({"p2_gamma": 2.0}, "--p2-gamma is of --weighting p2, which is not asked for"),
    ({"logit_mean": 1.0, "density": "cubic"}, "--logit-mean is of --density logit-normal"),
    ({"logit_std": 2.0}, "--logit-std is of --density logit-normal"),
    ({"huber_schedule": "constant"}, "--huber-schedule is of --huber"),
    ({"weighting": "debiased", "min_snr": 1.0}, "--weighting debiased and --min-snr 1 exclude each other"),
    ({"noise_offset": 0.1, "pyramid_noise": 0.3}, "--noise-offset and --pyramid-noise exclude each other"),
    ({"min_timestep": 500, "max_timestep": 500}, "no timestep is left from --min-timestep 500 to --max-timestep 500"),
])  # fmt: skip
def test_what_makes_no_sense_together_is_refused(tmp_path: Path, flags: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        resolve(flags={"folder": tmp_path, **flags})


def test_weights_that_turn_min_snr_off_are_no_contradiction(tmp_path: Path) -> None:
    assert resolve(flags={"folder": tmp_path, "weighting": "p2", "min_snr": 0}).objective.weighting == "p2"


@pytest.mark.parametrize(
    ("flags", "name"), [({"min_timestep": 1000}, "--min-timestep 1000"), ({"max_timestep": 1200}, "--max-timestep 1200")]
)
def test_timesteps_that_the_base_does_not_have_are_refused_first(make: Make, flags: dict[str, Any], name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}: the base has the timesteps 0 to 999"):
        check(make(**flags))
