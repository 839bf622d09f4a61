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

import torch
from torch import Tensor

from ..data.folder import read_folder
from ..errors import PersonalizeError, TrainingError, nearest
from ..models.threads import few_threads
from ..recipe.fields import Choosing, Recipe
from ..tuning.fleet import Fleet
from .ahead import Ahead
from .control import WORDS, take_words
from .event_of import failed_event, started_event, step_event
from .events import Event, Finished, Fold, Stopped, Warned
from .halves import Halves
from .inputs import TrainingData, prepare_data
from .memory.apply import apply_plan
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
from .milestones import finish, make_what_is_due, probe_run, sample_images, save_checkpoint, state_is_due
from .preflight import RunPlan, check, names_of, recipe_text, with_defaults
from .run import ActiveRun, peak_bytes, put_states, start_run
from .rundir import Commit, Run
from .step import gradients, in_order
from .trackers import track

Numbered = tuple[int, Event]  # number of the recipe, and an event of its run


def train(recipe: Recipe, *, fresh: bool = False) -> Iterator[Event]:
    """Train an adapter and leave it, with all that belongs to it, in the run folder.

    Goes on with what the run folder holds, unless `fresh`. Ctrl-C (or closing the iterator) saves the state first.
    Raises PersonalizeError before anything expensive if `check` finds something, and TrainingError if the run fails.
    """
    began = time.perf_counter()
    with contextlib.ExitStack() as locks:
        folds = recipe.choosing.leave_one_out
        if folds:
            yield from leave_out(recipe, fresh, locks)
        fresh = fresh and not folds  # they have seen to it
        plan = check(recipe, fresh=fresh, claim=lambda run: folds or locks.enter_context(run.hold()))
        if plan.finished:
            yield from again(plan)
        else:
            yield from train_plan(plan, fresh=fresh, began=began)


def again(plan: RunPlan) -> Iterator[Event]:
    """What is to be said of a finished run that is asked for once more."""
    assert plan.finished
    for what in plan.changes:
        yield Warned(plan.finished.step, f"{what}: the run was finished before, more --steps train on with that")
    yield plan.finished


def train_plan(plan: RunPlan, *, fresh: bool = False, began: float | None = None) -> Iterator[Event]:
    """Train an adapter whose recipe was checked, as `train` does."""
    events = train_plans({0: plan}, ALONE, fresh=fresh, began=began)
    for _, event in events:
        try:
            yield event
        except (KeyboardInterrupt, GeneratorExit) as stop:
            events.throw(stop)  # it saves the state, and raises this again


def leave_out(recipe: Recipe, fresh: bool, locks: contextlib.ExitStack) -> Iterator[Event]:
    """Train without one image, then without another, each a run of its own that draws nothing: how do they do on it?

    The run folder is held until `locks` are closed.
    """
    dataset = read_folder(recipe.data)
    recipe = with_defaults(recipe, dataset)
    names, count = names_of(recipe, dataset), min(recipe.choosing.leave_one_out, len(dataset.examples))
    assert recipe.output and recipe.name
    run = Run(recipe.output, recipe.name)
    locks.enter_context(run.hold())
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
    halves: Halves
    ahead: Ahead
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
    with contextlib.ExitStack() as stack:
        stack.enter_context(few_threads(plans[first].base))
        for i, plan in plans.items():
            try:
                data[i] = prepare_data(plan)  # images, captions => latents and conditioning, once
            except policy.contained as error:
                yield i, failed_event(plan, 0, error)
        starts = [plans[i].start for i in data]
        words = [plans[i].words for i in data]
        spec = plans[first].recipe.adapter
        fleet = stack.enter_context(Fleet(plans[first].base, starts, spec.dropout, words, spec.rank_by_timestep))
        runs = []
        commit = Commit(plans[first].run.commit) if len(data) > 1 else None
        for member, i in zip(fleet.members, data, strict=True):
            run = start_run(plans[i], data[i], member, memory[i], i)
            run.commit = commit
            run.began = began - run.plan.run.open(recipe_text(run.plan.recipe, run.plan.history), run.done)
            runs.append(run)
        try:
            halves, ahead = stack.enter_context(Halves(plans[first].base, runs)), stack.enter_context(Ahead())
            events = run_group(Group(runs, policy, halves, ahead, at_once(memory[first], len(runs))))
            yield from track(events, {run.number: (run.plan.run, run.plan.recipe, run.done) for run in runs})
        except (KeyboardInterrupt, GeneratorExit):
            left = [run for run in runs if not run.ended]
            for run in left:
                run.write_last_state()
            put_states(left)
            for run in left:
                run.plan.run.record(Stopped(run.done))
            raise
        except PersonalizeError as error:
            for run in runs:
                if not run.ended:
                    run.plan.run.record_end("error", step=run.done, message=str(error))
            raise


