"""Fleets: many recipes on one base, their steps taken in the same passes. One loop, as train.py's; a fleet of one is a run.

Each member is a run of its own, with its own folder, random stream, learning rate, clipping, step count and end: what it leaves
is what `train` would leave, but for the rounding of sums in another order, and either goes on with what the other has begun.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.delta import LowRank
from ..errors import PersonalizeError, RecipeError, TrainingError
from ..models.model import Base
from ..recipe.fields import Recipe
from ..recipe.resolve import to_toml
from ..tuning.crew import Crew, Member
from ..tuning.targets import fresh as fresh_deltas
from .events import Event, Failed, Finished, Step, Warned
from .inputs import Lesson, feed, prepare
from .loop import Seen, finish, milestone, next_step, started, taken, train, unbroken
from .memory.apply import place
from .memory.ladder import Fit
from .memory.recover import Choice, Work, begin, estimate_of, first_sentence, peak_bytes, plan
from .objectives.denoise import WHOLE, Asking, Inputs, Rng, answered, asking
from .optimizers import Optimizer
from .preflight import Job, check, parts

Told = tuple[int, Event]  # number of the recipe, and what its run says


@dataclass
class Runner:
    """A member at work: its run, what it learns, and the losses of the step that is being taken."""

    number: int  # of its recipe
    work: Work
    lesson: Lesson
    member: Member
    began: float
    ended: bool = False
    inputs: Iterator[Inputs] = field(init=False)
    seen: list[Seen] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rewind()

    def rewind(self) -> None:
        """Ready for the step after those that are done."""
        self.inputs = feed(self.job, self.lesson, self.work.done * self.job.recipe.optim.accumulate)

    @property
    def job(self) -> Job:
        return self.work.job

    @property
    def active(self) -> bool:
        """Whether there are steps to take."""
        return not self.ended and self.work.done < self.job.recipe.steps


def train_fleet(recipes: Sequence[Recipe], *, fresh: bool = False, together: int | None = None) -> Iterator[Told]:
    """Train an adapter for each recipe, side by side where they can be: on one base, with adapters of one shape.

    Yields (number of the recipe, event). All are checked before the first is trained. A run that cannot begin, or that fails on
    the way, says so, and the others go on. At most `together` members go through the base at once, and fewer where memory runs
    out. Ctrl-C (or closing the iterator) saves all states; the same call again goes on.
    """
    fleets: dict[str, dict[int, Job]] = {}
    bases: dict[str, Base] = {}
    places: dict[Path | None, int] = {}
    for i, recipe in enumerate(recipes):
        kind = kind_of(i, recipe)
        try:
            job = check(recipe, fresh=fresh, base=bases.get(kind))
            bases[kind] = job.base
            if (other := places.setdefault(job.recipe.output, i)) != i:
                raise RecipeError(f"{job.recipe.output} is the run folder of two recipes", f"numbers {other + 1} and {i + 1}")
        except PersonalizeError as error:
            yield i, Failed(0, str(error))
            continue
        if job.finished:
            yield i, job.finished
        else:
            fleets.setdefault(kind, {})[i] = job
    for jobs in fleets.values():
        if len(jobs) > 1:
            yield from run_fleet(jobs, fresh, together)
        else:
            yield from run_alone(*next(iter(jobs.items())), fresh)


def run_alone(number: int, job: Job, fresh: bool) -> Iterator[Told]:
    """A run that goes with no other."""
    last = 0
    try:
        for event in train(job.recipe, fresh=fresh):
            last = event.step if isinstance(event, Step) else last
            yield number, event
    except PersonalizeError as error:
        yield number, Failed(last, str(error))


def kind_of(number: int, recipe: Recipe) -> str:
    """What members of one fleet have in common. Dropout draws for a whole batch, and folds are runs before the run: alone."""
    learned = bool(recipe.optim.lr), bool(recipe.optim.text_encoder_lr)
    shape = recipe.adapter.model_dump(exclude={"alpha"}), learned, recipe.fitting.model_dump(), recipe.device
    alone = number if recipe.adapter.dropout or recipe.choosing.leave_one_out else None
    return repr((recipe.base, recipe.prediction, recipe.zero_snr, recipe.clip_skip, recipe.vae, shape, alone))


def run_fleet(jobs: Mapping[int, Job], fresh: bool, together: int | None) -> Iterator[Told]:
    """Train the members of one fleet to their ends."""
    began, choices, lessons = time.perf_counter(), {i: plan(job) for i, job in jobs.items()}, dict[int, Lesson]()
    (job, *_), (choice, *_) = jobs.values(), choices.values()
    place(job.base, choice.fit, job.device)
    for i, one in jobs.items():
        if fresh:
            one.run.clear()
        try:
            lessons[i] = prepare(one)
        except PersonalizeError as error:
            yield i, failed(one, 0, error)
    with Crew(job.base, [start_of(jobs[i]) for i in lessons]) as crew:
        runners = []
        for member, (i, lesson) in zip(crew.members, lessons.items(), strict=True):
            work = begin(one := jobs[i], member, choices[i])
            earlier = one.run.open(to_toml(one.recipe), work.done)
            runners.append(Runner(i, work, lesson, member, began - earlier))
            yield i, one.run.record(started(work, lesson))
        crew.at_once = together or affordable(job, choice, len(runners))
        try:
            yield from onward(crew, runners)
        except (KeyboardInterrupt, GeneratorExit):
            for runner in runners:
                if not runner.ended:
                    runner.work.stop()
                    runner.job.run.note("stopped", step=runner.work.done)
            raise


def start_of(job: Job) -> dict[str, LowRank]:
    """A member's factors before its first step, as a run alone begins with them."""
    return fresh_deltas(job.base, job.recipe.adapter, parts(job.recipe, job.base), job.recipe.seed)


