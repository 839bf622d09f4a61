"""The adapters of a workspace: what was trained, merged or sent, told from the files' headers; and where they can be sent."""

from __future__ import annotations

import filecmp
import hashlib
import json
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..adapters.describe import Description, describe
from ..errors import AdapterError, HostileFileError
from ..formats.header import PICKLES
from ..io import atomic
from ..jobs.workspace import Workspace
from ..reports.adapter.summary import as_json
from ..text import plain
from .errors import Refusal, not_found
from .files import copy
from .options import Limits
from .paths import Places, file_name
from .uploads import folder_aside

ENDING = ".safetensors"
CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
SIDECARS = (".json", ".png", ".txt")  # beside an adapter: how image UIs use it, its preview, its description
MOST = 2 << 30  # bytes of an adapter that is sent

State = tuple[int, int]  # nanoseconds and bytes of a file


@dataclass(frozen=True)
class Adapter:
    """An adapter file of the library, as its header tells."""

    id: str
    path: Path
    description: Description
    changed: float

    def record(self) -> dict[str, Any]:
        """What is told of it in a list."""
        one = self.description
        ranks = sorted(one.ranks)
        return {
            "id": self.id,
            "object": "adapter",
            "name": self.path.stem,
            "path": str(self.path),
            "kind": one.kind,
            "family": one.family,
            "ranks": ranks,
            "trigger": one.trigger,
            "title": one.title,
            "dtype": one.dtype,
            "bytes": one.bytes,
            "preview": f"/api/adapters/{self.id}/preview" if preview_of(self.path) else None,
            "checkpoint": self.path.parent.name == CHECKPOINTS,
            "made_by": made_by(one.metadata),
            "changed_at": int(self.changed),
        }


class Library:
    """The adapter files below the workspace's runs and adapters. Headers are read once for each state of a file."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._read: dict[Path, tuple[State, Description | None]] = {}
        self._lock = threading.Lock()

    def all(self, checkpoints: bool = False) -> list[Adapter]:
        """All of them, the newest first."""
        found = []
        for place in (self.workspace.adapters, self.workspace.runs):
            for path in place.rglob(f"*{ENDING}"):
                if (
                    (checkpoints or path.parent.name != CHECKPOINTS)
                    and not path.name.startswith(".")
                    and (one := self._adapter(path))
                ):
                    found.append(one)
        return sorted(found, key=lambda one: (-one.changed, one.id))

    def get(self, id: str) -> Adapter:
        """One of them, checkpoints too. Raises Refusal."""
        for one in self.all(checkpoints=True):
            if one.id == id:
                return one
        raise not_found("adapter", id, "GET /api/adapters lists them")

    def details(self, id: str) -> dict[str, Any]:
        """Everything in its header."""
        one = self.get(id)
        told: dict[str, Any] = json.loads(as_json(one.description))
        return one.record() | {"header": told}

    def add(self, name: str, file: BinaryIO, limits: Limits) -> Adapter:
        """Keep an adapter that was sent. Raises Refusal for its name, AdapterError for what is none: pickles are never opened."""
        name = file_name(name)
        if Path(name).suffix.lower() in PICKLES:
            raise HostileFileError(f"{name} is a pickle, which can run code when opened", "send a .safetensors")
        if Path(name).suffix.lower() != ENDING:
            raise AdapterError(f"{plain(name, 80)} is no adapter", "send a .safetensors")
        with folder_aside(self.workspace.uploads) as aside:
            copy(file, aside / name, min(MOST, limits.upload))
            try:
                found = describe(aside / name)
            except AdapterError as error:
                raise type(error)(error.what.replace(f"{aside}/", ""), error.hint) from None
            if found.kind == "unknown" or not found.is_learned:
                raise AdapterError(
                    f"{plain(name, 80)} holds no adapter", "send a LoRA or another kind that `personalize show` knows"
                )
            path = self.workspace.adapters / name
            if path.exists():
                raise Refusal(409, "exists", f"there is an adapter called {path.stem}", "give it another name")
            (aside / name).rename(path)
        return self._adapter(path) or self.get(id_of(self.workspace, path))

    def bring(self, path: Path, limits: Limits) -> Adapter:
        """Keep a copy of an adapter file of this machine with what lies beside it; what is here already is that.

        Raises as `add` does.
        """
        if not path.is_file():
            raise not_found("file", path.name)
        size = path.stat().st_size
        same = (one for one in self.all() if one.description.bytes == size and filecmp.cmp(one.path, path, shallow=False))
        if known := next(same, None):
            return known
        with path.open("rb") as file:
            found = self.add(path.name, file, limits)
        for beside in sidecars_of(path):
            shutil.copyfile(beside, found.path.with_suffix(beside.suffix))
        return found

    def remove(self, id: str) -> None:
        """Remove an adapter file with what lies beside it."""
        path = self.get(id).path
        for file in (path, *sidecars_of(path)):
            file.unlink(missing_ok=True)

    def send(self, id: str, folder: str, places: Places, replace: bool = False) -> list[Path]:
        """Copy an adapter into a folder that the user named, with what image UIs read beside it; returns the files."""
        path = self.get(id).path
        target = places.confine(folder, "folder")
        if not target.is_dir():
            raise not_found("folder", folder)
        files = [path, *sidecars_of(path)]
        if not replace and (there := next((target / one.name for one in files if (target / one.name).exists()), None)):
            raise Refusal(409, "exists", f"{there} is there already", "send replace=true to replace it")
        for file in files:
            with atomic(target / file.name) as temporary:
                shutil.copyfile(file, temporary)
        return [target / file.name for file in files]

    def _adapter(self, path: Path) -> Adapter | None:
        """An adapter file; None for another safetensors file, and for one that has just gone."""
        try:
            status = path.stat()
        except OSError:
            return None
        state = status.st_mtime_ns, status.st_size
        with self._lock:
            known = self._read.get(path)
        if known is None or known[0] != state:
            try:
                found = describe(path)
            except AdapterError:
                found = None
            known = state, found if found and found.is_learned else None
            with self._lock:
                self._read[path] = known
        return Adapter(id_of(self.workspace, path), path, known[1], status.st_mtime) if known[1] else None


def id_of(workspace: Workspace, path: Path) -> str:
    """The id of an adapter file: the same as long as it lies there."""
    return hashlib.sha256(workspace.relative(path).encode(errors="surrogateescape")).hexdigest()[:16]


def sidecars_of(path: Path) -> list[Path]:
    """What lies beside an adapter and belongs to it."""
    return [file for ending in SIDECARS if (file := path.with_suffix(ending)).is_file()]


def preview_of(path: Path) -> Path | None:
    """The picture beside an adapter."""
    return file if (file := path.with_suffix(".png")).is_file() else None


def made_by(metadata: dict[str, str] | Any) -> str:
    """How an adapter came to be, in a word."""
    if "personalize.merge" in metadata:
        return "merge"
    return "training" if "personalize.recipe" in metadata else ""
