"""Many runs seen from a terminal: one bar for all of their steps, a line for each run that ends, and one sheet of pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..recipe.fields import Recipe
from ..text import duration, plain, readable
from ..training.events import Chosen, Event, Failed, Finished, Started, Step, Warned
from .progress import Speed

SHOWN = 3  # sample prompts on the sheet


def oversee(recipes: Sequence[Recipe], *, fresh: bool, together: int | None) -> int:
    """Train them all, tell how it goes, write a report for each and one sheet. 0, 2 if some failed, 130 after Ctrl-C."""
    view = Overview(Console(highlight=False, soft_wrap=True), recipes)
    try:
        with view.bar:
            from ..training.fleet import train_fleet  # torch and friends take seconds

            events: Any = train_fleet(recipes, fresh=fresh, together=together)
            with contextlib.closing(events):
                for number, event in events:
                    view.tell(number, event)
    except KeyboardInterrupt:
        view.say(f"stopped; {len(view.ended)} of {len(recipes)} are done. To go on, type the same command again.")
        return 130
    return view.farewell()


class Overview:
    """Tells the events of many runs."""

    def __init__(self, console: Console, recipes: Sequence[Recipe]) -> None:
        self.console, self.recipes = console, recipes
        self.ended: dict[int, Finished] = {}
        self.failed: dict[int, str] = {}
        self.chosen: dict[int, int] = {}  # the step that became the adapter
        self.warned: set[str] = set()
        columns = (MofNCompleteColumn(), TextColumn("steps"), Speed(), TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=console)
        self.task = self.bar.add_task("loading", total=sum(recipe.steps for recipe in recipes))
        self.steps = [0] * len(recipes)

    def say(self, text: str) -> None:
        self.console.print(plain(text), markup=False)

    def name(self, number: int) -> str:
        return self.recipes[number].data.folder.resolve().name

    def folder(self, number: int) -> Path:
        output = self.recipes[number].output
        assert output
        return output

    def tell(self, number: int, event: Event) -> None:
        match event:
            case Started():
                self.steps[number] = event.resumed
                for warning in event.warnings:
                    self.say(f"{self.name(number)}: warning: {warning}")
            case Step():
                self.steps[number] = event.step
            case Warned() if event.text not in self.warned:
                self.warned.add(event.text)
                self.say(f"warning: {event.text}")
            case Chosen():
                self.chosen[number] = event.step
            case Failed():
                self.failed[number], self.steps[number] = event.message, self.recipes[number].steps
                self.say(f"{self.name(number)}: failed: {event.message}")
            case Finished():
                self._finished(number, event)
        running = sum(0 < done < recipe.steps for done, recipe in zip(self.steps, self.recipes, strict=True))
        self.bar.update(self.task, completed=sum(self.steps), description=f"training {running}" if running else "loading")

    def _finished(self, number: int, event: Finished) -> None:
        from ..reports.metrics import write_metrics
        from ..reports.run import write_report

        self.ended[number], self.steps[number] = event, self.recipes[number].steps
        adapter = self.folder(number) / event.path
        if event.again:
            self.say(f"{self.name(number)}: done before: {adapter}")
            return
        write_metrics(self.folder(number), self.recipes[number].base)
        write_report(self.folder(number))
        kept = f", step {self.chosen[number]} chosen" if number in self.chosen else ""
        told = f"{adapter} ({readable(adapter.stat().st_size)}), {event.step} steps{kept}"
        self.say(f"{self.name(number)}: done: {told}, {duration(event.seconds)} after the start")

    def farewell(self) -> int:
        """How many there are, and a sheet of them."""
        told = f"{len(self.ended)} of {len(self.recipes)} adapters are there"
        self.say(told + (f"; {len(self.failed)} failed: {', '.join(map(self.name, self.failed))}" if self.failed else ""))
        if path := self.sheet():
            self.say(f"pictures {path}")
        return 2 if self.failed else 0

    def sheet(self) -> Path | None:
        """A row per run: a picture that was learned from, and the sample pictures of its end. None where nothing was drawn."""
        from PIL import Image

        from ..data.folder import read_folder
        from ..inference import sampling as sample

        cells, rows = list[Image.Image](), list[str]()
        for number, event in sorted(self.ended.items()):
            step = self.chosen.get(number, event.step)
            found = sorted((self.folder(number) / "samples").glob(f"{step:06}-p[0-{SHOWN - 1}]-s*.png"))
            first = {path.name.split("-s")[0]: path for path in reversed(found)}  # of each prompt, its first seed
            drawn = [first[name] for name in sorted(first)]
            if drawn:
                learned = read_folder(self.recipes[number].data).examples[0].path
                rows.append(self.name(number))
                for path in (learned, *drawn, *[drawn[-1]] * (SHOWN - len(drawn))):
                    with Image.open(path) as picture:
                        cells.append(sample.enlarged(picture.convert("RGB").resize((128, 128), Image.Resampling.LANCZOS), 128))
        if not cells:
            return None
        sheet = sample.grid(cells, 1 + SHOWN, rows=rows, heads=("learned from", *[""] * SHOWN), side=128)
        return sample.save_sheet(sheet, self.folder(0).parent / "batch.png")
