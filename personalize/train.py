"""Training: one loop, read from top to bottom, that yields events.

The same call again goes on where the last one stopped. On a CPU, a run that was killed and went on ends with the same
bytes as an unbroken one: whatever is drawn at a step depends on (seed, step) only, and the state holds everything else.
"""

from __future__ import annotations

import collections
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
from pathlib import Path

import torch
from torch import Tensor

from . import objectives, sample
from .attach import Attached, attach
from .base import Cond
from .check import Job, check, is_drawn, names_of, parts, settled
from .choose import choose
from .data import Dataset, Example, Latents, batch_at, batches, cached, class_images, generator, on_demand, read_folder
from .errors import PersonalizeError, TrainingError
from .events import Chosen, Event, Finished, Fold, Sample, Saved, Started, Step, Sweep
from .files import atomic, write_text
from .metadata import describe_run, sidecar, versions
from .objectives import Inputs
from .optim import Optimizer
from .recipe import Choosing, Recipe, flatten, to_toml
from .runs import Run, State

PATIENCE = 3  # steps in a row that may fail
SWEEP = (0.25, 0.5, 0.75, 1.25)


def train(recipe: Recipe, *, fresh: bool = False) -> Iterator[Event]:
    """Train an adapter and leave it, with all that belongs to it, in the run folder.

    Goes on with what the run folder holds, unless `fresh`. Ctrl-C (or closing the iterator) saves the state first.
    Raises PersonalizeError before anything expensive if `check` finds something, and TrainingError if the run fails.
    """
    began = time.perf_counter()
    if recipe.choosing.leave_one_out:
        yield from leave_out(recipe, fresh)
        fresh = False  # the folds have seen to it
    job = check(recipe, fresh=fresh)
    if job.finished:
        yield job.finished
        return
    recipe, base, run = job.recipe, job.base, job.run
    if fresh:
        run.clear()
    lesson = prepare(job)  # pictures, captions => latents and conditioning, once
    with attach(base, recipe.adapter, parts=parts(recipe, base), seed=recipe.seed) as attached:
        loss = objectives.build(recipe.objective, base.schedule, attached.off)
        opt = Optimizer(attached.groups(), recipe.optim, recipe.steps)
        done = failed = 0
        if job.state:
            opt.load(job.state.tensors)
            done = job.state.done
        earlier = run.open(to_toml(recipe), done)
        try:
            yield run.record(started(job, opt, lesson, done))
            yield from milestone(job, attached, opt, done)
            inputs = feed(job, lesson, done * recipe.optim.accumulate)
            while done < recipe.steps:
                clock, losses = time.perf_counter(), []
                for micro in range(done * recipe.optim.accumulate, (done + 1) * recipe.optim.accumulate):
                    with attached.dropping(generator(recipe.seed, "dropout", micro).initial_seed()):
                        losses.append(loss(base.denoise, next(inputs), rng_of(recipe, micro)))  # [b], one per picture
                    opt.backward(losses[-1])
                norm = opt.norm()
                *values, size = torch.cat([*losses, norm[None]]).tolist()  # the step's one wait for the device
                good = all(map(math.isfinite, (*values, size)))
                with unbroken():
                    opt.step(done, norm) if good else opt.skip()
                    done += 1
                yield run.record(told(job, opt, done, values, size, time.perf_counter() - clock, good))
                failed = 0 if good else failed + 1
                if failed == PATIENCE:
                    raise TrainingError(*hopeless(job, done))
                yield from milestone(job, attached, opt, done)
            yield from finish(job, lesson, attached)
        except (KeyboardInterrupt, GeneratorExit):
            run.save_state(State(done, job.about, opt.state()))
            run.note("stopped", step=done)
            raise
        except PersonalizeError as error:
            run.note("error", step=done, message=str(error))
            raise
        seconds = time.perf_counter() - began + earlier
        yield run.record(Finished(recipe.steps, seconds, run.relative(run.adapter), peak_bytes(base.device)))


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
        inputs = Inputs(mean, std, cond, class_images=recipe.prior_rows if lesson.prior else 0, mask=rows[0].mask)
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


