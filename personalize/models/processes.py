"""Work on a small base that CPU cores share: copies of this process, each with its part of it.

One thread is fastest for a small base (threads.py), so another core is given whole pieces of work: half of a fleet's members, or
every other batch of images, or checkpoint. A copy is forked where its work begins: it has the models, adapters and images of that
moment without loading anything. How work is cut does not depend on how many processes share it, so neither do the values.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from ..errors import RecipeError, TrainingError
from .model import Base
from .threads import is_small

VARIABLE = "PERSONALIZE_PROCESSES"
MOST = 4  # each has activations of its own
PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent dies
YIELDED, ENDED, WARNED, FAILED = "yielded", "ended", "warned", "failed"

Item = TypeVar("Item")
Result = TypeVar("Result")


def processes(base: Base) -> int:
    """How many processes may share the work on a base now; 1 where cores compute together, or where this one cannot be copied.

    Only Linux copies a process safely that has loaded what it needs; and a thread beside the main one may be a server's, which
    has others that hold locks. Raises RecipeError where PERSONALIZE_PROCESSES is no number.
    """
    wanted = wanted_processes()
    first = multiprocessing.parent_process() is None and threading.current_thread() is threading.main_thread()
    if not (sys.platform == "linux" and first and is_small(base) and torch.get_num_threads() == 1):
        return 1
    return wanted or min(MOST, cores())


def cores() -> int:
    """How many cores processes could share; 1 where none are shared."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def wanted_processes() -> int | None:
    """What the environment says. Raises RecipeError where that is no number from 1 on."""
    text = os.environ.get(VARIABLE)
    if text is not None and not (text.isdecimal() and int(text)):
        raise RecipeError(f"{VARIABLE}={text} is not a number of processes", f"{VARIABLE}=1 computes in one")
    return None if text is None else int(text)


def share(base: Base, work: Callable[[Item], Iterable[Result]], items: Sequence[Item]) -> Generator[Result, None, None]:
    """What `work` yields for each item, in order; each of the processes that share it does every so many-th item.

    Results travel between processes: numbers, texts, images and arrays, no tensors, which torch would share through files of the
    process that ends. What `work` changes in memory stays where it was done: files count, and what it yields.

    >>> base = Base.load("pocket")
    >>> list(share(base, lambda item: [item, 10 * item], [1, 2, 3]))
    [1, 10, 2, 20, 3, 30]
    """
    count = min(processes(base), len(items))
    with contextlib.ExitStack() as stack:
        copies = [stack.enter_context(Copy(of_all(work, items[k::count]))) for k in range(1, count)]
        for i, item in enumerate(items):
            yield from copies[i % count - 1].results() if i % count else work(item)


def of_all(work: Callable[[Item], Iterable[Any]], items: Iterable[Item]) -> Callable[[Copy], None]:
    """What a copy does with its items: the results of each are sent, and then that they were all."""

    def main(here: Copy) -> None:
        for item in items:
            for result in work(item):
                here.send(YIELDED, result)
            here.send(ENDED)

    return main


class Copy:
    """A copy of this process that does one thing and speaks through a pipe, until the `with` block or this process ends."""

    def __init__(self, main: Callable[[Copy], None]) -> None:
        self.main = main

    def __enter__(self) -> Copy:
        context = multiprocessing.get_context("fork")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=self._run, args=(there, os.getpid()), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that other threads are there: see `processes`
            self.process.start()
        there.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _run(self, there: Any, parent: int) -> None:
        """What the copy does, from its first moment on."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal: the first process says what follows
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
        self.pipe.close()
        self.pipe = there
        warnings.showwarning = lambda message, *_: self.send(WARNED, message)
        with contextlib.ExitStack() as stack:
            stack.push(self._send_error)
            self.main(self)

    def _send_error(self, _: object, error: BaseException | None, __: object) -> bool:
        """Send an error, whatever it is, to be raised where the work was asked for."""
        if isinstance(error, Exception):
            self.send(FAILED, error)
        return isinstance(error, Exception)

    def send(self, kind: str, value: Any = None) -> None:
        """Say something to the other side. Raises TrainingError where that is gone."""
        try:
            self.pipe.send((kind, value))
        except OSError as error:
            raise process_error() from error

    def receive(self) -> tuple[str, Any]:
        """What the other side says next; its warnings and errors are raised here. Raises TrainingError where it is gone."""
        while True:
            try:
                kind, value = self.pipe.recv()
            except (EOFError, OSError) as error:
                raise process_error() from error
            if kind == FAILED:
                raise value
            if kind != WARNED:
                return kind, value
            warnings.warn(value, stacklevel=3)

    def results(self) -> Iterator[Any]:
        """What the copy's next item yields."""
        while (said := self.receive())[0] != ENDED:
            yield said[1]


def process_error() -> TrainingError:
    """The error of a process that ended in the middle of its work."""
    return TrainingError(
        "a process that shared the work was ended from outside, perhaps because memory ran out",
        f"the same command goes on from what was saved; with {VARIABLE}=1 in the environment there is only one",
    )
