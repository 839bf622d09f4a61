"""The studio's service: found where it runs, else started in its own environment; shared by all UIs of one workspace."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.response import addinfourl

from .environment import read_tail
from .lease import Lease, alone
from .proxy import Upstream
from .settings import Settings

ANSWER = 3.0  # seconds that a service that is there takes to say so
START = 120.0  # seconds that one may take to come up: a cold disk and a large environment
FRESH = 2.0  # seconds for which an answer is believed
PAUSE = 0.2  # seconds between two looks


class StartError(Exception):
    """The service could not be started: what happened, what to do, and the end of its log."""

    def __init__(self, what: str, hint: str, log: str = "") -> None:
        super().__init__(what)
        self.what, self.hint, self.log = what, hint, log


class Service:
    """The service as one UI uses it. What takes time is done in threads; all of it may be called from any."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lease: Lease | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self.error: StartError | None = None
        self._starting = threading.Lock()
        self._seen: tuple[float, Upstream | None] = (-FRESH, None)

    @property
    def leases(self) -> Path:
        """Where UIs say that they need the service, and where its log lies."""
        return self.settings.place / "uis"

    @property
    def log(self) -> Path:
        return self.leases / "service.log"

    @property
    def is_starting(self) -> bool:
        return self._starting.locked()

    def find(self) -> Upstream | None:
        """The service, if it answers; looked for again only every few seconds."""
        when, found = self._seen
        if time.monotonic() - when < FRESH:
            return found
        try:
            found = self.look()
        except StartError as error:
            found, self.error = None, error
        if found and not self.settings.url:
            self._hold()
        self._seen = (time.monotonic(), found)
        return found

    def look(self) -> Upstream | None:
        """The service that is named, or that serves the workspace, if it answers. Raises StartError for a wrong token."""
        url = self.settings.url.rstrip("/")
        url = f"http://{url}" if url and "://" not in url else url
        try:
            if not url:
                url = (self.settings.place / "address").read_text(encoding="utf-8").strip()
            with ask(Upstream(url), "/health") as answer:  # before a token is told to whoever listens there
                if json.load(answer).get("status") != "ok":
                    return None
            upstream = Upstream(url, self.settings.token or read_token(self.settings.place))
            ask(upstream, "/api/hosts").close()
        except urllib.error.HTTPError as error:
            if error.code == 401:
                raise StartError(f"the service at {url} wants another token", "set PERSONALIZE_TOKEN to its token") from error
            return None
        except (OSError, ValueError, AttributeError):
            return None
        return upstream

    def start(self) -> Upstream:
        """The service, started if need be. Another UI may do so at the same time. Raises StartError, kept for the panel."""
        with self._starting:
            self._seen, self.error = (-FRESH, None), None
            try:
                return self._start()
            except OSError as error:
                self.error = StartError(f"{self.settings.place} cannot be written to: {error.strerror}", "name another workspace")
            except StartError as error:
                self.error = error
        raise self.error

    def forget(self) -> None:
        """Look again at the next question."""
        self._seen = (-FRESH, None)

    def stop(self) -> None:
        """Say that this UI does not need it any more: it ends when no other one does."""
        if self.lease:
            self.lease.release()
            self.lease = None

    def _start(self) -> Upstream:
        if self.settings.url:
            if found := self.look():
                return found
            raise StartError(f"nothing answers at {self.settings.url}", "start that service, or take PERSONALIZE_URL away")
        python = self.settings.interpreter
        if not python.is_file():
            raise StartError(f"there is no {python}", "make an environment, or name a Python that has personalize")
        self._hold()
        with alone(self.leases / "start.lock", START):
            if found := self.look():
                return found
            self.child = self._run(python)
            return self._wait(self.child)

    def _hold(self) -> None:
        """Need it from now on, and let it know the host's folders."""
        if not self.lease:
            self.lease = Lease(self.leases)
            register(self.settings.place, self.settings.folders)

    def _run(self, python: Path) -> subprocess.Popen[bytes]:
        """The process: of a session of its own, so that Ctrl-C in the host's terminal is not its business."""
        settings, keep = self.settings, Path(__file__).with_name("keep.py").resolve()
        command = [
            str(python),
            str(keep),
            str(self.leases),
            "serve",
            "--workspace",
            str(settings.place),
            "--port",
            str(settings.port),
        ]
        for device in settings.devices:
            command += ["--device", device]
        environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        environ |= {"PERSONALIZE_TOKEN": settings.token or make_token(settings.place), "PYTHONUNBUFFERED": "1"}
        own: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            own = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with self.log.open("wb") as log:
            where: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": settings.place}
            try:
                return subprocess.Popen(command, env=environ, **where, **own)
            except OSError as error:
                hint = "name a Python that has personalize, or none: then an environment is made"
                raise StartError(f"{python} cannot be run: {error.strerror}", hint) from error

    def _wait(self, child: subprocess.Popen[bytes]) -> Upstream:
        """The service as soon as it answers. Raises StartError where it ends, or takes too long."""
        end = time.monotonic() + START
        while child.poll() is None:
            if found := self.look():
                return found
            if time.monotonic() > end:
                child.kill()
                break
            time.sleep(PAUSE)
        tail = read_tail(self.log)
        raise StartError("the studio did not start", hint_for(tail, self.settings), tail)


def ask(upstream: Upstream, path: str) -> addinfourl:
    """Ask the service itself, past every proxy of the system. Raises OSError, also for a refusal."""
    request = urllib.request.Request(
        upstream.url + path, headers={"Authorization": f"Bearer {upstream.token}"} if upstream.token else {}
    )
    answer: addinfourl = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=ANSWER)
    return answer


def read_token(place: Path) -> str:
    """The token that lies in a workspace; "" where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return (place / "token").read_text(encoding="utf-8").strip()
    return ""


def make_token(place: Path) -> str:
    """The same; one is made where there is none. It is its owner's alone, and every UI of the workspace reads it there."""
    if token := read_token(place):
        return token
    token = secrets.token_urlsafe(32)
    temporary = place / f"token.{os.getpid()}"
    temporary.touch(0o600)
    temporary.write_text(token + "\n", encoding="utf-8")
    os.replace(temporary, place / "token")
    return token


def register(place: Path, folders: tuple[str, ...]) -> None:
    """Let the studio know folders of a UI: where it keeps adapters and base models. The service reads the file."""
    path = place / "folders.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = []
    if missing := [folder for folder in folders if folder not in before]:
        temporary = path.with_name(f"folders.json.{os.getpid()}")
        temporary.write_text(json.dumps([*before, *missing], indent=1), encoding="utf-8")
        os.replace(temporary, path)


# What the end of a log says, and what helps; {place}: the workspace, {source}: what would be installed
HINTS = (
    (
        "No module named",
        "{python} has no personalize with its service: install it there with `{python} -m pip install '{source}[serve]'`, or name"
        " none: then an environment is made",
    ),
    ("{place} is in use: ", "another program serves this workspace: end it, or name another workspace"),
    ("cannot listen", "another program listens on this port: set the port to 0"),
    ("No space left", "make room on the disk"),
)


def hint_for(log: str, settings: Settings) -> str:
    """What to do about a service that did not start."""
    facts = {
        "place": settings.place,
        "python": settings.interpreter,
        "source": settings.source or "FOLDER OR WHEEL OF PERSONALIZE",
    }
    return next(
        (hint.format(**facts) for words, hint in HINTS if words.replace("{place}", str(settings.place)) in log),
        "the log says why; make the environment again if its packages are broken",
    )
