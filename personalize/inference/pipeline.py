"""Pictures whose prompts name adapters: every picture gets its own stack, and the base is as before after each batch.

import personalize as p

base, rex = p.Base.load("pocket"), p.Adapter.load("runs/rex/rex.safetensors")
p.draw(base, ["a <lora:rex:0.8> rex dog", "a dog"], seeds=[0, 0], adapters={"rex": rex})[0].save("rex.png")
p.draw(base, ["a <lora:rex:0@0,1@0.5:te=1> rex dog"], seeds=[0], adapters={"rex": rex})     # grows over the steps
p.draw(base, ["a <lora:rex> rex dog"], seeds=[0], adapters={"rex": rex}, image="photo.png", denoise=0.6)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..data.images import load_whole
from ..recipe.samplers import named
from ..tuning.attach import attach
from .img2img import DENOISE, Beginning, latents_of
from .prompts import Use, find, parse, untagged
from .sampling import DEFAULTS, Shape, Size, latent_shape, pictures

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..models.model import Base


@dataclass(frozen=True)
class Job:
    """One picture: what the text encoder reads, which adapters by name, and how it is drawn."""

    prompt: str
    seed: int = 0
    uses: tuple[Use, ...] = ()
    negative: str = ""
    steps: int = DEFAULTS.sample_steps
    guidance: float = DEFAULTS.guidance
    denoise: float = DENOISE
    sampler: str = DEFAULTS.sampler

    @property
    def how(self) -> tuple[Any, ...]:
        """What all pictures of a batch have in common."""
        return self.uses, self.negative, self.steps, self.guidance, self.denoise, self.sampler


def draw(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    adapters: Mapping[str, Adapter] | None = None,
    steps: int = DEFAULTS.sample_steps,
    guidance: float = DEFAULTS.guidance,
    negative: str = "",
    sampler: str = DEFAULTS.sampler,
    size: Size | None = None,
    image: Image.Image | str | Path | None = None,
    denoise: float = DENOISE,
    batch_size: int = 8,
) -> list[Image.Image]:
    """One picture per (prompt, seed) pair, in order; `<lora:NAME:0.8>` in a prompt adds an adapter of `adapters` to it.

    Tags are A1111's (prompts.py). `size` is the side or (width, height) in pixels, by default the image's or the base's.
    `guidance` is classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598): 1 is the plain conditional
    model. `sampler` is a name of samplers.py, such as "DPM++ 2M Karras"; auto is the base's own. With `image`, a picture or its
    file, drawing begins there and changes `denoise` (0 to 1) of it. Raises RecipeError for names that are no samplers or not in
    `adapters`, FamilyMismatchError for adapters of another family.

    >>> from personalize.models import Base
    >>> from personalize.recipe import AdapterSpec
    >>> base = Base.load("pocket")
    >>> fresh = attach(base, AdapterSpec(rank=1)).detach()  # changes nothing yet
    >>> one, two = draw(base, ["a <lora:new:0.8> cat", "a cat"], [7, 7], adapters={"new": fresh}, steps=2)
    >>> one.size, one == two
    ((64, 64), True)
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per picture")
    known, jobs = adapters or {}, []
    for prompt, seed in zip(prompts, seeds, strict=True):
        text, uses = parse(prompt)
        used = tuple(Use(find(name, known), weighting) for name, weighting in uses)
        jobs.append(Job(text, seed, used, untagged(negative), steps, guidance, denoise, named(sampler)))
    if unused := known.keys() - {name for job in jobs for name, _ in job.uses}:
        name = min(unused)
        warnings.warn(f"no prompt says <lora:{name}:1>: {name} is not used", stacklevel=2)
    picture = load_whole(Path(image)) if isinstance(image, str | Path) else image
    return list(drawn(base, jobs, known, size=size, image=picture, batch_size=batch_size))


def drawn(
    base: Base,
    jobs: Iterable[Job],
    adapters: Mapping[str, Adapter],
    *,
    size: Size | None = None,
    image: Image.Image | None = None,
    batch_size: int = 8,
) -> Iterator[Image.Image]:
    """Every job's picture, in order. Neighbours that are drawn alike share a batch; between batches nothing is attached."""
    jobs = list(jobs)
    shape = latent_shape(base, size)
    latents = None if image is None else latents_of(base, image, size)
    if latents is not None:
        shape = (latents.shape[1], latents.shape[2], latents.shape[3])
    for _, alike in groupby(jobs, key=lambda job: job.how):
        while batch := list(islice(alike, batch_size)):
            yield from together(base, batch, adapters, shape, latents)


def together(
    base: Base, jobs: Sequence[Job], adapters: Mapping[str, Adapter], shape: Shape, latents: Tensor | None
) -> list[Image.Image]:
    """One batch of jobs that are drawn alike, with their adapters attached for as long as it takes."""
    job = jobs[0]
    stack = [(adapters[name], weighting) for name, weighting in job.uses]
    with attach(base, stack) if stack else contextlib.nullcontext():
        return pictures(
            base,
            [job.prompt for job in jobs],
            [job.seed for job in jobs],
            shape,
            steps=job.steps,
            guidance=job.guidance,
            negative=job.negative,
            sampler=job.sampler,
            beginning=None if latents is None else Beginning(latents, job.denoise),
        )
