"""Copies of this process share work on a small base: in order, with their errors and warnings, and gone when it is over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from personalize.errors import DataError, RecipeError, TrainingError
from personalize.models import processes, threads
from personalize.models.model import Base
from personalize.models.processes import VARIABLE, Copy, share

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux copies processes")


@pytest.fixture(autouse=True)
def two(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, "2")
    yield
    assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> Base:
    return Base.load(narrow_base)


@pytest.mark.parametrize("count", ["1", "2", "3"])
def test_results_come_in_order_from_as_many_processes(base: Base, monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    monkeypatch.setenv(VARIABLE, count)
    found = list(share(base, lambda item: ((item, i, os.getpid()) for i in range(item)), [2, 0, 3, 1, 1]))
    assert [(item, i) for item, i, _ in found] == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (1, 0), (1, 0)]
    assert len({pid for *_, pid in found}) == int(count) and found[0][2] == os.getpid()


def test_what_is_there_is_seen_and_what_is_changed_stays_in_the_copy(base: Base) -> None:
    values = torch.zeros(3)

    def add(item: int) -> list[list[float]]:
        values.add_(item)
        return [values.tolist()]

    assert list(share(base, add, [1, 2])) == [[1.0] * 3, [2.0] * 3] and values.tolist() == [1.0] * 3


def test_errors_and_warnings_come_from_a_copy_as_from_here(base: Base) -> None:
    def fail(item: int) -> list[int]:
        if item:
            raise DataError("a picture cannot be read", "take it away")
        return [item]

    results = share(base, fail, [0, 1])
    assert next(results) == 0
    with pytest.raises(DataError) as caught:
        next(results)
    assert caught.value.hint == "take it away"

    def warn(item: int) -> list[int]:
        if item:
            warnings.warn("kept as fp32", UserWarning, stacklevel=2)
        return [item]

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(UserWarning, match="kept as fp32"):
            assert list(share(base, warn, [0, 1])) == [0, 1]


def test_a_copy_that_is_killed_is_an_error_that_says_what_to_do(base: Base) -> None:
    def die(item: int) -> list[int]:
        if item:
            os.kill(os.getpid(), signal.SIGKILL)
        return [item]

    with pytest.raises(TrainingError, match="ended from outside") as caught:
        list(share(base, die, [0, 1]))
    assert f"{VARIABLE}=1" in caught.value.hint


def test_copies_end_where_nobody_waits_for_them(base: Base) -> None:
    results = share(base, lambda item: [time.sleep(60 * item)], [0, 1])
    next(results)
    results.close()
    assert not multiprocessing.active_children()


def test_a_copy_has_no_copies_and_ignores_ctrl_c(base: Base) -> None:
    def count(item: int) -> list[int]:
        if item:
            os.kill(os.getpid(), signal.SIGINT)
        return [processes.processes(base)]

    assert list(share(base, count, [0, 1])) == [2, 1]


def test_a_copy_ends_with_the_process_that_was_copied(tmp_path: Path) -> None:
    script = """if True:
        import os, sys, time
        from personalize.models.processes import YIELDED, Copy
        def main(here):
            here.send(YIELDED, os.getpid())
            time.sleep(600)
        with Copy(main) as copy:
            print(copy.receive()[1], flush=True)
            time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    copy = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        if not is_alive(copy):
            return
        time.sleep(0.05)
    raise AssertionError("the copy lives on")


def is_alive(pid: int) -> bool:
    """Whether a process is there, and is not only waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_process_where_this_one_cannot_be_copied_or_should_not(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.processes(base) == 2
    seen: list[int] = []
    other = threading.Thread(target=lambda: seen.append(processes.processes(base)))
    other.start()
    other.join()
    assert seen == [1]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert processes.processes(base) == 1
    with monkeypatch.context() as patch:
        patch.setattr(threads, "SMALL", 1000)
        assert processes.processes(base) == 1
    torch.set_num_threads(2)
    assert processes.processes(base) == 1


def test_as_many_as_there_are_cores_where_nobody_says(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    for cores, count in ((1, 1), (2, 2), (64, processes.MOST)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert processes.processes(base) == count


@pytest.mark.parametrize("text", ["0", "two", "-1", ""])
def test_what_is_no_number_of_processes_is_refused(base: Base, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(RecipeError, match="is not a number of processes"):
        processes.processes(base)


def test_a_copy_answers_as_often_as_it_is_asked() -> None:
    def double(here: Copy) -> None:
        while True:
            here.send(processes.YIELDED, 2 * here.receive()[1])

    with Copy(double) as copy:
        for number in (1, 2, 3):
            copy.send(processes.YIELDED, number)
            assert copy.receive()[1] == 2 * number
