"""The loop over timesteps: requests to latents and pixels, with whatever adapters are attached to the base.

Each image is a function of its own prompt and seed only. Noise is always drawn on the CPU, one generator per
image, so an image keeps its composition in any batch and on any device.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.strengths.grammar import Weighting
from ..errors import BaseModelError, RecipeError
from ..families.cond import Cond
from ..recipe.samplers import AUTO, SAMPLERS, name_of, named
from ..tuning.attach import attach, attached_to

if TYPE_CHECKING:
    from ..models.model import Base
    from .img2img import InitLatents
    from .request import Request

Size = int | tuple[int, int]
Shape = tuple[int, int, int]  # [c, h, w] of latents
Steps = Generator[tuple[int, int], None, Tensor]  # (steps done, steps in all) after each step; returns a tensor
DDIM = "DDIMScheduler"  # of a config that names none
NOISE = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
NOISE |= {"timestep_spacing", "steps_offset", "set_alpha_to_one"}


@torch.no_grad()
def draw_batch(
    base: Base, requests: Sequence[Request], stack: Sequence[tuple[Adapter, Weighting]] = (), start: InitLatents | None = None
) -> Steps:
    """Draw requests that differ in prompt and seed only: yields (steps done, steps in all), returns pixels [b, 3, h, w].

    The adapters of `stack` are attached for as long as it takes; without any, what is attached to the base counts. However it
    ends, also by `close()`, the base is as it was.
    """
    with attach(base, stack) if stack else contextlib.nullcontext(), eval_mode(base):
        latents = yield from denoise_steps(base, requests, start)
        return base.decode(latents)


def denoise(base: Base, requests: Sequence[Request], start: InitLatents | None = None) -> Tensor:
    """Latents [b, c, h, w] of requests that differ in prompt and seed only, at once. See `denoise_steps`."""
    steps = denoise_steps(base, requests, start)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            latents: Tensor = end.value
            return latents


@torch.no_grad()
def denoise_steps(base: Base, requests: Sequence[Request], start: InitLatents | None = None) -> Steps:
    """Noise [b, c, h, w] to latents [b, c, h, w] along the scheduler's timesteps, both halves of the guidance in one call.

    Yields after each step. Adapters on the base follow their schedules; where the text encoder's change, the prompts are
    embedded anew.
    """
    one, prompts = requests[0], [request.prompt for request in requests]
    shape = tuple(start.latents.shape[1:]) if start else latent_shape(base, one.size)
    scheduler = make_sampler(base, one.steps, one.sampler)
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    own = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(base.device)
    timesteps, latents = scheduler.timesteps, noise * scheduler.init_noise_sigma
    if start:
        timesteps, latents = start.enter(scheduler, one.steps, noise)
    cond, order = None, scheduler.order  # how many timesteps, and calls of the model, make a step
    count = -(-len(timesteps) // order)
    with adapter_schedule(base) as turn:
        for i, t in enumerate(timesteps):
            changed = turn(i // order, count)
            if cond is None or any(part.startswith("text_encoder") for part in changed):
                cond = conditioning(base, prompts, one.negative, one.guidance)
            output = predict(base, scheduler.scale_model_input(latents, t), t, cond, one.guidance)
            latents = scheduler.step(output.float(), t, latents, **own).prev_sample
            if (i + 1) % order == 0 or i + 1 == len(timesteps):
                yield i // order + 1, count
    return latents


@contextlib.contextmanager
def adapter_schedule(base: Base) -> Iterator[Callable[[int, int], Iterable[str]]]:
    """A function that brings the base's adapters to their strengths at step i of n and returns the parts that changed.

    Afterwards they are at step 0 again.
    """
    attached = attached_to(base)
    try:
        yield attached.turn if attached else lambda step, steps: ()
    finally:
        if attached:
            attached.turn(0, 1)


@contextlib.contextmanager
def eval_mode(base: Base) -> Iterator[None]:
    """Inside, dropout is off; afterwards each module is in the mode it was in."""
    modules = [module for model in base.parts.values() for module in model.modules()]
    before = [module.training for module in modules]
    try:
        for model in base.parts.values():
            model.eval()
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[b, 3, h, w] in [-1, 1] to RGB images."""
    levels = (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()) for image in levels]


def conditioning(base: Base, prompts: Sequence[str], negative: str, guidance: float) -> Cond:
    """What b prompts say, as the text encoders read them now: b rows, or 2b with the negatives first where there is guidance.

    An empty negative prompt is nothing at all for SDXL, as it was trained (and as A1111 and diffusers do).
    """
    if guidance == 1:
        return base.embed(prompts, weighted=True)
    both = base.embed([negative, *prompts], weighted=True)
    against, wanted = both[:1], both[1:]
    if base.sized and not negative:
        against = against.zeros()
    return Cond.cat([against.expand(len(prompts)), wanted])


