"""Stable Diffusion 3: loaded, embedded, denoised and drawn as diffusers' pipeline does, and trained by its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from personalize.adapters.adapter import Adapter, distance
from personalize.cli import run
from personalize.errors import RecipeError
from personalize.families.noise import Flow
from personalize.inference import sampling, schedulers
from personalize.inference.request import Request
from personalize.models.model import Base
from personalize.recipe.fields import Objective
from personalize.recipe.resolve import resolve
from personalize.reports.run import usage
from personalize.reports.run.read import read_run
from personalize.training.events import Finished, Step
from personalize.training.loop import train
from personalize.training.objectives.objective import Inputs, answer, make_objective

PROMPTS = ["a red cat", "a photograph of a house on a hill"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.sd3(tmp_path_factory.mktemp("sd3") / "base")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return Base.load(folder)


def pipeline(base: Base) -> Any:
    parts = {text.part: text.model for text in base.texts} | {
        text.part.replace("text_encoder", "tokenizer"): text.tokenizer for text in base.texts
    }
    parts = dict.fromkeys([f"{one}{n}" for one in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]) | parts
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(base.scheduler_config)
    made = StableDiffusion3Pipeline(transformer=base.denoiser, vae=base.vae, scheduler=scheduler, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def theirs(base: Base, prompts: list[str]) -> tuple[Tensor, Tensor]:
    tokens, _, pooled, _ = pipeline(base).encode_prompt(prompts, None, None, do_classifier_free_guidance=False, device="cpu")
    return tokens, pooled


def test_it_is_loaded_as_what_it_is(base: Base) -> None:
    assert (base.family.name, base.resolution, base.channels, base.factor) == ("sd35-medium", 64, 16, 8)
    assert base.facts["prediction"] == "flow" and next(iter(base.parts)) == "transformer" and len(base.texts) == 3
    assert base.latents.scale == 1.5305 and base.latents.shift == 0.0609
    assert schedulers.sampler_of(base) == "Euler"
    with pytest.raises(RecipeError, match=r"DPM.* cannot draw with .*, which follows a rectified flow"):
        schedulers.make_sampler(base, 4, "DPM++ 2M")


@pytest.mark.parametrize("t5", [True, False])
@torch.no_grad()
def test_prompts_are_embedded_as_the_pipeline_does(tmp_path: Path, t5: bool) -> None:
    base = Base.load(bases.sd3(tmp_path / "base", t5=t5))
    cond, (tokens, pooled) = base.embed(PROMPTS), theirs(base, PROMPTS)
    assert len(base.texts) == 2 + t5
    assert torch.allclose(cond.tokens, tokens, atol=1e-5) and torch.allclose(cond.pooled, pooled, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(base.embed(PROMPTS, weighted=True).tokens, tokens, atol=1e-5)


@torch.no_grad()
def test_a_denoising_step_is_that_of_the_pipeline(base: Base) -> None:
    shape, cond = schedulers.latent_shape(base, 64), base.embed(PROMPTS)
    tokens, pooled = theirs(base, PROMPTS)
    x, t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), base.noise.time(torch.tensor([100, 900]))
    wanted = base.denoiser(x, timestep=t, encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False)[0]
    assert torch.allclose(base.denoise(x, t, cond), wanted, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_pictures_are_those_of_the_pipeline(base: Base) -> None:
    shape = schedulers.latent_shape(base, 64)
    ours = sampling.denoise(base, [Request(PROMPTS[0], 3, 4, 5.0, (64, 64))])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))[None]
    drawn = pipeline(base)(
        PROMPTS[0], num_inference_steps=4, guidance_scale=5.0, latents=noise, height=64, width=64, output_type="latent"
    ).images
    assert torch.allclose(ours, drawn, atol=1e-3 * float(drawn.abs().max()))


def test_noise_is_that_of_the_scheduler(base: Base) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(base.scheduler_config)
    noise = base.noise
    assert isinstance(noise, Flow)
    assert torch.allclose(noise.sigmas.flip(0), scheduler.sigmas[:1000], atol=1e-7)
    assert torch.allclose(noise.times.flip(0), scheduler.timesteps, atol=1e-3)
    drawn = noise.draw_t(100_000, torch.Generator().manual_seed(0)).double()
    normal = torch.special.logit((drawn + 0.5) / noise.steps)
    assert abs(float(normal.mean())) < 0.01 and abs(float(normal.std()) - 1) < 0.01  # logit-normal, mean 0, std 1


def test_a_steps_loss_is_that_of_the_dreambooth_script(base: Base) -> None:
    """examples/dreambooth/train_dreambooth_lora_sd3.py at its defaults: preconditioned outputs, all timesteps weigh alike."""
    noise, x0 = base.noise, torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = base.embed(PROMPTS[:1]).expand(3)
    generators: dict[str, int] = {"posterior": 0, "noise": 1, "timesteps": 2}

    def rng(purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(generators[purpose])

    with torch.no_grad():
        objective = make_objective(Objective(min_snr=0), noise)
        losses = answer([objective.loss(objective.draw(Inputs(x0, torch.zeros_like(x0), cond), rng))], base.denoise)[0]
        eps, t = torch.randn(x0.shape, generator=rng("noise")), noise.draw_t(3, rng("timesteps"))
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(base.scheduler_config)
        indices = scheduler.config.num_train_timesteps - 1 - t
        sigmas = scheduler.sigmas[indices].reshape(-1, 1, 1, 1)
        noisy = sigmas * eps + (1.0 - sigmas) * x0
        told = scheduler.timesteps[indices]
        predicted = base.denoiser(
            noisy, timestep=told, encoder_hidden_states=cond.tokens, pooled_projections=cond.pooled, return_dict=False
        )[0]
        wanted = ((predicted * -sigmas + noisy) - x0).square().mean((1, 2, 3))
    assert torch.allclose(losses, wanted, rtol=1e-4)


def test_min_snr_weighs_the_error_in_x0(base: Base) -> None:
    noise, t = base.noise, torch.arange(5, 1000, 50)
    sigma = noise.sigmas[t].double()  # type: ignore[attr-defined]
    snr = ((1 - sigma) / sigma).square()
    assert torch.allclose(noise.weight(t, 5.0).double() / sigma.square(), snr.clamp(max=5.0), rtol=1e-4)


def test_it_trains_saves_reads_back_and_draws(folder: Path, pictures: Path, tmp_path: Path) -> None:
    flags = {"folder": pictures, "class": "cat", "base": str(folder), "steps": 2, "batch_size": 2, "rank": 2}
    flags |= {"sample_steps": 1, "sample_seeds": [0], "checkpoint_every": 0, "choose": "none"}
    flags |= {"text_encoder_lr": 1e-4, "prior": "output"}
    made = {}
    for dialect in ("kohya", "diffusers"):
        recipe = resolve(flags={**flags, "dialect": dialect, "output": tmp_path / dialect})
        events = list(train(recipe))
        assert isinstance(events[-1], Finished) and all(event.lr > 0 for event in events if isinstance(event, Step))
        made[dialect] = tmp_path / dialect / "zwx.safetensors"
    one, other = (Adapter.load(path) for path in made.values())
    assert one.parts == ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    assert distance(one, other) < 1e-6 and one.metadata["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"
    state = StableDiffusion3Pipeline.lora_state_dict(made["diffusers"].parent, weight_name="zwx.safetensors")
    assert any(key.startswith("transformer.transformer_blocks.0.attn.to_q.lora_A") for key in state)
    told = usage.programs(read_run(tmp_path / "kohya"), "a zwx cat")
    assert [program.title for program in told] == ["personalize", "diffusers"]  # what UIs make of it has not been tried
    assert "from diffusers import StableDiffusion3Pipeline" in told[1].parts[0][1]
    for path in made.values():
        drawn = tmp_path / f"{path.parent.name}.png"
        assert run(["generate", "a zwx cat", "-a", f"{path}:unet=0.8:te=0.5", "--steps", "2", "-o", str(drawn)]) == 0
        assert drawn.is_file()
    assert (tmp_path / "kohya.png").read_bytes()[-5000:] == (tmp_path / "diffusers.png").read_bytes()[-5000:]
