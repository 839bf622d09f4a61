"""The child process that runs the jobs of one lane, one after another. The engine starts it, and stops it by closing its stdin.

The main thread works. Another one writes the events down, gives a sign of life on stdout, looks what the job was asked for, and
notices when the engine is gone: then the state is saved, the job goes back into the queue, and the worker ends. A lane's lock is
held for as long as its worker lives, so that no two of them run one job, whoever was killed and whatever the clock says.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
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

from ..errors import DataError, OutputError, PersonalizeError
from ..lock import hold, holder_process, is_held
from ..training.control import tell
from ..training.events import read_events
from .job import Job
from .kind import LONG, Kind
from .rows import Record, error_record, log_tail
from .store import Store, kind_of, kinds_of
from .workspace import Workspace

PAUSE = 0.05  # seconds between two looks at the queue, and between two writes of events
BEAT = 1.0  # seconds between signs of life
RETRY = 1.0  # seconds between two tries to write on a disk that refuses
IDLE = 600.0  # seconds without work after which nothing is kept in memory for the next job
PATIENCE = 600.0  # seconds that a worker of a killed engine is given to save its state
STATES = {"pause": "paused", "cancel": "cancelled", "leave": "queued"}  # what becomes of a job that was interrupted, and why


class RunningTask:
    """A job that is running: what its kind tells of it, until that is written down."""

    def __init__(self, job: Job) -> None:
        self.job, self.folder = job, job.folder
        self.records: collections.deque[Record] = collections.deque()
        self.progress: Record = dict(job.progress)
        self.written = self.progress
        self._begin: int | None = None  # steps that were done when this attempt began
        self._first: tuple[float, int] | None = None  # when its first step was done, and which that was

    def report(self, record: Mapping[str, Any], done: int = 0, total: int = 0, doing: str = "") -> None:
        """Tell an event of the job, or none with {}, and how far it is."""
        if record:
            self.records.append({"at": time.time(), **record})
        now = time.monotonic()
        if self._begin is None or done < self._begin:
            self._begin, self._first = done, None
        if self._first is None and done > self._begin:  # behind the first step: what comes before it is no measure of steps
            self._first = now, done
        since, first = self._first or (now, done)
        eta = round((now - since) / (done - first) * (total - done), 1) if first < done < total else None
        self.progress = {"done": done, "total": total, "doing": doing, "eta": eta}


class Worker:
    """One lane's worker. `run` takes jobs until the engine lets go of it; one of the long lane takes a single one."""

    def __init__(self, workspace: Workspace, lane: str, name: str, beats: int) -> None:
        self.store, self.lane, self.name = Store(workspace), lane, name
        self.leases = self.store.leases
        self.kinds = kinds_of(lane)
        self.beats = beats  # where signs of life go
        self.task: RunningTask | None = None
        self.leaving = threading.Event()  # the engine is gone, or wants this worker to go
        self.asked = ""  # why the job was interrupted
        self.interruptible = self.keeping = False
        self.writing = threading.Lock()

    def run(self) -> int:
        """Work. Returns the exit code."""
        signal.signal(signal.SIGINT, self._on_interrupt)
        signal.signal(signal.SIGTERM, lambda *_: self.leaving.set())
        for main in (self._watch, self._wait_for_the_end):
            threading.Thread(target=main, daemon=True).start()
        if self.lane.endswith(f"/{LONG}"):
            self._take()
            return 0
        for name in self.kinds:
            kind_of(name).warm()
        busy = time.monotonic()
        while not self.leaving.is_set():
            if self._take():
                busy = time.monotonic()
            elif time.monotonic() - busy > IDLE or self._is_memory_wanted():
                self._cool()
                busy = time.monotonic()
            else:
                self.leaving.wait(PAUSE)
        return 0

    def _take(self) -> bool:
        """Run the next job, if there is one."""
        job = None if self.leaving.is_set() else self.leases.claim(self.kinds, self.lane, self.name)
        if job:
            self._do(job)
        return job is not None

    def _do(self, job: Job) -> None:
        """Run a job, and say what became of it."""
        task = RunningTask(job)
        with self._log_of(job), _Crash(self):
            if job.attempts > 1:
                task.records.extend(self._unwritten_events(job))
            self.task = task
            state, about = self._outcome(task, kind_of(job.kind), keep=job.asked == "keep")
            self._end(state, **about)

    def _outcome(self, task: RunningTask, kind: Kind, keep: bool) -> tuple[str, Record]:
        """The state in which a job ends, and what is to be said of it."""
        self.keeping = keep
        try:
            with self._let_interrupt():
                _go_to(task.job.cwd)
                return "succeeded", {"result": kind.keep(task) if keep else kind.run(task)}
        except KeyboardInterrupt:
            if self.asked == "keep" and not keep:
                return self._outcome(task, kind, keep=True)
            self._cool()  # whatever was being done with what is kept, it was not done to its end
            return STATES.get(self.asked, "paused"), {}
        except PersonalizeError as error:
            print(f"personalize: {error}", file=sys.stderr, flush=True)
            self._cool()
            return "failed", self._error(type(error).__name__, error.what, error.hint)

    def _error(self, kind: str, message: str, hint: str) -> Record:
        assert self.task
        log = log_tail(self.store.workspace.log(self.task.job.id))
        return {"error": error_record(kind, message, hint, log)}

    def _end(self, state: str, **about: Any) -> None:
        """Write down what became of the job, behind all of its events: as soon as the disk allows it."""
        assert self.task
        task = self.task
        while True:
            try:
                self._write(task)
                self.task = None
                self.leases.end(task.job.id, self.name, state, **about)
                return
            except OutputError as error:
                print(f"personalize: {error}", file=sys.stderr, flush=True)
                if self.leaving.wait(RETRY):  # the next worker finds out what became of it
                    raise

    def _unwritten_events(self, job: Job) -> list[Record]:
        """What the run folder tells of attempts that were killed before they had written it down."""
        known = {_content(record) for _, record in self.store.events(job.id)}
        return [record for record in read_events(job.folder / "events.jsonl") if _content(record) not in known]

    def _is_memory_wanted(self) -> bool:
        """Whether a training on the same GPU could use what is kept here."""
        device = self.lane.rpartition("/")[0]
        return device != "cpu" and bool(self.leases.running(f"{device}/{LONG}"))

    def _cool(self) -> None:
        for name in self.kinds:
            kind_of(name).cool()

    # ------------------------------------------------------------ the other threads

    def _watch(self) -> None:
        """Give signs of life, write down what the job tells, and look what it is asked for."""
        beat = -BEAT
        while True:
            if time.monotonic() - beat >= BEAT:
                beat = time.monotonic()
                with contextlib.suppress(OSError):  # the engine is gone or busy
                    os.write(self.beats, b".")
            try:
                if task := self.task:
                    self._write(task)
                    self._look_for_wishes(task)
            except PersonalizeError:  # a full disk: it is written later
                time.sleep(RETRY)
            time.sleep(PAUSE)

    def _wait_for_the_end(self) -> None:
        """stdin ends when the engine does, or when it wants this worker to leave."""
        while os.read(0, 1):
            pass
        self.leaving.set()

    def _write(self, task: RunningTask) -> None:
        """Write down what the job has told."""
        with self.writing:
            records, progress = list(task.records), task.progress
            if records or progress is not task.written:
                self.leases.record(task.job.id, self.name, records, progress)
                task.written = progress
                for _ in records:
                    task.records.popleft()

    def _look_for_wishes(self, task: RunningTask) -> None:
        """Interrupt the job if somebody wants it to stop, and hand on words to a training."""
        asked, words = self.leases.wishes(task.job.id)
        if self.leaving.is_set():
            self._interrupt("leave")
        elif asked and not (asked == "keep" and self.keeping):
            self._interrupt(asked)
        for word in words:
            with contextlib.suppress(PersonalizeError):  # it has not begun yet
                tell(task.folder, word)
                self.leases.take_word(task.job.id, word)

    def _interrupt(self, asked: str) -> None:
        if not self.asked and self.interruptible:
            self.asked = asked
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interruptible and self.asked:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _let_interrupt(self) -> Iterator[None]:
        """Inside, the job can be interrupted: once, so that nothing disturbs it while it saves its state."""
        self.asked, self.interruptible = "", True
        try:
            yield
        finally:
            self.interruptible = False

    @contextlib.contextmanager
    def _log_of(self, job: Job) -> Iterator[None]:
        """Inside, all that this process prints, its libraries and its crash too, is in the job's log."""
        before = os.dup(2)
        with self.store.workspace.log(job.id).open("ab") as log:
            log.write(f"--- attempt {job.attempts}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            log.flush()
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream in (1, 2):
                os.dup2(before, stream)
            os.close(before)


class _Crash:
    """Around a job: an error that nobody expected is the job's failure, and goes on to end this worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self.worker.task:
            traceback.print_exception(error)
            sys.stderr.flush()
            told = self.worker._error(type(error).__name__, f"{type(error).__name__}: {error}", "the end of its log says where")
            self.worker._end("failed", **told)


def _content(record: Mapping[str, Any]) -> str:
    """What an event tells, whenever that was written down."""
    return json.dumps({key: value for key, value in record.items() if key != "at"}, sort_keys=True)


def _go_to(folder: Path) -> None:
    """Paths in a job's settings are relative to where it was asked for."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise DataError(f"the job was asked for in {folder}, which is not there: {error.strerror}", "queue it anew") from error


def work(place: Path, lane: str, name: str) -> int:
    """The life of a worker. Returns its exit code."""
    beats = os.dup(1)
    os.set_blocking(beats, False)
    os.dup2(2, 1)
    faulthandler.enable()
    workspace = Workspace(place)
    worker = Worker(workspace, lane, name, beats)
    folder, end = workspace.lane(lane), time.monotonic() + PATIENCE
    while is_held(folder):  # by a worker of an engine that was killed, which is saving its state
        if time.monotonic() > end and (process := holder_process(folder)):
            os.kill(process, signal.SIGKILL)
        time.sleep(PAUSE)
    with hold(folder, "it belongs to another worker"):
        for job, other in worker.leases.running(lane):
            worker.leases.lose(job.id, other, "the program was killed", fault=False)
        return worker.run()
