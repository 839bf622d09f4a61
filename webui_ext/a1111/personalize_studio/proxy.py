"""Requests of browsers, passed on to the service: who may come in, what is passed on, and streams both ways.

The browser talks to the host's own address, so that tunnels, https and --listen work. The service's token is added here; no
browser ever sees it. Nothing is buffered: an upload of gigabytes and a stream of events take a few kilobytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

# The first part of every path but / that belongs to the studio's page; /v1, /login and whatever comes are not passed on
ROOMS = ("static", "api", "train", "dataset", "compare", "library", "mix", "jobs", "health")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
# What the service is told of a request, and what the browser is told of an answer; cookies are the host's business
PASSED_IN = ("accept", "content-type", "content-length", "range", "if-none-match", "if-modified-since", "if-range", "user-agent",
             "last-event-id")  # fmt: skip
DROPPED_OUT = ("connection", "keep-alive", "transfer-encoding", "set-cookie", "server", "upgrade", "date")
CHUNK = 64 * 1024  # bytes
CONNECT = 10.0  # seconds
TARGET = re.compile(r"/[!-~]*")  # printable ASCII: nothing that could end the request's line
CUT = "the studio ended in the middle of an answer"
WORD = re.compile(r"[A-Za-z0-9-]+")


class Refusal(Exception):
    """A request that is answered here: an HTTP status, a code for programs, and words for people."""

    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint


@dataclass(frozen=True)
class Upstream:
    """Where the service is, and its token."""

    url: str
    token: str = field(default="", repr=False)

    @property
    def netloc(self) -> str:
        return urlsplit(self.url).netloc


@dataclass
class Answer:
    """An answer with a body that comes piece by piece. `close` has to be called at the end, also when nobody listens any more."""

    status: int
    headers: list[tuple[str, str]]
    body: AsyncIterator[bytes]
    _closing: list[asyncio.StreamWriter | asyncio.Task[None]] = field(default_factory=list)

    async def close(self) -> None:
        """End the connection to the service."""
        await close_all(self._closing)


# ---------------------------------------------------------------- who may come in


def check(method: str, path: str, headers: Mapping[str, str], names: Iterable[str] = ()) -> None:
    """Raise Refusal for what another site made a browser send, and for what is not the studio's. `headers` in lower case.

    Browsers say where a request comes from in Sec-Fetch-Site, which no script can forge, wherever the page is safe (https, or
    this machine). Without it, as in a plain network, Origin has to be this host, and the host's name a known one: a foreign name
    that was made to point here (DNS rebinding) is none.
    """
    site, origin = headers.get("sec-fetch-site", ""), headers.get("origin")
    follows_link = (
        method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    )
    if site and site not in ("same-origin", "none") and not follows_link:
        raise Refusal(403, "other_origin", "requests from pages of other sites are refused", "open the UI itself")
    if not site:
        host = headers.get("host", "")
        if not is_known(host, names):
            raise Refusal(421, "unknown_host", f"this UI does not know the host name {name_of(host)[:100]!r}",
                          "open it by its address, by https, or add the name in the settings of personalize")  # fmt: skip
        hosts = {host.lower(), headers.get("x-forwarded-host", "").lower()} - {""}
        if origin is not None and urlsplit(origin).netloc.lower() not in hosts:
            raise Refusal(403, "other_origin", "requests from pages of other sites are refused", "open the UI itself")
    if method not in METHODS:
        raise Refusal(405, "method_not_allowed", f"{method[:20]} is not passed on")
    if path != "/" and not (TARGET.fullmatch(path) and path.split("/")[1] in ROOMS and ".." not in path.split("/")):
        raise Refusal(404, "not_found", "that is not a part of the studio")


def name_of(host: str) -> str:
    """The name in a Host header, without its port; "" for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        return (parts.hostname or "") if parts.netloc == host and "@" not in host and " " not in host else ""
    except ValueError:
        return ""


def is_known(host: str, names: Iterable[str]) -> bool:
    """Whether a Host header is an address, this machine's own name, or one of those that the user gave.

    >>> [is_known(one, ["art.example"]) for one in ("localhost:7860", "192.168.1.5:7860", "[::1]", "Art.Example", "evil.example")]
    [True, True, True, True, False]
    """
    name = name_of(host).lower()
    own = socket.gethostname().lower()
    if name and name in {"localhost", own, f"{own}.local", f"{own}.lan", *(one.strip().lower() for one in names)}:
        return True
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


# ---------------------------------------------------------------- what is passed on


