"""Training: one loop, read from top to bottom, that yields events.

The same call again goes on where the last one stopped. On a CPU, a run that was killed and went on ends with the same
bytes as an unbroken one: whatever is drawn at a step depends on (seed, step) only, and the state holds everything else.
"""

from __future__ import annotations

import collections
import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..data.dataset import Dataset, Example
from ..data.folder import read_folder
from ..errors import PersonalizeError, TrainingError
from ..inference import sampling as sample
from ..io import atomic, write_text
from ..recipe.fields import Choosing, Recipe
from ..recipe.resolve import to_toml
from ..recipe.settings import flatten
from ..tuning.attach import Attached, attach
from .events import Chosen, Event, Finished, Fold, Sample, Saved, Started, Step, Sweep, Warned
from .inputs import Lesson, dropout_of, feed, prepare, rng_of
from .memory.apply import lacking, place
from .memory.ladder import pieces
from .memory.recover import PATIENCE, Work, begin, first_sentence, hopeless, lower, peak_bytes, plan, settle, skip, spilled
from .metadata import describe_run, sidecar, versions
from .objectives import denoise as objectives
from .objectives.denoise import Inputs
from .preflight import Job, check, names_of, parts, settled
from .rundir import Run
from .selection import choose
from .step import Seeds, gradients

LOOKED_AT = 32  # batches among which the probe finds the largest
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
    choice = plan(job)
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
    job = work.job
    yield from milestone(work)
    inputs = feed(job, lesson, work.done * job.recipe.optim.accumulate)
    while work.done < job.recipe.steps:
        clock, seen = time.perf_counter(), list[Seen]()
        n = pieces(work.fit, job.recipe.batch_size)
        values = gradients(job.base.denoise, work.loss, work.attached, work.opt, n, next_step(work, inputs, seen))
        numbers = values.tolist()  # the step's one wait for the device
        yield from taken(work, numbers, values[-1], seen, clock)
        yield from milestone(work)
    yield from finish(work, lesson)


Seen = tuple[Tensor, objectives.Rng]  # which pictures [b] a micro-step had, and what it drew from


def taken(
    work: Work, numbers: Sequence[float], norm: Tensor, seen: Sequence[Seen], clock: float, sharing: int = 1
) -> Iterator[Event]:
    """Take the step whose gradients are there, or take it back. `numbers` are the losses of all its pictures and the norm;
    it began at `clock`, for so many runs at once."""
    *losses, size = numbers
    good = all(map(math.isfinite, numbers))
    with unbroken():
        work.done += 1
        cause = "" if good else skip(work, losses, seen)
        if good:
            work.opt.step(work.done - 1, norm)
    seconds = (time.perf_counter() - clock) / sharing
    yield work.job.run.record(told(work, losses, size, seconds, cause))
    if slower := work.pace.slower(seconds):
        yield work.job.run.record(Warned(work.done, spilled(work, slower)))
    if len(work.failed) >= PATIENCE:
        raise TrainingError(*hopeless(work, cause))


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


# ---------------------------------------------------------------- what happens between steps


def milestone(work: Work) -> Iterator[Event]:
    """Pictures and files that are due where the run stands. Doing it twice does no harm, so a run goes on with this."""
    job, done = work.job, work.done
    recipe, run = job.recipe, job.run
    if done == 0 or is_due(done, recipe.sampling.sample_every, recipe.steps):
        yield from pictures(job, done)
    if recipe.checkpoint_every and is_due(done, recipe.checkpoint_every, recipe.steps):
        yield run.record(save(work, done, run.checkpoint(done)))
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
    how = sampling.how | ({"steps": steps} if steps else {})
    return sample.drawing(job.base, prompts, seeds, size=job.side, **how)


def save(work: Work, step: int, path: Path) -> Saved:
    """Write what is attached, an adapter of `step` steps, with the picture of that step or the last one before it."""
    job, adapter = work.job, work.attached.snapshot()
    if not all(delta.finite() for delta in adapter.deltas.values()):
        raise TrainingError(f"the adapter is not finite after {step} steps; nothing was overwritten", "try a lower --lr")
    first = next((picture for earlier in range(step, -1, -1) if (picture := job.run.sample(earlier, 0, 0)).is_file()), None)
    peak = peak_bytes(job.base.device) if job.base.device.type == "cuda" else None
    told = work.fit, work.facts()["estimate"], job.regularization, peak
    about = describe_run(job.recipe, job.base, job.dataset, job.run.name, step, first, *told)
    adapter.save(path, job.recipe.dialect, about)
    return Saved(step, job.run.relative(path))


def finish(work: Work, lesson: Lesson) -> Iterator[Event]:
    """Choose a checkpoint, draw it at several strengths, and write it under its own name, with its companions for UIs."""
    job, step, weight = work.job, work.job.recipe.steps, 1.0
    if job.recipe.choosing.choose != "none":
        for event in choose(job, lesson.latents, lesson.held, work.attached):
            yield event
            if isinstance(event, Chosen):
                step, weight = event.step, event.weight
    if step != job.recipe.steps and not is_due(step, job.recipe.sampling.sample_every, job.recipe.steps):
        yield from pictures(job, step)  # what was chosen is shown
    yield from sweep(job, work.attached, step)
    first = job.run.sample(step, 0, 0)
    if first.is_file():
        with sample.Image.open(first) as picture, atomic(job.run.adapter.with_suffix(".png")) as temporary:
            sample.enlarged(picture, 256).save(temporary, format="PNG")
    write_text(job.run.adapter.with_suffix(".json"), sidecar(job.recipe, job.base, job.dataset, step, weight))
    yield job.run.record(save(work, step, job.run.adapter))


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


# ---------------------------------------------------------------- what is told


def started(work: Work, lesson: Lesson) -> Started:
    """The event of a run that is about to go."""
    job, folders, encoded = work.job, (work.job.dataset, work.job.regularization), (lesson.latents, lesson.prior)
    warnings = [warning for part in (*folders, *encoded) if part for warning in part.warnings]
    if work.fit.compile and (why := lacking(job.device)):
        warnings.append(f"nothing is compiled: {why}")
    return Started(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        recipe=flatten(job.recipe),
        images=[told_of(example, job.dataset) for example in job.dataset.examples],
        warnings=warnings,
        parameters=sum(p.numel() for p in work.opt.parameters.values()),
        device=str(job.base.device),
        dtype=str(job.base.dtype).removeprefix("torch."),
        versions=versions(),
        base=job.base.facts,
        shapes={f"{w}x{h}": len(pool) for (w, h), pool in lesson.latents.buckets.items()},
        resumed=work.done,
        fit=work.facts(),
    )


def told_of(example: Example, dataset: Dataset) -> dict[str, str]:
    """A training picture as the diary has it."""
    trigger = dataset.concepts[example.concept].trigger
    return {"path": str(example.path), "caption": example.caption, "sha256": example.sha256, "trigger": trigger}


def told(work: Work, losses: list[float], norm: float, seconds: float, cause: str) -> Step:
    """The event of a step; `losses` are those of all its pictures."""
    recipe, opt, done = work.job.recipe, work.opt, work.done
    micros = range((done - 1) * recipe.optim.accumulate, done * recipe.optim.accumulate)
    times = [t for micro in micros for t in timesteps_of(work.job, micro)]
    return Step(
        step=done,
        loss=sum(losses) / len(losses),
        lr=opt.lr(work.job.base.family.denoiser.part, done - 1),
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
    drawn: list[int] = objectives.timesteps(job.recipe.batch_size, job.base.noise, rng_of(job.recipe, micro)).tolist()
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
