"""The child process that runs the jobs of one lane, one after another. The engine starts it, and stops it by closing its stdin.

The main thread works. Another one writes the events down, gives a sign of life on stdout, looks what the job was asked for, and
notices when the engine is gone: then the state is saved, the job goes back into the queue, and the worker ends. A lane's lock is
held for as long as its worker lives, so that no two of them run one job, whoever was killed and whatever the clock says.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ..errors import DataError, PersonalizeError
from ..lock import hold, is_held
from ..registry import table
from ..training.control import tell
from .job import Job
from .kind import LONG, Kind
from .store import Store, kind_of, log_tail
from .workspace import Workspace

PAUSE = 0.05  # seconds between two looks at the queue, and between two writes of events
BEAT = 1.0  # seconds between signs of life
ASKED_STATES = {"pause": "paused", "cancel": "cancelled", "leave": "queued"}


def kinds_of(lane: str) -> list[str]:
    """The kinds of jobs that a lane takes: `cpu/quick`."""
    sort = lane.rpartition("/")[2]
    return [name for name, row in table("jobs").items() if row.lane == sort]


class RunningTask:
    """A job that is running: what its kind tells of it, until it is written down."""

    def __init__(self, job: Job) -> None:
        self.job, self.folder = job, job.folder
        self.records: collections.deque[dict[str, Any]] = collections.deque()
        self.progress: dict[str, Any] = dict(job.progress)
        self._began: tuple[float, int] | None = None  # when the first step of this attempt was done, and which

    def report(self, record: Mapping[str, Any], done: int = 0, total: int = 0, doing: str = "") -> None:
        """Tell an event of the job, and how far it is."""
        if record:
            self.records.append({"at": time.time(), **record})
        now = time.monotonic()
        if self._began is None or done < self._began[1]:
            self._began = (now, done)
        pace = (now - self._began[0]) / (done - self._began[1]) if done > self._began[1] else None
        eta = None if pace is None or done >= total else round(pace * (total - done), 1)
        self.progress = {"done": done, "total": total, "doing": doing, "eta": eta}


class Worker:
    """One lane's worker. `run` takes jobs until the engine lets go of it; one of the long lane takes a single one."""

    def __init__(self, workspace: Workspace, lane: str, name: str) -> None:
        self.store, self.lane, self.name = Store(workspace), lane, name
        self.kinds = kinds_of(lane)
        self.task: RunningTask | None = None
        self.leaving = threading.Event()  # the engine is gone, or wants this worker to go
        self.asked = ""  # why the job is interrupted
        self.interruptible = False
        self.writing = threading.Lock()
        self.version = -1

    def run(self) -> int:
        """Work. Returns the exit code."""
        signal.signal(signal.SIGINT, self._on_interrupt)
        threading.Thread(target=self._watch, daemon=True).start()
        if self.lane.endswith(f"/{LONG}"):
            self._take()
            return 0
        for name in self.kinds:
            kind_of(name).warm()
        while not self.leaving.is_set():
            if not self._take():
                self.leaving.wait(PAUSE)
        return 0

    def _take(self) -> bool:
        """Run the next job, if there is one."""
        job = None if self.leaving.is_set() else self.store.claim(self.kinds, self.lane, self.name)
        if job:
            with self._log_of(job):
                self._do(job, kind_of(job.kind))
        return job is not None

    def _do(self, job: Job, kind: Kind) -> None:
        """Run a job, and say what became of it. What is nobody's mistake but ours ends the worker, when that is written down."""
        task = self.task = RunningTask(job)
        with _Crash(self, job):
            try:
                self.interruptible, self.asked = True, ""
                _go_to(job.cwd)
                keeping = job.asked == "keep"
                if not keeping:
                    try:
                        result = kind.run(task)
                    except KeyboardInterrupt:
                        if self.asked != "keep":
                            raise
                        keeping = True
                if keeping:
                    self.asked = ""
                    result = kind.keep(task)
                self.interruptible = False
                self._end("succeeded", result=result)
            except KeyboardInterrupt:
                self.interruptible = False
                self._end(ASKED_STATES.get(self.asked, "paused"))
            except PersonalizeError as error:
                self.interruptible = False
                print(f"personalize: {error}", file=sys.stderr, flush=True)
                self._fail(type(error).__name__, error.what, error.hint)

    def _end(self, state: str, **about: Any) -> None:
        """What became of the job, behind all of its events."""
        assert self.task
        task = self.task
        self._write(task)
        with self.writing:
            self.task = None
        self.store.end(task.job.id, self.name, state, **about)

    def _fail(self, kind: str, message: str, hint: str = "") -> None:
        assert self.task
        log = log_tail(self.store.workspace.log(self.task.job.id))
        self._end("failed", error={"kind": kind, "message": message, "hint": hint, "log": log})

    # ------------------------------------------------------------ the other thread

    def _watch(self) -> None:
        threading.Thread(target=self._wait_for_the_end, daemon=True).start()
        last = 0.0
        while True:
            if time.monotonic() - last >= BEAT:
                last = time.monotonic()
                with contextlib.suppress(OSError):  # the engine is gone or busy
                    os.write(BEATS, b".")
            if task := self.task:
                self._write(task)
                self._look_for_wishes(task)
            time.sleep(PAUSE)

    def _wait_for_the_end(self) -> None:
        """stdin ends when the engine does, or when it wants this worker to leave."""
        while os.read(0, 1):
            pass
        self.leaving.set()

    def _write(self, task: RunningTask) -> None:
        """Write down what the job has told."""
        with self.writing:
            records = [task.records.popleft() for _ in range(len(task.records))]
            if records:
                self.store.record(task.job.id, self.name, records, task.progress)

    def _look_for_wishes(self, task: RunningTask) -> None:
        """Interrupt the job if somebody wants it to stop, and hand on words to a training."""
        if self.leaving.is_set():
            return self._interrupt(task, "leave")
        asked, words = self.store.wishes(task.job.id)
        if asked and not (asked == "keep" and task.job.asked == "keep"):
            self._interrupt(task, asked)
        for word in words:
            with contextlib.suppress(PersonalizeError):  # it has not begun yet
                tell(task.folder, word)
                self.store.take_word(task.job.id, word)

    def _interrupt(self, task: RunningTask, asked: str) -> None:
        if not self.asked and self.interruptible:
            self.asked = asked
            os.kill(os.getpid(), signal.SIGINT)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interruptible and self.asked:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _log_of(self, job: Job) -> Iterator[None]:
        """Inside, all that this process prints, its libraries and its crash too, is in the job's log."""
        before = os.dup(2)
        with self.store.workspace.log(job.id).open("ab") as log:
            log.write(f"--- attempt {job.attempts}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            log.flush()
            os.dup2(log.fileno(), 2)
            os.dup2(log.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(before, 2)
            os.dup2(before, 1)
            os.close(before)


class _Crash:
    """Around a job: an error that no one expected is the job's failure, and goes on to end this worker."""

    def __init__(self, worker: Worker, job: Job) -> None:
        self.worker, self.job = worker, job

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self.worker.task:
            traceback.print_exception(error)
            self.worker.interruptible = False
            self.worker._fail(type(error).__name__, f"{type(error).__name__}: {error}", "its log says where")


def _go_to(folder: Path) -> None:
    """Paths in a job's settings are relative to where it was asked for."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise DataError(f"the job was asked for in {folder}, which is not there: {error.strerror}", "queue it anew") from error


BEATS = 1  # where signs of life go


def work(place: Path, lane: str, name: str) -> int:
    """The life of a worker. Returns its exit code."""
    global BEATS
    BEATS = os.dup(1)
    os.set_blocking(BEATS, False)
    os.dup2(2, 1)
    faulthandler.enable()
    workspace = Workspace(place)
    worker = Worker(workspace, lane, name)
    folder = workspace.lane(lane)
    while is_held(folder):  # by a worker of an engine that was killed, which is saving its state
        time.sleep(PAUSE)
    with hold(folder, "it belongs to another worker"):
        for job, other in worker.store.running(lane):
            worker.store.lose(job.id, other, "the program was killed", fault=False)
        return worker.run()
