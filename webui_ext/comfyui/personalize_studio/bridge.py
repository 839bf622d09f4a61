"""Everything that lies below the prefix of a host, as one function from a request to an answer.

PREFIX/-/...   the plugin's own: the panel that makes the environment and starts the service, its state, and a host's own actions
PREFIX/...     the studio, as long as its service answers

    bridge = Bridge(settings, "/personalize", {"unload": unload})
    answer = await bridge.handle("GET", "/jobs", "", headers, body)      # what the host's route was asked for
    ... send answer.status, answer.headers, and each piece of answer.body ...
    await answer.close()
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import environment
from .proxy import Answer, Refusal, check, forward
from .service import Service, StartError
from .settings import Settings

OWN = "/-/"
FILES = {"": ("panel.html", "text/html; charset=utf-8"), "panel.js": ("panel.js", "text/javascript; charset=utf-8"),
         "theme.js": ("theme.js", "text/javascript; charset=utf-8"),
         "panel.css": ("panel.css", "text/css; charset=utf-8")}  # fmt: skip
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'self'")  # fmt: skip
SAFE = (("cache-control", "no-store"), ("content-security-policy", POLICY), ("x-content-type-options", "nosniff"),
        ("referrer-policy", "same-origin"))  # fmt: skip
DEFAULT = "default"  # instead of an address of torch's builds: wherever pip and uv look by themselves
LONGEST = 1 << 20  # bytes of a body that is meant for the plugin itself
Action = Callable[[dict[str, Any]], Any]  # what a host does when its page asks: JSON object -> JSON; in a thread


class Bridge:
    """What a host's routes call. One for each process of a host."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        prefix: str,
        actions: Mapping[str, Action] | None = None,
        base: Callable[[], str] = lambda: "",
    ) -> None:
        """`base` tells the path of the checkpoint that the host draws with, which trainings then begin with; "" for none."""
        self.read_settings, self.prefix, self.actions, self.base = settings, prefix, dict(actions or {}), base
        self._service = Service(settings())
        self.maker: subprocess.Popen[bytes] | None = None

    @property
    def service(self) -> Service:
        """The service, by the settings as they are now."""
        settings = self.read_settings()
        if settings != self._service.settings:
            self._service.stop()
            self._service = Service(settings)
        return self._service

    async def handle(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: AsyncIterator[bytes], root: str = ""
    ) -> Answer:
        """Answer one request. `path` is decoded and begins with `/` behind the prefix, `headers` are in lower case, `root` is the
        path below which the host itself is reached."""
        try:
            target = quote(path, safe="/!$&'()*+,;=:@~-._")
            own = path.startswith(OWN)
            check(method, "/" if own else target, headers, self.service.settings.names)
            if own:
                return await self._answer_own(method, path[len(OWN) :], body)
            upstream = await asyncio.to_thread(self.service.find)
            if not upstream:
                raise Refusal(502, "service_down", "the studio is not running", "it is started from its tab")
            target = f"{target}?{query}" if query else target
            try:
                told = {"x-forwarded-prefix": root + self.prefix, "x-personalize-base": quote(self.base())}
                return await forward(upstream, told, method, target, headers, body)
            except Refusal:
                self.service.forget()
                raise
        except Refusal as refusal:
            return refuse(
                refusal, is_page="text/html" in headers.get("accept", "") and "hx-request" not in headers, root=root + self.prefix
            )

    async def _answer_own(self, method: str, name: str, body: AsyncIterator[bytes]) -> Answer:
        if method == "GET" and name in FILES:
            file, kind = FILES[name]
            return whole(200, kind, (Path(__file__).parent / file).read_bytes())
        if method == "GET" and name == "status":
            return as_json(await asyncio.to_thread(self.status))
        if method == "POST" and name in ("install", "cancel", "start"):
            return as_json(await asyncio.to_thread(getattr(self, name)))
        if method == "POST" and name in self.actions:
            given = await read_object(body)
            return as_json(await asyncio.to_thread(self.actions[name], given))
        raise Refusal(404, "not_found", "the plugin has nothing by that name")

    # ------------------------------------------------------------ what the panel shows and does; all in threads

    def status(self) -> dict[str, Any]:
        """What there is, and what is to be done: `state` is ready, starting, installing, missing, stopped or failed."""
        service, settings = self.service, self.service.settings
        about = {
            "workspace": str(settings.place),
            "python": str(settings.interpreter),
            "own": not (settings.python or settings.url),
        }
        if not service.is_starting and service.find():
            return about | {"state": "ready"}
        if service.is_starting:
            return about | {"state": "starting", "log": environment.read_tail(service.log)}
        made = environment.read_state(settings.home) if about["own"] else {"state": ""}
        if made["state"] == "running":
            return about | self._progress(settings, made)
        if service.error:
            error = service.error
            return about | {"state": "failed", "what": error.what, "hint": error.hint, "log": error.log, "again": "start"}
        if made["state"] == "failed":
            log = environment.read_tail(settings.home / "environment.log")
            return about | {
                "state": "failed",
                "what": made["error"],
                "hint": environment.hint_for(log),
                "log": log,
                "again": "install",
            }
        is_old = bool(settings.source) and made.get("package") != settings.source
        if about["own"] and (made["state"] != "ready" or is_old or not settings.interpreter.exists()):
            return about | {"state": "missing"} | self._plan(settings)
        return about | {"state": "stopped"}

    def _plan(self, settings: Settings) -> dict[str, Any]:
        """What an installation would do."""
        build = environment.build_of(index_of(settings), environment.SYSTEM)
        download, disk = environment.sizes(build)
        free = shutil.disk_usage(settings.home).free
        source, how = (
            settings.source,
            "uv" if shutil.which("uv") else "venv and pip" if environment.can_make() else "uv, which pip brings",
        )
        return {"build": build, "download": download, "disk": disk, "free": free, "source": source, "how": how,
                "place": str(settings.environment), "enough": free > disk}  # fmt: skip

    def _progress(self, settings: Settings, made: dict[str, Any]) -> dict[str, Any]:
        build = environment.build_of(index_of(settings), environment.SYSTEM)
        return {"state": "installing", "doing": made["doing"], "step": made["step"], "steps": made["steps"],
                "size": environment.size_of(settings.environment), "disk": environment.sizes(build)[1],
                "log": environment.read_tail(settings.home / "environment.log")}  # fmt: skip

    def install(self) -> dict[str, Any]:
        """Begin to make the environment, or go on."""
        settings = self.service.settings
        if not settings.source:
            raise_no_source()
        if environment.read_state(settings.home)["state"] != "running":
            self.service.error = None
            self._end_maker()
            try:
                self.maker = environment.begin(settings.home, settings.source, index_of(settings))
            except OSError as error:
                raise Refusal(409, "not_possible", f"{settings.home} cannot be written to: {error.strerror}") from error
        return self.status()

    def cancel(self) -> dict[str, Any]:
        """End an installation; what is finished is kept."""
        self._end_maker()
        return self.status()

    def _end_maker(self) -> None:
        if self.maker and self.maker.stdin:
            self.maker.stdin.close()
            self.maker.wait()
            self.maker = None

    def start(self) -> dict[str, Any]:
        """Start the service, and wait until it answers or has failed."""
        service = self.service
        if not service.is_starting:
            try:
                service.start()
            except StartError:
                pass  # status() tells it
        return self.status()

    def close(self) -> None:
        """The host ends: so does an installation, and the service when no other UI needs it."""
        self._end_maker()
        self._service.stop()


