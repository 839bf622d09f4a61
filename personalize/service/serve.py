"""The process of a service: uvicorn on a socket, the engine that runs the jobs, and an end that loses nothing."""

from __future__ import annotations

import contextlib
import signal
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from ..errors import OutputError
from ..io import write_text
from ..jobs.workspace import Workspace
from ..lock import is_held
from .app import create_app
from .options import Options
from .studio import Studio

ANSWER = 2.0  # seconds that a service that is there takes to say so
GRACE = 10  # seconds that open connections get at the end: hundreds of streams take a while on a busy machine
QUEUE = 512  # connections that may wait to be taken


class Server(uvicorn.Server):
    """Uvicorn, which says when it is ready, and ends streams before it waits for connections to end."""

    def __init__(self, config: uvicorn.Config, studio: Studio, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.studio, self.on_ready = studio, on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Inside, Ctrl-C and a request to end are heard. Ending so is no failure: they are not raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.studio.live.close()
        await super().shutdown(sockets)


def serve(options: Options, lanes: tuple[str, ...], on_ready: Callable[[str], None]) -> int:
    """Serve until a signal comes; `on_ready` is told the address. Jobs that run save their state, and go on at the next start.

    Raises OutputError where the port or the workspace is somebody else's.
    """
    with listen(options.host, options.port) as sock:
        studio = Studio.open(options, lanes)
        if studio.engine:
            studio.engine.start()  # now, so that a workspace that is in use is an error in one line
        tempfile.tempdir = str(make_folder(studio.workspace.uploads / "spool"))  # large forms are kept on the workspace's disk
        address = f"http://{shown_host(options.host)}:{sock.getsockname()[1]}"
        place = address_file(studio.workspace)

        def tell() -> None:
            write_text(place, address + "\n")
            on_ready(address)

        server = make_server(studio, tell)
        try:
            server.run(sockets=[sock])
        finally:
            place.unlink(missing_ok=True)
            if studio.engine:
                studio.engine.stop()
    return 0


def address_file(workspace: Workspace) -> Path:
    """Where a running service of a workspace says how it is reached."""
    return workspace.root / "address"


def address_of_running(workspace: Workspace) -> str:
    """The address of the service that runs a workspace; "" where none does."""
    try:
        address = address_file(workspace).read_text(encoding="utf-8").strip()
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/health", timeout=ANSWER) as answer:
            return address if answer.status == 200 and is_held(workspace.root) else ""
    except (OSError, ValueError):
        return ""


def make_server(studio: Studio, on_ready: Callable[[], None]) -> Server:
    """A server of a studio. It writes no log of who asked for what: addresses and headers hold what is nobody's business."""
    config = uvicorn.Config(
        create_app(studio),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
        backlog=QUEUE,
        lifespan="on",
        proxy_headers=False,
        ws="none",
    )
    return Server(config, studio, on_ready)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free. Raises OutputError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sends at once on those that say so
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OutputError(f"cannot listen on {host} port {port}: {error.strerror or error}", "choose another --port") from error
    return sock


def is_free(host: str, port: int) -> bool:
    """Whether a port can be listened on."""
    try:
        listen(host, port).close()
    except OutputError:
        return False
    return True


def shown_host(host: str) -> str:
    """A host as an address has it; one that stands for all networks is this machine's own name for itself.

    >>> shown_host("::1"), shown_host("0.0.0.0"), shown_host("127.0.0.1")
    ('[::1]', '127.0.0.1', '127.0.0.1')
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def make_folder(path: Path) -> Path:
    """A folder that is there."""
    path.mkdir(parents=True, exist_ok=True)
    return path
