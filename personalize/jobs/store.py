"""All that people ask of jobs: one object over the workspace's SQLite file, for any thread and any process.

store = Store(Workspace("studio"))
job = store.add("train", {"folder": "photos/rex", "class": "dog"})
store.pause(job.id); store.resume(job.id); store.events(job.id)
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import JobError, nearest
from ..registry import table
from .database import Database
from .job import ACTIVE, ENDED, STATES, WORDS, Job
from .kind import Kind
from .leases import Leases
from .rows import WAITING, Record, Rows, log_tail, to_json
from .workspace import Workspace


class Store:
    """The jobs of a workspace. Every change is one short transaction. Raises OutputError where the disk refuses it, or is of
    another version; a job is named by its id or the first letters of it, and NoSuchJobError raised where there is none."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.database = Database(workspace)
        self.leases = Leases(self.database)

    # ------------------------------------------------------------ what there is

    def version(self) -> int:
        """A number that grows with every change."""
        with self.database.read() as rows:
            return int(rows.query("SELECT count FROM changes")[0][0])

    def get(self, id: str) -> Job:
        """A job."""
        with self.database.read() as rows:
            return rows.get(id)

    def list(
        self,
        *,
        states: Iterable[str] | None = None,
        kinds: Iterable[str] | None = None,
        after: str | None = None,
        limit: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[Job]:
        """Jobs: those that run, then those that wait, as they will be taken, then the others, the newest first.

        `after` is the last job of the page before; `metadata` are values that all must have. Raises JobError for a state that
        there is not.
        """
        states = None if states is None else tuple(states)
        for state in states or ():
            if state not in STATES:
                raise JobError(f"no job is ever {state!r}", nearest(state, STATES))
        with self.database.read() as rows:
            return rows.page(states, kinds, after and rows.get(after).id, limit, metadata or {})

    def events(self, id: str, after: int = 0, limit: int | None = None) -> builtins.list[tuple[int, Record]]:
        """What happened to a job behind event number `after`, oldest first. Numbers begin at 1 and leave none out."""
        text = "SELECT number, record FROM events WHERE job = ? AND number > ? ORDER BY number LIMIT ?"
        with self.database.read() as rows:
            found = rows.query(text, (rows.get(id).id, after, -1 if limit is None else limit))
        return [(row["number"], json.loads(row["record"])) for row in found]

    def log(self, id: str, letters: int = 4000) -> str:
        """The end of what a job printed."""
        return log_tail(self.workspace.log(self.get(id).id), letters)

    # ------------------------------------------------------------ what can be asked for

    def add(
        self,
        kind: str,
        settings: Mapping[str, Any],
        *,
        name: str = "",
        priority: int = 0,
        after: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Job:
        """Queue a job, `after` another one has succeeded where that is given.

        Raises RecipeError, DataError, AdapterError, ... for settings that cannot be done, before anything is queued.
        """
        draft = kind_of(kind).draft(settings, self.workspace)
        values = {"name": name or draft.name, "priority": priority, "metadata": to_json(dict(metadata or {}))}
        with self.database.write() as rows:
            needs = rows.get(after) if after else None
            if needs and needs.state in ("failed", "cancelled"):
                raise JobError(f"job {needs.id} is {needs.state}, and nothing comes after it", "requeue it first")
            return rows.get(rows.insert(kind, draft, needs=needs and needs.id, **values))

    def edit(
        self, id: str, *, settings: Mapping[str, Any] | None = None, priority: int | None = None, name: str | None = None
    ) -> Job:
        """Change a job that is queued or paused: all its settings, its priority or its name.

        Raises JobError where it is running or over, and what `add` raises.
        """
        job = self.get(id)
        draft = kind_of(job.kind).draft(settings, self.workspace) if settings is not None else None
        with self.database.write() as rows:
            row = rows.find(job.id)
            rows.need(row, WAITING, "be edited")
            if draft:
                folder = row["folder"] if draft.is_own else rows.reserve(draft, job.id)
                rows.set(job.id, settings=to_json(draft.settings), folder=folder)
            changes = {"priority": priority, "name": name}
            rows.set(job.id, **{key: value for key, value in changes.items() if value is not None})
            return rows.get(job.id)

    def move(self, id: str, before: str | None = None) -> Job:
        """Let a job that waits be taken before another one, whose priority it gets; or with None behind all of its priority."""
        with self.database.write() as rows:
            row = rows.find(id)
            rows.need(row, WAITING, "be moved")
            if before is None:
                rows.set(row["id"], place=rows.last_place())
            elif (other := rows.find(before))["id"] != row["id"]:
                rows.need(other, WAITING, "have others before it")
                order = [one["id"] for one in rows.waiting() if one["id"] != row["id"]]
                order.insert(order.index(other["id"]), row["id"])
                rows.set(row["id"], priority=other["priority"])
                for place, one in enumerate(order):
                    rows.set(one, place=place)
            return rows.get(row["id"])

    def pause(self, id: str) -> Job:
        """Let a job rest: one that waits at once, one that is running as soon as its state is saved."""
        return self._ask(id, "pause", "paused")

    def cancel(self, id: str) -> Job:
        """End a job, at once or as soon as it has stopped; what it wrote stays, and `requeue` goes on with it."""
        return self._ask(id, "cancel", "cancelled")

    def resume(self, id: str) -> Job:
        """Queue a paused job again, or take back that a running one is to pause."""
        with self.database.write() as rows:
            row = rows.find(id)
            if row["state"] == "running" and row["asked"] == "pause":
                rows.set(row["id"], asked="")
            elif row["state"] != "queued":
                rows.need(row, ("paused",), "be resumed")
                rows.move_to(row["id"], "queued")
            return rows.get(row["id"])

    def requeue(self, id: str) -> Job:
        """Queue a job that is over once more, behind the others: a training goes on where it stands."""
        with self.database.write() as rows:
            row = rows.find(id)
            rows.need(row, ENDED, "be queued again")
            fresh = {"error": None, "result": None, "asked": "", "words": "", "losses": 0, "faults": 0, "furthest": -1}
            rows.set(row["id"], place=rows.last_place(), **fresh)
            rows.move_to(row["id"], "queued")
            return rows.get(row["id"])

    def tell(self, id: str, word: str) -> Job:
        """A word to a job: sample, save, stop or keep. Raises JobError for one that is none, and where it cannot be done."""
        if word not in WORDS:
            raise JobError(f"a job does not understand {word!r}", nearest(word, WORDS))
        if word == "stop":
            return self.pause(id)
        with self.database.write() as rows:
            row = rows.find(id)
            if row["kind"] not in ("train", "batch"):
                raise JobError(f"a job that does {row['kind']} cannot {word}", "personalize jobs cancel ends it")
            if word == "keep":
                return self._keep(rows, row["id"])
            rows.need(row, ("running",), word)
            if word not in row["words"].split():
                rows.set(row["id"], words=f"{row['words']} {word}".strip())
            return rows.get(row["id"])

    def _keep(self, rows: Rows, id: str) -> Job:
        """Let a training that is running or paused make an adapter of where it stands."""
        job = rows.get(id)
        rows.need(rows.find(id), ("running", "paused"), "be stopped and kept")
        if not job.progress.get("done"):
            raise JobError(f"job {id} has taken no step yet: there is nothing to keep", "personalize jobs cancel ends it")
        rows.set(id, asked="keep")
        if job.state == "paused":
            rows.move_to(id, "queued")
        return rows.get(id)

    def _ask(self, id: str, what: str, state: str) -> Job:
        """Bring a job into a state: at once, or by asking its worker. Nothing happens to one that is in it."""
        with self.database.write() as rows:
            row = rows.find(id)
            if row["state"] != state:
                rows.need(row, ACTIVE, f"be {state}")
                if row["state"] == "running":
                    rows.set(row["id"], asked=what)
                else:
                    rows.set(row["id"], asked="")
                    rows.move_to(row["id"], state)
            return rows.get(row["id"])


def kind_of(name: str) -> Kind:
    """A kind of jobs by its name. Raises RecipeError for one that there is not."""
    row: Kind = table("jobs")[name]
    return row


def kinds_of(lane: str) -> Sequence[str]:
    """The kinds of jobs that a lane takes: `cpu/quick`."""
    sort = lane.rpartition("/")[2]
    return [name for name, row in table("jobs").items() if row.lane == sort]
