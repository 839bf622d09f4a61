"""Who may call the service: host names, origins, tokens, cookies; and what browsers are told."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from servers import Service, serving

from personalize.errors import RecipeError
from personalize.service import security
from personalize.service.options import Options, find_token, is_local
from personalize.service.security import COOKIE, cookie_of

TOKEN = "a token of the tests, long enough"


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a token."""
    with serving(Options(tmp_path_factory.mktemp("closed") / "workspace", token=TOKEN)) as service:
        yield service


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "x@localhost", "", "a b"]
)
def test_other_host_names_are_refused(idle: Service, host: str) -> None:
    answer = idle.client.get("/health", headers={"Host": host})
    assert answer.status_code == 421 or (answer.status_code == 400 and not host.strip("a b")), (
        answer.text
    )  # h11 itself refuses some
    if answer.status_code == 421:
        assert answer.json()["error"]["code"] == "unknown_host"


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:1", "[::1]:80", "127.1.2.3"])
def test_names_of_this_machine_are_taken(idle: Service, host: str) -> None:
    assert idle.client.get("/health", headers={"Host": host}).json()["status"] == "ok"


def test_a_proxys_name_is_taken_where_it_was_named(tmp_path: Path) -> None:
    with serving(Options(tmp_path / "w", token=TOKEN, names=("studio.example",))) as service:
        headers = {"Host": "studio.example", "Authorization": f"Bearer {TOKEN}"}
        assert service.client.get("/api/jobs", headers=headers).status_code == 200
        assert service.client.get("/api/jobs", headers=headers | {"Host": "other.example"}).status_code == 421


