"""Training seen from a terminal: one run with its loss, pictures and checkpoints, or many runs with a line for each that ends.

A bar shows steps, speed and time left; where there is no terminal, a single run prints plain lines instead.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from ..lock import hold
from ..recipe.fields import Recipe
from ..recipe.settings import flatten
from ..text import base_summary, duration, memory_summary, pace, plain, readable
from ..training.events import Chosen, Event, Failed, Finished, Fold, Sample, Saved, Started, Step, SteppedDown, Stopped, Warned
from .live import LiveReports

SMOOTHING = 0.9  # of the loss that is shown: single steps are mostly noise
LINES = 10  # of progress, where there is no terminal
SHEET_PROMPTS = 3  # sample prompts on the sheet of many runs


def train_one(recipe: Recipe, fresh: bool = False) -> int:
    """Train with a progress bar and write the report. Returns the exit code: 0, or 130 after Ctrl-C, which saves the state."""

    def events() -> Iterator[Event]:
        from ..training.loop import train  # torch and friends take seconds: imported under the "loading" notice

        return train(recipe, fresh=fresh)

    return follow(RunView(terminal(), recipe), events)


def train_many(recipes: Sequence[Recipe], backend: str, *, fresh: bool, together: int | None) -> int:
    """Train many runs on a backend, write a report for each and one sheet. Returns the exit code: 0, 2 if some failed, 130
    after Ctrl-C. Raises RecipeError for a backend that there is not."""

    def events() -> Iterator[tuple[int, Event]]:
        from ..backends.backend import get_backend  # torch comes with it

        return get_backend(backend).run(recipes, fresh=fresh, together=together)

    view = BatchView(terminal(), recipes)
    with hold(view.parent, "wait for it, or choose another --output"):
        return follow(view, events)


def follow(view: View, start: Callable[[], Iterator[Any]]) -> int:
    """Show all events of a training in a view, and how it ended; returns the exit code."""
    try:
        with view:
            events: Any = start()
            with contextlib.closing(events):
                for event in events:
                    view.show(event)
    except KeyboardInterrupt:
        view.stopped = True
    if not view.stopped:
        return view.finish()
    view.reports.end()
    view.print(f"{view.standing()} To go on, type the same command again.")
    if folder := view.folder_to_finish():
        view.print(f"To make an adapter of it as it stands: personalize finish {shlex.quote(str(folder))}")
    return 130


def terminal() -> Console:
    """Where progress goes: stdout."""
    return Console(highlight=False, soft_wrap=True)


class Speed(ProgressColumn):
    """Steps per second, or seconds per step where that is the larger number."""

    def render(self, task: Task) -> Text:
        return Text(pace(task.speed) if task.speed else "", style="dim")


class View:
    """Lines on a console, and a bar below them where that is a terminal."""

    def __init__(self, console: Console, title: str, detail: str) -> None:
        self.console, self.stopped = console, False
        self.reports = LiveReports(self.print)
        speed = Speed(Column(no_wrap=True))
        columns = (MofNCompleteColumn(), TextColumn(detail), speed, TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(TextColumn(title), BarColumn(), *columns, console=console)

    def __enter__(self) -> View:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def print(self, text: str) -> None:
        """A line, above the bar if there is one. File names and prompts are no markup."""
        self.console.print(plain(text), markup=False)

    def show(self, event: Any) -> None:
        """Show what happened."""
        raise NotImplementedError

    def folder_to_finish(self) -> Path | None:
        """The folder of what was stopped after some steps."""
        raise NotImplementedError

    def standing(self) -> str:
        """How far the training came before it was stopped, as a sentence."""
        raise NotImplementedError

    def finish(self) -> int:
        """Show what the training made; returns the exit code."""
        raise NotImplementedError


def write_reports(folder: Path, base: str) -> Path:
    """Metrics and report of a run folder; returns the report's path."""
    from ..reports.metrics import write_metrics
    from ..reports.run import write_report

    write_metrics(folder, base)
    return write_report(folder)


# ---------------------------------------------------------------- one run


