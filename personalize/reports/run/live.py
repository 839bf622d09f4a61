"""The report of a run that goes on: there from its first sample pictures on, and written anew after each further ones."""

from __future__ import annotations

import time
from pathlib import Path

from ...training.events import Event, Failed, Finished, Sample, Saved, Stopped
from . import write_report

SHARE = 0.05  # of the run's time that its report may take, at most


class LiveReport:
    """Keeps `report.html` of a run folder up to date with the run's events."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stale = False  # something is there that the page does not show
        self.spared = 0.0  # seconds until the page may be written again

    def show(self, event: Event) -> None:
        """Write the report if an event before this one has something to show. Raises OutputError where it cannot be written."""
        if isinstance(event, Sample | Saved):
            self.stale = self.stale or isinstance(event, Sample) or (self.folder / "report.html").is_file()
        elif isinstance(event, Finished):
            self.stale = False  # its own report has more to say
        elif isinstance(event, Failed | Stopped):
            self.end()
        elif self.stale and (began := time.monotonic()) >= self.spared:
            write_report(self.folder, live=True)
            now = time.monotonic()
            self.stale, self.spared = False, now + (now - began) / SHARE

    def end(self) -> None:
        """The run goes on no more: say so on the page that there is."""
        self.stale = False
        if (self.folder / "report.html").is_file():
            write_report(self.folder)
