"""The studio through a host's address: pages below a prefix, events, uploads, and who is kept out."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from fastapi.routing import APIRoute
from fronts import PREFIX, Front, apart, fronting, peak_memory, settings_for
from personalize_studio.proxy import ROOMS, Heard, Refusal, Upstream, check
from servers import SHORT, Service, png, serving, wait

from personalize.service import page
from personalize.service.options import Options

FOREIGN = {"origin": "http://evil.example"}


def test_the_page_lies_below_the_prefix(front: Front) -> None:
    """Every address in every room leads below the prefix; nothing leads to the host's own."""
    assert front.client.get("/health").json()["status"] == "ok"
    for room in ("/", "/dataset", "/compare", "/library", "/mix", "/jobs"):
        answer = front.client.get(room, headers={"accept": "text/html"})
        assert answer.status_code == 200, room
        found = re.findall(r'(?:href|src|action|hx-get|hx-post|sse-connect)="(/[^"]*)"', answer.text)
        assert len(found) > 10 and all(one.startswith(f"{PREFIX}/") for one in found), found
        assert "frame-ancestors 'self'" in answer.headers["content-security-policy"] and "set-cookie" not in answer.headers
    for one in set(found):
        if "/static/" in one:
            assert httpx.get(front.address + one, trust_env=False).status_code == 200, one


def test_where_browsers_are_sent_lies_below_the_prefix(front: Front) -> None:
    data = [("files", ("a.png", png(64), "image/png"))]
    sent = front.client.post("/train", files=data)
    assert sent.status_code == 303 and sent.headers["location"].startswith(f"{PREFIX}/train/")
    again = front.client.post("/train", files=data, headers={"hx-request": "true"})
    assert again.status_code == 204 and again.headers["hx-redirect"].startswith(f"{PREFIX}/train/")
    plan = front.client.get(f"{sent.headers['location'].removeprefix(PREFIX)}/plan", headers={"hx-request": "true"})
    assert f'hx-post="{PREFIX}/train/' in plan.text and 'hx-post="/train' not in plan.text


def test_a_prefix_is_believed_from_who_passes_requests_on_alone(idle: Service) -> None:
    for prefix, expected in (("/a/b", 'href="/a/b/jobs"'), ('/x"onload="', 'href="/jobs"'), ("//evil.example", 'href="/jobs"')):
        answer = idle.client.get("/", headers={"x-forwarded-prefix": prefix, "accept": "text/html"})
        assert expected in answer.text and "evil" not in answer.text


def test_every_room_of_the_page_is_passed_on_and_nothing_else() -> None:
    """A room that is added to the page is added here, or is not to be seen in image UIs."""
    routers = [
        page.router,
        *(one.router for one in vars(page).values() if isinstance(one, ModuleType) and hasattr(one, "router")),
    ]
    rooms = {route.path.split("/")[1] for one in routers for route in one.routes if isinstance(route, APIRoute)}
    assert rooms - {"login", "logout"} == {*ROOMS, ""} - {"api", "health"}


@pytest.mark.parametrize("path", ["/v1/models", "/login", "/logout", "/api/../v1/models", "/api/a b", "//evil.example/", "/docs"])
def test_what_is_not_the_studio_is_not_passed_on(front: Front, path: str) -> None:
    with pytest.raises(Refusal) as refused:
        check("GET", path, {"host": "localhost"})
    assert refused.value.status == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:7860"}, 0),
        ({"host": "192.168.1.5:7860", "origin": "http://192.168.1.5:7860"}, 0),
        ({"host": "localhost:7860", "origin": "http://localhost:7861"}, 403),
        ({"host": "localhost:7860", "origin": "null"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 421),  # a name that was made to point here
        ({"host": "a.tunnel.example", "sec-fetch-site": "same-origin", "origin": "https://a.tunnel.example"}, 0),
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "same-origin", "origin": "https://a.tunnel.example"}, 0),
        ({"host": "localhost:7860", "sec-fetch-site": "same-site"}, 403),
        ({"host": "localhost:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        (
            {"host": "localhost:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
            403,
        ),
        (
            {
                "host": "localhost:7860",
                "sec-fetch-site": "cross-site",
                "sec-fetch-mode": "navigate",
                "sec-fetch-dest": "document",
            },
            0,
        ),
        ({"host": "127.0.0.1:7860", "x-forwarded-host": "art.example", "origin": "https://art.example"}, 0),
        ({"host": "art.example"}, 0),
        ({"host": "x@localhost"}, 421),
        ({}, 421),
    ],
)
def test_who_may_come_in(headers: dict[str, str], status: int) -> None:
    try:
        check("GET", "/", headers, ["art.example"])
        found = 0
    except Refusal as refusal:
        found = refusal.status
    assert found == status


def test_another_site_changes_nothing(front: Front, idle: Service) -> None:
    before = len(idle.studio.store.list())
    for path in ("/api/jobs", "/-/start", "/-/install"):
        answer = front.client.post(path, json={"kind": "train", "settings": {}}, headers=FOREIGN)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "other_origin"
    assert len(idle.studio.store.list()) == before


def test_the_browser_never_sees_the_token(tmp_path: Path) -> None:
    token = "a token that nobody guesses"
    with (
        serving(Options(tmp_path / "workspace", token=token)) as service,
        fronting(settings_for(tmp_path, service.address.removeprefix("http://"), token=token)) as front,
    ):
        assert service.client.get("/api/jobs").status_code == 401
        answer = front.client.get("/api/jobs", headers={"cookie": "host=1", "authorization": "Bearer of the host"})
        assert answer.status_code == 200 and token not in str(answer.headers)
        assert token not in front.client.get("/", headers={"accept": "text/html"}).text
        assert token not in front.client.get("/-/status").text and front.client.get("/-/status").json()["state"] == "ready"


