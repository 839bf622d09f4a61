"""All that is asked of jobs: one object over the workspace's SQLite file, for any thread and any process.

store = Store(Workspace("studio"))
job = store.add("train", {"folder": "photos/rex", "class": "dog"})
store.pause(job.id); store.resume(job.id); store.events(job.id)
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import JobError, NoSuchJobError, nearest
from ..registry import table
from .database import Database
from .job import ENDED, STATES, WORDS, Job
from .kind import Draft, Kind
from .workspace import Workspace

Record = dict[str, Any]
ACTIVE = ("queued", "running", "paused")


class Store:
    """The jobs of a workspace. Every change is one short transaction; raises OutputError where the disk refuses it."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.database = Database(workspace.database)

    # ------------------------------------------------------------ what there is

    def version(self) -> int:
        """A number that grows with every change."""
        with self.database.read() as connection:
            return int(connection.execute("SELECT count FROM changes").fetchone()[0])

    def get(self, id: str) -> Job:
        """A job by its id, or by the first letters of it. Raises NoSuchJobError."""
        with self.database.read() as connection:
            return self._job(self._row(connection, id))

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

        `after` is the id of the last job of the page before; `metadata` are values that all must have.
        """
        for state in states or ():
            if state not in STATES:
                raise JobError(f"no job is ever {state!r}", nearest(state, STATES))
        with self.database.read() as connection:
            rows = connection.execute(f"SELECT * FROM jobs ORDER BY {ORDER}").fetchall()
        jobs = [self._job(row) for row in rows]
        if after is not None:
            ids = [job.id for job in jobs]
            jobs = jobs[ids.index(self.get(after).id) + 1 :]
        found = [
            job
            for job in jobs
            if (states is None or job.state in states)
            and (kinds is None or job.kind in kinds)
            and all(job.metadata.get(key) == value for key, value in (metadata or {}).items())
        ]
        return found[:limit]

    def events(self, id: str, after: int = 0, limit: int | None = None) -> list[tuple[int, Record]]:
        """What happened to a job behind event number `after`, oldest first. Numbers begin at 1 and leave none out."""
        job = self.get(id).id
        query = "SELECT number, record FROM events WHERE job = ? AND number > ? ORDER BY number LIMIT ?"
        with self.database.read() as connection:
            rows = connection.execute(query, (job, after, -1 if limit is None else limit)).fetchall()
        return [(row["number"], json.loads(row["record"])) for row in rows]

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
        needs = self.get(after).id if after else None
        with self.database.write() as connection:
            values = {
                "id": (id := secrets.token_hex(4)),
                "kind": kind,
                "name": name or draft.name,
                "settings": to_json(draft.settings),
                "priority": priority,
                "place": connection.execute("SELECT coalesce(max(place), 0) + 1 FROM jobs").fetchone()[0],
                "needs": needs,
                "folder": self._reserve(connection, draft, id),
                "cwd": str(Path.cwd()),
                "metadata": to_json(dict(metadata or {})),
                "created_at": time.time(),
            }
            names = ", ".join(values)
            marks = ", ".join(f":{key}" for key in values)
            connection.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", values)
            self._tell(connection, id, [state_record("queued")])
            return self._job(self._row(connection, id))

    def edit(
        self, id: str, *, settings: Mapping[str, Any] | None = None, priority: int | None = None, name: str | None = None
    ) -> Job:
        """Change a job that has not begun: all its settings, its priority or its name. A paused one keeps its folder.

        Raises JobError where it is running or over, and what `add` raises.
        """
        job = self.get(id)
        draft = kind_of(job.kind).draft(settings, self.workspace) if settings is not None else None
        with self.database.write() as connection:
            row = self._row(connection, job.id)
            self._need(row, ("queued", "paused"), "be edited")
            if draft:
                folder = row["folder"] if draft.is_own else self._reserve(connection, draft, job.id)
                self._set(connection, job.id, settings=to_json(draft.settings), folder=folder)
            if priority is not None:
                self._set(connection, job.id, priority=priority)
            if name is not None:
                self._set(connection, job.id, name=name)
            return self._job(self._row(connection, job.id))

    def move(self, id: str, before: str | None = None) -> Job:
        """Let a job that waits be taken before another one, or with None after all others of its priority."""
        with self.database.write() as connection:
            row = self._row(connection, id)
            self._need(row, ("queued", "paused"), "be moved")
            if before is None:
                place = connection.execute("SELECT max(place) + 1 FROM jobs").fetchone()[0]
                self._set(connection, row["id"], place=place)
            elif (other := self._row(connection, before))["id"] != row["id"]:
                self._need(other, ("queued", "paused"), "have others before it")
                query = "SELECT max(place) FROM jobs WHERE place < ? AND id != ?"
                previous = connection.execute(query, (other["place"], row["id"])).fetchone()[0]
                place = (other["place"] + (other["place"] - 2 if previous is None else previous)) / 2
                self._set(connection, row["id"], place=place, priority=other["priority"])
            return self._job(self._row(connection, row["id"]))

    def pause(self, id: str) -> Job:
        """Let a job rest: one that waits at once, one that is running as soon as its state is saved."""
        return self._ask(id, "pause", "paused", ("queued", "running", "paused"))

    def cancel(self, id: str) -> Job:
        """End a job, at once or as soon as it has stopped; what it wrote stays, and `requeue` goes on with it."""
        return self._ask(id, "cancel", "cancelled", ACTIVE)

    def resume(self, id: str) -> Job:
        """Queue a paused job again, or take back that a running one is to pause."""
        with self.database.write() as connection:
            row = self._row(connection, id)
            if row["state"] == "running" and row["asked"] == "pause":
                self._set(connection, row["id"], asked="")
            elif row["state"] != "queued":
                self._need(row, ("paused",), "be resumed")
                self._move_to(connection, row["id"], "queued")
            return self._job(self._row(connection, row["id"]))

    def requeue(self, id: str) -> Job:
        """Queue a job that is over once more, behind the others: a training goes on where it stands."""
        with self.database.write() as connection:
            row = self._row(connection, id)
            self._need(row, ENDED, "be queued again")
            place = connection.execute("SELECT max(place) + 1 FROM jobs").fetchone()[0]
            fresh = {"error": None, "result": None, "finished_at": None, "progress": "{}", "asked": "", "words": ""}
            self._set(connection, row["id"], place=place, losses=0, faults=0, furthest=-1, **fresh)
            self._move_to(connection, row["id"], "queued")
            return self._job(self._row(connection, row["id"]))

    def tell(self, id: str, word: str) -> Job:
        """A word to a job that is running: sample, save, stop or keep. Raises JobError where it cannot do that."""
        if word not in WORDS:
            raise JobError(f"a job does not understand {word!r}", nearest(word, WORDS))
        if word == "stop":
            return self.pause(id)
        with self.database.write() as connection:
            row = self._row(connection, id)
            if row["kind"] not in ("train", "batch"):
                raise JobError(f"{row['kind']} jobs cannot {word}", "cancel ends one")
            if word == "keep":
                return self._keep(connection, row)
            self._need(row, ("running",), word)
            self._set(connection, row["id"], words=" ".join([*row["words"].split(), word]))
            return self._job(self._row(connection, row["id"]))

    def _keep(self, connection: sqlite3.Connection, row: sqlite3.Row) -> Job:
        """Let a training that is running or paused make an adapter of where it stands."""
        self._need(row, ("running", "paused"), "be stopped and kept")
        if not json.loads(row["progress"]).get("done"):
            raise JobError(f"job {row['id']} has taken no step yet, there is nothing to keep", "cancel ends it")
        self._set(connection, row["id"], asked="keep")
        if row["state"] == "paused":
            self._move_to(connection, row["id"], "queued")
        return self._job(self._row(connection, row["id"]))

    def _ask(self, id: str, what: str, state: str, allowed: Sequence[str]) -> Job:
        with self.database.write() as connection:
            row = self._row(connection, id)
            if row["state"] != state:
                self._need(row, allowed, f"be {state}")
                if row["state"] == "running":
                    self._set(connection, row["id"], asked=what)
                else:
                    self._move_to(connection, row["id"], state)
            return self._job(self._row(connection, row["id"]))

    # ------------------------------------------------------------ what workers and the engine do

    def waiting(self, kinds: Sequence[str]) -> bool:
        """Whether a job of some kinds can be taken."""
        with self.database.read() as connection:
            return self._next(connection, kinds) is not None

    def claim(self, kinds: Sequence[str], lane: str, worker: str) -> Job | None:
        """The next job of some kinds, which is this worker's now; None where none can be taken."""
        if not self.waiting(kinds):
            return None
        with self.database.write() as connection:
            if (row := self._next(connection, kinds)) is None:
                return None
            begun = {"started_at": row["started_at"] or time.time(), "attempts": row["attempts"] + 1, "error": None}
            self._set(connection, row["id"], lane=lane, worker=worker, words="", **begun)
            self._move_to(connection, row["id"], "running", attempt=row["attempts"] + 1)
            return self._job(self._row(connection, row["id"]))

    def wishes(self, id: str) -> tuple[str, list[str]]:
        """What a running job was asked for, and the words that it was told."""
        with self.database.read() as connection:
            row = self._row(connection, id)
            return row["asked"], row["words"].split()

    def take_word(self, id: str, word: str) -> None:
        """A word has reached the run."""
        with self.database.write() as connection:
            words = self._row(connection, id)["words"].split()
            if word in words:
                words.remove(word)
            self._set(connection, id, words=" ".join(words))

    def record(self, id: str, worker: str, records: Sequence[Mapping[str, Any]], progress: Mapping[str, Any]) -> bool:
        """Append events, and say how far the job is; False where it is not this worker's any more."""
        with self.database.write() as connection:
            row = self._row(connection, id)
            if row["worker"] != worker:
                return False
            self._tell(connection, id, records)
            self._set(connection, id, progress=to_json(progress))
            return True

    def end(
        self, id: str, worker: str, state: str, *, result: Mapping[str, Any] | None = None, error: Mapping[str, str] | None = None
    ) -> bool:
        """What became of a job; False where it is not this worker's any more."""
        with self.database.write() as connection:
            row = self._row(connection, id)
            if row["worker"] != worker or row["state"] != "running":
                return False
            asked = row["asked"] if state == "queued" else ""
            values = {"result": to_json(result) if result else None, "error": to_json(error) if error else None}
            self._set(connection, id, asked=asked, words="", **values)
            self._move_to(connection, id, state, **({"error": error["message"]} if error else {}))
            return True

    def running(self, lane: str) -> list[tuple[Job, str]]:
        """The jobs that run in a lane, each with its worker."""
        with self.database.read() as connection:
            rows = connection.execute("SELECT * FROM jobs WHERE state = 'running' AND lane = ?", (lane,)).fetchall()
        return [(self._job(row), row["worker"]) for row in rows]

    def lose(self, id: str, worker: str, cause: str, *, fault: bool) -> str:
        """A worker died with this job: queue it again in its place, or let it fail if it killed too many. Returns the new state.

        A `fault` is the job's own (it crashed, or took all memory), and no more than FAULTS of them in a row are borne without
        any progress between them; a worker that somebody killed says little about its job.
        """
        with self.database.write() as connection:
            row = self._row(connection, id)
            if row["worker"] != worker or row["state"] != "running":
                return str(row["state"])
            done = int(json.loads(row["progress"]).get("done") or 0)
            further = done > row["furthest"]
            faults, losses = (0 if further else row["faults"]) + fault, (0 if further else row["losses"]) + 1
            self._set(connection, id, faults=faults, losses=losses, furthest=max(done, row["furthest"]))
            if row["asked"] in ("pause", "cancel"):
                state = {"pause": "paused", "cancel": "cancelled"}[row["asked"]]
                self._set(connection, id, asked="")
                self._move_to(connection, id, state, lost=cause)
            elif faults >= FAULTS or losses >= LOSSES:
                state, often = "failed", max(faults, losses if losses >= LOSSES else 0)
                message = f"{cause}, {often} times in a row at the same point: it was not tried again"
                log = log_tail(self.workspace.log(id))
                error = {"kind": "WorkerLost", "message": message, "hint": "requeue tries again", "log": log}
                self._set(connection, id, error=to_json(error), asked="")
                self._move_to(connection, id, "failed", error=message)
            else:
                state = "queued"
                self._move_to(connection, id, "queued", lost=cause)
            return state

    # ------------------------------------------------------------ inside a transaction

    def _row(self, connection: sqlite3.Connection, id: str) -> sqlite3.Row:
        """The row of a job by its id or the beginning of it. Raises NoSuchJobError."""
        rows = connection.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchall()
        if not rows and id:
            rows = connection.execute("SELECT * FROM jobs WHERE substr(id, 1, ?) = ?", (len(id), id)).fetchall()
        if len(rows) > 1:
            raise NoSuchJobError(f"{len(rows)} jobs begin with {id}", "give more of it")
        if not rows:
            raise NoSuchJobError(f"there is no job {id!r} in {self.workspace.root}", "personalize jobs lists them")
        row: sqlite3.Row = rows[0]
        return row

    def _job(self, row: sqlite3.Row) -> Job:
        values = {key: row[key] for key in row.keys() if key in Job.__dataclass_fields__}  # noqa: SIM118  # a row's keys are a method
        for key in ("settings", "progress", "error", "result", "metadata"):
            values[key] = None if row[key] is None else json.loads(row[key])
        return Job(**{**values, "folder": self.workspace.root / row["folder"], "cwd": Path(row["cwd"])})

    def _next(self, connection: sqlite3.Connection, kinds: Sequence[str]) -> sqlite3.Row | None:
        marks = ", ".join("?" * len(kinds))
        query = f"""SELECT jobs.* FROM jobs LEFT JOIN jobs AS first ON first.id = jobs.needs
            WHERE jobs.state = 'queued' AND jobs.kind IN ({marks}) AND (jobs.needs IS NULL OR first.state = 'succeeded')
            ORDER BY jobs.priority DESC, jobs.place LIMIT 1"""
        row: sqlite3.Row | None = connection.execute(query, tuple(kinds)).fetchone()
        return row

    def _set(self, connection: sqlite3.Connection, id: str, **values: Any) -> None:
        pairs = ", ".join(f"{key} = :{key}" for key in values)
        connection.execute(f"UPDATE jobs SET {pairs} WHERE id = :_id", values | {"_id": id})

    def _move_to(self, connection: sqlite3.Connection, id: str, state: str, **about: Any) -> None:
        """Bring a job into a state, and tell it as an event; what needed one that did not succeed has failed."""
        self._set(connection, id, state=state, **({} if state == "running" else {"lane": None, "worker": None}))
        self._set(connection, id, finished_at=time.time() if state in ENDED else None)
        self._tell(connection, id, [state_record(state, **about)])
        if state in ("failed", "cancelled"):
            needy = connection.execute("SELECT id FROM jobs WHERE needs = ? AND state IN ('queued', 'paused')", (id,)).fetchall()
            for row in needy:
                message = f"job {id}, which it needs, {'was cancelled' if state == 'cancelled' else 'failed'}"
                error = {"kind": "JobError", "message": message, "hint": "requeue that one first, then this one", "log": ""}
                self._set(connection, row["id"], error=to_json(error))
                self._move_to(connection, row["id"], "failed", error=message)

    def _tell(self, connection: sqlite3.Connection, id: str, records: Sequence[Mapping[str, Any]]) -> None:
        query = "SELECT coalesce(max(number), 0) FROM events WHERE job = ?"
        last = connection.execute(query, (id,)).fetchone()[0]
        now = {"at": time.time()}
        rows = [(id, number, to_json(now | dict(record))) for number, record in enumerate(records, last + 1)]
        connection.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)

    def _need(self, row: sqlite3.Row, states: Sequence[str], what: str) -> None:
        if row["state"] not in states:
            hint = f"only jobs that are {' or '.join(states)} can"
            raise JobError(f"job {row['id']} is {row['state']} and cannot {what}", hint)

    def _reserve(self, connection: sqlite3.Connection, draft: Draft, id: str) -> str:
        """Where a job writes: nobody else's place. Raises JobError for one that another job writes to."""
        folder, number = draft.folder, 2
        while True:
            text = self.workspace.relative(folder)
            states = "" if draft.is_own else f" AND state IN {ACTIVE}"
            other = connection.execute(f"SELECT id FROM jobs WHERE folder = ? AND id != ?{states}", (text, id)).fetchone()
            if not draft.is_own and other:
                raise JobError(f"job {other['id']} writes to {folder}", "wait for it, or name another output")
            if not draft.is_own or not (other or folder.exists()):
                return text
            folder, number = draft.folder.with_stem(f"{draft.folder.stem}-{number}"), number + 1


FAULTS = 3  # crashes of a job in a row, without any progress, that end it
LOSSES = 100  # the same for workers that were killed from outside
ORDER = """CASE state WHEN 'running' THEN 0 WHEN 'queued' THEN 1 WHEN 'paused' THEN 1 ELSE 2 END,
    CASE WHEN state IN ('queued', 'paused') THEN -priority END, CASE WHEN state IN ('queued', 'paused') THEN place END, number DESC"""


def kind_of(name: str) -> Kind:
    """A kind of jobs by its name. Raises RecipeError for one that there is not."""
    row: Kind = table("jobs")[name]
    return row


def state_record(state: str, **about: Any) -> Record:
    """The event that says in which state a job is."""
    return {"event": "state", "state": state, **about}


def to_json(value: Any) -> str:
    """Strict JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)


def log_tail(path: Path, letters: int = 4000) -> str:
    """The end of a log; "" where there is none."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - letters))
            return log.read().decode(errors="replace")
    except OSError:
        return ""
