"""What changes, as it changes: one look at the store for everybody who listens, and events encoded once for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from ..errors import NoSuchJobError, PersonalizeError
from ..jobs import Job, Store

PAUSE = 0.2  # seconds between two looks at the store, while somebody listens
PING = 15.0  # seconds of silence after which a sign of life is sent, so that nothing between closes the connection
MOST = 500  # events that go out at once

T = TypeVar("T")


@dataclass
class Tail:
    """The events of a job that somebody listens to, encoded."""

    listeners: int = 0
    version: int = -1  # of the store when it was read last
    events: list[bytes] = field(default_factory=list)
    job: Job | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Live:
    """Wakes streams when the store has changed. All of it runs in one event loop; the store is asked in threads."""

    def __init__(self, store: Store) -> None:
        self.store, self.version, self.closing = store, -1, False
        self._tails: dict[str, Tail] = {}
        self._listeners = 0
        self._changed: asyncio.Event | None = None  # set at the next change, which leaves another one here
        self._task: asyncio.Task[None] | None = None
        self._memo: dict[str, tuple[int, Any]] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside, the store is watched."""
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def close(self) -> None:
        """End all streams."""
        self.closing = True
        self._wake()

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` makes of the store, made once for each of its versions. For threads."""
        version = self.store.version()
        known = self._memo.get(key)
        if known is None or known[0] != version:
            known = self._memo[key] = (version, make())
            if len(self._memo) > 64:
                del self._memo[next(iter(self._memo))]
        found: T = known[1]
        return found

    async def wait(self, seen: int, seconds: float) -> int:
        """The store's version, as soon as it is another one than `seen`, or after so many seconds."""
        assert self._changed, "only while it is running"
        self._listeners += 1
        try:
            if self.version == seen and not self.closing:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), seconds)
            return self.version
        finally:
            self._listeners -= 1

    async def changes(self) -> AsyncIterator[bytes]:
        """An event for each change of the store, as server-sent events; the first at once."""
        seen = -1
        while not self.closing:
            version = await self.wait(seen, PING)
            if version != seen:
                seen = version
                yield format_sse_event(event="change", data_str=json.dumps({"version": version}), id=str(version))
            else:
                yield KEEPALIVE_COMMENT

    async def job_events(self, job: str, after: int) -> AsyncIterator[bytes]:
        """The events of a job behind number `after` as server-sent events, and `end` with its state when it is over."""
        tail = self._tails.setdefault(job, Tail())
        tail.listeners += 1
        try:
            seen = -1
            while not self.closing:
                version = self.version
                await self._read(job, tail, version if version != seen else -1)
                seen = version
                while after < len(tail.events):
                    some = tail.events[after : after + MOST]
                    after += len(some)
                    yield b"".join(some)
                if tail.job and tail.job.ended:
                    state = json.dumps({"state": tail.job.state, "error": tail.job.error})
                    yield format_sse_event(event="end", data_str=state)
                    return
                if await self.wait(seen, PING) == seen:
                    yield KEEPALIVE_COMMENT
        except NoSuchJobError:
            return
        finally:
            tail.listeners -= 1
            if not tail.listeners:
                self._tails.pop(job, None)

    async def _read(self, job: str, tail: Tail, version: int) -> None:
        """Bring a tail up to date, once for each version of the store whoever asks first."""
        async with tail.lock:
            if tail.job is not None and version in (-1, tail.version):
                return
            tail.job = await asyncio.to_thread(self.store.get, job)  # before its events, so that none is missed at the end
            news = await asyncio.to_thread(self.store.events, job, len(tail.events))
            tail.events += [encode(number, record) for number, record in news]
            tail.version = version

    async def _watch(self) -> None:
        while True:
            if self._listeners:
                try:
                    version = await asyncio.to_thread(self.store.version)
                except PersonalizeError:  # a disk that is full or gone: it may come back
                    version = self.version
                if version != self.version:
                    self.version = version
                    self._wake()
            await asyncio.sleep(PAUSE)

    def _wake(self) -> None:
        """Wake all who wait."""
        if self._changed:
            self._changed.set()
            self._changed = asyncio.Event()


def encode(number: int, record: dict[str, Any]) -> bytes:
    """An event as server-sent events have it, under the name of its kind and with its number as id."""
    kind = str(record.get("event", "message"))
    return format_sse_event(event=kind if kind.isidentifier() else "message", data_str=json.dumps(record), id=str(number))