def index_of(settings: Settings) -> str:
    """Where torch is installed from: "" is wherever pip and uv look by themselves."""
    found = settings.index or environment.torch_index(environment.accelerator(), environment.SYSTEM)
    return "" if found == DEFAULT else found


def raise_no_source() -> None:
    """Raise Refusal: nobody knows what should be installed."""
    raise Refusal(409, "no_source", "the plugin was copied without what it installs",
                  "name the folder or wheel of personalize in the settings, or in PERSONALIZE_PACKAGE")  # fmt: skip


async def read_object(body: AsyncIterator[bytes]) -> dict[str, Any]:
    """A JSON object. Raises Refusal."""
    data = b""
    async for piece in body:
        data += piece
        if len(data) > LONGEST:
            raise Refusal(413, "too_large", "the body of the request is too large")
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Refusal(400, "invalid_value", "the body is no JSON object")
    return found


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    """Bytes as a body."""
    for one in data:
        yield one


def whole(status: int, kind: str, data: bytes, *headers: tuple[str, str]) -> Answer:
    """An answer that is there at once."""
    own = [("content-type", kind), ("content-length", str(len(data))), *SAFE, *headers]
    return Answer(status, own, pieces(data))


def as_json(value: Any, status: int = 200) -> Answer:
    """An answer for the plugin's scripts."""
    return whole(status, "application/json", json.dumps(value).encode())


def refuse(refusal: Refusal, is_page: bool, root: str) -> Answer:
    """A refusal: as JSON in the service's shape; who looks for a page of a studio that is not there is sent to the panel."""
    if is_page and refusal.code == "service_down":
        return whole(303, "text/plain", b"", ("location", root + OWN))
    message = f"{refusal.message} ({refusal.hint})" if refusal.hint else refusal.message
    error = {"message": message, "type": "plugin_error", "param": None, "code": refusal.code, "hint": refusal.hint}
    if is_page:
        return whole(refusal.status, "text/plain; charset=utf-8", message.encode())
    return as_json({"error": error}, refusal.status)
