"""The training data, encoded once, and the batches that each step of a run gets of it: pure functions of (seed, step)."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data.batches import batch_at, batches, generator
from ..data.captions import remove_triggers
from ..data.folder import class_images
from ..data.latents import Latents, embed_captions, encode_dataset, on_demand
from ..families.cond import Cond
from ..inference.pipeline import draw_images
from ..inference.png import save_picture
from ..io import write_text
from ..recipe.fields import Recipe
from .objectives.objective import Inputs, Off, Rng, needs_of
from .preflight import RunPlan, is_drawn
from .step import Seeds


@dataclass(frozen=True)
class TrainingData:
    """The training data, encoded: the images, and what keeps the class as it is."""

    latents: Latents
    prior: Latents | None  # class images, where the objective needs them; encoded when a step first wants them in its shape
    class_captions: list[str]  # those of the pictures without the trigger, then the class prompts
    class_cond: Cond | None  # distinct class captions as the base reads them, where the objective needs them
    class_rows: Mapping[str, int]  # each one's row there
    held: Latents | None  # pictures that are not learned


def prepare_data(plan: RunPlan) -> TrainingData:
    """Encode the pictures and captions, and draw class images if the objective wants them. Cached, all of it."""
    recipe, prior, class_cond = plan.recipe, None, None
    needs = needs_of(recipe.objective)
    if needs.class_images:
        if plan.regularization is None:
            draw_class_images(plan)
        classes = plan.regularization or class_images(plan.run.class_images, plan.class_prompts[0])
        prior = on_demand(plan.base, classes, recipe, windows=plan.windows)
    with plan.base.keeping():
        captions, latents = plan.class_captions, encode_dataset(plan.base, plan.dataset, recipe, plan.windows)
        read = [without_trigger(plan, one) for ways in latents.variants for one in ways] + [""] if needs.reference else captions
        rows = {caption: row for row, caption in enumerate(dict.fromkeys(read))}
        if needs.class_captions or needs.reference:
            class_cond = embed_captions(plan.base, list(rows), plan.windows, latents.warnings)
        held = encode_dataset(plan.base, replace(plan.dataset, examples=plan.held), recipe, plan.windows) if plan.held else None
        return TrainingData(latents, prior, captions, class_cond, rows, held)


def training_batches(plan: RunPlan, data: TrainingData, start: int, off: Off = contextlib.nullcontext) -> Iterator[Inputs]:
    """Endless batches from micro-step `start` on. Captions that are not read beforehand are embedded here; inside `off`, where
    the base alone is to read them."""
    recipe, base = plan.recipe, plan.base
    stream = batches(data.latents, batch_size=recipe.batch_size, seed=recipe.seed, data=recipe.data, start_step=start)
    whole = recipe.data.model_copy(update={"caption_shuffle": False, "tag_dropout": 0.0})  # class captions stay as they are
    prior = functools.partial(batch_at, batch_size=recipe.prior_rows, seed=recipe.seed, data=whole, purpose="class images")
    read, alone = reader(plan), reader_alone(plan, data, off)
    for micro, batch in enumerate(stream, start):
        both = [batch, prior(data.prior, micro, shape=batch.shape)] if data.prior else [batch]
        rows = [one.to(base.device) for one in both]
        cond = Cond.cat([read(row.captions, micro) if row.cond is None else row.cond for row in rows])
        mean, std = torch.cat([row.mean for row in rows]), torch.cat([row.std for row in rows])
        cond = cond.with_sizes(torch.cat([row.sizes for row in rows]))
        k = recipe.prior_rows if data.prior else 0
        inputs = Inputs(mean, std, cond, class_images=k, mask=rows[0].mask, pictures=batch.index)
        if needs_of(recipe.objective).reference:
            inputs = replace(inputs, class_cond_off=alone(batch.captions).with_sizes(cond.sizes))
        elif data.class_cond is not None:
            inputs = with_class_captions(plan, data, inputs, batch.index[: recipe.prior_rows], micro, read)
        yield inputs


Read = Callable[[Sequence[str], int], Cond]  # captions, micro-step -> their conditioning


def reader(plan: RunPlan) -> Read:
    """How the adapter reads captions at a micro-step: anew while what reads them learns, and else each once, as far as kept."""
    learning = plan.recipe.reading_steps * plan.recipe.optim.accumulate

    @functools.lru_cache(maxsize=256)
    @torch.no_grad()
    def final(caption: str) -> Cond:
        return plan.base.embed([caption], windows=plan.windows, weighted=True)

    def read(captions: Sequence[str], micro: int) -> Cond:
        if micro < learning:
            return plan.base.embed(captions, windows=plan.windows, weighted=True)
        return Cond.cat(final(caption) for caption in captions)

    return read


def reader_alone(plan: RunPlan, data: TrainingData, off: Off) -> Callable[[Sequence[str]], Cond]:
    """How the base alone reads what captions say without the trigger; what was not read beforehand, once as well."""

    @functools.lru_cache(maxsize=256)
    @torch.no_grad()
    def embed(said: str) -> Cond:
        with off():
            return plan.base.embed([said], windows=plan.windows, weighted=True)

    def row(said: str) -> Cond:
        if data.class_cond is None or said not in data.class_rows:
            return embed(said)
        return data.class_cond[[data.class_rows[said]]].to(plan.base.device)

    return lambda captions: Cond.cat(row(without_trigger(plan, caption)) for caption in captions)


def without_trigger(plan: RunPlan, caption: str) -> str:
    """What a caption says without any trigger of the folder."""
    return remove_triggers(plan.dataset.triggers, caption)[0]


def with_class_captions(plan: RunPlan, data: TrainingData, inputs: Inputs, index: Tensor, micro: int, read: Read) -> Inputs:
    """The captions without the trigger of pictures `index` [k], as the adapter reads them now and as the base reads them.

    Every other row takes a class prompt instead: what no caption tells, other styles say, would take the subject on.
    """
    assert data.class_cond is not None
    captions, pictures = data.class_captions, len(plan.dataset.examples)
    if prompts := len(captions) - pictures:
        drawn = torch.randint(prompts, (len(index),), generator=rng_of(plan.recipe, micro)("class captions"))
        others = torch.arange(len(index)) % 2 == micro % 2
        index = torch.where(others, pictures + drawn, index.cpu())
    off = data.class_cond[[data.class_rows[captions[i]] for i in index.tolist()]].to(plan.base.device)
    now = read([captions[i] for i in index.tolist()], micro) if plan.recipe.optim.text_encoder_lr else off
    sizes = None if inputs.cond.sizes is None else inputs.cond.sizes[: len(index)]
    return replace(inputs, class_cond=now.with_sizes(sizes), class_cond_off=off.with_sizes(sizes))


def dropout_seeds(recipe: Recipe, micro: int) -> Seeds:
    """Piece of a micro-step -> the seed of its dropout."""
    return lambda piece: generator(recipe.seed, "dropout", micro, *([piece] if piece else [])).initial_seed()


def rng_of(recipe: Recipe, micro: int) -> Rng:
    """What a micro-step draws from, by purpose."""
    return lambda purpose: generator(recipe.seed, purpose, micro)


def draw_class_images(plan: RunPlan) -> None:
    """Let the base draw the class images that are not there yet."""
    recipe, run = plan.recipe, plan.run
    wanted = {recipe.seed + i: run.class_images / f"{i:04}.png" for i in range(recipe.objective.prior_images)}
    prompts = dict(zip(wanted, itertools.cycle(plan.class_prompts)))
    requests = {seed: plan.request(prompts[seed], seed) for seed in wanted}
    missing = [seed for seed, path in wanted.items() if not is_drawn(path, requests[seed].complete(plan.base))]
    images = draw_images(plan.base, [requests[seed] for seed in missing])
    for seed, image in zip(missing, images, strict=True):
        write_text(wanted[seed].with_suffix(".txt"), prompts[seed] + "\n")
        save_picture(image, wanted[seed], requests[seed].complete(plan.base))