def rng_of(recipe: Recipe, micro: int) -> objectives.Rng:
    """What a micro-step draws from, by purpose."""
    return lambda purpose: generator(recipe.seed, purpose, micro)


# ---------------------------------------------------------------- what happens between steps


def milestone(job: Job, attached: Attached, opt: Optimizer, done: int) -> Iterator[Event]:
    """Pictures and files that are due after `done` steps. Doing it twice does no harm, so a run goes on with this."""
    recipe, run = job.recipe, job.run
    if done == 0 or is_due(done, recipe.sampling.sample_every, recipe.steps):
        yield from pictures(job, done)
    if recipe.checkpoint_every and is_due(done, recipe.checkpoint_every, recipe.steps):
        yield run.record(save(job, attached, done, run.checkpoint(done)))
    if is_due(done, recipe.checkpoint_every or 50, recipe.steps):
        run.save_state(State(done, job.about, opt.state()))


def is_due(done: int, every: int, steps: int) -> bool:
    """Every so many steps (never, if 0), and after the last."""
    return done == steps or (done > 0 and every > 0 and done % every == 0)


def pictures(job: Job, done: int) -> Iterator[Event]:
    """Draw the sample pictures; those of step 0 show the base, for an adapter starts as nothing."""
    pairs = [(p, s) for p in range(len(job.prompts)) for s in range(len(job.recipe.sampling.sample_seeds))]
    for (p, s), picture in zip(pairs, draw(job, pairs), strict=True):
        path, prompt, seed = job.run.sample(done, p, s), job.prompts[p], job.recipe.sampling.sample_seeds[s]
        sample.save_picture(picture, path, job.parameters(prompt, seed))
        yield job.run.record(Sample(done, prompt, seed, job.run.relative(path), base=done == 0))


def draw(job: Job, pairs: list[tuple[int, int]]) -> Iterator[sample.Image.Image]:
    """Sample pictures for pairs of (prompt, seed) numbers, with what is attached now."""
    sampling = job.recipe.sampling
    prompts, seeds = [job.prompts[p] for p, _ in pairs], [sampling.sample_seeds[s] for _, s in pairs]
    return sample.drawing(job.base, prompts, seeds, steps=sampling.sample_steps, guidance=sampling.guidance, size=job.side)


def save(job: Job, attached: Attached, step: int, path: Path) -> Saved:
    """Write what is attached, an adapter of `step` steps, with the picture of that step or the last one before it."""
    adapter = attached.snapshot()
    if not all(delta.finite() for delta in adapter.deltas.values()):
        raise TrainingError(f"the adapter is not finite after {step} steps; nothing was overwritten", "try a lower --lr")
    first = next((picture for earlier in range(step, -1, -1) if (picture := job.run.sample(earlier, 0, 0)).is_file()), None)
    about = describe_run(job.recipe, job.base, job.dataset, job.run.name, step, first, job.regularization)
    adapter.save(path, job.recipe.dialect, about)
    return Saved(step, job.run.relative(path))


def finish(job: Job, lesson: Lesson, attached: Attached) -> Iterator[Event]:
    """Choose a checkpoint, draw it at several strengths, and write it under its own name, with its companions for UIs."""
    step, weight = job.recipe.steps, 1.0
    if job.recipe.choosing.choose != "none":
        for event in choose(job, lesson.latents, lesson.held, attached):
            yield event
            if isinstance(event, Chosen):
                step, weight = event.step, event.weight
    if step != job.recipe.steps and not is_due(step, job.recipe.sampling.sample_every, job.recipe.steps):
        yield from pictures(job, step)  # what was chosen is shown
    yield from sweep(job, attached, step)
    first = job.run.sample(step, 0, 0)
    if first.is_file():
        with sample.Image.open(first) as picture, atomic(job.run.adapter.with_suffix(".png")) as temporary:
            sample.enlarged(picture, 256).save(temporary, format="PNG")
    write_text(job.run.adapter.with_suffix(".json"), sidecar(job.recipe, job.base, job.dataset, step, weight))
    yield job.run.record(save(job, attached, step, job.run.adapter))


