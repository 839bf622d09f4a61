"""The room Library: adapters, what they are, whether they are sound, and where they can be sent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, UploadFile
from starlette.responses import Response

from ...jobs import Job
from ..library import Adapter, made_by, preview_of
from ..requests import job_settings
from ..routes.common import Here, Name
from ..routes.datasets import UPLOADS
from ..routes.library import remove_adapter
from ..studio import Studio
from .render import Room, nothing, show

router = APIRouter(route_class=Room)
USUAL = 0.8  # strength of an adapter of which nothing is known


@dataclass(frozen=True)
class Book:
    """An adapter as the library shows it: the job it came from, and what the doctor said of it last."""

    adapter: Adapter
    origin: Job | None
    checkup: Job | None

    @property
    def preview(self) -> str:
        return f"/api/adapters/{self.adapter.id}/preview" if preview_of(self.adapter.path) else ""

    @property
    def made(self) -> str:
        return made_by(self.adapter.description.metadata)

    @property
    def findings(self) -> list[Mapping[str, Any]]:
        """What the doctor found, once it has looked."""
        files = (self.checkup.result or {}).get("files") if self.checkup else None
        return files[0]["findings"] if files else []


def books(here: Studio) -> list[Book]:
    """All adapters, the newest first."""
    jobs = here.store.list()
    origins = [job for job in jobs if job.kind != "doctor" and job.state == "succeeded"]
    return [Book(one, origin_of(one, origins), checkup_of(one, jobs)) for one in here.library.all()]


def origin_of(adapter: Adapter, jobs: list[Job]) -> Job | None:
    """The job that wrote an adapter."""
    return next((job for job in jobs if job.folder in (adapter.path, adapter.path.parent)), None)


def checkup_of(adapter: Adapter, jobs: list[Job]) -> Job | None:
    """The newest examination of a file as it is now."""
    own = [job for job in jobs if job.kind == "doctor" and job.settings.get("files") == [str(adapter.path)]]
    return next((job for job in sorted(own, key=lambda job: -job.created_at) if job.created_at >= adapter.changed), None)


def book_of(here: Studio, id: str) -> Book:
    """One of them. Raises Refusal."""
    adapter, jobs = here.library.get(id), here.store.list()
    return Book(adapter, origin_of(adapter, [job for job in jobs if job.kind != "doctor"]), checkup_of(adapter, jobs))


@router.get("/library")
def show_library(request: Request, here: Here) -> Response:
    """All adapters."""
    return show(request, "library", room="library", books=books(here), hosts=here.hosts)


@router.get("/library/-/list")
def list_books(request: Request, here: Here) -> Response:
    """All adapters, as a part of the page."""
    return show(request, "_library", books=books(here), hosts=here.hosts)


@router.post("/library", tags=[UPLOADS])
def add(here: Here, files: Annotated[list[UploadFile], File()]) -> Response:
    """Bring adapters."""
    for file in files:
        here.library.add(file.filename or "", file.file, here.options.limits)
    return nothing("changed")


@router.get("/library/{id}/health")
def health(request: Request, here: Here, id: Name) -> Response:
    """What the doctor said, or how far it is."""
    return show(request, "_health", book=book_of(here, id))


@router.post("/library/{id}/health")
def check(request: Request, here: Here, id: Name) -> Response:
    """Let the doctor look."""
    adapter = here.library.get(id)
    here.store.add("doctor", job_settings(here, "doctor", {"files": [id]}), name=f"health of {adapter.path.stem}")
    return show(request, "_health", book=book_of(here, id))


@router.post("/library/{id}/send")
def send(
    request: Request, here: Here, id: Name, folder: Annotated[str, Form()], replace: Annotated[bool, Form()] = False
) -> Response:
    """Copy an adapter into the folder of an image UI."""
    adapter = here.library.get(id)
    files = here.library.send(id, folder, here.targets, replace)
    told = {"name": files[0].stem, "trigger": adapter.description.trigger or "", "weight": weight_of(adapter.path)}
    return show(request, "_sent", path=files[0], folder=Path(folder), told=told)


def weight_of(path: Path) -> float:
    """The strength that suits an adapter, as the file beside it tells image UIs."""
    try:
        given = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["preferred weight"]
        return round(float(given), 2) or USUAL
    except (OSError, ValueError, KeyError, TypeError):
        return USUAL


@router.post("/library/{id}/remove")
def remove(here: Here, id: Name) -> Response:
    """Remove an adapter."""
    remove_adapter(here, id)
    return nothing("changed")