def predict(base: Base, latents: torch.Tensor, t: torch.Tensor, cond: Cond, guidance: float) -> torch.Tensor:
    """The guided model output [b, c, h, w] at timestep `t`; `cond` has b rows, or 2b with the negatives first."""
    times, attached = t.to(base.device).expand(len(cond)), attached_to(base)
    with attached.lowered() if attached else contextlib.nullcontext():
        if guidance == 1:
            return base.denoise(latents.to(base.dtype), times, cond)
        without, with_prompt = base.denoise(torch.cat([latents, latents]).to(base.dtype), times, cond).chunk(2)
    return without + guidance * (with_prompt - without)


def make_sampler(base: Base, steps: int, name: str = AUTO) -> Any:
    """A diffusers scheduler by the name that people know, set to `steps` steps; on auto the one that the base's config names.

    Raises RecipeError for a name that is none, a sampler that cannot draw with this base, or not in so many steps,
    BaseModelError for one that diffusers does not have here.
    """
    name = sampler_of(base, name)
    sampler = scheduler_of(base, name)
    if steps > sampler.config.num_train_timesteps:
        raise RecipeError(f"--steps must be at most {sampler.config.num_train_timesteps} for {base.name}, not {steps}")
    try:
        sampler.set_timesteps(steps)
    except ValueError as error:  # LCM has a limit of its own
        raise RecipeError(f"--sampler {name} does not draw in {steps} steps: {' '.join(str(error).split())}") from error
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(0)  # else it looks for its first timestep, which Karras' steps may have twice
    return sampler


def scheduler_of(base: Base, name: str) -> Any:
    """The base's own scheduler as its config says, where that is its name; else the named one, on the base's noise."""
    own, row = name == sampler_of(base), SAMPLERS.get(name)
    if row and not row.sample and base.schedule.prediction == "sample":
        raise RecipeError(f"--sampler {name} cannot draw with {base.name}, which predicts pictures", "try Euler or DDIM")
    what = f"the scheduler of {base.name}" if own else f"--sampler {name}"
    kind = base.scheduler_config.get("_class_name", DDIM) if own or not row else f"{row.scheduler}Scheduler"
    config = base.scheduler_config if own or not row else noise_of(base) | dict(row.options)
    if not hasattr(diffusers, kind):
        raise BaseModelError(f"{what} is {kind}, which diffusers {diffusers.__version__} does not have")
    try:
        return getattr(diffusers, kind).from_config(dict(config))
    except ImportError as error:  # some need scipy or torchsde
        raise BaseModelError(f"{what}, {kind}, lacks something: {' '.join(str(error).split())}") from error


def sampler_of(base: Base, name: str = AUTO) -> str:
    """A sampler's name as UIs write it; on auto that of the base's own. Raises RecipeError for an unknown one."""
    if (found := named(name)) != AUTO:
        return found
    kind = str(base.scheduler_config.get("_class_name", DDIM))
    defaults = inspect.signature(getattr(diffusers, kind, object)).parameters
    return name_of(kind, {key: value.default for key, value in defaults.items()} | dict(base.scheduler_config))


def noise_of(base: Base) -> dict[str, Any]:
    """What any scheduler must know of a base: its noise, where its steps lie, and what it predicts."""
    config = {key: value for key, value in base.scheduler_config.items() if key in NOISE} | {"clip_sample": False}
    zero = bool(base.schedule.alphas_cumprod[-1] == 0)  # most samplers divide by the signal
    return config | ({"trained_betas": base.schedule.finite().tolist()} if zero else {})


def latent_shape(base: Base, size: Size | None) -> Shape:
    """[c, h, w] of the latents of a `size` picture."""
    width, height = (size, size) if isinstance(size, int) else size or (base.resolution, base.resolution)
    factor = base.factor
    for side in (width, height):
        if side < factor or side % factor:
            near = max(factor, round(side / factor) * factor)
            raise RecipeError(f"--size must be a multiple of {factor} for {base.name}, not {side}", f"try {near}")
    return base.unet.config.in_channels, height // factor, width // factor


MOVED = (
    *("drawing", "diffuse", "evaluating", "to_pictures", "save_picture", "save_sheet", "enlarged", "grid", "settings_of"),
    *("read_parameters", "Parameters", "DEFAULTS"),
)


def __getattr__(name: str) -> Any:
    """Old names, until their callers have the new ones."""
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(".moved", __package__), name)
