"""Samplers by name: each draws what the prompt says on the real base, follows its seed alone, begins and ends where it says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from slow import all_but, every
from small import LATENT
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import LowRank
from personalize.errors import BaseModelError, RecipeError
from personalize.inference import png, sampling, schedulers
from personalize.inference.img2img import InitLatents
from personalize.inference.pipeline import draw, draw_images
from personalize.inference.request import Request
from personalize.models.model import Base
from personalize.recipe import samplers
from personalize.recipe.fields import Recipe
from personalize.recipe.resolve import resolve
from personalize.recipe.samplers import SAMPLERS, Sampler, sampler_name
from personalize.training.preflight import check
from personalize.tuning.attach import attach
from tools.pocket.judge import Judge

ANCESTRAL = {"Euler a", "DPM2 a", "DPM2 a Karras", "DDPM", "LCM", *(name for name in SAMPLERS if "SDE" in name)}
USUAL = {"Euler a", "DPM++ 2M Karras", "DPM++ 2M SDE", "UniPC"}  # judged in `make test`; the others in `make test-all`
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # ends with some signal

# numpy's, on its way through diffusers and scipy
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")


@pytest.fixture(scope="module")
def pocket() -> Base:
    return Base.load("pocket")


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> Base:
    return Base.load(narrow_base)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=int)


def of(base: Base, kind: Any = Base, **config: Any) -> Any:
    """The same base with another scheduler's config."""
    return kind(**{one.name: getattr(base, one.name) for one in fields(base)} | {"scheduler_config": config})


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("euler", "Euler"),
        ("euler_a", "Euler a"),
        ("Euler ancestral", "Euler a"),
        ("DPM++ 2M Karras", "DPM++ 2M Karras"),
        ("dpm++ 2m karras", "DPM++ 2M Karras"),
        ("dpmpp_2m", "DPM++ 2M"),
        ("dpmpp_3m_sde", "DPM++ 3M SDE"),
        ("dpm_2_ancestral", "DPM2 a"),
        ("uni_pc", "UniPC"),
        ("PNDM", "PLMS"),
        ("AUTO", "auto"),
    ],
)
def test_names_are_read_as_people_write_them(typed: str, meant: str) -> None:
    assert sampler_name(typed) == meant == resolve(flags={"sampler": typed}).sampling.sampler


@pytest.mark.parametrize(
    ("typed", "near"), [("eulr", "euler"), ("dpmpp_2m_karas", "dpm++ 2m karras"), ("DPM++ SDE", "dpm++ 3m sde")]
)
def test_an_unknown_name_is_told_with_the_nearest(base: Base, typed: str, near: str) -> None:
    with pytest.raises(RecipeError) as error:
        draw(base, ["a cat"], [0], sampler=typed)
    assert str(error.value) == f"unknown sampler {typed!r} (did you mean {near}?)"
    with pytest.raises(RecipeError, match="unknown sampler '5'"):
        resolve(flags={"sampler": 5})


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_name_is_its_own(base: Base, name: str) -> None:
    """What a row makes is called by the row's name, and no other row makes the same."""
    made = schedulers.make_sampler(base, 4, name)
    assert samplers.name_of(type(made).__name__, made.config) == name
    kind = type(made).__name__.removesuffix("Scheduler")
    assert [row.name for row in SAMPLERS.values() if row.names(kind, made.config)] == [name]


def test_the_bases_own_sampler_is_told_by_its_name(base: Base) -> None:
    assert schedulers.sampler_of(base) == "DDIM" == schedulers.sampler_of(of(base, **NOISE))
    assert schedulers.sampler_of(of(base, **NOISE, _class_name="EulerDiscreteScheduler")) == "Euler"
    assert schedulers.sampler_of(of(base, **NOISE, _class_name="PNDMScheduler", skip_prk_steps=True)) == "PLMS"
    karras = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    assert schedulers.sampler_of(of(base, **NOISE, **karras)) == "DPM++ 2M Karras"
    assert schedulers.sampler_of(of(base, **NOISE, _class_name="TCDScheduler")) == "TCD"
    told = Request("", 0, 1, 1.0, (64, 64)).complete(of(base, **NOISE, **karras))
    assert "Sampler: DPM++ 2M Karras, " in png.infotext(told, "1")


# ---------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def usual(pocket: Base) -> Image.Image:
    return draw(pocket, ["a red cat in the snow"], [0], steps=20, sampler="DDIM")[0]