def test_pages_of_other_sites_can_do_nothing(idle: Service) -> None:
    host = idle.address.removeprefix("http://")
    refused = [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},  # another port of this machine is another site
        {"Origin": f"http://{host}.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ]
    for headers in refused:
        for method, path in (("POST", "/api/jobs"), ("GET", "/api/jobs"), ("DELETE", "/api/datasets/x"), ("GET", "/api/events")):
            answer = idle.client.request(method, path, headers=headers)
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "other_origin", (headers, method, path)
            assert "access-control-allow-origin" not in answer.headers
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert idle.client.options("/api/jobs", headers=preflight).status_code == 403
    form = {"Origin": "https://evil.example", "Content-Type": "text/plain"}  # what a form can send without being asked
    assert idle.client.post("/v1/fine_tuning/jobs", headers=form, content='{"model": "pocket"}').status_code == 403


def test_the_own_page_and_links_to_it_work(idle: Service) -> None:
    own = {"Origin": idle.address, "Sec-Fetch-Site": "same-origin"}
    assert idle.client.get("/api/jobs", headers=own).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert idle.client.get("/", headers=link).status_code == 200
    assert idle.client.post("/login", headers=link).status_code == 403


def test_without_the_token_nothing_is_told(closed: Service) -> None:
    for method, path in [("GET", "/api/jobs"), ("POST", "/v1/files"), ("GET", "/api/openapi.json"), ("GET", "/nowhere"),
                         ("GET", "/health/"), ("GET", "//health"), ("GET", "/static/../api/jobs"),
                         ("GET", "/api/events")]:  # fmt: skip
        answer = closed.client.request(method, path)
        assert answer.status_code == 401 or (path == "/static/../api/jobs" and answer.status_code == 404), (path, answer.text)
        if answer.status_code == 401:
            assert answer.json()["error"]["type"] == "authentication_error" and answer.headers["www-authenticate"] == "Bearer"
    assert closed.client.get("/health").status_code == 200  # that it is there is no secret
    assert closed.client.get("/static/page.css").status_code == 200


@pytest.mark.parametrize(
    "given", ["", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Bearer \xff"]
)
def test_wrong_tokens(closed: Service, given: str) -> None:
    assert closed.client.get("/api/jobs", headers={"Authorization": given.encode("latin-1")}).status_code == 401  # type: ignore[dict-item]


def test_the_right_token(closed: Service) -> None:
    assert closed.client.get("/api/jobs", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert closed.client.get("/api/jobs", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200


def test_tokens_are_compared_in_constant_time(closed: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []
    compare = security.hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or compare(a, b))
    closed.client.get("/api/jobs", headers={"Authorization": "Bearer no", "Cookie": f"{COOKIE}=no"})
    assert [known for _, known in seen] == [TOKEN.encode(), cookie_of(TOKEN).encode()]


def test_logging_in_gives_a_cookie(closed: Service) -> None:
    with httpx.Client(base_url=closed.address, trust_env=False) as browser:
        first = browser.get("/", headers={"Accept": "text/html"})
        assert (first.status_code, first.headers["location"]) == (303, "/login")
        assert 'type="password"' in browser.get("/login").text
        assert browser.post("/login", data={"token": "wrong"}).status_code == 401 and not browser.cookies
        answer = browser.post("/login", data={"token": TOKEN})
        cookie = answer.headers["set-cookie"]
        assert answer.status_code == 303 and "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and TOKEN not in cookie
        assert browser.get("/api/jobs").status_code == 200 and browser.get("/").status_code == 200
        browser.post("/logout")
        assert browser.get("/api/jobs").status_code == 401
    for wrong in ("x", cookie_of(TOKEN)[:-1], f'"{cookie_of(TOKEN)}x"', "\x01", TOKEN):
        assert closed.client.get("/api/jobs", headers={"Cookie": f"{COOKIE}={wrong}"}).status_code == 401


def test_browsers_are_told_to_run_nothing_inline(idle: Service) -> None:
    for path in ("/", "/login", "/health", "/api/jobs", "/nowhere", "/static/page.css"):
        headers = idle.client.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and policy["frame-ancestors"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["cross-origin-resource-policy"] == "same-origin"
    for path in ("/", "/login"):
        page = idle.client.get(path).text
        scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
        assert all(' src="/static/' in where and not what for where, what in scripts)
        assert "style=" not in page and "<style" not in page and "onclick" not in page
        assert all(at.startswith(("/", "#")) for at in re.findall(r'(?:src|href|action)="([^"]*)"', page))


def test_off_this_machine_a_token_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host, names in (("0.0.0.0", ()), ("::", ()), ("192.168.0.7", ()), ("127.0.0.1", ("studio.example",))):
        with pytest.raises(RecipeError, match="needs a token"):
            Options(tmp_path, host, names=names)
    with pytest.raises(RecipeError, match="at least 16"):
        Options(tmp_path, token="short")
    assert TOKEN not in repr(Options(tmp_path, token=TOKEN))
    monkeypatch.delenv("PERSONALIZE_TOKEN", raising=False)
    assert find_token(tmp_path, needed=False) == ("", None)
    token, path = find_token(tmp_path, needed=True)
    assert path and len(token) >= 32 and find_token(tmp_path, needed=True) == (token, path)
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv("PERSONALIZE_TOKEN", TOKEN)
    assert find_token(tmp_path, needed=False) == (TOKEN, None)
    assert is_local("LOCALHOST") and not is_local("example.com")


def test_the_command_off_this_machine_says_where_the_token_is_and_not_what(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "personalize",
        "serve",
        "--workspace",
        str(tmp_path / "w"),
        "--port",
        "0",
        "--host",
        "0.0.0.0",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PERSONALIZE_TOKEN"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout and process.stderr
        ready, told = process.stdout.readline(), process.stdout.readline()
        address = ready.split()[-1]
        token = (tmp_path / "w" / "token").read_text().strip()
        assert address.startswith("http://127.0.0.1:") and str(tmp_path / "w" / "token") in told
        assert httpx.get(f"{address}/health", trust_env=False).status_code == 200
        assert httpx.get(f"{address}/api/jobs", trust_env=False).status_code == 401
        headers = {"Authorization": f"Bearer {token}", "Host": "192.168.0.7:8765"}  # an address cannot be made to point elsewhere
        assert httpx.get(f"{address}/api/jobs", headers=headers, trust_env=False).status_code == 200
        assert httpx.get(f"{address}/api/jobs", headers=headers | {"Host": "evil.example"}, trust_env=False).status_code == 421
        process.terminate()
        rest = ready + told + process.stdout.read() + process.stderr.read()
        assert process.wait(60) == 0 and token not in rest
