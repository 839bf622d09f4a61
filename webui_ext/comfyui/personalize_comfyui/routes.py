"""The studio below ComfyUI's own address: routes of its aiohttp server, as streams both ways."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from .studio import PREFIX, bridge

CHUNK = 64 * 1024  # bytes
LOOK = 1.0  # seconds between two looks whether the browser still listens: aiohttp does not say so to who waits


def add_routes(server: Any) -> None:
    """Everything below the prefix."""
    server.routes.route("*", PREFIX + "/{path:.*}")(handle)


async def handle(request: Any) -> Any:
    """Pass one request to the bridge, and its answer back."""
    from aiohttp import web

    headers = {name.lower(): value for name, value in request.headers.items()}
    path, query = "/" + request.match_info["path"], request.rel_url.raw_query_string
    answer = await bridge.handle(request.method, path, query, headers, body_of(request))
    try:
        response = web.StreamResponse(status=answer.status)
        for name, value in answer.headers:
            response.headers.add(name, value)
        await response.prepare(request)
        await send_while_heard(answer, request, response)
        return response
    finally:
        await answer.close()


async def body_of(request: Any) -> AsyncIterator[bytes]:
    """The body as it comes."""
    async for piece in request.content.iter_chunked(CHUNK):
        yield piece


async def send_while_heard(answer: Any, request: Any, response: Any) -> None:
    """Send an answer until it ends, or nobody listens any more."""
    sending = asyncio.ensure_future(send(answer, response))
    try:
        while not sending.done() and request.transport is not None and not request.transport.is_closing():
            await asyncio.wait({sending}, timeout=LOOK)
        if sending.done():
            await sending
    finally:
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await sending


async def send(answer: Any, response: Any) -> None:
    """Send an answer, piece by piece."""
    async for piece in answer.body:
        await response.write(piece)
    await response.write_eof()
