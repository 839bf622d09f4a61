"""The engine and its workers, with jobs that count: whoever is killed, each job ends once, and each line is there once."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import serving

from personalize.errors import OutputError
from personalize.jobs import Engine, Job, Store, Workspace, engine
from personalize.jobs.leases import FAULTS
from personalize.lock import holder_process, is_held

Wait = Callable[..., Job]

pytestmark = pytest.mark.usefixtures("counting_workers")


@pytest.fixture
def running(workspace: Workspace, store: Store) -> Iterator[Engine]:
    with Engine(workspace) as found:
        yield found


def lines(job: Job) -> list[int]:
    """The steps that a job took, in their order."""
    return [int(line.split()[0]) for line in (job.folder / "lines").read_text().splitlines()]


def at_step(step: int) -> Callable[[Job], bool]:
    return lambda job: bool(job.progress.get("done", 0) >= step)


def test_jobs_run_to_their_ends(running: Engine, store: Store, wait: Wait) -> None:
    first, then = store.add("count", {"steps": 4}), store.add("glance", {})
    done = wait(store, first.id)
    assert (done.state, done.attempts, done.error, done.asked, done.lane) == ("succeeded", 1, None, "", None)
    assert done.progress == {"done": 4, "total": 4, "doing": "counting", "eta": None} and lines(done) == [1, 2, 3, 4]
    assert done.result == {"lines": str(done.folder / "lines"), "steps": 4}
    assert done.created_at <= (done.started_at or 0) <= (done.finished_at or 0) and "counting from 0" in store.log(first.id)
    told = [(record["event"], record.get("state", record.get("step"))) for _, record in store.events(first.id)]
    assert told == [("state", "queued"), ("state", "running"), ("started", None), *[("step", n) for n in (1, 2, 3, 4)],
                    ("state", "succeeded")]  # fmt: skip
    assert wait(store, then.id).state == "succeeded"


def test_what_is_quick_does_not_wait_for_what_is_long(running: Engine, store: Store, wait: Wait) -> None:
    long, behind = store.add("count", {"wait_at": 2}), store.add("count", {})
    wait(store, long.id, at_step(1))
    assert wait(store, store.add("glance", {}).id).state == "succeeded"
    assert store.get(long.id).state == "running" and store.get(behind.id).state == "queued"


def test_a_running_job_rests_and_goes_on(running: Engine, store: Store, wait: Wait) -> None:
    job = store.add("count", {"wait_at": 2})
    wait(store, job.id, at_step(1))
    store.pause(job.id)
    rests = wait(store, job.id, lambda job: job.state == "paused")
    assert rests.asked == "" and lines(rests) == [1]
    store.edit(job.id, settings={"steps": 3})
    store.resume(job.id)
    done = wait(store, job.id)
    assert (done.state, done.attempts, lines(done)) == ("succeeded", 2, [1, 2, 3])


def test_a_running_job_is_cancelled_and_can_be_queued_again(running: Engine, store: Store, wait: Wait) -> None:
    job, other = store.add("count", {"wait_at": 2}), store.add("count", {})
    wait(store, job.id, at_step(1))
    store.cancel(job.id)
    assert wait(store, job.id).state == "cancelled" and wait(store, other.id).state == "succeeded"
    store.requeue(job.id)
    wait(store, job.id, lambda job: job.attempts == 2)
    store.cancel(job.id)
    assert lines(wait(store, job.id)) == [1]


def test_a_job_that_does_not_listen_is_cancelled_all_the_same(
    running: Engine, store: Store, wait: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "GRACE", 0.1)
    job = store.add("count", {"deaf_at": 2})
    wait(store, job.id, at_step(1))
    store.cancel(job.id)
    assert wait(store, job.id).state == "cancelled"


def test_a_mistake_is_the_jobs_failure_in_a_line(running: Engine, store: Store, wait: Wait) -> None:
    failed = wait(store, store.add("count", {"fail_at": 2}).id)
    assert failed.state == "failed" and failed.error and failed.attempts == 1
    assert (failed.error["kind"], failed.error["message"]) == ("RecipeError", "this cannot be counted")
    assert failed.error["hint"] == "count something else" and "personalize: this cannot be counted" in failed.error["log"]


def test_a_crash_in_python_is_the_jobs_failure_with_its_traceback(running: Engine, store: Store, wait: Wait) -> None:
    failed, other = store.add("glance", {"break_at": 2}), store.add("glance", {})
    job = wait(store, failed.id)
    assert job.state == "failed" and job.error and job.error["message"] == "ZeroDivisionError: nobody expected this"
    assert "Traceback" in job.error["log"] and "raise ZeroDivisionError" in job.error["log"] and job.attempts == 1
    assert wait(store, other.id).state == "succeeded"  # by a new worker


def test_a_job_that_crashes_its_workers_fails_after_a_few(running: Engine, store: Store, wait: Wait) -> None:
    poison, other = store.add("count", {"crash_at": 2}, priority=1), store.add("count", {})
    failed = wait(store, poison.id)
    assert failed.state == "failed" and failed.error
    assert failed.attempts == FAULTS
    assert "its worker crashed (SIGSEGV), 3 times in a row without getting any further" in failed.error["message"]
    assert "Segmentation fault" in failed.error["log"] and "counting.py" in failed.error["log"] and failed.error["hint"]
    assert wait(store, other.id).state == "succeeded" and lines(failed) == [1]


def test_a_worker_that_was_killed_is_replaced_and_its_job_goes_on(running: Engine, store: Store, wait: Wait) -> None:
    job = store.add("count", {"wait_at": 3, "steps": 3})
    for attempt in (1, 2, 3, 4, 5):
        wait(store, job.id, lambda job, n=attempt: job.attempts == n and job.progress.get("done") == 2 and job.state == "running")
        process = holder_process(store.workspace.lane("cpu/long"))
        assert process
        os.kill(process, signal.SIGKILL)
    wait(store, job.id, lambda job: job.attempts == 6)
    lost = [record["lost"] for _, record in store.events(job.id) if "lost" in record]
    assert lost == ["its worker was killed"] * 5 and lines(store.get(job.id)) == [1, 2]
    store.cancel(job.id)
    wait(store, job.id)


def test_a_worker_that_hangs_is_replaced(running: Engine, store: Store, wait: Wait, monkeypatch: pytest.MonkeyPatch) -> None:
    job = store.add("count", {"wait_at": 2})
    wait(store, job.id, at_step(1))
    monkeypatch.setattr(engine, "STUCK", 2.5)  # two signs of life that did not come
    os.kill(holder_process(store.workspace.lane("cpu/long")) or 0, signal.SIGSTOP)
    again = wait(store, job.id, lambda job: job.attempts == 2)
    assert again.state == "running"
    store.cancel(job.id)
    assert wait(store, job.id).state == "cancelled"


def test_a_workspace_has_one_engine(running: Engine, workspace: Workspace) -> None:
    with pytest.raises(OutputError, match="is in use: by process"):
        Engine(workspace).start()
    assert is_held(workspace.root)
    running.stop()
    with Engine(workspace):
        assert is_held(workspace.root)
    assert not is_held(workspace.root)


def test_an_engine_that_stops_leaves_its_jobs_in_the_queue(workspace: Workspace, store: Store, wait: Wait) -> None:
    job, behind = store.add("count", {"wait_at": 2}), store.add("count", {})
    with Engine(workspace):
        wait(store, job.id, at_step(1))
    assert store.get(job.id).state == "queued" and [one.id for one in store.list()] == [job.id, behind.id]
    store.edit(job.id, settings={})
    with Engine(workspace):
        assert lines(wait(store, job.id)) == [1, 2, 3] and wait(store, behind.id).state == "succeeded"


def test_an_engine_without_the_lane_takes_over_what_ran_there(workspace: Workspace, store: Store, wait: Wait) -> None:
    job = store.add("count", {})
    store.leases.claim(["count"], "cuda:7/long", "a worker that is gone")
    with Engine(workspace):
        assert wait(store, job.id).attempts == 2


def test_workers_see_their_own_gpu_alone() -> None:
    assert engine.environment("cuda:1/long")["CUDA_VISIBLE_DEVICES"] == "1"
    assert engine.environment("cpu/quick")["CUDA_VISIBLE_DEVICES"] == "" and engine.environment("cpu/quick")["PATH"]


@pytest.mark.parametrize("points", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_whoever_is_killed_each_job_ends_once(workspace: Workspace, store: Store, wait: Wait, points: int) -> None:
    """The engine, a worker or both, at moments of their lives that are drawn."""
    draw, steps = random.Random(points), 20 * points
    jobs = [store.add(kind, {"steps": steps, "pace": 0.01}) for kind in ("count", "glance")]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving.Server(workspace, "counting_lane"))
        for _ in range(points):
            wait_for_events(wait, store, draw.choice(jobs), draw.randrange(1, 4))
            time.sleep(draw.random() * 0.02)  # nothing is waited for: any moment will do
            kill(server, workspace, draw.sample(["server", "cpu/long", "cpu/quick"], draw.randrange(1, 4)))
            if server.process.poll() is not None:
                server = stack.enter_context(serving.Server(workspace, "counting_lane"))
        for job in jobs:
            done, events = wait(store, job.id), store.events(job.id)
            assert done.state == "succeeded" and done.attempts > 1 and lines(done) == [*range(1, steps + 1)], done
            assert [number for number, _ in events] == [*range(1, len(events) + 1)]
            assert sum(record.get("state") == "succeeded" for _, record in events) == 1
        server.end()
    assert not is_held(workspace.root) and not any(is_held(workspace.lane(lane)) for lane in ("cpu/long", "cpu/quick"))


def wait_for_events(wait: Wait, store: Store, job: Job, more: int) -> None:
    """Wait until so many more things have happened to a job, or it is over."""
    count = len(store.events(job.id)) + more
    wait(store, job.id, lambda job: job.ended or len(store.events(job.id)) >= count)


def kill(server: serving.Server, workspace: Workspace, who: list[str]) -> None:
    for one in who:
        if one == "server":
            server.kill()
        elif process := holder_process(workspace.lane(one)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def test_a_worker_of_a_killed_engine_saves_and_leaves(workspace: Workspace, store: Store, wait: Wait) -> None:
    job = store.add("count", {"wait_at": 2})
    with serving.Server(workspace, "counting_lane") as server:
        wait(store, job.id, at_step(1))
        server.kill()
        left = wait(store, job.id, lambda job: job.state == "queued")
    assert lines(left) == [1] and left.attempts == 1


def test_processes_leave_nothing_open(workspace: Workspace, store: Store, wait: Wait) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not list what a process has open")
    left = []
    for _ in range(2):  # the first one opens this thread's own connection to the file, for good
        with Engine(workspace):
            wait(store, store.add("count", {}).id)
        gc.collect()
        left.append(len(os.listdir("/proc/self/fd")))
    assert left[1] <= left[0]
