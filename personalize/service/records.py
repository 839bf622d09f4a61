"""Jobs as the service's own routes tell them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..jobs import Job

SHOWN = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".safetensors": "application/octet-stream",
         ".json": "application/json", ".jsonl": "text/plain; charset=utf-8", ".toml": "text/plain; charset=utf-8",
         ".txt": "text/plain; charset=utf-8", ".html": "text/html; charset=utf-8"}  # fmt: skip  # what of a job's folder is shown


def job_record(job: Job) -> dict[str, Any]:
    """A job as JSON; where its files are, as addresses under `files`."""
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "name": job.name,
        "state": job.state,
        "asked": job.asked,
        "priority": job.priority,
        "needs": job.needs,
        "settings": job.settings,
        "progress": job.progress,
        "error": job.error,
        "result": job.result,
        "files": addresses(job),
        "metadata": job.metadata,
        "attempts": job.attempts,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def addresses(job: Job) -> dict[str, Any]:
    """The files that a job's result names, as addresses."""
    found: dict[str, Any] = {}
    for key, value in (job.result or {}).items():
        if isinstance(value, str) and (at := address(job, value)):
            found[key] = at
        elif key == "pictures" and isinstance(value, list):
            paths = [one.get("path") for one in value if isinstance(one, Mapping)]
            found[key] = [at for path in paths if isinstance(path, str) and (at := address(job, path))]
    return found


def address(job: Job, path: str | Path) -> str:
    """Where a file of a job is had; "" for one that is elsewhere. A relative path is below the job's folder."""
    if job.folder.suffix and job.folder == Path(path):  # a job that writes one file
        return f"/api/jobs/{job.id}/files/{quote(job.folder.name)}"
    try:
        below = (job.folder / path).relative_to(job.folder)
    except ValueError:
        return ""
    return f"/api/jobs/{job.id}/files/{quote(below.as_posix())}" if below.suffix.lower() in SHOWN else ""


def sample_records(job: Job, events: Iterable[tuple[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The sample pictures of a training, as far as it has drawn them: step, prompt, seed, strength, address."""
    found = {}
    for _, record in events:
        if record.get("event") in ("sample", "sweep") and isinstance(path := record.get("path"), str):
            keys = {key: record.get(key) for key in ("step", "prompt", "seed")}
            strength = record.get("strength", 0.0 if record.get("base") else 1.0)
            found[path] = keys | {"strength": strength, "base": bool(record.get("base")), "url": address(job, path)}
    return list(found.values())


def file_of(job: Job, name: str) -> Path | None:
    """A file of a job that may be shown; None for one that is not there, lies elsewhere, or is of another kind."""
    path = job.folder if job.folder.is_file() and job.folder.name == name else job.folder / name
    try:
        true, root = path.resolve(), job.folder.resolve()
    except (OSError, ValueError, RuntimeError):
        return None
    good = (true == root or true.is_relative_to(root)) and true.suffix.lower() in SHOWN and not true.name.startswith(".")
    return true if good and true.is_file() else None
