"""The studio's service as the nodes use it: JSON in and out, files sent and fetched; started where it does not run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.response import addinfourl

from ..personalize_studio.proxy import Upstream
from ..personalize_studio.service import Service, StartError

ANSWER = 60.0  # seconds without a byte after which an answer is given up
ENDED = ("succeeded", "failed", "cancelled")
Part = tuple[str, str, Callable[[], Any]]  # a field, a file's name, and what opens it for reading bytes


class StudioError(RuntimeError):
    """What the studio has to say against something, with what helps. ComfyUI shows it beside the node."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class Client:
    """The service. Where it does not run it is started, which takes some seconds."""

    def __init__(self, service: Service) -> None:
        self.service = service
        try:
            self.upstream: Upstream = service.find() or service.start()
        except StartError as error:
            tail = f"\n{error.log[-1500:]}" if error.log else ""
            raise StudioError(f"{error.what}: {error.hint}. The tab Personalize in the sidebar does that.{tail}") from error

    @property
    def is_here(self) -> bool:
        """Whether the service runs on this machine and sees its files."""
        return not self.service.settings.url

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> addinfourl:
        """One request; `body` is bytes or an open file. Raises StudioError."""
        own = {"Authorization": f"Bearer {self.upstream.token}"} if self.upstream.token else {}
        request = urllib.request.Request(self.upstream.url + path, body, {**own, **(headers or {})}, method=method)
        try:
            answer: addinfourl = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=ANSWER)
        except urllib.error.HTTPError as error:
            raise refusal_of(error) from None
        except OSError as error:
            self.service.forget()
            raise StudioError(f"the studio does not answer ({error}); queue again, and it is started again") from error
        return answer

    def get(self, path: str) -> Any:
        """What a route tells."""
        with self.ask("GET", path) as answer:
            return json.load(answer)

    def post(self, path: str, value: Any = None) -> Any:
        """What a route answers to a JSON value."""
        with self.ask("POST", path, json.dumps(value or {}).encode(), {"Content-Type": "application/json"}) as answer:
            return json.load(answer)

    def send(self, path: str, parts: Sequence[Part], **fields: str) -> Any:
        """What a route answers to files and fields; as a stream, whatever their size."""
        with tempfile.TemporaryFile() as body:
            kind = write_form(body, parts, fields)
            size = body.tell()
            body.seek(0)
            with self.ask("POST", path, body, {"Content-Type": kind, "Content-Length": str(size)}) as answer:
                return json.load(answer)

    def fetch(self, path: str, to: Path) -> Path:
        """A file, all or nothing."""
        temporary = to.with_name(f"{to.name}.{uuid.uuid4().hex[:8]}")
        try:
            with self.ask("GET", path) as answer, temporary.open("wb") as file:
                shutil.copyfileobj(answer, file)
            os.replace(temporary, to)
        finally:
            temporary.unlink(missing_ok=True)
        return to

    def read(self, path: str) -> bytes:
        """A small file."""
        with self.ask("GET", path) as answer:
            return answer.read()

    def find_adapter(self, path: str) -> str:
        """The id of an adapter file of this machine in the studio's library, which keeps a copy of what it does not have."""
        if self.is_here:
            try:
                return str(self.post("/api/adapters/bring", {"path": path})["id"])
            except StudioError as error:
                if error.code != "exists":  # the library has another one of that name
                    raise
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else hashlib.sha256(file.read())
        name = f"{Path(path).stem}-{digest.hexdigest()[:8]}"
        known = [str(one["id"]) for one in self.get("/api/adapters")["data"] if one["name"] == name]
        return (
            known[0]
            if known
            else str(self.send("/api/adapters", [("file", f"{name}.safetensors", lambda: open(path, "rb"))])["id"])
        )


def refusal_of(error: urllib.error.HTTPError) -> StudioError:
    """What the service says in an error."""
    with error:
        try:
            said = json.load(error)["error"]
            return StudioError(str(said["message"]), str(said.get("code") or ""))  # which holds the hint
        except (ValueError, KeyError, TypeError):
            return StudioError(f"the studio answered with {error.code}")


def write_form(body: Any, parts: Sequence[Part], fields: Mapping[str, str]) -> str:
    """Write a multipart form; returns its content type."""
    edge = uuid.uuid4().hex
    for name, value in fields.items():
        body.write(f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for field, name, opener in parts:
        told = name.replace("\\", "/").replace('"', "%22").replace("\r", "").replace("\n", "")
        body.write(f'--{edge}\r\nContent-Disposition: form-data; name="{field}"; filename="{told}"\r\n'.encode())
        body.write(b"Content-Type: application/octet-stream\r\n\r\n")
        with opener() as file:
            shutil.copyfileobj(file, body)
        body.write(b"\r\n")
    body.write(f"--{edge}--\r\n".encode())
    return f"multipart/form-data; boundary={edge}"


def address(*parts: str) -> str:
    """A path of names.

    >>> address("api", "datasets", "my cat")
    '/api/datasets/my%20cat'
    """
    return "".join(f"/{quote(part, safe='')}" for part in parts)
