"""What long commands tell while they go on, for whoever runs them as a job: events as records, and how far they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

Listener = Callable[[Mapping[str, Any], int, int, str], None]  # a record, steps that are done, of how many, what goes on

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report(record: Mapping[str, Any], done: int, total: int, doing: str) -> None:
    """Tell an event to who listens; without anybody, nothing happens."""
    if listener := _LISTENER.get():
        listener(record, done, total, doing)


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Inside, a listener is told what commands report."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