def sweep(job: Job, attached: Attached, step: int) -> Iterator[Event]:
    """Draw the first two prompts at several strengths; those at 0 and 1 are there already."""
    pairs = [(p, 0) for p in range(len(job.prompts[:2])) if job.recipe.sampling.sample_seeds]
    for strength in (0.0, *SWEEP, 1.0):
        with attached.at(strength):
            drawn = list(draw(job, pairs)) if strength in SWEEP else []
        for i, (p, s) in enumerate(pairs):
            prompt, seed = job.prompts[p], job.recipe.sampling.sample_seeds[s]
            path = job.run.sweep(strength, p, s) if drawn else job.run.sample(step if strength else 0, p, s)
            if drawn:
                sample.save_picture(drawn[i], path, job.parameters(prompt, seed))
            yield job.run.record(Sweep(step, strength, prompt, seed, job.run.relative(path)))


def leave_out(recipe: Recipe, fresh: bool) -> Iterator[Event]:
    """Train without one picture, then without another, each a run of its own that draws nothing: how do they do on it?"""
    dataset = read_folder(recipe.data)
    recipe = settled(recipe, dataset)
    names, count = names_of(recipe, dataset), min(recipe.choosing.leave_one_out, len(dataset.examples))
    assert recipe.output and recipe.name
    run = Run(recipe.output, recipe.name)
    if fresh:
        run.clear()
    sampling = recipe.sampling.model_copy(update={"sample_every": 0, "sample_seeds": ()})
    for number in range(1, count + 1):
        name, fold = names[(number - 1) * len(names) // count], run.fold(number)
        choosing = Choosing(holdout=(name,))
        told = {"output": fold.folder, "sampling": sampling, "choosing": choosing}
        collections.deque(train(recipe.model_copy(update=told)), maxlen=0)
        best = max(scores := fold.scores(), key=scores.__getitem__)
        yield Fold(number, count, [name], best, scores[best])


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


def started(job: Job, opt: Optimizer, lesson: Lesson, done: int) -> Started:
    """The event of a run that is about to go."""
    folders, encoded = (job.dataset, job.regularization), (lesson.latents, lesson.prior)
    warnings = [warning for part in (*folders, *encoded) if part for warning in part.warnings]
    return Started(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=flatten(job.recipe),
        images=[told_of(example, job.dataset) for example in job.dataset.examples],
        warnings=warnings,
        parameters=sum(p.numel() for p in opt.parameters.values()),
        device=str(job.base.device),
        dtype=str(job.base.dtype).removeprefix("torch."),
        versions=versions(),
        base=job.base.facts,
        shapes={f"{w}x{h}": len(pool) for (w, h), pool in lesson.latents.buckets.items()},
        resumed=done,
    )


def told_of(example: Example, dataset: Dataset) -> dict[str, str]:
    """A training picture as the diary has it."""
    trigger = dataset.concepts[example.concept].trigger
    return {"path": str(example.path), "caption": example.caption, "sha256": example.sha256, "trigger": trigger}


def told(job: Job, opt: Optimizer, done: int, losses: list[float], norm: float, seconds: float, good: bool) -> Step:
    """The event of a step; `losses` are those of all its pictures."""
    accumulate, b = job.recipe.optim.accumulate, job.recipe.batch_size
    micros = range((done - 1) * accumulate, done * accumulate)
    times = [objectives.timesteps(b, job.base.schedule, rng_of(job.recipe, micro)).tolist() for micro in micros]
    return Step(
        step=done,
        loss=sum(losses) / len(losses),
        lr=opt.lr("unet", done - 1),
        text_encoder_lr=opt.lr("text_encoder", done - 1),
        grad_norm=norm,
        seconds=seconds,
        timesteps=[t for micro in times for t in micro],
        losses=losses,
        skipped=not good,
    )


def hopeless(job: Job, done: int) -> tuple[str, str]:
    """What to say when no step succeeds any more."""
    steps = ", ".join(str(step) for step in range(done - PATIENCE + 1, done + 1))
    return (
        f"the loss or its gradient was not finite at steps {steps}, so the run stopped; checkpoints before them are good",
        f"try a --lr below {max(job.recipe.optim.lr, job.recipe.optim.text_encoder_lr):g}, with --fresh",
    )


def peak_bytes(device: torch.device) -> int:
    """The most memory that the run has held: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
