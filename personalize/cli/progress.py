"""One run seen from a terminal: its loss, pictures and checkpoints, what it is doing after its last step, and what to do next."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..recipe.adapter import FULL
from ..recipe.fields import Recipe
from ..text import base_summary, duration, memory_summary, pace, readable
from ..training.events import (
    Chosen,
    Derived,
    Encoded,
    Event,
    Finished,
    Fold,
    Judged,
    Sample,
    Saved,
    Scored,
    Started,
    Step,
    SteppedDown,
    Stopped,
    Sweep,
    Warned,
    parse,
)
from ..training.verdict import describe
from .messages import answer
from .queueing import events_of
from .view import SILENCE, View, follow, terminal

if TYPE_CHECKING:
    from ..jobs import Job, Store

SMOOTHING = 0.9  # of the loss that is shown: single steps are mostly noise
LINES = 10  # of progress, where there is no terminal


def train_one(recipe: Recipe, fresh: bool = False) -> int:
    """Train with a progress bar and write the report. Returns the exit code: 0, or 130 after Ctrl-C, which saves the state."""

    def events() -> Iterator[Event]:
        from ..api.runs import train  # torch and friends take seconds: imported under the "loading" notice

        return train(recipe, fresh=fresh)

    return follow(RunView(terminal(), recipe), events)


def follow_job(store: Store, job: Job, recipe: Recipe) -> int:
    """The same of a training that a server does."""

    def events() -> Iterator[Event]:
        state = yield from events_of(store, job, parse)
        if state != "succeeded":
            yield Stopped(view.step)

    view = RunView(terminal(), recipe, writes=False)
    return follow(view, events)


# ---------------------------------------------------------------- one run


class RunView(View):
    """A single run. `step` is the last one that is done, `settings` the recipe by flat names with every default filled in."""

    def __init__(self, console: Console, recipe: Recipe, writes: bool = True) -> None:
        super().__init__(console, "loss {task.fields[loss]}", f"loading {recipe.base} and the pictures", writes)
        self.recipe = recipe
        self.step, self.loss = 0, math.nan
        self.settings: dict[str, Any] = {}
        self.finished: Finished | None = None
        self.judged: dict[int, Judged] = {}  # what images of a checkpoint say, by its step
        self.sampled = -1  # step of the last sample pictures that were announced
        self.choice: Chosen | None = None
        self.notice = console.status(self.doing)

    def __enter__(self) -> View:
        if self.console.is_terminal:
            self.notice.start()
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.notice.stop()
        super().__exit__(kind, error, trace)

    @property
    def folder(self) -> Path:
        return Path(self.settings["output"])

    def show(self, event: Event) -> None:
        self._tell(event)
        if self.settings:
            self.reports.show(self.folder, event)
        self.begin(doing_after(event, self.recipe) or self.doing)

    def _tell(self, event: Event) -> None:
        """Print what a person wants to know of an event."""
        match event:
            case Started():
                self._show_start(event)
            case Step():
                self._show_step(event)
            case Sample() if event.step > self.sampled:
                self.sampled = event.step
                whose = "  (the base's own)" if event.base else ""
                self.print(f"pictures {self.folder / event.path.partition('-')[0]}-*.png{whose}")
            case Saved():
                self.print(f"saved    {self.folder / event.path}")
            case Derived():
                lost = f"; {event.error:.2%} of the update lost" if event.error else ""
                self.print(f"saved    {self.folder / event.path}  ({event.what}{lost})")
            case Fold():
                best = f"best on it after step {event.step}, validation {error_change(event.validation)}"
                self.print(f"left out {', '.join(event.pictures)} ({event.number} of {event.of}): {best}")
            case Encoded() if event.concern:
                self.print(f"warning: {event.concern}")
                self.print(f"         look at {self.folder / event.path}")
            case Judged():
                self.judged[event.step] = event
            case Chosen():
                self._show_choice(event)
            case SteppedDown():
                self.print(f"memory   {event.why}, so: {event.what}; going on after step {event.step}")
                self.step = event.step
            case Warned():
                self.print(f"warning: {event.text}")
            case Stopped():
                self.stopped = True
            case Finished():
                self.finished, self.step = event, event.step  # of one that was finished before nothing else is told

    def _show_start(self, event: Started) -> None:
        self.settings = event.recipe
        for warning in event.warnings:
            self.print(f"warning: {warning}")
        self.print(f"base     {self.recipe.base}: {base_summary(event.base)}")
        self.print(f"learning {len(event.images)} pictures, {event.parameters:,} parameters to train on {event.device}")
        if len(event.shapes) > 1:
            self.print(f"shapes   {', '.join(f'{shape} ({count})' for shape, count in event.shapes.items())}")
        self.print(f"fits     {memory_summary(event.fit)}")
        for why in event.fit["why"]:
            self.print(f"         {why}")
        self.step = event.resumed
        if event.init and not event.resumed:
            steps = f", which has learned {event.init['steps']} steps" if "steps" in event.init else ""
            self.print(f"begins   with {event.init['file']}{steps}")
        if event.resumed:
            self.print(f"going on after step {event.resumed}")
        for change in event.changes:
            self.print(f"changed  {change}")
        self.notice.stop()
        if self.console.is_terminal:
            self.bar.add_task(self.doing, total=self.recipe.steps, completed=event.resumed, loss="")
            self.bar.start()

    def _show_step(self, event: Step) -> None:
        self.step = event.step
        if event.skipped:
            self.print(f"step {event.step} skipped: {event.cause}")
            return
        self.loss = event.loss if math.isnan(self.loss) else SMOOTHING * self.loss + (1 - SMOOTHING) * event.loss
        if self.bar.tasks:
            self.bar.update(self.bar.tasks[0].id, completed=event.step, loss=f"{self.loss:.4f}")
        elif event.step % max(1, self.recipe.steps // LINES) == 0 or time.monotonic() - self.spoke >= SILENCE:
            self.print(f"step {event.step}/{self.recipe.steps}  loss {self.loss:.4f}  {pace(1 / max(event.seconds, 1e-9))}")

    def _show_choice(self, event: Chosen) -> None:
        """Which checkpoint became the adapter, why, and at which strengths it is good."""
        self.choice = event
        evidence = f"validation {error_change(event.validation)} on {event.judged_by}, drift {event.drift:.2f}"
        span = f"strengths {event.low:g} to {event.high:g}" if event.low < event.high else f"strength {event.low:g}"
        self.print(f"chosen   step {event.step} of {self.recipe.steps} ({evidence}), {span}")
        if event.fit <= 0:
            self.print("warning: the adapter knows the pictures no better than the base: a lower --lr may help")
        if event.best != event.step:
            self.print(f"         step {event.best} scored best: --choose best takes it, without training again")
        if event.step in self.judged:
            words = describe(self.judged[event.step])
            self.print(f"verdict  {words.headline}")
            for reason in words.reasons:
                self.print(f"         {reason}")

    def progress(self) -> tuple[int, int]:
        return self.step, self.recipe.steps

    def standing(self) -> str:
        return f"stopped after step {self.step} of {self.recipe.steps}."

    def folders_to_finish(self) -> list[Path]:
        return [self.folder] if self.step else []

    def finish(self) -> int:
        """Where everything is, and what to type next."""
        from ..api.runs import proposal, run_folder

        if self.finished is None:
            return 0
        end, folder = self.finished, run_folder(self.recipe)
        adapter, report = folder / end.path, folder / "report.html"
        if end.again:
            self.print("this run is already finished: more --steps train on, --fresh starts it over, another --output keeps both")
        else:
            self.print(f"done     {end.step} steps in {duration(end.seconds)}, at most {readable(end.peak_bytes)} of memory")
        self.print(f"adapter  {adapter}  ({readable(adapter.stat().st_size)})")
        self.print(f"report   {report}")
        self.print(f"next     {(following := proposal(folder))}")
        answer(run=folder, adapter=adapter, report=report, steps=end.step, seconds=end.seconds, again=end.again)
        judged = self.judged.get(self.choice.step) if self.choice else None
        answer(chosen=asdict(self.choice) if self.choice else None, judged=asdict(judged) if judged else None, next=following)
        return 0


def doing_after(event: Event, recipe: Recipe) -> str:
    """What comes after an event, and takes its time; "" where that is what went on before it."""
    match event:
        case Step() if event.step < recipe.steps:
            return "training"
        case Step():
            return "drawing the samples"
        case Started():
            return "training" if event.resumed else "drawing the base's samples"
        case Sample():
            return "training" if event.step < recipe.steps else "writing the checkpoint"
        case Saved() if "checkpoints/" not in event.path:
            return "writing the model" if recipe.adapter.kind == FULL else "writing the report"
        case Saved() if event.step == recipe.steps:
            return "drawing at several strengths" if recipe.choosing.choose == "none" else "judging the checkpoints"
        case Scored():
            return f"judging step {event.step} at strength {event.strength:g}"
        case Judged():
            return "judging the checkpoints by images"
        case Chosen():
            return "drawing at several strengths"
        case Sweep() if event.strength == 1:
            return "writing the adapter"
    return ""


def error_change(gain: float) -> str:
    """A share of the base's error that is gone, as its change.

    >>> error_change(0.123), error_change(-0.04)
    ('-12 %', '+4 %')
    """
    return f"{-100 * gain:+.0f} %"
