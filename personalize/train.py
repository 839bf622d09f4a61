"""Training: one loop, read from top to bottom, that yields events.

The same call again goes on where the last one stopped. On a CPU, a run that was killed and went on ends with the same
bytes as an unbroken one: whatever is drawn at a step depends on (seed, step) only, and the state holds everything else.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice

import torch
from torch import Tensor

from . import objectives, sample
from .attach import Attached, attach
from .base import Cond
from .check import Job, check, is_drawn, parts
from .data import Latents, batches, cached, class_images, generator
from .errors import PersonalizeError, TrainingError
from .events import Event, Finished, Sample, Saved, Started, Step, Sweep, Warned
from .files import atomic, write_text
from .fit import Seeds, gradients, lacking, pieces, place
from .fitting import PATIENCE, Work, begin, choose, first_sentence, hopeless, lower, peak_bytes, settle, skip, spilled
from .metadata import describe_run, sidecar, versions
from .objectives import Inputs
from .recipe import Recipe, flatten, to_toml

LOOKED_AT = 32  # batches among which the probe finds the largest
SWEEP = (0.25, 0.5, 0.75, 1.25)


def train(recipe: Recipe, *, fresh: bool = False) -> Iterator[Event]:
    """Train an adapter and leave it, with all that belongs to it, in the run folder.

    Goes on with what the run folder holds, unless `fresh`. Ctrl-C (or closing the iterator) saves the state first.
    Raises PersonalizeError before anything expensive if `check` finds something, and TrainingError if the run fails.
    """
    began = time.perf_counter()
    job = check(recipe, fresh=fresh)
    if job.finished:
        yield job.finished
        return
    recipe, base, run = job.recipe, job.base, job.run
    if fresh:
        run.clear()
    choice = choose(job)
    place(base, choice.fit, job.device)
    lesson = prepare(job)  # pictures, captions => latents and conditioning, once
    with attach(base, recipe.adapter, parts=parts(recipe, base), seed=recipe.seed) as attached:
        work = begin(job, attached, choice)
        earlier = run.open(to_toml(recipe), work.done)
        try:
            try_out(work, lesson)
            yield run.record(started(work, lesson))
            while True:
                try:
                    yield from onward(work, lesson)
                    break
                except torch.OutOfMemoryError as error:
                    why = first_sentence(error)
                yield run.record(lower(work, why))  # out here, where the step's tensors are gone
        except (KeyboardInterrupt, GeneratorExit):
            work.stop()
            run.note("stopped", step=work.done)
            raise
        except PersonalizeError as error:
            run.note("error", step=work.done, message=str(error))
            raise
        seconds = time.perf_counter() - began + earlier
        yield run.record(Finished(recipe.steps, seconds, run.relative(run.adapter), peak_bytes(base.device)))


def onward(work: Work, lesson: Lesson) -> Iterator[Event]:
    """From where the run stands to its end."""
    job, opt = work.job, work.opt
    yield from milestone(work)
    inputs = feed(job, lesson, work.done * job.recipe.optim.accumulate)
    while work.done < job.recipe.steps:
        clock, seen = time.perf_counter(), list[Seen]()
        n = pieces(work.fit, job.recipe.batch_size)
        values = gradients(job.base.denoise, work.loss, work.attached, opt, n, next_step(work, inputs, seen))
        *losses, size = values.tolist()  # the step's one wait for the device
        good = all(map(math.isfinite, (*losses, size)))
        with unbroken():
            work.done += 1
            cause = "" if good else skip(work, losses, seen)
            if good:
                opt.step(work.done - 1, values[-1])
        seconds = time.perf_counter() - clock
        yield job.run.record(told(work, losses, size, seconds, cause))
        if slower := work.pace.slower(seconds):
            yield job.run.record(Warned(work.done, spilled(work, slower)))
        if len(work.failed) >= PATIENCE:
            raise TrainingError(*hopeless(work, cause))
        yield from milestone(work)
    yield from finish(work)


Seen = tuple[Tensor, objectives.Rng]  # which pictures [b] a micro-step had, and what it drew from


def next_step(work: Work, inputs: Iterator[Inputs], seen: list[Seen]) -> Iterator[tuple[Inputs, objectives.Rng, Seeds]]:
    """The batches of the step after those that are done, one micro-step after the other; notes what was seen."""
    recipe = work.job.recipe
    for micro in range(work.done * recipe.optim.accumulate, (work.done + 1) * recipe.optim.accumulate):
        batch, rng = next(inputs), rng_of(recipe, micro)
        assert batch.pictures is not None
        seen.append((batch.pictures, rng))
        yield batch, rng, dropout_of(recipe, micro)


def try_out(work: Work, lesson: Lesson) -> None:
    """Probe the largest batch, where there is a budget to keep to."""
    if work.choice.budget is None:
        return
    job, path = work.job, work.job.run.folder / ".probe.safetensors"
    epoch = -(-len(job.dataset.examples) // job.recipe.batch_size)

    def sample_and_save() -> None:
        pairs = sample_pairs(job)
        for _ in draw(job, pairs[:8], steps=1) if pairs else ():
            pass
        try:
            work.attached.snapshot().save(path, job.recipe.dialect)
        finally:
            path.unlink(missing_ok=True)

    settle(work, lambda: islice(feed(job, lesson, 0), min(epoch, LOOKED_AT)), sample_and_save)


@dataclass(frozen=True)
class Lesson:
    """What there is to learn, encoded: the pictures, and what keeps the class as it is."""

    latents: Latents
    prior: Latents | None  # class images, for prior 'images'
    class_captions: list[str]  # those of the pictures without the trigger, then the class prompts
    class_cond: Cond | None  # class captions as the base reads them, for prior 'output'


def prepare(job: Job) -> Lesson:
    """Encode the pictures and captions, and draw class images if the objective wants them. Cached, all of it."""
    recipe, captions, prior, class_cond = job.recipe, job.class_captions, None, None
    if recipe.objective.prior == "images":
        draw_class_images(job)
        prior = cached(job.base, class_images(job.run.class_images, job.class_prompts[0]), recipe, job.windows)
    with job.base.keeping():
        if recipe.objective.prior == "output":
            with torch.no_grad():
                class_cond = job.base.embed(captions, windows=job.windows)
        return Lesson(cached(job.base, job.dataset, recipe, job.windows), prior, captions, class_cond)


def feed(job: Job, lesson: Lesson, start: int) -> Iterator[Inputs]:
    """Endless batches from micro-step `start` on. Where the text encoder trains, captions are embedded here, each time anew."""
    recipe, base = job.recipe, job.base
    stream = functools.partial(batches, seed=recipe.seed, caption_dropout=recipe.data.caption_dropout, start_step=start)
    priors = stream(lesson.prior, batch_size=recipe.prior_rows, purpose="class images") if lesson.prior else None
    read = reader(job)
    for micro, batch in enumerate(stream(lesson.latents, batch_size=recipe.batch_size), start):
        rows = [one.to(base.device) for one in ([batch, next(priors)] if priors else [batch])]
        cond = Cond.cat([read(row.captions, micro) if row.cond is None else row.cond for row in rows])
        mean, std = torch.cat([row.mean for row in rows]), torch.cat([row.std for row in rows])
        inputs = Inputs(mean, std, cond, class_images=recipe.prior_rows if priors else 0, pictures=batch.index)
        if lesson.class_cond is not None:
            inputs = with_class_captions(job, lesson, inputs, batch.index[: recipe.prior_rows], micro, read)
        yield inputs


Read = Callable[[Sequence[str], int], Cond]  # captions, micro-step -> their conditioning


def reader(job: Job) -> Read:
    """How the adapter reads captions at a micro-step: anew while the text encoder learns, and from then on each once."""
    learning = job.recipe.optim.text_encoder_steps(job.recipe.steps) * job.recipe.optim.accumulate

    @functools.cache
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
    return replace(inputs, class_cond=now, class_cond_off=off)


def dropout_of(recipe: Recipe, micro: int) -> Seeds:
    """Piece of a micro-step -> the seed of its dropout."""
    return lambda piece: generator(recipe.seed, "dropout", micro, *([piece] if piece else [])).initial_seed()


def rng_of(recipe: Recipe, micro: int) -> objectives.Rng:
    """What a micro-step draws from, by purpose."""
    return lambda purpose: generator(recipe.seed, purpose, micro)


# ---------------------------------------------------------------- what happens between steps


def milestone(work: Work) -> Iterator[Event]:
    """Pictures and files that are due where the run stands. Doing it twice does no harm, so a run goes on with this."""
    job, done = work.job, work.done
    recipe, run = job.recipe, job.run
    if done == 0 or is_due(done, recipe.sampling.sample_every, recipe.steps):
        yield from pictures(job, done)
    if done < recipe.steps and is_due(done, recipe.checkpoint_every, recipe.steps):
        yield run.record(save(work))
    if is_due(done, recipe.checkpoint_every or 50, recipe.steps):
        work.keep()


def is_due(done: int, every: int, steps: int) -> bool:
    """Every so many steps (never, if 0), and after the last."""
    return done == steps or (done > 0 and every > 0 and done % every == 0)


def pictures(job: Job, done: int) -> Iterator[Event]:
    """Draw the sample pictures; those of step 0 show the base, for an adapter starts as nothing."""
    pairs = sample_pairs(job)
    for (p, s), picture in zip(pairs, draw(job, pairs), strict=True):
        path, prompt, seed = job.run.sample(done, p, s), job.prompts[p], job.recipe.sampling.sample_seeds[s]
        sample.save_picture(picture, path, job.parameters(prompt, seed))
        yield job.run.record(Sample(done, prompt, seed, job.run.relative(path), base=done == 0))


def sample_pairs(job: Job) -> list[tuple[int, int]]:
    """Every sample prompt's number with every seed's."""
    return [(p, s) for p in range(len(job.prompts)) for s in range(len(job.recipe.sampling.sample_seeds))]


def draw(job: Job, pairs: list[tuple[int, int]], steps: int = 0) -> Iterator[sample.Image.Image]:
    """Sample pictures for pairs of (prompt, seed) numbers, with what is attached now; in the recipe's steps, or in fewer."""
    sampling = job.recipe.sampling
    prompts, seeds = [job.prompts[p] for p, _ in pairs], [sampling.sample_seeds[s] for _, s in pairs]
    steps = steps or sampling.sample_steps
    return sample.drawing(job.base, prompts, seeds, steps=steps, guidance=sampling.guidance, size=job.side)


