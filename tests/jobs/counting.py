"""Kinds of jobs that need no base: for what is true of every kind, without the seconds that a training takes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalize import registry
from personalize.errors import RecipeError
from personalize.jobs.kind import LONG, QUICK, Draft, Task
from personalize.jobs.workspace import Workspace

PLACES = ("crash_at", "wait_at", "deaf_at", "fail_at", "break_at")


@dataclass(frozen=True)
class Counting:
    """Takes steps, a line of a file each, and goes on behind the last line. At the step of a setting it kills its worker by a
    signal (`crash_at`), waits to be interrupted (`wait_at`) or to be killed (`deaf_at`), or raises an error that is expected
    (`fail_at`) or not (`break_at`).
    """

    lane: str

    def warm(self) -> None:
        pass

    def cool(self) -> None:
        pass

    def draft(self, settings: Mapping[str, Any], workspace: Workspace) -> Draft:
        if unknown := settings.keys() - {"steps", "name", "output", "signal", "pace", *PLACES}:
            raise RecipeError(f"there is no setting {min(unknown)}")
        name = settings.get("name", "count")
        own = "output" not in settings
        return Draft(dict(settings), name, workspace.outputs / name if own else Path(settings["output"]), own)

    def run(self, task: Task) -> dict[str, Any]:
        path, settings = task.folder / "lines", task.job.settings
        task.folder.mkdir(parents=True, exist_ok=True)
        done = len(path.read_text().splitlines()) if path.exists() else 0
        total = settings.get("steps", 3)
        task.report({"event": "started", "resumed": done}, done, total, "counting")
        print("counting from", done, flush=True)
        for step in range(done + 1, total + 1):
            self.step(step, settings, task)
            with path.open("a") as lines:
                lines.write(f"{step} {task.job.id} {task.job.attempts}\n")
            task.report({"event": "step", "step": step}, step, total, "counting")
        return {"lines": str(path), "steps": total}

    def step(self, step: int, settings: Mapping[str, Any], task: Any) -> None:
        time.sleep(settings.get("pace", 0))  # its work
        if step == settings.get("wait_at"):
            threading.Event().wait()
        while step == settings.get("deaf_at"):
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        while step == settings.get("crash_at") and task.written is not task.progress:
            time.sleep(0.01)  # else how often it gets further, as far as anybody knows, depends on how busy the machine is
        if step == settings.get("crash_at"):
            os.kill(os.getpid(), getattr(signal, settings.get("signal", "SIGSEGV")))
        if step == settings.get("fail_at"):
            raise RecipeError("this cannot be counted", "count something else")
        if step == settings.get("break_at"):
            raise ZeroDivisionError("nobody expected this")

    def keep(self, task: Task) -> dict[str, Any]:
        lines = (task.folder / "lines").read_text().splitlines()
        (task.folder / "kept").write_text(str(len(lines)))
        return {"kept": len(lines)}


COUNT, GLANCE = Counting(LONG), Counting(QUICK)


def add_rows() -> None:
    """Into the table of this process."""
    registry.table("jobs").add("count", COUNT)
    registry.table("jobs").add("glance", GLANCE)


@contextlib.contextmanager
def rows() -> Iterator[None]:
    """Inside, these kinds are in the table."""
    add_rows()
    try:
        yield
    finally:
        registry.table("jobs").remove("count")
        registry.table("jobs").remove("glance")
