"""The reports of runs that a terminal follows: renewed while they go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PersonalizeError
from ..training.events import Event

if TYPE_CHECKING:
    from ..reports.run.live import LiveReport


class LiveReports:
    """A report for each run folder; where one cannot be written, its run goes on without, and `warn` is told once."""

    def __init__(self, warn: Callable[[str], None], writes: bool = True) -> None:
        self.warn, self.writes = warn, writes
        self.reports: dict[Path, LiveReport | None] = {}

    def show(self, folder: Path, event: Event) -> None:
        """Keep the report of a run up to date with an event."""
        from ..reports.run.live import LiveReport

        report = self.reports.setdefault(folder, LiveReport(folder) if self.writes else None)
        try:
            if report:
                report.show(event)
        except PersonalizeError as error:
            self.reports[folder] = None
            self.warn(f"warning: no report while the run goes on: {error}")

    def end(self) -> None:
        """Let those that there are say that their runs go on no more."""
        with contextlib.suppress(PersonalizeError):  # told before
            for report in filter(None, self.reports.values()):
                report.end()
