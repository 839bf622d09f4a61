"""The bridge as an ASGI app, which every Starlette mounts, old or new: nothing of the host's framework is imported."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from personalize_studio import Answer, Bridge

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Incoming:
    """What comes from the browser: a body, and then that it has gone."""

    def __init__(self, receive: Receive, has_body: bool) -> None:
        self.receive, self.read = receive, asyncio.Event()
        if not has_body:
            self.read.set()

    async def body(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises ConnectionResetError where the browser goes away in the middle."""
        more = not self.read.is_set()
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the browser went away")
            yield message.get("body", b"")
            more = message.get("more_body", False)
        self.read.set()

    async def wait_until_gone(self) -> None:
        """Wait until the browser listens no more."""
        await self.read.wait()
        while (await self.receive())["type"] != "http.disconnect":
            pass


class App:
    """Everything below the bridge's prefix; `may_enter` says whether the host lets who asks in."""

    def __init__(self, bridge: Bridge, may_enter: Callable[[Scope], bool] = lambda _: True) -> None:
        self.bridge, self.may_enter = bridge, may_enter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if not self.may_enter(scope):
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"log in to this UI first"})
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        incoming = Incoming(receive, "content-length" in headers or "transfer-encoding" in headers)
        root, path = places(scope, self.bridge.prefix)
        query = scope.get("query_string", b"").decode("latin-1")
        answer = await self.bridge.handle(scope["method"], path, query, headers, incoming.body(), root)
        try:
            await send_while_heard(answer, incoming, send)
        finally:
            await answer.close()


def places(scope: Scope, prefix: str) -> tuple[str, str]:
    """Where the browser reaches the host, and the path behind the prefix, which old Starlettes cut off and new ones do not.

    >>> places({"root_path": "/personalize", "path": "/jobs"}, "/personalize")
    ('', '/jobs')
    >>> places({"root_path": "/sub/personalize", "path": "/sub/personalize/jobs"}, "/personalize")
    ('/sub', '/jobs')
    """
    root, path = scope.get("root_path", ""), scope["path"]
    if path == root or path.startswith(f"{root}/"):
        path = path[len(root) :]
    return root.removesuffix(prefix), path or "/"


async def send_while_heard(answer: Answer, incoming: Incoming, send: Send) -> None:
    """Send an answer until it ends, or nobody listens any more: Starlette does not say so to who sends."""
    sending = asyncio.ensure_future(send_answer(answer, send))
    listening = asyncio.ensure_future(incoming.wait_until_gone())
    try:
        await asyncio.wait({sending, listening}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            await sending
    finally:
        for task in (sending, listening):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await task


async def send_answer(answer: Answer, send: Send) -> None:
    """Send an answer, piece by piece."""
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    async for piece in answer.body:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
