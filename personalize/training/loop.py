"""Training: one loop for one run or many, read from top to bottom, that yields events.

The same call again goes on where the last one stopped. On a CPU, a run that was killed and went on ends with the same
bytes as an unbroken one: whatever is drawn at a step depends on (seed, step) only, and the state holds everything else.

Runs that go side by side (fleet.py) share one base, and their steps are taken in the same passes; each stays a run of its own,
with its own folder, random stream, learning rate, clipping, step count and end.
"""

from __future__ import annotations

import collections
import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
from torch import Tensor

from ..adapters.delta import LowRank
from ..data.dataset import Dataset, Example
from ..data.folder import read_folder
from ..errors import PersonalizeError, TrainingError
from ..recipe.fields import Choosing, Recipe
from ..recipe.resolve import to_toml
from ..recipe.settings import flatten
from ..tuning.fleet import Fleet
from ..tuning.targets import fresh as fresh_deltas
from .events import Event, Failed, Finished, Fold, Started, Step, Warned
from .inputs import TrainingData, prepare_data, rng_of
from .memory.apply import apply_plan, missing_compiler
from .memory.plan import MemoryPlan, choose_memory_plan
from .memory.recover import (
    PATIENCE,
    failure_message,
    first_sentence,
    free_memory,
    slowdown_message,
    step_down,
    undo_step,
)
from .metadata import versions
from .milestones import finish, make_what_is_due, probe_run
from .objectives.denoise import timesteps
from .preflight import RunPlan, check, names_of, parts, with_defaults
from .run import ActiveRun, peak_bytes, start_run
from .rundir import Run
from .step import gradients

Numbered = tuple[int, Event]  # number of the recipe, and an event of its run


def train(recipe: Recipe, *, fresh: bool = False) -> Iterator[Event]:
    """Train an adapter and leave it, with all that belongs to it, in the run folder.

    Goes on with what the run folder holds, unless `fresh`. Ctrl-C (or closing the iterator) saves the state first.
    Raises PersonalizeError before anything expensive if `check` finds something, and TrainingError if the run fails.
    """
    began = time.perf_counter()
    if recipe.choosing.leave_one_out:
        yield from leave_out(recipe, fresh)
        fresh = False  # the folds have seen to it
    plan = check(recipe, fresh=fresh)
    if plan.finished:
        yield plan.finished
        return
    yield from train_plan(plan, fresh=fresh, began=began)


def train_plan(plan: RunPlan, *, fresh: bool = False, began: float | None = None) -> Iterator[Event]:
    """Train an adapter whose recipe was checked, as `train` does."""
    events = train_plans({0: plan}, ALONE, fresh=fresh, began=began)
    for _, event in events:
        try:
            yield event
        except (KeyboardInterrupt, GeneratorExit) as stop:
            events.throw(stop)  # it saves the state, and raises this again