@pytest.mark.parametrize("name", all_but(USUAL, SAMPLERS))
def test_every_sampler_draws_what_the_prompt_says(pocket: Base, judge: Judge, usual: Image.Image, name: str) -> None:
    """On a base that predicts velocity, with zero-terminal SNR. Those without noise of their own draw the usual picture."""
    (picture,) = draw(pocket, ["a red cat in the snow"], [0], steps=20, sampler=name)
    seen = judge.verdict([picture])
    assert (seen["object"], seen["colour"], seen["background"]) == (["cat"], ["red"], ["snow"])
    away = abs(levels(picture) - levels(usual)).mean()
    print(f"{name}: {away:.1f}")
    assert away < 4 or name in ANCESTRAL


def test_the_bases_own_by_its_name_is_the_default_to_the_byte(base: Base) -> None:
    assert draw(base, ["a cat"], [0], steps=3) == draw(base, ["a cat"], [0], steps=3, sampler="ddim")
    own = of(base, **NOISE, _class_name="EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1)
    assert draw(own, ["a cat"], [0], steps=3) == draw(own, ["a cat"], [0], steps=3, sampler="euler")


@pytest.mark.parametrize("name", every(3, SAMPLERS))
def test_a_picture_is_the_same_alone_and_in_any_batch(base: Base, name: str) -> None:
    together = draw(base, ["a cat", "a dog"], [0, 1], steps=3, sampler=name)
    (alone,) = draw(base, ["a dog"], [1], steps=3, sampler=name)
    assert abs(levels(together[1]) - levels(alone)).max() <= 1 and together[0] != together[1]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_end_in_a_picture(base: Base, name: str, steps: int) -> None:
    found = sampling.denoise(base, [Request("a cat", steps=steps, sampler=name)])
    assert found.isfinite().all() and found.std() > 0


class Oracle(Base):
    """A model that knows the picture, and answers exactly, whatever it is asked."""

    seen: list[Any]
    look = staticmethod(lambda: 0.0)

    def denoise(self, latents: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
        x0 = torch.full_like(latents, 0.5)
        signal, noise = self.noise.signal(timesteps.long()), self.noise.noise(timesteps.long())
        self.seen.append((latents.clone(), timesteps.clone(), self.look()))
        return (latents - signal * x0) / noise


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("denoise", [0.3, 0.6, 1.0])
def test_every_sampler_begins_where_it_says(base: Base, name: str, denoise: float) -> None:
    """What the model is first shown is signal * x0 + noise * eps of the timestep it is told, and at the end x0 is found."""
    oracle = of(base, Oracle, **NOISE, prediction_type="epsilon")
    oracle.seen = []
    start, steps = InitLatents(torch.full((1, *LATENT), 0.5), denoise), 10
    found = sampling.denoise(oracle, [Request("a cat", 0, steps, 1, sampler=name)], start)
    first, t, _ = oracle.seen[0]
    noise = torch.randn((1, *LATENT), generator=torch.Generator().manual_seed(0))
    wanted = oracle.noise.signal(t.long()) * 0.5 + oracle.noise.noise(t.long()) * noise
    assert float((first - wanted).abs().max()) < 0.05, "the first timestep"
    assert abs(float(t) / 1000 - denoise) < 0.12 or "Karras" in name  # whose steps lie otherwise
    assert float((found - 0.5).abs().max()) < 0.15, "the last step"  # PLMS keeps the noise of timestep 0


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("denoise", [None, 0.5])
def test_every_sampler_follows_strengths_that_change(base: Base, name: str, denoise: float | None) -> None:
    """At each look at the model the adapter has the strength of its step, whether a step looks once or twice."""
    oracle = of(base, Oracle, **NOISE, prediction_type="epsilon")
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    fading = Adapter({path: LowRank(torch.ones(64, 1), torch.ones(1, 64), 1)})
    start = None if denoise is None else InitLatents(torch.full((1, *LATENT), 0.5), denoise)
    oracle.seen = []
    with attach(oracle, [(fading, "1@0,0@1")]) as attached:
        (rows,) = attached.moving.rows.values()
        oracle.look = lambda: float(rows.down[0, 0])
        sampling.denoise(oracle, [Request("a cat", 0, 8, 1, sampler=name)], start)
    steps = 4 if denoise else 8
    wanted = [1 - i / (steps - 1) for i in range(steps)]
    if SAMPLERS[name].scheduler in ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"):
        wanted = [strength for strength in wanted for _ in range(2)][:-1]  # the last step looks once
    if name == "PLMS":
        wanted = [1 - i / steps for i in range(steps + 1)]  # takes its second step twice
    assert [strength for _, _, strength in oracle.seen] == pytest.approx(wanted)


# ---------------------------------------------------------------- bases


def test_zero_terminal_snr_is_set_up_right(base: Base) -> None:
    """Where the base's noise ends without signal, other samplers go on its own noise to nearly none, and no further down."""
    for name in set(SAMPLERS) - {"DDIM"}:
        made = schedulers.make_sampler(base, 20, name)
        signal = made.alphas_cumprod
        assert float(signal[-1]) == pytest.approx(1e-4, rel=0.01) and bool((signal[1:] < signal[:-1]).all()), name
        assert torch.allclose(signal[:970], base.noise.alphas_cumprod[:970], atol=1e-5), name
        assert float(made.timesteps[0]) == pytest.approx(999) and made.config.prediction_type == "v_prediction"


def test_other_bases_noise_is_left_as_it_is(base: Base) -> None:
    other = of(base, **NOISE, prediction_type="epsilon")
    assert torch.allclose(other.noise.finite().float(), diffusers.DDPMScheduler(**NOISE).betas, atol=1e-6)
    for name in SAMPLERS:
        assert torch.equal(schedulers.make_sampler(other, 4, name).alphas_cumprod, other.noise.alphas_cumprod), name


def test_what_a_base_asks_of_its_own_sampler_is_no_matter_to_others(base: Base) -> None:
    own = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
    made = schedulers.make_sampler(of(base, **NOISE, **own), 4, "DPM++ 2M")
    assert not made.config.use_karras_sigmas and made.config.algorithm_type == "dpmsolver++"


def test_what_cannot_be_drawn_is_refused_by_name(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = of(base, **NOISE, prediction_type="sample")
    for name, row in SAMPLERS.items():
        if row.sample:
            assert len(draw(pictures, ["a cat"], [0], steps=2, sampler=name)) == 1
        else:
            with pytest.raises(RecipeError, match=rf"--sampler {name} cannot draw with .* \(try Euler or DDIM\)"):
                draw(pictures, ["a cat"], [0], steps=2, sampler=name)
    with pytest.raises(RecipeError, match="--sampler LCM does not draw in 60 steps: "):
        draw(base, ["a cat"], [0], steps=60, sampler="lcm")
    monkeypatch.setitem(SAMPLERS, "LMS", Sampler("LMS", "Forgotten", {}))  # of another version of diffusers
    with pytest.raises(BaseModelError, match=r"--sampler LMS is ForgottenScheduler, which diffusers .* does not have"):
        draw(base, ["a cat"], [0], steps=2, sampler="lms")


def test_a_missing_library_is_told(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(config: Any) -> None:
        raise ImportError("LMSDiscreteScheduler requires\n the scipy library")  # as diffusers' stand-ins do

    monkeypatch.setattr(diffusers.LMSDiscreteScheduler, "from_config", lacking)
    with pytest.raises(BaseModelError, match=r"--sampler LMS, LMSDiscreteScheduler, lacks something: .* the scipy library$"):
        draw(base, ["a cat"], [0], steps=2, sampler="lms")


@pytest.mark.parametrize(("dtype", "hint"), [("float32", "an adapter's are damaged"), ("bfloat16", "try --precision float32")])
def test_what_is_no_picture_is_told(narrow_base: Path, dtype: str, hint: str) -> None:
    broken = Base.load(narrow_base, dtype=getattr(torch, dtype))
    with torch.no_grad():
        broken.unet.conv_out.bias.fill_(torch.inf)
    with pytest.warns(UserWarning, match=f"not finite in {dtype}: .*{hint}"):
        draw(broken, ["a cat"], [0], steps=1)


# ---------------------------------------------------------------- while training


def test_sample_pictures_are_drawn_with_it(narrow_base: Path, pictures: Path, tmp_path: Path) -> None:
    flags = {"folder": pictures, "base": str(narrow_base), "sample_steps": 2, "sample_prompts": ["a cat"], "sample_seeds": [0]}

    def drawn(sampler: str) -> tuple[Image.Image, str]:
        job = check(resolve(flags={**flags, "output": tmp_path / sampler, "sampler": sampler}))
        request = job.request("a cat", 0)
        return next(draw_images(job.base, [request])), request.complete(job.base).sampler

    usual, lively = drawn("auto"), drawn("euler_a")
    assert usual[0] != lively[0] and (usual[1], lively[1]) == ("DDIM", "Euler a")
    with pytest.raises(RecipeError, match="--sampler LCM does not draw in 60 steps"):
        check(resolve(flags={**flags, "output": tmp_path / "lcm", "sampler": "lcm", "sample_steps": 60}))
    assert Recipe().sampling.how == {"steps": 20, "guidance": 3.0, "sampler": "auto"}
