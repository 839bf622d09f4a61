"""What there is to learn, encoded once, and what each step of a run gets of it: pure functions of (seed, step)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data.batches import batch_at, batches, generator
from ..data.folder import class_images
from ..data.latents import Latents, cached, on_demand
from ..families.cond import Cond
from ..inference import sampling as sample
from ..io import write_text
from ..recipe.fields import Recipe
from .objectives import denoise as objectives
from .objectives.denoise import Inputs
from .preflight import Job, is_drawn
from .step import Seeds


@dataclass(frozen=True)
class Lesson:
    """What there is to learn, encoded: the pictures, and what keeps the class as it is."""

    latents: Latents
    prior: Latents | None  # class images, for prior 'images'; encoded when a step first wants them in its shape
    class_captions: list[str]  # those of the pictures without the trigger, then the class prompts
    class_cond: Cond | None  # class captions as the base reads them, for prior 'output'
    held: Latents | None  # pictures that are not learned


def prepare(job: Job) -> Lesson:
    """Encode the pictures and captions, and draw class images if the objective wants them. Cached, all of it."""
    recipe, captions, prior, class_cond = job.recipe, job.class_captions, None, None
    if recipe.objective.prior == "images":
        if job.regularization is None:
            draw_class_images(job)
        classes = job.regularization or class_images(job.run.class_images, job.class_prompts[0])
        prior = on_demand(job.base, classes, recipe, windows=job.windows)
    with job.base.keeping():
        if recipe.objective.prior == "output":
            with torch.no_grad():
                class_cond = job.base.embed(captions, windows=job.windows)
        held = cached(job.base, replace(job.dataset, examples=job.held), recipe, job.windows) if job.held else None
        return Lesson(cached(job.base, job.dataset, recipe, job.windows), prior, captions, class_cond, held)


def feed(job: Job, lesson: Lesson, start: int) -> Iterator[Inputs]:
    """Endless batches from micro-step `start` on. Captions that are not read beforehand are embedded here."""
    recipe, base = job.recipe, job.base
    stream = batches(lesson.latents, batch_size=recipe.batch_size, seed=recipe.seed, data=recipe.data, start_step=start)
    whole = recipe.data.model_copy(update={"caption_shuffle": False, "tag_dropout": 0.0})  # class captions stay as they are
    prior = functools.partial(batch_at, batch_size=recipe.prior_rows, seed=recipe.seed, data=whole, purpose="class images")
    read = reader(job)
    for micro, batch in enumerate(stream, start):
        both = [batch, prior(lesson.prior, micro, shape=batch.shape)] if lesson.prior else [batch]
        rows = [one.to(base.device) for one in both]
        cond = Cond.cat([read(row.captions, micro) if row.cond is None else row.cond for row in rows])
        mean, std = torch.cat([row.mean for row in rows]), torch.cat([row.std for row in rows])
        cond = cond.sized(torch.cat([row.sizes for row in rows]))
        k = recipe.prior_rows if lesson.prior else 0
        inputs = Inputs(mean, std, cond, class_images=k, mask=rows[0].mask, pictures=batch.index)
        if lesson.class_cond is not None:
            inputs = with_class_captions(job, lesson, inputs, batch.index[: recipe.prior_rows], micro, read)
        yield inputs


Read = Callable[[Sequence[str], int], Cond]  # captions, micro-step -> their conditioning


def reader(job: Job) -> Read:
    """How the adapter reads captions at a micro-step: anew while the text encoder learns, and else each once, as far as kept."""
    learning = job.recipe.optim.text_encoder_steps(job.recipe.steps) * job.recipe.optim.accumulate

    @functools.lru_cache(maxsize=256)
    @torch.no_grad()
    def final(caption: str) -> Cond:
        return job.base.embed([caption], windows=job.windows)

    def read(captions: Sequence[str], micro: int) -> Cond:
        if micro < learning:
            return job.base.embed(captions, windows=job.windows)
        return Cond.cat(final(caption) for caption in captions)

    return read


def with_class_captions(job: Job, lesson: Lesson, inputs: Inputs, index: Tensor, micro: int, read: Read) -> Inputs:
    """The captions without the trigger of pictures `index` [k], as the adapter reads them now and as the base reads them.

    Every other row takes a class prompt instead: what no caption tells, other styles say, would take the subject on.
    """
    assert lesson.class_cond is not None
    captions, pictures = lesson.class_captions, len(job.dataset.examples)
    if prompts := len(captions) - pictures:
        drawn = torch.randint(prompts, (len(index),), generator=rng_of(job.recipe, micro)("class captions"))
        others = torch.arange(len(index)) % 2 == micro % 2
        index = torch.where(others, pictures + drawn, index.cpu())
    off = lesson.class_cond[index.to(lesson.class_cond.tokens.device)]
    now = read([captions[i] for i in index.tolist()], micro) if job.recipe.optim.text_encoder_lr else off
    sizes = None if inputs.cond.sizes is None else inputs.cond.sizes[: len(index)]
    return replace(inputs, class_cond=now.sized(sizes), class_cond_off=off.sized(sizes))


def dropout_of(recipe: Recipe, micro: int) -> Seeds:
    """Piece of a micro-step -> the seed of its dropout."""
    return lambda piece: generator(recipe.seed, "dropout", micro, *([piece] if piece else [])).initial_seed()


def rng_of(recipe: Recipe, micro: int) -> objectives.Rng:
    """What a micro-step draws from, by purpose."""
    return lambda purpose: generator(recipe.seed, purpose, micro)


def draw_class_images(job: Job) -> None:
    """Let the base draw the class images that are not there yet."""
    recipe, run = job.recipe, job.run
    wanted = {recipe.seed + i: run.class_images / f"{i:04}.png" for i in range(recipe.objective.prior_images)}
    prompts = dict(zip(wanted, itertools.cycle(job.class_prompts)))
    told = {seed: job.parameters(prompts[seed], seed) for seed in wanted}
    missing = [seed for seed, path in wanted.items() if not is_drawn(path, told[seed])]
    asked = [prompts[seed] for seed in missing]
    drawn = sample.drawing(job.base, asked, missing, size=job.side, **recipe.sampling.how)
    for seed, picture in zip(missing, drawn, strict=True):
        write_text(wanted[seed].with_suffix(".txt"), prompts[seed] + "\n")
        sample.save_picture(picture, wanted[seed], told[seed])