def save(work: Work) -> Saved:
    """Write the adapter as it is now: under the run's name if all steps are done, else as a checkpoint."""
    job, done = work.job, work.done
    path = job.run.adapter if done == job.recipe.steps else job.run.checkpoint(done)
    adapter = work.attached.snapshot()
    if not all(delta.finite() for delta in adapter.deltas.values()):
        raise TrainingError(f"the adapter is not finite after {done} steps; nothing was overwritten", "try a lower --lr")
    first = next((picture for step in range(done, -1, -1) if (picture := job.run.sample(step, 0, 0)).is_file()), None)
    about = describe_run(job.recipe, job.base, job.dataset, job.run.name, done, first, work.fit, work.facts()["estimate"])
    adapter.save(path, job.recipe.dialect, about)
    return Saved(done, job.run.relative(path))


def finish(work: Work) -> Iterator[Event]:
    """The strength sweep, the adapter under its own name, and its companions for UIs."""
    job = work.job
    yield from sweep(job, work.attached)
    first = job.run.sample(job.recipe.steps, 0, 0)
    if first.is_file():
        with sample.Image.open(first) as picture, atomic(job.run.adapter.with_suffix(".png")) as temporary:
            sample.enlarged(picture, 256).save(temporary, format="PNG")
    write_text(job.run.adapter.with_suffix(".json"), sidecar(job.recipe, job.base, job.dataset))
    yield job.run.record(save(work))


