"""The loop over timesteps: requests to latents and pixels, with whatever adapters are attached to the base.

Each image is a function of its own prompt and seed only. Noise is always drawn on the CPU, one generator per
image, so an image keeps its composition in any batch and on any device.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.embedding import vectors_of
from ..adapters.strengths.grammar import Weighting
from ..families.cond import Cond
from ..families.notation import at_step
from ..tuning.attach import attached_to
from ..tuning.layers import AdapterLayer, sum_once
from .schedulers import latent_shape, make_sampler
from .stacks import Stacks

if TYPE_CHECKING:
    from ..models.model import Base
    from .img2img import InitLatents
    from .request import Request

Steps = Generator[tuple[int, int], None, Tensor]  # (steps done, steps in all) after each step; returns a tensor


@torch.no_grad()
def draw_batch(
    base: Base,
    requests: Sequence[Request],
    stack: Sequence[tuple[Adapter, Weighting]] = (),
    start: InitLatents | None = None,
    stacks: Stacks | None = None,
) -> Steps:
    """Draw requests that differ in prompt and seed only: yields (steps done, steps in all), returns pixels [b, 3, h, w].

    The adapters of `stack` are attached for as long as it takes, and their words known, those of the first that brings them; one
    that changes no layer brings words alone. Without any, what is attached to the base counts. Those of `stacks` are ready.
    However it ends, also by `close()`, the base is as it was.
    """
    words = {word: vectors for adapter, _ in reversed(stack) for word, vectors in vectors_of(adapter.words).items()}
    layered = [pair for pair in stack if pair[0].deltas]
    on = (stacks or Stacks(base, most=0)).use(layered) if layered else contextlib.nullcontext()
    with on, base.knowing(words) if words else contextlib.nullcontext(), eval_mode(base):
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

    Yields after each step. Adapters on the base follow their schedules; where the text encoder's change, or prompts that are
    edited by step, they are embedded anew.
    """
    one, prompts, said = requests[0], [request.prompt for request in requests], [""]
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
    with adapter_schedule(base) as turn, reading_text_once(base) as forget:
        for i, t in enumerate(timesteps):
            if changed := turn(i // order, count, t):
                forget()
            now = [at_step(text, i // order + 1, count) for text in (one.negative, *prompts)]
            if cond is None or now != said or any(part.startswith("text_encoder") for part in changed):
                said = now
                cond = conditioning(base, said[1:], said[0], one.guidance)
            output = predict(base, scheduler.scale_model_input(latents, t), t, cond, one.guidance)
            latents = scheduler.step(output.float(), t, latents, **own).prev_sample
            if (i + 1) % order == 0 or i + 1 == len(timesteps):
                if start:
                    latents = start.keep(scheduler, latents, noise, timesteps[i + 1 : i + 2])
                yield i // order + 1, count
    return latents


@contextlib.contextmanager
def adapter_schedule(base: Base) -> Iterator[Callable[[int, int, Tensor], Iterable[str]]]:
    """A function that brings the base's adapters to their strengths at step i of n, and their ranks to those of its timestep; it
    returns the parts that changed.

    Afterwards they are at step 0 again.
    """
    attached = attached_to(base)
    try:
        yield attached.turn if attached else lambda step, steps, time: ()
    finally:
        if attached:
            attached.turn(0, 1)


class Once:
    """What a layer makes of its input, computed when the input is another one than before."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward
        self.forget()

    def forget(self) -> None:
        """Compute anew, whatever the input."""
        self.seen: Tensor | None = None
        self.made: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.forward(x)
        if self.made is None or x is not self.seen:
            self.seen, self.made = x, self.forward(x)
        return self.made


@contextlib.contextmanager
def reading_text_once(base: Base) -> Iterator[Callable[[], None]]:
    """Inside, keys and values of the text are computed once for a conditioning. The function given makes them be computed anew:
    for layers that have changed."""
    pattern = base.family.denoiser.text_layers
    layers = [layer for path, layer in base.denoiser.named_modules() if pattern and re.fullmatch(pattern, path)]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = Once(layer.forward)

    def forget() -> None:
        for layer in layers:
            layer.forward.forget()

    try:
        yield forget
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@contextlib.contextmanager
def eval_mode(base: Base) -> Iterator[None]:
    """Inside, dropout is off, and small adapted layers are sums (see `sum_once`); afterwards each module is as it was."""
    modules = [module for model in base.parts.values() for module in model.modules()]
    training = [module for module in modules if module.training]
    try:
        for module in training:  # mostly none: nothing is written where nothing changes
            module.training = False
        with sum_once([module for module in modules if isinstance(module, AdapterLayer)]):
            yield
    finally:
        for module in training:
            module.training = True


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[b, 3, h, w] in [-1, 1] to RGB images."""
    levels = (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()) for image in levels]


def conditioning(base: Base, prompts: Sequence[str], negative: str, guidance: float) -> Cond:
    """What b prompts say, as the text encoders read them now: b rows, or 2b with the negatives first where there is guidance.

    An empty negative prompt is nothing at all for families that were trained so (and as A1111 and diffusers do).
    """
    if guidance == 1:
        return base.embed(prompts, weighted=True)
    both = base.embed([negative, *prompts], weighted=True)
    against, wanted = both[:1], both[1:]
    if base.family.silent and not negative:
        against = against.zeros()
    return Cond.cat([against.expand(len(prompts)), wanted])


def predict(base: Base, latents: torch.Tensor, t: torch.Tensor, cond: Cond, guidance: float) -> torch.Tensor:
    """The guided model output [b, c, h, w] at timestep `t`; `cond` has b rows, or 2b with the negatives first."""
    times, attached = t.to(base.device).expand(len(cond)), attached_to(base)
    with attached.cast_once() if attached else contextlib.nullcontext():
        if guidance == 1:
            return base.denoise(latents.to(base.dtype), times, cond)
        without, with_prompt = base.denoise(torch.cat([latents, latents]).to(base.dtype), times, cond).chunk(2)
    return without + guidance * (with_prompt - without)
