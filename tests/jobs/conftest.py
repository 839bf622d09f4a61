"""A workspace of a test's own, with kinds of jobs that need no base."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import counting
import pytest

from personalize.jobs import Job, Store, Workspace, engine

LIMIT = 60.0  # seconds after which something will never happen


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def store(workspace: Workspace) -> Iterator[Store]:
    with counting.rows():
        yield Store(workspace)


@pytest.fixture
def counting_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that know the kinds of the tests."""
    here = Path(__file__).parent
    monkeypatch.setattr(engine, "WORKER", "counting_lane")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parents[1])]))


@pytest.fixture
def wait() -> Callable[..., Job]:
    """Wait until something is true of a job, which is returned as it was then."""

    def until(store: Store, id: str, true: Callable[[Job], object] = lambda job: job.ended) -> Job:
        end, version = time.monotonic() + LIMIT, -1
        while time.monotonic() < end:
            if (now := store.version()) != version:
                version, job = now, store.get(id)
                if true(job):
                    return job
            time.sleep(0.01)
        raise AssertionError(f"this did not become true: {job}\n{store.log(id)}")

    return until