def failed(job: Job, step: int, error: PersonalizeError) -> Failed:
    """How a run ended, also for its diary."""
    with contextlib.suppress(PersonalizeError):  # the disk may be what went wrong
        job.run.note("error", step=step, message=str(error))
    return Failed(step, str(error))


def affordable(job: Job, choice: Choice, size: int) -> int | None:
    """How many members' batches fit at once, by estimate: a power of two; None where there is no budget to keep to."""
    if choice.budget is None:
        return None
    count = 1
    while count < size and peak_of(job, choice.fit, 2 * count) <= choice.budget:
        count *= 2
    return count


def peak_of(job: Job, fit: Fit, count: int) -> int:
    """Bytes that a step takes with so many members' batches in one, by estimate."""
    rows = count * job.recipe.batch_size
    return estimate_of(
        replace(job, recipe=job.recipe.model_copy(update={"batch_size": rows})), replace(fit, micro_batch=rows)
    ).peak


def onward(crew: Crew, runners: Sequence[Runner]) -> Iterator[Told]:
    """Step by step, until the last member is at its end."""
    for runner in runners:
        yield from alone(crew, runner, milestone(runner.work))
        if not runner.active:
            yield from alone(crew, runner, ending(runner))
    while active := [runner for runner in runners if runner.active]:
        clock = time.perf_counter()
        if why := step(crew, active):
            yield from ((runner.number, runner.job.run.record(Warned(runner.work.done, why))) for runner in active)
        norms = [runner.work.opt.norm() for runner in active]
        losses = [torch.cat(runner.losses) for runner in active]
        numbers = torch.cat([*losses, torch.stack(norms)]).tolist()  # the one wait for the device
        events = list[Told]()
        with unbroken():  # all members take this step, or none: a fleet that goes on meets the same company
            for runner, own, norm, size in zip(active, losses, norms, numbers[-len(active) :], strict=True):
                mine, numbers = [*numbers[: len(own)], size], numbers[len(own) :]
                events += alone(crew, runner, taken(runner.work, mine, norm, runner.seen, clock, len(active)))
        yield from events
        for runner in active:
            yield from alone(crew, runner, milestone(runner.work))
            if not runner.active:
                yield from alone(crew, runner, ending(runner))