def request_headers(
    headers: Mapping[str, str], upstream: Upstream, told: Mapping[str, str], chunked: bool
) -> list[tuple[str, str]]:
    """The headers that the service gets: those of the page (`hx-`) too, and what it is `told` of the host."""
    kept = [(name, value) for name, value in headers.items() if name in PASSED_IN or name.startswith("hx-")]
    own = [("host", upstream.netloc), ("connection", "close"), *told.items()]
    own += [("authorization", f"Bearer {upstream.token}")] if upstream.token else []
    own += [("transfer-encoding", "chunked")] if chunked else []
    return own + [(name, value) for name, value in kept if value.isascii() and value.isprintable()]


def answer_headers(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The headers that the browser gets. Streams say that they are not compressed: hosts' middlewares would hold events back."""
    kept = [(name, value) for name, value in headers if name not in DROPPED_OUT]
    is_stream = any(name == "content-type" and value.startswith("text/event-stream") for name, value in kept)
    return [*kept, ("content-encoding", "identity"), ("x-accel-buffering", "no")] if is_stream else kept


async def forward(
    upstream: Upstream, told: Mapping[str, str], method: str, target: str, headers: Mapping[str, str], body: AsyncIterator[bytes]
) -> Answer:
    """Pass a request on: `target` is path and query as the service knows them, `told` what it is told of the host.

    The answer comes as soon as its headers are known; what is left of the body goes on being sent meanwhile. Raises Refusal where
    the service is not there.
    """
    url = urlsplit(upstream.url)
    secure = ssl.create_default_context() if url.scheme == "https" else None
    port = url.port or (443 if secure else 80)
    has_body = "content-length" in headers or "transfer-encoding" in headers
    closing: list[asyncio.StreamWriter | asyncio.Task[None]] = []
    try:
        reader, writer = await asyncio.wait_for(_connect(url.hostname or "", port, secure), CONNECT)
        closing.append(writer)
        chunked = has_body and "content-length" not in headers
        lines = [f"{method} {target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in request_headers(headers, upstream, told, chunked)]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        if has_body:
            closing.append(asyncio.ensure_future(_send(writer, body, chunked)))
        status, found = await _read_head(reader)
    except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
        await close_all(closing)
        raise Refusal(502, "service_down", "the studio does not answer", "it is started again from its tab") from error
    except asyncio.CancelledError:
        await close_all(closing)
        raise
    return Answer(status, answer_headers(found), _read_body(reader, method, status, dict(found)), closing)


class Heard(asyncio.StreamReader):
    """What came before a connection broke can still be read: a service that refuses an upload answers, and hangs up."""

    def set_exception(self, exc: BaseException) -> None:
        if isinstance(exc, ConnectionError):
            self.feed_eof()
        else:
            super().set_exception(exc)  # type: ignore[arg-type]


async def _connect(host: str, port: int, secure: ssl.SSLContext | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As asyncio.open_connection does it, with such a reader."""
    loop, reader = asyncio.get_running_loop(), Heard(limit=CHUNK)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.create_connection(lambda: protocol, host, port, ssl=secure)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def close_all(closing: list[asyncio.StreamWriter | asyncio.Task[None]]) -> None:
    """End what is going on, the newest first."""
    while closing:
        one = closing.pop()
        if isinstance(one, asyncio.StreamWriter):
            one.close()
        else:
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await one


async def _send(writer: asyncio.StreamWriter, body: AsyncIterator[bytes], chunked: bool) -> None:
    """Send a body as it comes. Where the browser went away, or the service listens no more, the connection is of no use."""
    try:
        async for piece in body:
            if piece:
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                await writer.drain()
        if chunked:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
    except ConnectionError:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, list[tuple[str, str]]]:
    """The status and headers of an answer, names in lower case. Raises ValueError for what is none."""
    while True:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(lines[0].split(" ", 2)[1])
        if status >= 200:  # others only say that there will be one
            break
    pairs = [line.partition(":") for line in lines[1:] if line]
    return status, [(name.strip().lower(), value.strip()) for name, _, value in pairs if WORD.fullmatch(name.strip())]


async def _read_body(reader: asyncio.StreamReader, method: str, status: int, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The body of an answer as it comes. Raises ConnectionError where it ends too early."""
    if method == "HEAD" or status in (204, 304):
        return
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await _read_line(reader)).split(b";")[0], 16):
            async for piece in _read_exactly(reader, size):
                yield piece
            await _read_line(reader)
    elif "content-length" in headers:
        async for piece in _read_exactly(reader, int(headers["content-length"])):
            yield piece
    else:
        while piece := await reader.read(CHUNK):
            yield piece


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    if not (line := await reader.readline()):
        raise ConnectionResetError(CUT)
    return line


async def _read_exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        piece = await reader.read(min(size, CHUNK))
        if not piece:
            raise ConnectionResetError(CUT)
        size -= len(piece)
        yield piece
