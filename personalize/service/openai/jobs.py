"""/v1/fine_tuning/jobs: trainings."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from ...jobs import Job
from ..errors import not_found
from ..routes.common import Here, Name
from ..routes.jobs import act
from ..studio import Studio
from .names import job_id
from .request import NewFineTuning, fine_tuning
from .shapes import checkpoints, events_page, fine_tuning_job, page

router = APIRouter(prefix="/fine_tuning/jobs", tags=["openai"])
FILTER = re.compile(r"metadata\[(.+)\]")


def training(here: Studio, id: str) -> Job:
    """A training by OpenAI's id. Raises Refusal for a job of another kind."""
    job = here.store.get(job_id(id))
    if job.kind != "train":
        raise not_found("training", id)
    return job


@router.post("")
def create_job(here: Here, body: NewFineTuning) -> dict[str, Any]:
    """Train on the pictures of a file, from a base or from a model that was trained here.

    Every setting of the recipe may stand beside OpenAI's keys; an unknown one is an error that names the nearest.
    """
    settings, metadata = fine_tuning(here, body)
    return fine_tuning_job(here.store.add("train", settings, name=body.suffix or "", metadata=metadata), time.time())


@router.get("")
def list_jobs(
    here: Here, request: Request, after: Name | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20
) -> dict[str, Any]:
    """The trainings, the newest first; `metadata[key]=value` leaves those that have it."""
    wanted = metadata_filter(request.query_params)
    jobs = here.live.once("trainings", lambda: here.store.list(kinds=("train",)))
    now = time.time()
    found = [job for job in jobs if all(job.metadata.get(key) == value for key, value in wanted.items())]
    found.sort(key=lambda job: job.created_at, reverse=True)
    return page([fine_tuning_job(job, now) for job in found], after, limit)


def metadata_filter(query: Mapping[str, str]) -> dict[str, str]:
    """What a list is filtered by.

    >>> metadata_filter({"metadata[team]": "red", "limit": "3"})
    {'team': 'red'}
    """
    return {match[1]: value for key, value in query.items() if (match := FILTER.fullmatch(key))}


@router.get("/{job}")
def get_job(here: Here, job: Name) -> dict[str, Any]:
    """One of them."""
    return fine_tuning_job(training(here, job), time.time())


@router.get("/{job}/events")
def list_events(
    here: Here, job: Name, after: Name | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20
) -> dict[str, Any]:
    """What happened to it, the newest first."""
    found = training(here, job)
    return page(events_page(found, here.store.events(found.id)), after, limit)


@router.get("/{job}/checkpoints")
def list_checkpoints(
    here: Here, job: Name, after: Name | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 10
) -> dict[str, Any]:
    """Its checkpoints, the last first, with their scores."""
    found = training(here, job)
    return page(checkpoints(found, here.store.events(found.id)), after, limit)


@router.post("/{job}/{action}")
def act_on_job(here: Here, job: Name, action: Literal["cancel", "pause", "resume"]) -> dict[str, Any]:
    """Pause, resume or cancel it."""
    return fine_tuning_job(act(here, training(here, job).id, action), time.time())