def test_a_wrong_token_is_told_once(tmp_path: Path) -> None:
    with (
        serving(Options(tmp_path / "workspace", token="a token that nobody guesses")) as service,
        fronting(settings_for(tmp_path, service.address, token="another")) as front,
    ):
        status = front.client.get("/-/status").json()
        assert status["state"] == "failed" and "another token" in status["what"] and "PERSONALIZE_TOKEN" in status["hint"]


def test_events_come_as_they_happen(front: Front) -> None:
    """Through a middleware that compresses, too: each event is there before the next one happens."""
    dataset = front.client.post("/api/datasets", files=[("files", ("a.png", png(64), "image/png"))]).json()["id"]
    headers = {"accept": "text/event-stream", "accept-encoding": "gzip"}
    with front.client.stream("GET", "/api/events", headers=headers, timeout=20) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        changes = (line for line in stream.iter_lines() if line == "event: change")
        for _ in range(3):
            next(changes)
            assert front.client.post("/api/jobs", json={"settings": {**SHORT, "folder": dataset}}).status_code == 201


def test_a_stream_ends_when_the_browser_goes(front: Front, idle: Service) -> None:
    live = idle.studio.live
    wait(lambda: live._listeners, lambda count: count == 0)  # who listened before this test may still be on the way out
    with front.client.stream("GET", "/api/events", headers={"accept": "text/event-stream"}):
        wait(lambda: live._listeners, lambda count: count == 1)
    wait(lambda: live._listeners, lambda count: count == 0)


def test_what_came_before_a_connection_broke_is_heard() -> None:
    """A service that refuses an upload answers and hangs up, while the upload is still being sent."""

    async def read(broken: Exception) -> bytes:
        reader = Heard()
        reader.feed_data(b"HTTP/1.1 413")
        reader.set_exception(broken)
        return await reader.read(100) + await reader.read(100)

    assert asyncio.run(read(BrokenPipeError("gone"))) == b"HTTP/1.1 413"
    with pytest.raises(OSError, match="no route"):
        asyncio.run(read(OSError("no route")))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at memory in /proc")
def test_a_large_upload_takes_little_memory(tmp_path: Path) -> None:
    """200 MB go and come back whole through a host whose memory grows by less than a tenth of them."""
    size, piece = 200 << 20, random.Random(7).randbytes(1 << 20)
    sent, back = hashlib.sha256(), hashlib.sha256()

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
        for block in (png(64), *(number.to_bytes(4, "big") + piece[4:] for number in range(size >> 20))):
            sent.update(block)  # a picture with much behind it
            yield block
        yield b"\r\n--x--\r\n"

    with (
        serving(Options(tmp_path / "workspace")) as service,
        apart(settings_for(tmp_path, service.address)) as (address, process),
        httpx.Client(base_url=address, timeout=300, trust_env=False) as client,
    ):
        client.get("/health").raise_for_status()
        before = peak_memory(process)
        answer = client.post("/api/datasets", content=body(), headers={"content-type": "multipart/form-data; boundary=x"})
        assert answer.status_code == 201, answer.text
        with client.stream("GET", f"/api/datasets/{answer.json()['id']}/pictures/a.png") as stream:
            for block in stream.iter_bytes():
                back.update(block)
        grown = peak_memory(process) - before
    assert back.digest() == sent.digest() and grown < size / 10, f"{grown >> 20} MB"


def test_an_upload_is_refused_as_the_service_refuses_it(front: Front) -> None:
    answer = front.client.post("/api/jobs", content=b"{" + b" " * 200_000 + b"}", headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"


def test_a_body_without_a_length(front: Front) -> None:
    def pieces() -> object:
        yield b'{"kind": "train", '
        time.sleep(0.01)
        yield b'"settings": {"folder": "none"}}'

    answer = front.client.post("/api/jobs", content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404) and "none" in answer.text


def test_a_service_that_is_down(tmp_path: Path) -> None:
    """It is told as such; who looks for a page is sent to the panel, which starts it."""
    with fronting(settings_for(tmp_path, "http://127.0.0.1:9")) as front:
        answer = front.client.get("/api/jobs")
        assert answer.status_code == 502 and answer.json()["error"]["code"] == "service_down"
        page = front.client.get("/", headers={"accept": "text/html"})
        assert page.status_code == 303 and page.headers["location"] == f"{PREFIX}/-/"
        assert front.client.get("/-/").text.startswith("<!doctype html>")
        assert front.client.get("/-/status").json()["state"] == "stopped"
        failed = front.client.post("/-/start").json()
        assert failed["state"] == "failed" and "nothing answers" in failed["what"] and failed["hint"]
        assert front.client.get("/-/nothing").status_code == 404


def test_a_service_that_dies_in_the_middle(tmp_path: Path) -> None:
    with fronting(settings_for(tmp_path, "http://127.0.0.1:9")) as front:
        front.bridge.service._seen = (time.monotonic() + 60, Upstream("http://127.0.0.1:9"))
        assert front.client.get("/api/jobs").json()["error"]["code"] == "service_down"
        assert json.loads(front.client.get("/-/status").text)["state"] == "stopped"
