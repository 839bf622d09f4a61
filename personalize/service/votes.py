"""Which of two pictures people like better, kept for tuning by preference: one line of JSON for each vote."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from ..io import disk_error
from ..jobs.workspace import Workspace

_LOCK = threading.Lock()


class Votes:
    """The votes of a workspace, in votes.jsonl: pictures by their paths below the workspace, with how each was drawn."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    @property
    def file(self) -> Path:
        return self.workspace.root / "votes.jsonl"

    def all(self, run: str | None = None) -> list[dict[str, Any]]:
        """All votes, or those about one training, the oldest first. A line that a crash left half written is left out."""
        try:
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        found = [vote for line in lines if (vote := _read(line))]
        return [vote for vote in found if run is None or vote.get("run") == run]

    def add(self, run: str, prompt: str, seed: int, chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
        """Keep a vote. `chosen` and `rejected` say where each picture is and how it was drawn. Raises OutputError."""
        vote = {"at": time.time(), "run": run, "prompt": prompt, "seed": seed, "chosen": chosen, "rejected": rejected}
        try:
            with _LOCK, self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(vote, ensure_ascii=True) + "\n")
        except OSError as error:
            raise disk_error(self.file, error) from error
        return vote


def _read(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "chosen" in found and "rejected" in found else None