def alone(crew: Crew, runner: Runner, what: Iterator[Event]) -> Iterator[Told]:
    """What one member does by itself with the base. What goes wrong ends its run only."""
    if runner.ended:
        return
    try:
        with crew.rows.of(runner.member.number):
            events = list(what)
    except PersonalizeError as error:
        runner.ended = True
        events = [failed(runner.job, runner.work.done, error)]
    yield from ((runner.number, event) for event in events)


def ending(runner: Runner) -> Iterator[Event]:
    """The end of a run, as `train` ends it."""
    job = runner.job
    yield from finish(runner.work, runner.lesson)
    seconds = time.perf_counter() - runner.began
    runner.ended = True
    yield job.run.record(Finished(job.recipe.steps, seconds, job.run.relative(job.run.adapter), peak_bytes(job.base.device)))


# ---------------------------------------------------------------- one step of all


Batch = tuple[Runner, Inputs, Rng]


def step(crew: Crew, active: Sequence[Runner]) -> str:
    """All gradients of the members' next steps; where memory runs out, anew with half as many at once: what was said of it."""
    why = ""
    while True:
        crew.forget()
        try:
            for batches in drawn(crew, active):
                for group in alike(batches, crew.at_once):
                    learn(crew, group)
        except torch.OutOfMemoryError as error:
            said = first_sentence(error)
        else:
            crew.share_out()
            return why
        count = crew.at_once or len(active)
        if count == 1:
            raise TrainingError(f"not even one member fits into memory: {said}", "a run by itself gives way: personalize train")
        crew.at_once = -(-count // 2)
        why = f"memory ran out ({said}): {crew.at_once} of {len(active)} members at a time from now on"
        for runner in active:
            runner.rewind()


def drawn(crew: Crew, active: Sequence[Runner]) -> Iterator[list[Batch]]:
    """The batches of the members' next steps, one micro-step after the other; captions are read through each own adapter."""
    sources = []
    for runner in active:
        runner.seen, runner.losses = [], []
        sources.append((runner, next_step(runner.work, runner.inputs, runner.seen)))
    while sources:
        batches: list[Batch] = []
        for runner, source in sources:
            with crew.rows.of(runner.member.number):
                if (found := next(source, None)) is not None:
                    batches.append((runner, *found[:2]))
        sources = [(runner, source) for runner, source in sources if any(runner is one[0] for one in batches)]
        yield batches


def alike(batches: Sequence[Batch], most: int | None) -> Iterator[list[Batch]]:
    """Batches that can go through the base as one, at most so many at once: of one shape, asking the same questions."""
    groups = collections.defaultdict(list)
    for batch in batches:
        runner, inputs, _ = batch
        held = 0 if inputs.class_cond is None else len(inputs.class_cond)
        shape = inputs.mean.shape, inputs.cond.tokens.shape, inputs.class_images, held
        groups[shape, runner.job.recipe.objective.prior].append(batch)
    for group in groups.values():
        size = most or len(group)
        yield from (group[first : first + size] for first in range(0, len(group), size))


def learn(crew: Crew, group: Sequence[Batch]) -> None:
    """Forward and backward of a group."""
    asks = [asking(runner.job.recipe.objective, crew.base.noise)(inputs, rng, WHOLE) for runner, inputs, rng in group]
    losses = pass_through(crew, [runner.member.number for runner, *_ in group], asks, [runner.work.opt for runner, *_ in group])
    for (runner, *_), loss in zip(group, losses, strict=True):
        runner.losses.append(loss.detach())


def pass_through(crew: Crew, who: Sequence[int], asks: Sequence[Asking], opts: Sequence[Optimizer]) -> list[Tensor]:
    """The losses [b] of some members, whose gradients are added to the shared ones: one pass through the base per question."""
    with crew.rows.of(*who), crew.lowered():
        losses = answered(asks, crew.base.denoise, crew.rows.of)
        torch.stack([opt.share(loss) for opt, loss in zip(opts, losses, strict=True)]).sum().backward()
    return losses
