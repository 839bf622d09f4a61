"""Children of the tests' process: what is killed or interrupted needs a process of its own, but not to import all again."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

import torch


def start_child(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Run a function of a module in a process that has imported all that this one has, and computes with as many threads.

    It is forked where nothing forbids it: threads of torch's and a GPU do, and then a new process imports all of it.
    """
    threads = torch.get_num_threads()
    how = "fork" if threads == 1 and not torch.cuda.is_available() else "spawn"
    process = get_context(how).Process(target=_run, args=(threads, function, *arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of pytest-xdist's thread, which only listens
        process.start()
    return process


def _run(threads: int, function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else tokenizers speaks of the fork
    function(*arguments)