def run_group(group: Group) -> Generator[Numbered, None, None]:
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
        group.halves.close()
        group.ahead.close()
        yield from group.policy.make_room(group, why)  # out here, where the step's tensors are gone


def advance(group: Group) -> Iterator[Numbered]:
    """Everything that is due before the next step, and that step, of every run."""
    yield from keep_states(group)
    for do in (between_steps, end_of_run, obey):  # no run ends before all have what is due
        for run in group.runs:
            yield from by_itself(group, run, do(run))
    if not (active := group.active):
        return
    clock, learners = time.perf_counter(), [run.learner for run in active]
    at_once = group.halves.at_once(len(active), group.at_once)
    take = group.halves.backward(active, at_once)
    if take is in_order and len(group.runs) == 1:
        group.ahead.begin(active[0])
    values = gradients(learners, [run.next_batches() for run in active], at_once, take)
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


def keep_states(group: Group) -> Iterator[Numbered]:
    """Where any run's state is due, keep those of all: whenever they are killed, they go on in the same company."""
    due = {run.number: run.between and state_is_due(run) for run in group.runs if not run.ended}
    if not any(due.values()):
        return
    for run in group.runs:
        yield from by_itself(group, run, write_state(run, due.get(run.number, False)))
    with defer_interrupts():
        put_states(group.runs)


def write_state(run: ActiveRun, due: bool) -> Iterator[Event]:
    """Write a run's state beside the one that is there. Raises OutputError."""
    run.write_state(due)
    yield from ()


def between_steps(run: ActiveRun) -> Iterator[Event]:
    """What is due where the run stands."""
    if run.between:
        with run.opt.holding_average():
            yield from make_what_is_due(run)
        run.between = False


def end_of_run(run: ActiveRun) -> Iterator[Event]:
    """The end of a run that has taken its last step."""
    if not run.steps_left:
        with run.opt.holding_average():
            yield from finish(run)
        plan, seconds = run.plan, time.perf_counter() - run.began
        run.ended = True
        path = plan.run.relative(plan.run.adapter)
        yield plan.run.record(Finished(plan.recipe.steps, seconds, path, peak_bytes(plan.base.device)))


def obey(run: ActiveRun) -> Iterator[Event]:
    """What somebody asked the run for by its file `control`."""
    for word in take_words(run.plan.run.folder):
        yield from obey_word(run, word)


def obey_word(run: ActiveRun, word: str) -> Iterator[Event]:
    """What one word asks for."""
    if word == "sample":
        with run.opt.holding_average():
            yield from sample_images(run, run.done)
    elif word == "save":
        run.write_state(due=True)
        run.plan.run.put_state()
        with run.opt.holding_average():
            saved = save_checkpoint(run)
        yield saved
    elif word == "stop":
        run.write_last_state()
        run.plan.run.put_state()
        run.ended = True
        yield run.plan.run.record(Stopped(run.done))
    elif word:
        yield run.plan.run.record(Warned(run.done, f"a run does not understand {word!r} ({nearest(word, WORDS)})"))


def take_step(run: ActiveRun, numbers: Sequence[float], norm: Tensor, clock: float, sharing: int) -> Iterator[Event]:
    """Take the step whose gradients are there, or take it back. `numbers` are the losses of all its images and the norm;
    it began at `clock`, for so many runs at once."""
    *losses, size = numbers
    good = all(map(math.isfinite, numbers))
    run.done += 1
    run.between = True
    cause = "" if good else undo_step(run, losses)
    bounded = update(run, norm) if good else 0
    seconds = (time.perf_counter() - clock) / sharing
    yield run.plan.run.record(step_event(run, losses, size, seconds, cause, bounded))
    if slower := run.pace.slower(seconds):
        yield run.plan.run.record(Warned(run.done, slowdown_message(run, slower)))


def update(run: ActiveRun, norm: Tensor) -> int:
    """Let the optimizer take the step that was counted already; how many layers became too large and were scaled back."""
    run.opt.step(run.done - 1, norm)
    most = run.plan.recipe.optim.scale_weight_norms
    bounded = run.tunable.bound(most) if most else 0
    run.opt.follow(run.done - 1)
    return bounded


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
