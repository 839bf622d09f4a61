"""Captions by a model, in the room Dataset: which captioner, as a job that can be watched and cancelled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...captioning.caption import PREFIX
from ...captioning.find import DEFAULT, EXAMPLE, captioners_at_hand
from ...data.folder import concepts_of
from ...errors import PersonalizeError
from ...jobs import Job
from ...jobs.job import ACTIVE
from ...pictures.galleries import galleries
from ...recipe.fields import Data
from ..errors import Refusal
from ..requests import job_settings
from ..routes.common import Here, Name
from ..studio import Studio
from .forms import read_form
from .render import Room, show
from .train import form_of

router = APIRouter(route_class=Room)
ALL, EMPTY = "all", "empty"  # which pictures get a caption
ASKED = ("model", "trigger", "max_words", "without")  # settings that are fields of the form, as they are
SOON = 3  # priority of what somebody waits for


@router.post("/dataset/{dataset}/captioning")
async def begin(request: Request, here: Here, dataset: Name) -> Response:
    """Let a captioner look at the pictures."""
    from anyio import to_thread

    return await to_thread.run_sync(begin_captioning, request, here, dataset, await form_of(request))


def begin_captioning(request: Request, here: Studio, dataset: str, form: Mapping[str, str]) -> Response:
    """Queue the job. Raises Refusal where one is at it already."""
    job = last_captioning(here, dataset)
    if job and job.state in ACTIVE:
        raise Refusal(409, "in_use", "A captioner is at these pictures already", "Wait for it, or cancel it.")
    given = read_form({name: form.get(name, "") for name in ASKED}, "caption")
    given |= {"folder": dataset, "overwrite": form.get("which") == ALL, "prefix": form.get("prefix", PREFIX).strip()}
    here.store.add("caption", job_settings(here, "caption", given), priority=SOON, metadata={"captions": dataset})
    return show_captioning(request, here, dataset)


@router.get("/dataset/{dataset}/captioning")
def show_captioning(request: Request, here: Here, dataset: Name, seen: str = "") -> Response:
    """How far the last captioner is, or what it has done; nothing where somebody has seen that."""
    job = last_captioning(here, dataset)
    mark = mark_of(job)
    if mark == seen:
        return Response(status_code=204)
    answer = show(request, "_captioning", dataset=here.datasets.record(dataset), job=job, mark=mark)
    if seen and job and job.state not in ACTIVE:
        answer.headers["HX-Trigger"] = "changed"  # the pictures have other captions now
    return answer


def last_captioning(here: Studio, dataset: str) -> Job | None:
    """The job that captions a dataset, or did so last."""
    return max(here.store.list(kinds=("caption",), metadata={"captions": dataset}), key=lambda job: job.created_at, default=None)


def mark_of(job: Job | None) -> str:
    """What differs as soon as there is something new to be seen of a job."""
    told = f"{job.id} {job.state} {job.progress.get('done')} {job.progress.get('doing')}" if job else "none"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def captioning_of(here: Studio, dataset: str) -> dict[str, Any]:
    """What the form needs: captioners at hand, the trigger as training would have it, and the last job."""
    job, folder = last_captioning(here, dataset), here.datasets.folder(dataset)
    try:
        triggers = [one.trigger for one in concepts_of(Data(folder=folder), galleries(folder))]
    except PersonalizeError:  # the frames say what is wrong with the folder
        triggers = []
    known = {"captioners": list(captioners_at_hand(here.options.folders)), "default": DEFAULT, "example": EXAMPLE}
    return {**known, "prefix": PREFIX, "triggers": triggers, "job": job, "mark": mark_of(job)}