def sweep(job: Job, attached: Attached) -> Iterator[Event]:
    """Draw the first two prompts at several strengths; those at 0 and 1 are there already."""
    pairs, done = [(p, 0) for p in range(len(job.prompts[:2])) if job.recipe.sampling.sample_seeds], job.recipe.steps
    for strength in (0.0, *SWEEP, 1.0):
        with attached.at(strength):
            drawn = list(draw(job, pairs)) if strength in SWEEP else []
        for i, (p, s) in enumerate(pairs):
            prompt, seed = job.prompts[p], job.recipe.sampling.sample_seeds[s]
            path = job.run.sweep(strength, p, s) if drawn else job.run.sample(done if strength else 0, p, s)
            if drawn:
                sample.save_picture(drawn[i], path, job.parameters(prompt, seed))
            yield job.run.record(Sweep(done, strength, prompt, seed, job.run.relative(path)))


def draw_class_images(job: Job) -> None:
    """Let the base draw the class images that are not there yet."""
    recipe, run = job.recipe, job.run
    wanted = {recipe.seed + i: run.class_images / f"{i:04}.png" for i in range(recipe.objective.prior_images)}
    prompts = dict(zip(wanted, itertools.cycle(job.class_prompts)))
    told = {seed: job.parameters(prompts[seed], seed) for seed in wanted}
    missing = [seed for seed, path in wanted.items() if not is_drawn(path, told[seed])]
    sampling = recipe.sampling
    drawn = sample.drawing(
        job.base,
        [prompts[seed] for seed in missing],
        missing,
        steps=sampling.sample_steps,
        guidance=sampling.guidance,
        size=job.side,
    )
    for seed, picture in zip(missing, drawn, strict=True):
        write_text(wanted[seed].with_suffix(".txt"), prompts[seed] + "\n")
        sample.save_picture(picture, wanted[seed], told[seed])


