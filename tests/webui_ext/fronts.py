"""A host as its browser sees it: a Starlette app that mounts the bridge, on a port of its own."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def fronting(settings: Settings) -> Iterator[Front]:
    """A host with the plugin, as A1111 is built: with a middleware that compresses."""
    bridge = Bridge(lambda: settings, PREFIX)
    app = Starlette(routes=[Mount(PREFIX, App(bridge))])
    app.add_middleware(GZipMiddleware, minimum_size=1000)
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
