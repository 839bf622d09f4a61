"""A host as its browser sees it: a Starlette app that mounts the bridge, on a port of its own."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from personalize_a1111.asgi import App
from personalize_studio import Bridge, Settings
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount

from personalize.service.serve import listen

PREFIX = "/personalize"


@dataclass
class Front:
    """The host, how it is reached, and its bridge."""

    address: str
    bridge: Bridge
    client: httpx.Client

    @property
    def studio(self) -> str:
        return self.address + PREFIX


def app_of(settings: Settings) -> tuple[Starlette, Bridge]:
    """A host with the plugin, as A1111 is built: with a middleware that compresses."""
    bridge = Bridge(lambda: settings, PREFIX)
    app = Starlette(routes=[Mount(PREFIX, App(bridge))])
    app.add_middleware(GZipMiddleware, minimum_size=1000)
    return app, bridge


@contextlib.contextmanager
def fronting(settings: Settings) -> Iterator[Front]:
    """Such a host in a thread."""
    app, bridge = app_of(settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=1))
    with listen("127.0.0.1", 0) as sock:
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            with httpx.Client(base_url=address + PREFIX, timeout=60, trust_env=False) as client:
                yield Front(address, bridge, client)
        finally:
            bridge.close()
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def settings_for(home: Path, url: str = "", **more: object) -> Settings:
    """Settings that know nothing of this machine's own."""
    return Settings(home, url=url, workspace=str(home / "workspace"), **more)  # type: ignore[arg-type]


@contextlib.contextmanager
def apart(settings: Settings) -> Iterator[tuple[str, int]]:
    """Such a host in a process of its own: the studio's address there, and the process."""
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parents[1]), str(here.parents[1] / "webui_ext" / "a1111")]
    code = f"import sys; sys.path[:0] = {paths!r}; import fronts; fronts.main({str(settings.home)!r}, {settings.url!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    try:
        yield child.stdout.readline().strip() + PREFIX, child.pid
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def main(home: str, url: str) -> None:
    """Such a host, until it is killed; prints its address."""
    with listen("127.0.0.1", 0) as sock:
        print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
        app, _ = app_of(settings_for(Path(home), url))
        uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none")).run(sockets=[sock])


def peak_memory(process: int) -> int:
    """The most memory that a process has had, in bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]