# ---------------------------------------------------------------- what is told


def started(work: Work, lesson: Lesson) -> Started:
    """The event of a run that is about to go."""
    job = work.job
    warnings = [*job.dataset.warnings, *lesson.latents.warnings, *(lesson.prior.warnings if lesson.prior else [])]
    if work.fit.compile and (why := lacking(job.device)):
        warnings.append(f"nothing is compiled: {why}")
    return Started(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=flatten(job.recipe),
        images=[{"path": str(e.path), "caption": e.caption, "sha256": e.sha256} for e in job.dataset.examples],
        warnings=warnings,
        parameters=sum(p.numel() for p in work.opt.parameters.values()),
        device=str(job.base.device),
        dtype=str(job.base.dtype).removeprefix("torch."),
        versions=versions(),
        base=job.base.facts,
        resumed=work.done,
        fit=work.facts(),
    )


def told(work: Work, losses: list[float], norm: float, seconds: float, cause: str) -> Step:
    """The event of a step; `losses` are those of all its pictures."""
    recipe, opt, done = work.job.recipe, work.opt, work.done
    micros = range((done - 1) * recipe.optim.accumulate, done * recipe.optim.accumulate)
    times = [t for micro in micros for t in timesteps_of(work.job, micro)]
    return Step(
        step=done,
        loss=sum(losses) / len(losses),
        lr=opt.lr("unet", done - 1),
        text_encoder_lr=opt.lr("text_encoder", done - 1),
        grad_norm=norm,
        seconds=seconds,
        timesteps=times,
        losses=losses,
        skipped=bool(cause),
        cause=cause,
    )


def timesteps_of(job: Job, micro: int) -> list[int]:
    """Those of a micro-step's pictures."""
    drawn: list[int] = objectives.timesteps(job.recipe.batch_size, job.base.schedule, rng_of(job.recipe, micro)).tolist()
    return drawn


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end: a step is taken whole or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)
