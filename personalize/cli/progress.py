"""A run seen from a terminal: a progress bar with loss, speed and time left, or plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..recipe.fields import Recipe
from ..recipe.settings import flatten
from ..text import duration, fits, loaded, pace, plain, readable
from ..training.events import Chosen, Event, Finished, Fold, Sample, Saved, Started, Step, SteppedDown, Warned

SMOOTHING = 0.9  # of the loss that is shown: single steps are mostly noise
LINES = 10  # of progress, where there is no terminal


def watch(recipe: Recipe, fresh: bool = False) -> int:
    """Train, tell how it goes, write the report, and say what to type next. Ctrl-C saves and exits with 130."""
    view = View(Console(highlight=False, soft_wrap=True), recipe)
    try:
        with view:
            from ..training.loop import train  # torch and friends take seconds: only under the "loading" notice

            events: Any = train(recipe, fresh=fresh)
            with contextlib.closing(events):
                for event in events:
                    view.tell(event)
    except KeyboardInterrupt:
        view.say(f"stopped after step {view.step} of {recipe.steps}. To go on, type the same command again.")
        return 130
    view.farewell()
    return 0


class Speed(TextColumn):
    """Steps per second, or seconds per step where that is the larger number."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text(pace(task.speed) if task.speed else "", style="dim")


class View:
    """Tells events. `step` is the last finished one, `settled` the recipe by flat names with every default filled in."""

    def __init__(self, console: Console, recipe: Recipe) -> None:
        self.console, self.recipe = console, recipe
        self.step, self.loss, self.spent = 0, float("nan"), 0.0
        self.settled: dict[str, Any] = {}
        self.finished: Finished | None = None
        self.drawn = -1  # step of the last pictures that were announced
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            Speed(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.notice = console.status(f"loading {recipe.base} and the pictures")

    def __enter__(self) -> View:
        if self.console.is_terminal:
            self.notice.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.notice.stop()
        if self.bar.tasks:
            self.bar.stop()

    def say(self, text: str) -> None:
        """A line, above the bar if there is one. File names and prompts are no markup."""
        self.console.print(plain(text), markup=False)

    def tell(self, event: Event) -> None:
        match event:
            case Started():
                self._started(event)
            case Step():
                self._step(event)
            case Sample() if event.step > self.drawn:
                self.drawn = event.step
                whose = "  (the base's own)" if event.base else ""
                self.say(f"pictures {self.folder / event.path.partition('-')[0]}-*.png{whose}")
            case Saved():
                self.say(f"saved    {self.folder / event.path}")
            case Fold():
                told = f"best on it after step {event.step}, validation {change(event.validation)}"
                self.say(f"left out {', '.join(event.pictures)} ({event.number} of {event.of}): {told}")
            case Chosen():
                self._chosen(event)
            case SteppedDown():
                self.say(f"memory   {event.why}, so: {event.what}; going on after step {event.step}")
                self.step = event.step
            case Warned():
                self.say(f"warning: {event.text}")
            case Finished():
                self.finished = event

    @property
    def folder(self) -> Path:
        return Path(self.settled["output"])

    def _started(self, event: Started) -> None:
        self.settled = event.recipe
        for warning in event.warnings:
            self.say(f"warning: {warning}")
        self.say(f"base     {self.recipe.base}: {loaded(event.base)}")
        self.say(f"learning {len(event.images)} pictures, {event.parameters:,} parameters to train on {event.device}")
        if len(event.shapes) > 1:
            self.say(f"shapes   {', '.join(f'{shape} ({count})' for shape, count in event.shapes.items())}")
        self.say(f"fits     {fits(event.fit)}")
        for why in event.fit["why"]:
            self.say(f"         {why}")
        self.step = event.resumed
        if event.resumed:
            self.say(f"going on after step {event.resumed}")
        self.notice.stop()
        if self.console.is_terminal:
            self.bar.add_task("", total=self.recipe.steps, completed=event.resumed, loss="")
            self.bar.start()

    def _step(self, event: Step) -> None:
        self.step, self.spent = event.step, self.spent + event.seconds
        if event.skipped:
            self.say(f"step {event.step} skipped: {event.cause}")
            return
        first = self.loss != self.loss  # nan: nothing told yet
        self.loss = event.loss if first else SMOOTHING * self.loss + (1 - SMOOTHING) * event.loss
        if self.bar.tasks:
            self.bar.update(self.bar.tasks[0].id, completed=event.step, loss=f"{self.loss:.4f}")
        elif event.step % max(1, self.recipe.steps // LINES) == 0:
            self.say(f"step {event.step}/{self.recipe.steps}  loss {self.loss:.4f}  {pace(1 / max(event.seconds, 1e-9))}")

    def _chosen(self, event: Chosen) -> None:
        """Which checkpoint, why, and at which strengths."""
        told = f"validation {change(event.validation)} on {event.judged_by}, drift {event.drift:.2f}"
        span = f"strengths {event.low:g} to {event.high:g}" if event.low < event.high else f"strength {event.low:g}"
        self.say(f"chosen   step {event.step} of {self.recipe.steps} ({told}), {span}")
        if event.fit <= 0:
            self.say("warning: the adapter knows the pictures no better than the base: a lower --lr may help")
        if event.best != event.step:
            self.say(f"         step {event.best} scored best: --choose best takes it, without training again")

    def farewell(self) -> None:
        """Where everything is, and what to type next."""
        from ..data.captions import fill
        from ..data.folder import read_folder
        from ..reports.metrics import write_metrics
        from ..reports.run import write_report
        from ..training.preflight import settled

        if self.finished is None:
            return
        self.settled = self.settled or flatten(settled(self.recipe, read_folder(self.recipe.data)))
        adapter = self.folder / self.finished.path
        if self.finished.again:
            self.say("this run is already finished: --fresh starts it over, another --output keeps both")
        else:
            spent, most = duration(self.finished.seconds), readable(self.finished.peak_bytes)
            self.say(f"done     {self.finished.step} steps in {spent}, at most {most} of memory")
        self.say(f"adapter  {adapter}  ({readable(adapter.stat().st_size)})")
        write_metrics(self.folder, self.recipe.base)
        self.say(f"report   {write_report(self.folder)}")
        prompt = fill("a {trigger} {class} in the snow", self.settled["trigger"], self.settled.get("class", ""))
        self.say(f"next     personalize generate {shlex.quote(prompt)} --adapter {shlex.quote(str(adapter))}")


def change(gain: float) -> str:
    """A share of the base's error that is gone, as its change.

    >>> change(0.123), change(-0.04)
    ('-12 %', '+4 %')
    """
    return f"{-100 * gain:+.0f} %"
