"""The rows of jobs inside a transaction: found, changed, brought into another state, and told of as events."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import JobError, NoSuchJobError
from .job import ACTIVE, ENDED, Job
from .kind import Draft
from .workspace import Workspace

Record = dict[str, Any]
WAITING = ("queued", "paused")
# Those that run, those that wait as they will be taken, and the others, the newest first.
ORDER = f"""CASE WHEN state = 'running' THEN 0 WHEN state IN {WAITING} THEN 1 ELSE 2 END,
    CASE WHEN state IN {WAITING} THEN -priority END, CASE WHEN state IN {WAITING} THEN place END, number DESC"""


class Rows:
    """One transaction, or one look, at the jobs of a workspace."""

    def __init__(self, connection: sqlite3.Connection, workspace: Workspace) -> None:
        self.connection, self.workspace = connection, workspace

    def query(self, text: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        """The rows that SQL gives."""
        return self.connection.execute(text, values).fetchall()

    def find(self, id: str) -> sqlite3.Row:
        """The row of a job by its id or the beginning of it. Raises NoSuchJobError."""
        found = self.query("SELECT * FROM jobs WHERE id = ?", (id,))
        if not found and id:
            found = self.query("SELECT * FROM jobs WHERE substr(id, 1, ?) = ?", (len(id), id))
        if len(found) > 1:
            raise NoSuchJobError(f"{len(found)} jobs begin with {id}", "give more of it")
        if not found:
            raise NoSuchJobError(f"there is no job {id!r} in {self.workspace.root}", "personalize jobs lists them")
        return found[0]

    def job(self, row: sqlite3.Row) -> Job:
        """A row as a value."""
        values = {name: row[name] for name in Job.__dataclass_fields__}
        for name in ("settings", "progress", "error", "result", "metadata"):
            values[name] = None if row[name] is None else json.loads(row[name])
        return Job(**{**values, "folder": self.workspace.root / row["folder"], "cwd": Path(row["cwd"])})

    def get(self, id: str) -> Job:
        """A job by its id or the beginning of it. Raises NoSuchJobError."""
        return self.job(self.find(id))

    def page(
        self,
        states: Iterable[str] | None,
        kinds: Iterable[str] | None,
        after: str | None,
        limit: int | None,
        metadata: Mapping[str, Any],
    ) -> list[Job]:
        """Jobs in the order of ORDER, behind another one."""
        wheres, values = ["nth > coalesce((SELECT nth FROM sorted WHERE id = ?), 0)"], [after]
        for column, wanted in (("state", states), ("kind", kinds)):
            if wanted is not None:
                values += (names := list(wanted))
                wheres.append(f"{column} IN ({marks(names)})")
        for key, value in metadata.items():
            values += [key, value]
            wheres.append("EXISTS (SELECT 1 FROM json_each(metadata) WHERE key = ? AND value = ?)")
        text = f"""WITH sorted AS (SELECT *, row_number() OVER (ORDER BY {ORDER}) AS nth FROM jobs)
            SELECT * FROM sorted WHERE {" AND ".join(wheres)} ORDER BY nth LIMIT ?"""
        return [self.job(row) for row in self.query(text, [*values, -1 if limit is None else limit])]

    def next(self, kinds: Sequence[str]) -> sqlite3.Row | None:
        """The job of some kinds that is to be taken next."""
        found = self.query(
            f"""SELECT jobs.* FROM jobs LEFT JOIN jobs AS first ON first.id = jobs.needs
            WHERE jobs.state = 'queued' AND jobs.kind IN ({marks(kinds)}) AND (jobs.needs IS NULL OR first.state = 'succeeded')
            ORDER BY jobs.priority DESC, jobs.place LIMIT 1""",
            tuple(kinds),
        )
        return found[0] if found else None

    def waiting(self) -> list[sqlite3.Row]:
        """The jobs that wait or rest, as they will be taken."""
        return self.query(f"SELECT * FROM jobs WHERE state IN {WAITING} ORDER BY priority DESC, place")

    def last_place(self) -> float:
        """The place behind all others."""
        return float(self.query("SELECT coalesce(max(place), 0) + 1 FROM jobs")[0][0])

    # ------------------------------------------------------------ changes

    def insert(self, kind: str, draft: Draft, **values: Any) -> str:
        """A new job, queued behind the others. Returns its id."""
        id = secrets.token_hex(4)
        values |= {"id": id, "kind": kind, "settings": to_json(draft.settings), "folder": self.reserve(draft, id)}
        values |= {"place": self.last_place(), "cwd": str(Path.cwd()), "created_at": time.time()}
        names = ", ".join(values)
        self.query(f"INSERT INTO jobs ({names}) VALUES ({', '.join(f':{name}' for name in values)})", values)
        self.append(id, [state_record("queued")])
        return id

    def set(self, id: str, **values: Any) -> None:
        """Change columns of a job."""
        if not values:
            return
        pairs = ", ".join(f"{name} = :{name}" for name in values)
        self.query(f"UPDATE jobs SET {pairs} WHERE id = :_id", values | {"_id": id})

    def move_to(self, id: str, state: str, **about: Any) -> None:
        """Bring a job into a state, and tell it as an event; what needed one that did not succeed has failed."""
        self.set(id, state=state, finished_at=time.time() if state in ENDED else None)
        if state != "running":
            self.set(id, lane=None, worker=None)
        self.append(id, [state_record(state, **about)])
        for row in self.query(f"SELECT id FROM jobs WHERE needs = ? AND state IN {WAITING}", (id,)):
            if state in ("failed", "cancelled"):
                message = f"job {id}, which it needs, {'was cancelled' if state == 'cancelled' else 'failed'}"
                self.set(row["id"], error=to_json(error_record("JobError", message, "requeue that one, then this one")))
                self.move_to(row["id"], "failed", error=message)

    def append(self, id: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Events of a job, numbered from 1 without a gap; each says `at` what time it was written, if it does not already."""
        last = self.query("SELECT coalesce(max(number), 0) FROM events WHERE job = ?", (id,))[0][0]
        now = {"at": time.time()}
        rows = [(id, number, to_json(now | dict(record))) for number, record in enumerate(records, last + 1)]
        self.connection.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)

    def need(self, row: sqlite3.Row, states: Sequence[str], what: str) -> None:
        """Raise JobError if a job is in none of these states."""
        if row["state"] not in states:
            hint = f"only jobs that are {' or '.join(states)} can"
            raise JobError(f"job {row['id']} is {row['state']} and cannot {what}", hint)

    def reserve(self, draft: Draft, id: str) -> str:
        """Where a job writes: nobody else's place. Raises JobError for one that another job writes to."""
        folder, number = draft.folder, 2
        while True:
            text = self.workspace.relative(folder)
            others = self.query("SELECT id, state FROM jobs WHERE folder = ? AND id != ?", (text, id))
            if not draft.is_own:
                if busy := [other["id"] for other in others if other["state"] in ACTIVE]:
                    raise JobError(f"job {busy[0]} writes to {folder}", "wait for it, or name another output")
                return text
            if not (others or folder.exists()):
                return text
            folder, number = draft.folder.with_stem(f"{draft.folder.stem}-{number}"), number + 1


def marks(values: Sequence[Any]) -> str:
    """A question mark for each value."""
    return ", ".join("?" * len(values))


def state_record(state: str, **about: Any) -> Record:
    """The event that says in which state a job is."""
    return {"event": "state", "state": state, **about}


def error_record(kind: str, message: str, hint: str = "", log: str = "") -> dict[str, str]:
    """Why a job failed."""
    return {"kind": kind, "message": message, "hint": hint, "log": log}


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
