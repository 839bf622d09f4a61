"""What a kind of job is: how its settings are checked before it is queued, where it writes, and how it runs.

Kinds are rows of `registry.table("jobs")`. Ours are the commands themselves (cli/work.py): a job does what its command does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .job import Job
from .workspace import Workspace

LONG, QUICK = "long", "quick"  # lanes of a device: trainings one after another, and what must not wait for them


@dataclass(frozen=True)
class Draft:
    """A job that was checked and may be queued."""

    settings: dict[str, Any]  # as JSON has them
    name: str
    folder: Path  # where it writes: a folder or a file
    is_own: bool  # whether the name was ours to choose: then it is one that is free


class Task(Protocol):
    """A job that is running, as its kind sees it."""

    job: Job
    folder: Path

    def report(self, record: Mapping[str, Any], done: int = 0, total: int = 0, doing: str = "") -> None:
        """Tell an event of the job, and how far it is."""


class Kind(Protocol):
    """A row of the table `jobs`."""

    lane: str

    def warm(self) -> None:
        """Import and load what every job of the kind needs, while its worker waits for one."""

    def cool(self) -> None:
        """Let go of what is kept between two jobs."""

    def schema(self) -> dict[str, Any]:
        """What the settings may be, as the JSON schema of an object; `format` says which texts are paths."""

    def draft(self, settings: Mapping[str, Any], workspace: Workspace) -> Draft:
        """Check everything that can be checked before a job is queued. Raises PersonalizeError."""

    def run(self, task: Task) -> dict[str, Any]:
        """Do the work to its end, and return what is to be said of it. Raises PersonalizeError, and KeyboardInterrupt where it
        was interrupted and can go on."""

    def keep(self, task: Task) -> dict[str, Any]:
        """Make the best of where an interrupted job stands. Raises PersonalizeError."""
