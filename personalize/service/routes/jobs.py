"""Jobs: the queue, what becomes of them as it happens, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from pydantic import Field
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse

from ...jobs import Job
from ..errors import Refusal, not_found
from ..openai.shapes import checkpoints
from ..records import SHOWN, file_of, job_record, sample_records
from ..requests import check_text, job_settings
from ..security import REPORT_POLICY
from ..studio import Studio
from .common import Body, Here, Name, many

router = APIRouter(tags=["jobs"])
STREAM = "text/event-stream"
State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
Action = Literal["pause", "resume", "cancel", "requeue"]
Word = Literal["sample", "save", "stop", "keep"]
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {STREAM: {"schema": {"type": "string"}}}}}
BYTES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


class NewJob(Body):
    """A job that is to be queued. What its settings may be is in the schema of its kind: GET /api/schemas/{kind}."""

    kind: str = "train"
    settings: dict[str, Any]
    name: Name = ""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    after: Name | None = Field(None, description="the job that must succeed before")
    metadata: dict[Name, Any] = {}


class Change(Body):
    """What is changed of a job that waits: all of its settings, its priority, its name, the job that it is taken before."""

    settings: dict[str, Any] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    name: Name | None = None
    before: Name | None = Field(None, description='the id of another job that waits, or "" to be taken last')


@router.get("/jobs")
def list_jobs(
    here: Here,
    state: Annotated[list[State] | None, Query()] = None,
    kind: Annotated[list[Name] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Name | None = None,
) -> dict[str, Any]:
    """The jobs: those that run, those that wait in their order, then the others, the newest first."""
    key = repr(("jobs", state, kind, limit, after))
    return here.live.once(key, lambda: _page(here, state, kind, limit, after))


def _page(here: Studio, state: list[State] | None, kind: list[str] | None, limit: int, after: str | None) -> dict[str, Any]:
    found = here.store.list(states=state, kinds=kind, limit=limit + 1, after=after)
    return many([job_record(job) for job in found[:limit]], has_more=len(found) > limit)


@router.post("/jobs", status_code=201)
def add_job(here: Here, body: NewJob) -> dict[str, Any]:
    """Queue a job. Its settings are checked now: what would fail is told before anything waits."""
    settings = job_settings(here, body.kind, body.settings)
    check_text(json.dumps(body.metadata, ensure_ascii=False), "metadata")
    job = here.store.add(body.kind, settings, name=body.name, priority=body.priority, after=body.after, metadata=body.metadata)
    return job_record(job)


@router.get("/jobs/{id}")
def get_job(here: Here, id: Name) -> dict[str, Any]:
    """One job."""
    return job_record(here.store.get(id))


@router.patch("/jobs/{id}")
def change_job(here: Here, id: Name, body: Change) -> dict[str, Any]:
    """Change a job that waits, or its place in the queue."""
    job = here.store.get(id)
    settings = job_settings(here, job.kind, body.settings) if body.settings is not None else None
    if settings is not None or body.priority is not None or body.name is not None:
        job = here.store.edit(job.id, settings=settings, priority=body.priority, name=body.name)
    if body.before is not None:
        job = here.store.move(job.id, body.before or None)
    return job_record(job)


@router.post("/jobs/{id}/tell/{word}")
def tell_job(here: Here, id: Name, word: Word) -> dict[str, Any]:
    """A word to a training that goes on: draw samples now, save now, stop, or stop and keep what there is."""
    return job_record(here.store.tell(id, word))


@router.get("/events", responses=STREAMED, response_class=Response)
async def all_events(here: Here) -> StreamingResponse:
    """Server-sent events: one `change` whenever anything about any job has changed."""
    return StreamingResponse(here.live.changes(), media_type=STREAM)


@router.get("/jobs/{id}/events", responses=STREAMED)
async def job_events(
    here: Here,
    request: Request,
    id: Name,
    after: Annotated[int, Query(ge=0, le=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Any:
    """What happened to a job behind event number `after`: as JSON, or with `Accept: text/event-stream` as it happens.

    A stream ends with an event `end`, when the job is over.
    """
    from anyio import to_thread

    job = await to_thread.run_sync(here.store.get, id)
    if last_event_id and last_event_id.isdecimal() and len(last_event_id) < 16:  # a browser that connects again
        after = int(last_event_id)
    if STREAM in request.headers.get("accept", ""):
        return StreamingResponse(here.live.job_events(job.id, after), media_type=STREAM)
    found = await to_thread.run_sync(here.store.events, job.id, after, limit)
    return many([{"number": number, **record} for number, record in found])


@router.get("/jobs/{id}/log", response_class=PlainTextResponse)
def job_log(here: Here, id: Name, letters: Annotated[int, Query(ge=1, le=1_000_000)] = 20_000) -> str:
    """The end of what a job printed."""
    return here.store.log(id, letters)


@router.get("/jobs/{id}/samples")
def job_samples(here: Here, id: Name) -> dict[str, Any]:
    """The sample pictures of a training so far."""
    job = here.store.get(id)
    return many(sample_records(job, here.store.events(job.id)))


@router.get("/jobs/{id}/checkpoints")
def job_checkpoints(here: Here, id: Name) -> dict[str, Any]:
    """The checkpoints of a training so far, the last first, with what they scored."""
    job = here.store.get(id)
    return many(checkpoints(job, here.store.events(job.id)))


@router.get("/jobs/{id}/files/{name:path}", responses=BYTES, response_class=Response)
def job_file(here: Here, id: Name, name: str) -> Response:
    """A file of a job: pictures, the adapter, checkpoints, the report, the recipe."""
    job = here.store.get(id)
    if (path := file_of(job, name)) is None:
        raise not_found("file", name, f"GET /api/jobs/{job.id} names those that there are")
    return file_response(path)


def file_response(path: Path) -> Response:
    """A file of the workspace. Scripts in a page of it do not run."""
    more: Mapping[str, str] = {"Content-Security-Policy": REPORT_POLICY} if path.suffix == ".html" else {}
    return FileResponse(path, media_type=SHOWN[path.suffix.lower()], headers={"Cache-Control": "private, no-cache", **more})


@router.post("/jobs/{id}/{action}")
def act_on_job(here: Here, id: Name, action: Action) -> dict[str, Any]:
    """Pause, resume, cancel, or queue once more."""
    return job_record(act(here, id, action))


def act(here: Studio, id: str, action: str) -> Job:
    """What is asked of a job. Raises Refusal for a word that is none."""
    actions = {"pause": here.store.pause, "resume": here.store.resume, "cancel": here.store.cancel, "requeue": here.store.requeue}
    if action not in actions:
        raise Refusal(404, "not_found", f"a job cannot be asked to {action}", f"one of {', '.join(actions)}")
    return actions[action](id)
