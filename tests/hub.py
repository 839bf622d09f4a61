"""A hub of one repository on this machine: what huggingface_hub asks of a server when it lists and downloads files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40


@contextlib.contextmanager
def serving(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, the files that were downloaded so far) of a server of `folder` as repository `name`."""
    taken: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(send=False)

        def do_GET(self) -> None:
            self.answer(send=True)

        def answer(self, send: bool) -> None:
            path = unquote(urlparse(self.path).path)
            files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            if path.startswith(f"/api/models/{name}/tree/"):
                entries = [
                    {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": "0" * 40} for file in files
                ]
                self.reply(json.dumps(entries).encode(), send, "application/json")
            elif path.startswith(f"/api/models/{name}"):
                about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                self.reply(json.dumps(about).encode(), send, "application/json")
            elif path.startswith(f"/{name}/resolve/") and (file := path.split("/", 5)[5]) in files:
                taken.extend([file] if send else [])
                self.reply((folder / file).read_bytes(), send, "application/octet-stream")
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound" if name not in path else "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def reply(self, body: bytes, send: bool, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if send:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", taken
    finally:
        server.shutdown()
        server.server_close()
