"""The room Jobs: what runs, what waits, what became of it; and everything that can be asked of it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...jobs.job import ACTIVE, WORDS
from ..routes.common import Here, Name
from ..routes.jobs import act
from .render import Room, nothing, show

router = APIRouter(route_class=Room)
MOST = 100  # jobs that are shown


@router.get("/jobs")
def show_jobs(request: Request, here: Here) -> Response:
    """The queue."""
    return show(request, "jobs", room="jobs", jobs=here.store.list(limit=MOST))


@router.get("/jobs/-/list")
def list_jobs(request: Request, here: Here) -> Response:
    """The queue, as it stands now."""
    return show(request, "_jobs", jobs=here.store.list(limit=MOST))


@router.get("/jobs/-/badge")
def count_jobs(request: Request, here: Here) -> Response:
    """What runs, beside the name of the room."""
    active = here.store.list(states=ACTIVE)
    return show(request, "_badge", running=[job for job in active if job.state == "running"], count=len(active))


@router.post("/jobs/{id}/ask/{word}")
def ask(here: Here, id: Name, word: Name) -> Response:
    """Ask something of a job: a word to a training, or what becomes of it."""
    if word in WORDS:
        here.store.tell(id, word)
    elif word == "first":
        waiting = here.store.list(states=("queued",))
        if waiting and waiting[0].id != id:
            here.store.move(id, waiting[0].id)
    else:
        act(here, id, word)
    return nothing("changed")