def leave_out(recipe: Recipe, fresh: bool) -> Iterator[Event]:
    """Train without one image, then without another, each a run of its own that draws nothing: how do they do on it?"""
    dataset = read_folder(recipe.data)
    recipe = with_defaults(recipe, dataset)
    names, count = names_of(recipe, dataset), min(recipe.choosing.leave_one_out, len(dataset.examples))
    assert recipe.output and recipe.name
    run = Run(recipe.output, recipe.name)
    if fresh:
        run.clear()
    sampling = recipe.sampling.model_copy(update={"sample_every": 0, "sample_seeds": ()})
    for number in range(1, count + 1):
        name, fold = names[(number - 1) * len(names) // count], run.fold(number)
        changes = {"output": fold.folder, "sampling": sampling, "choosing": Choosing(holdout=(name,))}
        collections.deque(train(recipe.model_copy(update=changes)), maxlen=0)
        best = max(scores := fold.scores(), key=scores.__getitem__)
        yield Fold(number, count, [name], best, scores[best])


# ---------------------------------------------------------------- the loop


@dataclass
class Group:
    """Runs that are trained side by side."""

    runs: list[ActiveRun]
    policy: Policy
    at_once: int | None = None  # so many runs' batches go through the base in one pass; None: all

    @property
    def active(self) -> list[ActiveRun]:
        """Those with steps to take."""
        return [run for run in self.runs if run.steps_left]


@dataclass(frozen=True)
class Policy:
    """What differs between a run alone and one among others."""

    make_room: Callable[[Group, str], Iterator[Numbered]]  # what is done where memory runs out, and why it did
    probe: bool  # whether a real step is tried first, where there is a budget
    contained: tuple[type[PersonalizeError], ...]  # errors that end one run, and not the whole


def train_plans(
    plans: Mapping[int, RunPlan],
    policy: Policy,
    *,
    fresh: bool = False,
    began: float | None = None,
    at_once: Callable[[MemoryPlan, int], int | None] = lambda *_: None,
) -> Generator[Numbered, None, None]:
    """Train adapters of one shape on one base to their ends, side by side: (number of the plan, event).

    `at_once` tells from the first run's memory plan and the number of runs how many go through the base together.
    """
    began = time.perf_counter() if began is None else began
    for plan in plans.values():
        if fresh:
            plan.run.clear()
    memory, data = {i: choose_memory_plan(plan) for i, plan in plans.items()}, dict[int, TrainingData]()
    first, *_ = plans
    apply_plan(plans[first].base, memory[first].compute, plans[first].device)
    for i, plan in plans.items():
        try:
            data[i] = prepare_data(plan)  # images, captions => latents and conditioning, once
        except policy.contained as error:
            yield i, failed_event(plan, 0, error)
    with Fleet(plans[first].base, [start_of(plans[i]) for i in data], plans[first].recipe.adapter.dropout) as fleet:
        runs = []
        for member, i in zip(fleet.members, data, strict=True):
            run = start_run(plans[i], data[i], member, memory[i], i)
            run.began = began - run.plan.run.open(to_toml(run.plan.recipe), run.done)
            runs.append(run)
        try:
            yield from run_group(Group(runs, policy, at_once(memory[first], len(runs))))
        except (KeyboardInterrupt, GeneratorExit):
            for run in runs:
                if not run.ended:
                    run.stop()
                    run.plan.run.record_end("stopped", step=run.done)
            raise
        except PersonalizeError as error:
            for run in runs:
                if not run.ended:
                    run.plan.run.record_end("error", step=run.done, message=str(error))
            raise


def run_group(group: Group) -> Iterator[Numbered]:
    """From where the runs stand to their ends."""
    for run in group.runs:
        if group.policy.probe:
            probe_run(run)
        yield run.number, run.plan.run.record(started_event(run))
    while not all(run.ended for run in group.runs):
        try:
            yield from advance(group)
            continue
        except torch.OutOfMemoryError as error:
            why = first_sentence(error)
        yield from group.policy.make_room(group, why)  # out here, where the step's tensors are gone


def advance(group: Group) -> Iterator[Numbered]:
    """Everything that is due before the next step, and that step, of every run."""
    for run in group.runs:
        yield from by_itself(group, run, between_steps(run))
    if not (active := group.active):
        return
    clock, learners = time.perf_counter(), [run.learner for run in active]
    values = gradients(learners, [run.next_batches() for run in active], group.at_once)
    numbers = torch.cat(values).tolist()  # the step's one wait for the device
    events: list[Numbered] = []
    with defer_interrupts():  # all take this step, or none: runs that go on meet the same company
        for run, own in zip(active, values, strict=True):
            mine, numbers = numbers[: len(own)], numbers[len(own) :]
            events += by_itself(group, run, take_step(run, mine, own[-1], clock, len(active)))
    yield from events
    for run in active:
        yield from by_itself(group, run, give_up(run))


def by_itself(group: Group, run: ActiveRun, events: Iterator[Event]) -> Iterator[Numbered]:
    """What one run does alone with the base. What goes wrong ends that run only, if the policy says so."""
    if run.ended:
        return
    try:
        with run.tunable.computing():
            for event in events:
                yield run.number, event
    except group.policy.contained as error:
        run.ended = True
        yield run.number, failed_event(run.plan, run.done, error)


def between_steps(run: ActiveRun) -> Iterator[Event]:
    """What is due where the run stands; after its last step, its end."""
    if run.between:
        yield from make_what_is_due(run)
        run.between = False
    if not run.steps_left:
        yield from finish(run)
        plan, seconds = run.plan, time.perf_counter() - run.began
        run.ended = True
        path = plan.run.relative(plan.run.adapter)
        yield plan.run.record(Finished(plan.recipe.steps, seconds, path, peak_bytes(plan.base.device)))


def take_step(run: ActiveRun, numbers: Sequence[float], norm: Tensor, clock: float, sharing: int) -> Iterator[Event]:
    """Take the step whose gradients are there, or take it back. `numbers` are the losses of all its images and the norm;
    it began at `clock`, for so many runs at once."""
    *losses, size = numbers
    good = all(map(math.isfinite, numbers))
    run.done += 1
    run.between = True
    cause = "" if good else undo_step(run, losses)
    if good:
        run.opt.step(run.done - 1, norm)
    seconds = (time.perf_counter() - clock) / sharing
    yield run.plan.run.record(step_event(run, losses, size, seconds, cause))
    if slower := run.pace.slower(seconds):
        yield run.plan.run.record(Warned(run.done, slowdown_message(run, slower)))


def give_up(run: ActiveRun) -> Iterator[Event]:
    """Raise TrainingError if too many steps failed."""
    if len(run.failed) >= PATIENCE:
        raise TrainingError(*failure_message(run))
    yield from ()


@contextlib.contextmanager
def defer_interrupts() -> Iterator[None]:
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


# ---------------------------------------------------------------- where memory runs out


def lower_rung(group: Group, why: str) -> Iterator[Numbered]:
    """A run alone takes the next rung of the ladder, and goes on from its last checkpoint."""
    for run in group.runs:
        yield run.number, run.plan.run.record(step_down(run, why))


def halve(group: Group, why: str) -> Iterator[Numbered]:
    """Among others, half as many go through the base at once, and the step is taken anew. Raises TrainingError for one."""
    active = group.active
    count = group.at_once or len(active)
    if count <= 1:
        raise TrainingError(f"not even one member fits into memory: {why}", "a run by itself gives way: personalize train")
    group.at_once = -(-count // 2)
    text = f"memory ran out ({why}): {group.at_once} of {len(active)} members at a time from now on"
    for run in active:
        free_memory(run)
        run.rewind()
        yield run.number, run.plan.run.record(Warned(run.done, text))


ALONE = Policy(lower_rung, probe=True, contained=())
AMONG_OTHERS = Policy(halve, probe=False, contained=(PersonalizeError,))


# ---------------------------------------------------------------- events


def start_of(plan: RunPlan) -> dict[str, LowRank]:
    """The adapter before its first step."""
    return fresh_deltas(plan.base, plan.recipe.adapter, parts(plan.recipe, plan.base), plan.recipe.seed)


def failed_event(plan: RunPlan, step: int, error: PersonalizeError) -> Failed:
    """How a run ended, also for its diary."""
    with contextlib.suppress(PersonalizeError):  # the disk may be what went wrong
        plan.run.record_end("error", step=step, message=str(error))
    return Failed(step, str(error))


def started_event(run: ActiveRun) -> Started:
    """The event of a run that is about to go."""
    plan, data = run.plan, run.data
    sources = (plan.dataset, plan.regularization, data.latents, data.prior)
    warnings = [*plan.recipe.remarks, *(warning for source in sources if source for warning in source.warnings)]
    if run.compute.compile and (why := missing_compiler(plan.device)):
        warnings.append(f"nothing is compiled: {why}")
    return Started(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        recipe=flatten(plan.recipe),
        images=[image_record(example, plan.dataset) for example in plan.dataset.examples],
        warnings=warnings,
        parameters=sum(p.numel() for p in run.opt.parameters.values()),
        device=str(plan.base.device),
        dtype=str(plan.base.dtype).removeprefix("torch."),
        versions=versions(),
        base=plan.base.facts,
        shapes={f"{w}x{h}": len(pool) for (w, h), pool in data.latents.buckets.items()},
        resumed=run.done,
        fit=run.facts(),
    )


def image_record(example: Example, dataset: Dataset) -> dict[str, str]:
    """A training image as events have it."""
    trigger = dataset.concepts[example.concept].trigger
    return {"path": str(example.path), "caption": example.caption, "sha256": example.sha256, "trigger": trigger}


def step_event(run: ActiveRun, losses: list[float], norm: float, seconds: float, cause: str) -> Step:
    """The event of a step; `losses` are those of all its images."""
    recipe, opt, done = run.plan.recipe, run.opt, run.done
    micros = range((done - 1) * recipe.optim.accumulate, done * recipe.optim.accumulate)
    times = [t for micro in micros for t in timesteps_of(run.plan, micro)]
    return Step(
        step=done,
        loss=sum(losses) / len(losses),
        lr=opt.lr(run.plan.base.family.denoiser.part, done - 1),
        text_encoder_lr=opt.lr("text_encoder", done - 1),
        grad_norm=norm,
        seconds=seconds,
        timesteps=times,
        losses=losses,
        skipped=bool(cause),
        cause=cause,
    )


def timesteps_of(plan: RunPlan, micro: int) -> list[int]:
    """Those of a micro-step's images."""
    drawn: list[int] = timesteps(plan.recipe.batch_size, plan.base.noise, rng_of(plan.recipe, micro)).tolist()
    return drawn
