"""Locks on folders: one writer at a time, whoever it is, and a dead one is no obstacle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from personalize import lock
from personalize.errors import OutputError
from personalize.lock import LOCK, hold, is_held

HOLDER = """
import sys, time
from pathlib import Path
from personalize.lock import hold
with hold(Path(sys.argv[1]), "wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a folder until its input ends."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_told_who_holds_the_folder_and_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    with start_holder(tmp_path) as process:
        assert is_held(tmp_path)
        told = rf"^{tmp_path} is in use: by process {process.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \(wait for it\)$"
        with pytest.raises(OutputError, match=told), hold(tmp_path, "wait for it"):
            pass
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).is_file() and not is_held(tmp_path)
    with hold(tmp_path, ""):
        assert is_held(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_threads_are_others_too(tmp_path: Path) -> None:
    told: list[str] = []

    def second() -> None:
        try:
            with hold(tmp_path, "wait"):
                told.append("both hold it")
        except OutputError as error:
            told.append(str(error))

    with hold(tmp_path, ""):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(told) == 1 and f"process {os.getpid()} " in told[0]


def test_many_at_once_never_hold_it_together(tmp_path: Path) -> None:
    """Each of a few threads holds it often: the file that one removes must not be the one that another has locked."""
    inside, turns, together = [0], [0], list[int]()

    def work() -> None:
        mine = 0
        while mine < 50:
            try:
                with hold(tmp_path, ""):
                    inside[0] += 1
                    together.append(inside[0])
                    turns[0] += 1
                    inside[0] -= 1
                    mine += 1
            except OutputError:
                pass

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert turns == [150] and set(together) == {1}


def test_who_only_looks_keeps_nobody_out(tmp_path: Path) -> None:
    """Whoever looks has the lock for a moment: a holder that meets one tries again."""
    end = threading.Event()

    def look() -> None:
        while not end.wait(0.0001):
            is_held(tmp_path)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(300):
            with hold(tmp_path, "never"):
                pass
    finally:
        end.set()
        for looker in lookers:
            looker.join()


def test_a_disk_without_locks_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(next(iter(lock.NO_LOCKS)), "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path, ""), hold(tmp_path, ""):
        pass


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*: Not a directory"), hold(tmp_path / "file" / "run", ""):
        pass
