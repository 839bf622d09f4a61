"""A training as it happens: loss, time left, samples as they grow; and what it was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...jobs import Job
from ...reports.kit.curves import Panel, plot, smooth
from ...reports.run.read import read_run
from ...reports.run.verdict import judgement
from ...training.verdict import Words, describe
from ..records import address, addresses, sample_records
from ..routes.common import Here, Name
from ..studio import Studio
from .render import Room, show

router = APIRouter(route_class=Room)
MOST_FRAMES = 24  # of a prompt: the newest, and the base's


@dataclass(frozen=True)
class Strip:
    """The pictures of one prompt and seed, the newest first, that of the base last."""

    prompt: str
    seed: int
    frames: list[dict[str, Any]]


@router.get("/jobs/{id}")
def show_job(request: Request, here: Here, id: Name) -> Response:
    """A job: a training with all that it shows, another one with its settings and its end."""
    job = here.store.get(id)
    return show(request, "run" if job.kind == "train" else "job", room="jobs", job=job, **view_of(here, job))


@router.get("/jobs/{id}/live")
def show_live(request: Request, here: Here, id: Name) -> Response:
    """What changes all the time."""
    job = here.store.get(id)
    return show(request, "_live" if job.kind == "train" else "_job", job=job, **view_of(here, job))


@router.get("/jobs/{id}/growth")
def show_growth(request: Request, here: Here, id: Name, seen: int = -1) -> Response:
    """The samples; nothing where somebody has seen them all."""
    job = here.store.get(id)
    found = strips_of(here, job)
    count = sum(len(one.frames) for one in found)
    return Response(status_code=204) if count == seen else show(request, "_growth", job=job, strips=found, count=count)


def view_of(here: Studio, job: Job) -> dict[str, Any]:
    """All that is shown of a job."""
    told = here.watch.of(job.id)
    strips = strips_of(here, job)
    started = (told.kind("started") or [{}])[-1]
    return {
        "panel": loss_panel(told.losses),
        "loss": smooth(sorted(told.losses.items()))[-1][1] if told.losses else None,
        "strips": strips,
        "count": sum(len(one.frames) for one in strips),
        "warnings": list(dict.fromkeys([*started.get("warnings", []), *(one["text"] for one in told.kind("warned"))])),
        "chosen": next(reversed(told.kind("chosen")), None),
        "report": address(job, "report.html") if (job.folder / "report.html").is_file() else "",
        "adapter": adapter_of(here, job),
        "verdict": verdict_of(job),
        "pictures": pictures_of(job, told.kind("picture")),
        "files": {key: at for key, at in addresses(job).items() if isinstance(at, str)},
        "log": here.store.log(job.id, 6000) if job.state == "failed" else "",
    }


def verdict_of(job: Job) -> Words | None:
    """What the judgement says of the adapter that a training made, as its report says it; None where nothing was judged."""
    if job.kind != "train" or job.state != "succeeded" or not job.folder.is_dir():
        return None
    found = judgement(read_run(job.folder))
    return describe(found) if found else None


def loss_panel(losses: dict[int, float]) -> Panel | None:
    """The loss as a curve; None before there are two steps."""
    points = [(float(step), loss) for step, loss in sorted(losses.items())]
    return plot("loss", [("loss", "smoothed", smooth(points))], points) if len(points) > 1 else None


def strips_of(here: Studio, job: Job) -> list[Strip]:
    """The samples of a training by prompt and seed."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in sample_records(job, enumerate(here.watch.of(job.id).kind("sample"))):
        found.setdefault((one["prompt"], one["seed"]), []).append(one)
    order = lambda one: (one["base"], -one["step"])  # noqa: E731
    strips = [Strip(prompt, seed, sorted(frames, key=order)) for (prompt, seed), frames in found.items()]
    return [Strip(one.prompt, one.seed, newest(one.frames)) for one in strips]


def newest(frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of many frames, and the last."""
    return frames if len(frames) <= MOST_FRAMES else [*frames[: MOST_FRAMES - 1], frames[-1]]


def pictures_of(job: Job, records: list[dict[str, Any]]) -> list[str]:
    """The addresses of the pictures that a job has drawn so far."""
    return [at for one in records if (at := address(job, one["path"]))]


def adapter_of(here: Studio, job: Job) -> Any:
    """The adapter in the library that a job has made; None where there is none."""
    if job.state != "succeeded":
        return None
    if job.folder.is_file():
        return next((one for one in here.library.all() if one.path == job.folder), None)
    return next((one for one in here.library.all() if one.path.parent == job.folder), None)
