"""The engine: starts a worker for each lane of each device, watches them, and puts new ones where they died.

    engine = Engine(Workspace("studio"), lanes=("cuda:0", "cuda:1"))
    engine.start()
    ...
    engine.stop()      # jobs that run save their state and go back into the queue

One engine holds a workspace. Whoever is killed, worker or engine, at whatever moment: the next one goes on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import OutputError, PersonalizeError
from ..lock import hold, is_held
from .kind import LONG, QUICK
from .store import Store, kinds_of
from .workspace import Workspace

WORKER = "personalize.cli.lane"  # the worker's process: jobs are commands
PAUSE = 0.05  # seconds between two looks at the workers
LOOKS = 5  # so many tries to take the workspace
STUCK = 120.0  # seconds without a sign of life, after which a worker is killed
GRACE = 30.0  # seconds that a job may take to stop, after which its worker is killed
OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # signals by which somebody ends a worker
SLOWEST = 30.0  # seconds between two starts of a worker that does not even start


@dataclass
class Lane:
    """A lane of a device and its worker, as the engine sees them."""

    name: str  # "cuda:0/long"
    kinds: Sequence[str] = ()
    worker: str = ""
    process: subprocess.Popen[bytes] | None = None
    beat: float = 0.0  # when its last sign of life came
    kills: int = 0  # of the kernel for want of memory, when the worker was started
    next_start: float = 0.0
    failures: int = 0  # starts in a row that came to nothing
    asked: dict[str, float] = field(default_factory=dict)  # job that is to be cancelled => since when


class Engine:
    """Runs the jobs of a workspace, in threads and child processes of its own, between `start` and `stop`.

    `lanes` are devices: "cpu", "cuda:0", ... Each has two lanes: one for trainings and other long work, one for drawing and what
    is quick, whose worker keeps the base model that it drew with.
    """

    def __init__(self, workspace: Workspace, lanes: Sequence[str] = ("cpu",)) -> None:
        self.workspace, self.store = workspace, Store(workspace)
        self.leases = self.store.leases
        self.lanes = [Lane(f"{device}/{sort}") for device in lanes for sort in (LONG, QUICK)]
        self._locks = contextlib.ExitStack()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take the workspace and begin. Raises OutputError where another engine has it."""
        if self._thread:
            return
        self._take_workspace()
        for lane in self.lanes:
            lane.kinds = kinds_of(lane.name)
        self._over.clear()
        self._thread = threading.Thread(target=self._supervise, name="personalize-engine", daemon=True)
        self._thread.start()

    def _take_workspace(self) -> None:
        """Hold the workspace. Others that only look whether somebody does have its lock for a moment."""
        hint = "it runs the jobs of this workspace; another --workspace gets an engine of its own"
        for last in (False,) * LOOKS + (True,):
            try:
                self._locks.enter_context(hold(self.workspace.root, hint))
                return
            except OutputError:
                if last:
                    raise
                time.sleep(PAUSE)

    def stop(self, grace: float = GRACE) -> None:
        """End: jobs that run save their state within so many seconds, and wait in the queue for the next start."""
        if not self._thread:
            return
        self._over.set()
        self._thread.join()
        self._thread = None
        end = time.monotonic() + grace
        with self._locks:
            alive = [lane for lane in self.lanes if lane.process]
            for lane in alive:
                assert lane.process and lane.process.stdin
                lane.process.stdin.close()
            for lane in alive:
                assert lane.process
                try:
                    lane.process.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    lane.process.kill()
                    lane.process.wait()
                self._bury(lane)

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------ the supervisor

    def _supervise(self) -> None:
        version = -1
        while not self._over.wait(PAUSE):
            try:
                for lane in self.lanes:
                    self._look_after(lane)
                if (now := self.store.version()) != version:
                    version = now
                    self._free_lanes_of_others()
            except PersonalizeError as error:  # the disk is full, or gone: it may come back
                print(f"personalize: {error}", file=sys.stderr, flush=True)
                self._over.wait(1.0)

    def _look_after(self, lane: Lane) -> None:
        now = time.monotonic()
        if lane.process is None:
            if now >= lane.next_start and self._is_needed(lane):
                self._spawn(lane)
            return
        assert lane.process.stdout
        with contextlib.suppress(BlockingIOError):
            if os.read(lane.process.stdout.fileno(), 1 << 12):
                lane.beat, lane.failures = now, 0
        if lane.process.poll() is not None:
            self._bury(lane)
        elif now - lane.beat > STUCK or self._is_overdue(lane, now):
            lane.process.kill()

    def _is_needed(self, lane: Lane) -> bool:
        """Whether a lane has work for a worker, or a job that lost its own with an engine that was killed."""
        return lane.name.endswith(QUICK) or self.leases.waiting(lane.kinds) or bool(self.leases.running(lane.name))

    def _is_overdue(self, lane: Lane, now: float) -> bool:
        """Whether a job that is to be cancelled has not stopped in time."""
        asked = {job.id for job, _ in self.leases.running(lane.name) if job.asked == "cancel"}
        lane.asked = {id: lane.asked.get(id, now) for id in asked}
        return any(now - since > GRACE for since in lane.asked.values())

    def _spawn(self, lane: Lane) -> None:
        lane.worker, lane.kills = secrets.token_hex(8), out_of_memory_kills()
        command = [sys.executable, "-m", WORKER, str(self.workspace.root), lane.name, lane.worker]
        log = self.workspace.log(f"lane-{self.workspace.lane(lane.name).name}")
        try:
            with log.open("wb") as errors:
                lane.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment(lane.name),
                    start_new_session=True,  # Ctrl-C is for the engine, which lets its workers save what they do
                )
        except OSError as error:
            raise OutputError(f"cannot start a worker: {error.strerror}", "free some memory or disk space") from error
        assert lane.process.stdout
        os.set_blocking(lane.process.stdout.fileno(), False)
        lane.beat = time.monotonic()

    def _bury(self, lane: Lane) -> None:
        """A worker has ended: its job, if it had one, is queued again or has failed."""
        assert lane.process
        process, lane.process = lane.process, None
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        cause, fault = death_of(process.returncode, out_of_memory_kills() > lane.kills)
        for job, worker in self.leases.running(lane.name):
            if worker == lane.worker:
                self.leases.lose(job.id, worker, cause, fault=fault)
        if process.returncode:
            lane.failures += 1
            lane.next_start = time.monotonic() + min(SLOWEST, 0.1 * 2**lane.failures)

    def _free_lanes_of_others(self) -> None:
        """Jobs in lanes that this engine does not have, whose workers are gone, go back into the queue."""
        own = {lane.name for lane in self.lanes}
        for job in self.store.list(states=["running"]):
            if job.lane and job.lane not in own and not is_held(self.workspace.lane(job.lane)):
                for one, worker in self.leases.running(job.lane):
                    self.leases.lose(one.id, worker, "the program was killed", fault=False)


def devices_here() -> tuple[str, ...]:
    """Every GPU of this machine, or its CPU."""
    import torch

    return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count())) or ("cpu",)


def is_served(place: Path) -> bool:
    """Whether an engine runs the jobs of a workspace."""
    return is_held(place)


def environment(lane: str) -> Mapping[str, str]:
    """The environment of a lane's worker: it sees no GPU but its own."""
    device, _, index = lane.rpartition("/")[0].partition(":")
    own = {"cpu": {"CUDA_VISIBLE_DEVICES": ""}, "cuda": {"CUDA_VISIBLE_DEVICES": index or "0"}}
    return {**os.environ, **own.get(device, {})}


def death_of(code: int, memory: bool) -> tuple[str, bool]:
    """How a process ended, in words, and whether its job is to blame. `memory`: the kernel has killed some for want of it."""
    if code == -signal.SIGKILL and memory:
        return "its worker was ended by the kernel, because the machine ran out of memory", True
    if -code in OUTSIDE:
        return "its worker was killed", False
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"its worker crashed ({signal.Signals(-code).name})", True
    return f"its worker ended with exit code {code}", code != 0


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed for want of memory; 0 where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
