"""The SQLite file of a workspace: its schema, connections by thread and process, short transactions, errors as one line."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator

from ..errors import OutputError
from .rows import Rows
from .workspace import Workspace

VERSION = 1  # of the schema: PRAGMA user_version
PATIENCE = 30.0  # seconds that a transaction waits for another one

SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    settings TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    priority INTEGER NOT NULL DEFAULT 0,
    place REAL NOT NULL,
    needs TEXT,
    folder TEXT NOT NULL,
    cwd TEXT NOT NULL,
    metadata TEXT NOT NULL DEFAULT '{}',
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    progress TEXT NOT NULL DEFAULT '{}',
    error TEXT,
    result TEXT,
    asked TEXT NOT NULL DEFAULT '',
    words TEXT NOT NULL DEFAULT '',
    attempts INTEGER NOT NULL DEFAULT 0,
    losses INTEGER NOT NULL DEFAULT 0,
    faults INTEGER NOT NULL DEFAULT 0,
    furthest INTEGER NOT NULL DEFAULT -1,
    lane TEXT,
    worker TEXT
);
CREATE INDEX queue ON jobs (state, priority DESC, place);
CREATE TABLE events (
    job TEXT NOT NULL REFERENCES jobs (id),
    number INTEGER NOT NULL,
    record TEXT NOT NULL,
    PRIMARY KEY (job, number)
) WITHOUT ROWID;
CREATE TABLE changes (count INTEGER NOT NULL);
INSERT INTO changes VALUES (0);
"""


class Database:
    """Transactions on one file, from any thread and process. Raises OutputError for a disk that refuses and another version."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.path = workspace, workspace.database
        self._own = threading.local()
        with self._as_one_line():
            self._create()

    def _create(self) -> None:
        """Make the tables where there are none. Two that come at once make them once."""
        connection = self._connection()
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in filter(str.strip, SCHEMA.split(";\n")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
        if version not in (0, VERSION):
            what = f"{self.path} is a workspace of version {version}, and this program knows version {VERSION}"
            raise OutputError(what, "name another one with --workspace, or use the program that made it")

    @contextlib.contextmanager
    def write(self) -> Iterator[Rows]:
        """A transaction that holds whole or not at all, and counts as a change."""
        with self._as_one_line():
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield Rows(connection, self.workspace)
                connection.execute("UPDATE changes SET count = count + 1")
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def read(self) -> Iterator[Rows]:
        """A look at what there is."""
        with self._as_one_line():
            yield Rows(self._connection(), self.workspace)

    def _connection(self) -> sqlite3.Connection:
        """This thread's own, of this process: one that was carried over a fork must not be used."""
        if getattr(self._own, "process", None) != os.getpid():
            connection = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.execute(
                "PRAGMA synchronous = NORMAL"
            )  # with WAL, a power cut may take the last changes, never half of one
            connection.execute("PRAGMA foreign_keys = ON")
            self._own.connection, self._own.process = connection, os.getpid()
        found: sqlite3.Connection = self._own.connection
        return found

    @contextlib.contextmanager
    def _as_one_line(self) -> Iterator[None]:
        """Inside, what SQLite and the disk refuse is an OutputError."""
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            hint = "free some space" if "full" in text else "choose another --workspace, whose disk is there and can be written"
            if isinstance(error, sqlite3.DatabaseError) and "not a database" in text:
                hint = "move the file away, or choose another --workspace"
            raise OutputError(f"cannot use {self.path}: {text}", hint) from error
