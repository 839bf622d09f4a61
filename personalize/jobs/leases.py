"""What workers and the engine do with jobs: take one, tell how it goes, end it; and what becomes of one whose worker died.

A job is its worker's for as long as its row says so. Nothing here looks at a clock: that a worker is dead is known from the lock
that it held, or from its process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .database import Database
from .job import Job
from .rows import Rows, error_record, log_tail, to_json

FAULTS = 3  # crashes of a job in a row, without any progress between them, that end it
LOSSES = 100  # the same for workers that were killed from outside, which says little about their jobs


class Leases:
    """The jobs of a workspace, as those see them who run them. Raises OutputError where the disk refuses."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def waiting(self, kinds: Sequence[str]) -> bool:
        """Whether a job of some kinds can be taken."""
        with self.database.read() as rows:
            return rows.next(kinds) is not None

    def claim(self, kinds: Sequence[str], lane: str, worker: str) -> Job | None:
        """The next job of some kinds, which is this worker's now; None where none can be taken."""
        if not self.waiting(kinds):
            return None
        with self.database.write() as rows:
            if (row := rows.next(kinds)) is None:
                return None
            id, attempt = row["id"], row["attempts"] + 1
            begun = row["started_at"] or time.time()
            rows.set(id, lane=lane, worker=worker, attempts=attempt, started_at=begun, words="", error=None)
            rows.move_to(id, "running", attempt=attempt)
            return rows.get(id)

    def running(self, lane: str) -> list[tuple[Job, str]]:
        """The jobs that run in a lane, each with its worker."""
        with self.database.read() as rows:
            found = rows.query("SELECT * FROM jobs WHERE state = 'running' AND lane = ?", (lane,))
            return [(rows.job(row), row["worker"]) for row in found]

    def wishes(self, id: str) -> tuple[str, list[str]]:
        """What a running job was asked for, and the words that it was told."""
        with self.database.read() as rows:
            row = rows.find(id)
            return row["asked"], row["words"].split()

    def take_word(self, id: str, word: str) -> None:
        """A word has reached the run."""
        with self.database.write() as rows:
            left = [one for one in rows.find(id)["words"].split() if one != word]
            rows.set(id, words=" ".join(left))

    def record(self, id: str, worker: str, records: Sequence[Mapping[str, Any]], progress: Mapping[str, Any]) -> bool:
        """Append events, and say how far the job is; False where it is not this worker's any more."""
        with self.database.write() as rows:
            if rows.find(id)["worker"] != worker:
                return False
            rows.append(id, records)
            rows.set(id, progress=to_json(progress))
            return True

    def end(
        self, id: str, worker: str, state: str, *, result: Mapping[str, Any] | None = None, error: Mapping[str, str] | None = None
    ) -> bool:
        """What became of a job; False where it is not this worker's any more."""
        with self.database.write() as rows:
            row = rows.find(id)
            if row["worker"] != worker:
                return False
            asked = row["asked"] if state == "queued" else ""  # what could not be done before the program ended is done later
            if state == "queued" and asked in AT_LAST:
                state, asked = AT_LAST[asked], ""
            values = {"result": None if result is None else to_json(result), "error": None if error is None else to_json(error)}
            rows.set(id, asked=asked, words="", **values)
            rows.move_to(id, state, **({"error": error["message"]} if error else {}))
            return True

    def lose(self, id: str, worker: str, cause: str, *, fault: bool) -> str:
        """A worker died with this job: queue it again in its place, or let it fail if it kills its workers. Returns its state.

        A `fault` is the job's own: it crashed, or took all memory.
        """
        with self.database.write() as rows:
            row = rows.find(id)
            if row["worker"] != worker:
                return str(row["state"])
            done = int(json.loads(row["progress"]).get("done") or 0)
            further = done > row["furthest"]
            faults, losses = (0 if further else row["faults"]) + fault, (0 if further else row["losses"]) + 1
            rows.set(id, faults=faults, losses=losses, furthest=max(done, row["furthest"]))
            if row["asked"] in AT_LAST:
                state = AT_LAST[row["asked"]]
                rows.set(id, asked="")
                rows.move_to(id, state, lost=cause)
                return state
            if faults >= FAULTS or losses >= LOSSES:
                return self._give_up(rows, id, f"{cause}, {max(faults, losses)} times in a row without getting any further")
            rows.move_to(id, "queued", lost=cause)
            return "queued"

    def _give_up(self, rows: Rows, id: str, message: str) -> str:
        log = log_tail(rows.workspace.log(id))
        rows.set(id, asked="", error=to_json(error_record("WorkerLost", message, "personalize jobs requeue tries again", log)))
        rows.move_to(id, "failed", error=message)
        return "failed"


AT_LAST = {"pause": "paused", "cancel": "cancelled"}  # what a job is that was asked for this and does not run any more
