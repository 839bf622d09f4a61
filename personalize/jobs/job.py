"""A job as a value: what is to be done, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATES = ("queued", "running", "paused", "succeeded", "failed", "cancelled")
ACTIVE = ("queued", "running", "paused")
ENDED = ("succeeded", "failed", "cancelled")
WORDS = {  # what can be told to a job that is running
    "sample": "draw the sample pictures now",
    "save": "save a checkpoint and the state now",
    "stop": "save the state and pause",
    "keep": "stop, and make an adapter of where it stands",
}


@dataclass(frozen=True)
class Job:
    """One job of a workspace, as it was when it was read. Times are seconds since 1970; None: not yet.

    `progress` is {done, total, doing, eta}: eta in seconds, None where it is not known. `error` is {kind, message, hint, log}:
    its log is the end of what the job printed. `result` is what the command's --json answers. `asked` is what a running job was
    asked for and has not done yet: "pause", "cancel" or "keep".
    """

    id: str
    kind: str
    name: str
    settings: dict[str, Any]
    state: str
    priority: int
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] | None = None
    result: dict[str, Any] | None = None
    folder: Path = Path()  # or the file that the job writes
    metadata: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0  # how often it was begun
    asked: str = ""
    needs: str | None = None  # the job that must succeed before
    cwd: Path = Path()  # what relative paths in the settings are relative to
    lane: str | None = None  # where it is running

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to it unless it is queued again."""
        return self.state in ENDED
