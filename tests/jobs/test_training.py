"""Trainings as jobs, on a small base: what they leave is what the command leaves, to the byte, whoever was killed on the way."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import serving
from small import QUIET, SMALL

from personalize.api.recipes import resolve
from personalize.jobs import Engine, Job, Store, Workspace
from personalize.lock import holder_process
from personalize.training.loop import train

Wait = Callable[..., Job]
LANE = "cpu/long"


@pytest.fixture
def store(workspace: Workspace) -> Store:
    return Store(workspace)


@pytest.fixture(scope="module")
def settings(narrow_base: Path, pictures: Path) -> dict[str, Any]:
    return {"base": str(narrow_base), "folder": str(pictures), **SMALL, **QUIET}


@pytest.fixture(scope="module")
def plain(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run in this process leaves."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    for _ in train(resolve(flags={**settings, "output": folder})):
        pass
    return weights(folder)


@pytest.fixture
def running(workspace: Workspace) -> Iterator[Engine]:
    with Engine(workspace) as found:
        yield found


def weights(folder: Path) -> dict[str, bytes]:
    """The adapter and the checkpoints of a run."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("zwx*.safetensors")}


def whole(store: Store, job: Job, plain: dict[str, bytes]) -> None:
    """A training ended once, and left what an undisturbed one leaves."""
    assert job.state == "succeeded" and job.result and job.result["adapter"] == str(job.folder / "zwx.safetensors"), job
    assert weights(job.folder) == plain and len(plain) == 3
    events = store.events(job.id)
    assert [number for number, _ in events] == [*range(1, len(events) + 1)]
    assert {record["step"] for _, record in events if record["event"] == "step"} == {1, 2, 3, 4}
    assert sum(record.get("state") == "succeeded" for _, record in events) == 1
    assert (job.folder / "report.html").is_file() and job.progress["done"] == job.progress["total"] == 4


def test_a_training_leaves_what_the_command_leaves(
    running: Engine, store: Store, settings: dict[str, Any], plain: dict[str, bytes], wait: Wait
) -> None:
    job = store.add("train", settings)
    assert (job.name, job.folder) == ("zwx", store.workspace.runs / "zwx")
    whole(store, wait(store, job.id), plain)
    kinds = [record["event"] for _, record in store.events(job.id)]
    assert kinds.index("started") < kinds.index("step") < kinds.index("saved") < kinds.index("finished")
    again = wait(store, store.requeue(job.id).id)  # as after a kill between the run's end and the job's
    assert again.result and again.result["again"] and again.progress["done"] == again.progress["total"] == 4


def test_a_training_rests_goes_on_and_is_kept(
    running: Engine, store: Store, settings: dict[str, Any], plain: dict[str, bytes], wait: Wait
) -> None:
    """Pause, resume, a word, and stop and keep; then the whole run, which goes on with what was kept."""
    job = store.add("train", {**settings, "steps": 100_000, "checkpoint_every": 0})
    wait(store, job.id, lambda job: job.progress.get("done", 0) >= 1)
    store.tell(job.id, "save")
    wait(store, job.id, lambda job: any(record["event"] == "saved" for _, record in store.events(job.id)))
    store.pause(job.id)
    rests = wait(store, job.id, lambda job: job.state == "paused")
    assert rests.asked == "" and (job.folder / "checkpoints" / "state.safetensors").is_file()
    assert not (job.folder / "zwx.safetensors").exists()
    store.tell(job.id, "keep")
    kept = wait(store, job.id)
    assert kept.state == "succeeded" and kept.result and kept.asked == ""
    assert kept.result["steps"] >= rests.progress["done"] and (job.folder / "zwx.safetensors").is_file()


def test_a_running_training_is_stopped_and_kept(running: Engine, store: Store, settings: dict[str, Any], wait: Wait) -> None:
    job = store.add("train", {**settings, "steps": 100_000, "checkpoint_every": 0})
    wait(store, job.id, lambda job: job.progress.get("done", 0) >= 2)
    store.tell(job.id, "keep")
    kept = wait(store, job.id)
    assert kept.state == "succeeded" and kept.result and 2 <= kept.result["steps"] < 100_000 and kept.attempts == 1


@pytest.mark.parametrize(("points", "together"), [(2, 1), pytest.param(50, 2, marks=pytest.mark.slow)])
def test_trainings_end_once_with_the_same_bytes_whoever_is_killed(
    store: Store, settings: dict[str, Any], plain: dict[str, bytes], wait: Wait, points: int, together: int
) -> None:
    """The server, the worker or both are killed, so many events after the last time as is drawn and a moment later; `together`
    jobs are queued, and others as soon as they are over, until that has happened at so many points."""
    draw, kills, jobs = random.Random(points), 0, list[Job]()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving.Server(store.workspace))
        while kills < points:
            if not (left := store.list(states=["running", "queued"])):
                jobs += (left := [store.add("train", settings) for _ in range(together)])
            count = len(store.events(left[0].id)) + draw.randrange(1, 9)
            first = wait(store, left[0].id, lambda job, count=count: job.ended or len(store.events(job.id)) >= count)
            if first.ended:
                continue
            time.sleep(draw.random() * 0.5)  # nothing is waited for: any moment will do
            who = draw.choice((("server",), ("worker",), ("worker", "server")))
            if "worker" in who and (process := holder_process(store.workspace.lane(LANE))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if "server" in who:
                server.kill()
                server = stack.enter_context(serving.Server(store.workspace))
            kills += 1
            print(f"{kills}: {' and '.join(who)}, after {count} events of {first.id}", flush=True)
        for job in jobs:
            whole(store, wait(store, job.id), plain)
        server.end()
    print(f"{kills} kills, {[store.get(job.id).attempts for job in jobs]} attempts")
