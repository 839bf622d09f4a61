"""The studio below ComfyUI's address: its route, under a stand-in of aiohttp's requests, with a real studio behind it."""

from __future__ import annotations

import asyncio
import json
import sys
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from comfy_stub import NAME, PACK, Host, loaded
from loops import run_coroutine
from servers import Service, png

OWN = {"host": "127.0.0.1:8188", "sec-fetch-site": "same-origin"}


class Transport:
    """A connection, which the browser may close."""

    def __init__(self) -> None:
        self.closed = False

    def is_closing(self) -> bool:
        return self.closed


class Response:
    """aiohttp's StreamResponse: headers that may be many of one name, pieces that are written."""

    def __init__(self, status: int) -> None:
        pairs: list[tuple[str, str]] = []
        self.status, self.pairs, self.body, self.ended = status, pairs, b"", False
        self.headers = SimpleNamespace(add=lambda name, value: pairs.append((name, value)))

    async def prepare(self, request: Any) -> None:
        request.answers.append(self)

    async def write(self, data: bytes) -> None:
        self.body += data

    async def write_eof(self) -> None:
        self.ended = True


def request(method: str, path: str, query: str = "", headers: dict[str, str] | None = None, body: bytes = b"") -> Any:
    """A request as aiohttp hands it over: the part of the path behind the prefix is decoded, the query is not."""

    async def chunks(size: int) -> AsyncIterator[bytes]:
        for at in range(0, len(body), size):
            yield body[at : at + size]

    told = {**OWN, **(headers or {}), **({"content-length": str(len(body))} if body else {})}
    return SimpleNamespace(method=method, match_info={"path": unquote(path)}, rel_url=SimpleNamespace(raw_query_string=query),
                           headers={name.title(): value for name, value in told.items() if value}, answers=[],
                           transport=Transport(), content=SimpleNamespace(iter_chunked=chunks))  # fmt: skip


@pytest.fixture
def handle(idle: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The handler that the pack adds to the host's routes."""
    aiohttp: Any = types.ModuleType("aiohttp")
    aiohttp.web = SimpleNamespace(StreamResponse=lambda status: Response(status))
    monkeypatch.setitem(sys.modules, "aiohttp", aiohttp)
    monkeypatch.setenv("PERSONALIZE_URL", idle.address)
    monkeypatch.setenv("PERSONALIZE_WORKSPACE", str(tmp_path / "workspace"))
    with loaded(tmp_path) as (_, host):
        ((method, path, found),) = host.routes
        assert (method, path) == ("*", "/personalize/{path:.*}")
        yield lambda one: run_coroutine(found(one))


def test_pages_and_uploads_pass(handle: Any) -> None:
    page = handle(request("GET", "", headers={"accept": "text/html"}))
    assert page.status == 200 and page.ended and b'href="/personalize/' in page.body and b'href="/static' not in page.body
    panel = handle(request("GET", "-/"))
    assert b"panel.js" in panel.body and json.loads(handle(request("GET", "-/status")).body)["state"] == "ready"
    edge = b'--x\r\nContent-Disposition: form-data; name="files"; filename="my cat.png"\r\n\r\n' + png(64) + b"\r\n--x--\r\n"
    sent = handle(request("POST", "api/datasets", headers={"content-type": "multipart/form-data; boundary=x"}, body=edge))
    made = json.loads(sent.body)
    assert sent.status == 201 and made["files"] == ["my cat.png"]
    small = handle(request("GET", f"api/datasets/{made['id']}/pictures/my%20cat.png", "side=32"))
    assert ("content-type", "image/webp") in small.pairs and small.body[8:12] == b"WEBP"


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (request("POST", "api/jobs", headers={"sec-fetch-site": "cross-site"}, body=b"{}"), 403),
        (request("POST", "api/jobs", headers={"sec-fetch-site": "", "origin": "http://evil.example"}, body=b"{}"), 403),
        (request("GET", "api/jobs", headers={"sec-fetch-site": "", "host": "evil.example"}), 421),
        (request("GET", "v1/models"), 404),
        (request("GET", "../api/jobs"), 404),
        (request("OPTIONS", "api/jobs"), 405),
    ],
)
def test_who_is_kept_out(given: Any, status: int, handle: Any) -> None:
    assert handle(given).status == status


def test_events_end_with_the_browser(handle: Any) -> None:
    """A stream is passed on at once, and its connection to the studio ends when nobody listens any more."""
    one = request("GET", "api/events", headers={"accept": "text/event-stream"})

    async def listen() -> Response:
        route = sys.modules[f"{NAME}.personalize_comfyui.routes"]
        task = asyncio.ensure_future(route.handle(one))
        while not one.answers:
            await asyncio.sleep(0.02)
        assert ("content-encoding", "identity") in one.answers[0].pairs
        one.transport.closed = True
        return await asyncio.wait_for(task, 20)  # type: ignore[no-any-return]

    assert not run_coroutine(listen()).ended


def test_the_page_asks_for_what_is_there() -> None:
    """The script's nodes and the prefix are the pack's."""
    script = (PACK / "web" / "personalize.js").read_text()
    assert 'const ROOT = "/personalize/"' in script and "registerSidebarTab" in script
    for name in ("PersonalizeLoad", "PersonalizeDoctor"):
        assert f'"{name}"' in script


def test_settings_beside_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONALIZE_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.delenv("PERSONALIZE_URL", raising=False)
    with loaded(tmp_path) as (_, host):
        own = sys.modules[f"{NAME}.personalize_comfyui.host"]
        monkeypatch.setattr(own, "HOME", tmp_path)
        (tmp_path / own.FILE).write_text('{"devices": ["cpu"], "port": 9001, "workspace": "elsewhere"}')
        found = own.settings()
        assert (found.devices, found.port, found.place) == (("cpu",), 9001, tmp_path / "workspace"), "variables go before"
        assert found.folders == tuple(str(host.root / "models" / name) for name in ("loras", "checkpoints"))
        (tmp_path / own.FILE).write_text('{"folder": "x"}')
        with pytest.raises(ValueError, match="no setting 'folder'"):
            own.settings()


def test_hosts_are_not_kept(tmp_path: Path) -> None:
    """The stand-in leaves nothing behind."""
    with loaded(tmp_path) as (_, host):
        assert isinstance(host, Host)
    assert not {"comfy", "server", "folder_paths", NAME} & sys.modules.keys()
