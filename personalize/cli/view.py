"""What a long command shows while it works: lines, a bar where there is a terminal, and else a sign of life now and then."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from ..text import command_line, duration, pace, plain
from ..training.events import event_record
from .listening import report
from .live import LiveReports
from .messages import LINE, answer

SILENCE = 25.0  # seconds after which a log without a terminal gets a line


def follow(view: View, start: Callable[[], Iterator[Any]]) -> int:
    """Show all events of a training in a view, and how it ended; returns the exit code."""
    try:
        with view:
            events: Any = start()
            with contextlib.closing(events):
                for event in events:
                    view.show(event)
                    number, one = event if isinstance(event, tuple) else (None, event)
                    record = event_record(one) if number is None else {"number": number} | event_record(one)
                    report(record, *view.progress(), view.doing)
    except KeyboardInterrupt:
        view.stopped = True
    if not view.stopped:
        return view.finish()
    view.reports.end()
    view.print(f"{view.standing()} To go on, type the same command again.")
    if folders := view.folders_to_finish():
        command = command_line("personalize", "finish", *folders)
        view.print(f"To make an adapter of it as it stands: {command}")
        answer(finish=command)
    return 130


def terminal() -> Console:
    """Where progress goes: stdout."""
    return Console(highlight=False, soft_wrap=True)


class Speed(ProgressColumn):
    """Steps per second, or seconds per step where that is the larger number."""

    def render(self, task: Task) -> Text:
        return Text(pace(task.speed) if task.speed else "", style="dim")


class View:
    """Lines on a console, and a bar below them where that is a terminal. `doing` is what takes its time now."""

    def __init__(self, console: Console, detail: str, doing: str, writes: bool = True) -> None:
        self.console, self.doing, self.began = console, doing, time.monotonic()
        self.stopped = False  # before its end, by Ctrl-C or because somebody asked
        self.reports = LiveReports(self.print, writes)  # who only looks on writes none
        columns = (
            MofNCompleteColumn(),
            TextColumn(detail),
            Speed(Column(no_wrap=True)),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), *columns, console=console)
        self.spoke = time.monotonic()
        self.over = threading.Event()
        self.pulse = threading.Thread(target=self._give_signs, daemon=True)

    def __enter__(self) -> View:
        if not self.console.is_terminal:
            self.pulse.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()
        if self.pulse.is_alive():
            self.pulse.join()
        if self.bar.live.is_started:
            self.bar.stop()

    def print(self, text: str) -> None:
        """A line, above the bar if there is one. File names and prompts are no markup."""
        self.spoke = time.monotonic()
        self.console.print(plain(text, LINE), markup=False)

    def begin(self, doing: str) -> None:
        """Say in the bar what takes its time from now on."""
        self.doing = doing
        for task in self.bar.tasks:
            self.bar.update(task.id, description=doing)

    def show(self, event: Any) -> None:
        """Show what happened."""
        raise NotImplementedError

    def progress(self) -> tuple[int, int]:
        """Steps that are done, and of how many."""
        raise NotImplementedError

    def folders_to_finish(self) -> list[Path]:
        """The folders of what was stopped after some steps."""
        raise NotImplementedError

    def standing(self) -> str:
        """How far the training came before it was stopped, as a sentence."""
        raise NotImplementedError

    def finish(self) -> int:
        """Show what the training made; returns the exit code."""
        raise NotImplementedError

    def _give_signs(self) -> None:
        """Print what is being done, whenever nothing was said for a while."""
        while not self.over.wait(max(0.01, self.spoke + SILENCE - time.monotonic())):
            if time.monotonic() - self.spoke >= SILENCE:
                self.print(f"... {self.doing} ({duration(time.monotonic() - self.began)} since the start)")