class RunView(View):
    """A single run. `step` is the last one that is done, `settings` the recipe by flat names with every default filled in."""

    def __init__(self, console: Console, recipe: Recipe) -> None:
        super().__init__(console, "training", "loss {task.fields[loss]}")
        self.recipe = recipe
        self.step, self.loss = 0, math.nan
        self.settings: dict[str, Any] = {}
        self.finished: Finished | None = None
        self.sampled = -1  # step of the last sample pictures that were announced
        self.notice = console.status(f"loading {recipe.base} and the pictures")

    def __enter__(self) -> View:
        if self.console.is_terminal:
            self.notice.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.notice.stop()
        if self.bar.tasks:
            self.bar.stop()

    @property
    def folder(self) -> Path:
        return Path(self.settings["output"])

    def show(self, event: Event) -> None:
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
            case Fold():
                best = f"best on it after step {event.step}, validation {error_change(event.validation)}"
                self.print(f"left out {', '.join(event.pictures)} ({event.number} of {event.of}): {best}")
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
                self.finished = event
        if self.settings:
            self.reports.show(self.folder, event)

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
            self.bar.add_task("", total=self.recipe.steps, completed=event.resumed, loss="")
            self.bar.start()

    def _show_step(self, event: Step) -> None:
        self.step = event.step
        if event.skipped:
            self.print(f"step {event.step} skipped: {event.cause}")
            return
        self.loss = event.loss if math.isnan(self.loss) else SMOOTHING * self.loss + (1 - SMOOTHING) * event.loss
        if self.bar.tasks:
            self.bar.update(self.bar.tasks[0].id, completed=event.step, loss=f"{self.loss:.4f}")
        elif event.step % max(1, self.recipe.steps // LINES) == 0:
            self.print(f"step {event.step}/{self.recipe.steps}  loss {self.loss:.4f}  {pace(1 / max(event.seconds, 1e-9))}")

    def _show_choice(self, event: Chosen) -> None:
        """Which checkpoint became the adapter, why, and at which strengths it is good."""
        evidence = f"validation {error_change(event.validation)} on {event.judged_by}, drift {event.drift:.2f}"
        span = f"strengths {event.low:g} to {event.high:g}" if event.low < event.high else f"strength {event.low:g}"
        self.print(f"chosen   step {event.step} of {self.recipe.steps} ({evidence}), {span}")
        if event.fit <= 0:
            self.print("warning: the adapter knows the pictures no better than the base: a lower --lr may help")
        if event.best != event.step:
            self.print(f"         step {event.best} scored best: --choose best takes it, without training again")

    def standing(self) -> str:
        return f"stopped after step {self.step} of {self.recipe.steps}."

    def folder_to_finish(self) -> Path | None:
        return self.folder if self.step else None

    def finish(self) -> int:
        """Where everything is, and what to type next."""
        from ..data.captions import fill
        from ..data.folder import read_folder
        from ..training.preflight import with_defaults

        if self.finished is None:
            return 0
        self.settings = self.settings or flatten(with_defaults(self.recipe, read_folder(self.recipe.data)))
        adapter = self.folder / self.finished.path
        if self.finished.again:
            self.print("this run is already finished: more --steps train on, --fresh starts it over, another --output keeps both")
        else:
            time, memory = duration(self.finished.seconds), readable(self.finished.peak_bytes)
            self.print(f"done     {self.finished.step} steps in {time}, at most {memory} of memory")
        self.print(f"adapter  {adapter}  ({readable(adapter.stat().st_size)})")
        self.print(f"report   {write_reports(self.folder, self.recipe.base)}")
        prompt = fill("a {trigger} {class} in the snow", self.settings["trigger"], self.settings.get("class", ""))
        self.print(f"next     personalize generate {shlex.quote(prompt)} --adapter {shlex.quote(str(adapter))}")
        return 0


def error_change(gain: float) -> str:
    """A share of the base's error that is gone, as its change.

    >>> error_change(0.123), error_change(-0.04)
    ('-12 %', '+4 %')
    """
    return f"{-100 * gain:+.0f} %"


# ---------------------------------------------------------------- many runs


class BatchView(View):
    """Many runs: one bar for all of their steps, a line for each run that ends, and one sheet of pictures."""

    def __init__(self, console: Console, recipes: Sequence[Recipe]) -> None:
        super().__init__(console, "{task.description}", "steps")
        self.recipes = recipes
        self.finished: dict[int, Finished] = {}
        self.failed: dict[int, str] = {}
        self.chosen: dict[int, int] = {}  # the step that became the adapter
        self.warnings: set[str] = set()  # those that were shown
        self.steps = [0] * len(recipes)
        self.task = self.bar.add_task("loading", total=sum(recipe.steps for recipe in recipes))

    def __enter__(self) -> View:
        self.bar.start()
        return self

    def name(self, number: int) -> str:
        """The folder of pictures of a run."""
        return self.recipes[number].data.folder.resolve().name

    def folder(self, number: int) -> Path:
        """The run folder of a run."""
        output = self.recipes[number].output
        assert output
        return output

    @property
    def parent(self) -> Path:
        """Where the run folders lie."""
        return self.folder(0).parent

    def show(self, event: tuple[int, Event]) -> None:
        number, what = event
        match what:
            case Started():
                self.steps[number] = what.resumed
                for warning in what.warnings:
                    self.print(f"{self.name(number)}: warning: {warning}")
            case Step():
                self.steps[number] = what.step
            case Warned() if what.text not in self.warnings:
                self.warnings.add(what.text)
                self.print(f"warning: {what.text}")
            case Chosen():
                self.chosen[number] = what.step
            case Failed():
                self.failed[number], self.steps[number] = what.message, self.recipes[number].steps
                self.print(f"{self.name(number)}: failed: {what.message}")
            case Stopped():
                self.stopped = True
                self.print(f"{self.name(number)}: stopped after step {what.step}")
            case Finished():
                self._show_end(number, what)
        self.reports.show(self.folder(number), what)
        running = sum(0 < done < recipe.steps for done, recipe in zip(self.steps, self.recipes, strict=True))
        self.bar.update(self.task, completed=sum(self.steps), description=f"training {running}" if running else "loading")

    def _show_end(self, number: int, event: Finished) -> None:
        self.finished[number], self.steps[number] = event, self.recipes[number].steps
        adapter = self.folder(number) / event.path
        if event.again:
            self.print(f"{self.name(number)}: done before: {adapter}")
            return
        write_reports(self.folder(number), self.recipes[number].base)
        chosen = f", step {self.chosen[number]} chosen" if number in self.chosen else ""
        facts = f"{adapter} ({readable(adapter.stat().st_size)}), {event.step} steps{chosen}"
        self.print(f"{self.name(number)}: done: {facts}, {duration(event.seconds)} after the start")

    def standing(self) -> str:
        return f"stopped; {len(self.finished)} of {len(self.recipes)} are done."

    def folder_to_finish(self) -> Path | None:
        return self.parent if any(self.steps) else None

    def finish(self) -> int:
        """How many adapters there are, and a sheet of them."""
        failed = f"; {len(self.failed)} failed: {', '.join(map(self.name, self.failed))}" if self.failed else ""
        older = sum(any(self.folder(i).glob("*.safetensors")) for i in range(len(self.recipes)) if i not in self.finished)
        before = f", {older} of them from before" if older else ""
        self.print(f"{len(self.finished) + older} of {len(self.recipes)} adapters are there{before}{failed}")
        if path := self.write_sheet():
            self.print(f"pictures {path}")
        return 2 if self.failed else 0

    def write_sheet(self) -> Path | None:
        """A row per run: a training picture, and the sample pictures of its end. None where no sample was drawn."""
        from PIL import Image

        from ..data.folder import read_folder
        from ..inference.sheet import contact_sheet, enlarge, save_sheet

        cells, rows = list[Image.Image](), list[str]()
        for number, event in sorted(self.finished.items()):
            if not (samples := self.last_samples(number, event)):
                continue
            rows.append(self.name(number))
            learned = read_folder(self.recipes[number].data).examples[0].path
            for path in (learned, *samples, *[samples[-1]] * (SHEET_PROMPTS - len(samples))):
                with Image.open(path) as picture:
                    small = picture.convert("RGB").resize((128, 128), Image.Resampling.LANCZOS)
                cells.append(enlarge(small, 128))
        if not cells:
            return None
        heads = ("learned from", *[""] * SHEET_PROMPTS)
        sheet = contact_sheet(cells, 1 + SHEET_PROMPTS, rows=rows, heads=heads, side=128)
        return save_sheet(sheet, self.parent / "batch.png")

    def last_samples(self, number: int, event: Finished) -> list[Path]:
        """The sample pictures of the step that became the adapter: the first seed of each of the first prompts."""
        from ..training.rundir import Run

        step, first = self.chosen.get(number, event.step), dict[str, Path]()
        for (at, prompt, _), path in Run(self.folder(number), "").samples().items():
            if at == step:
                first.setdefault(prompt, path)
        return list(first.values())[:SHEET_PROMPTS]
