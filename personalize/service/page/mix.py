"""The room Mix: adapters together, each as much as its slider says; where they collide; and one file of all."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...jobs import Job
from ...jobs.job import ACTIVE
from ...text import slug
from ..errors import Refusal
from ..library import Adapter
from ..requests import job_settings
from ..routes.common import Here, Name
from ..studio import Studio
from .library import books
from .render import Room, go, show
from .run import pictures_of
from .train import form_of

router = APIRouter(route_class=Room)
STEPS = 12  # of a picture that follows the sliders
MOST = 2.0  # strength at the end of a slider
SOON = 5  # priority of what somebody waits for


@dataclass(frozen=True)
class Part:
    """An adapter of a mix: how much of it, and how much of each block, where it makes room for another."""

    adapter: Adapter
    strength: float
    blocks: str = ""

    @property
    def text(self) -> str:
        """As jobs have it."""
        return f"{self.adapter.id}:{self.strength:g}" + (f":lbw={self.blocks}" if self.blocks else "")


@router.get("/mix")
def show_mix(request: Request, here: Here, adapter: Name = "") -> Response:
    """All adapters with their sliders."""
    return show(request, "mix", room="mix", books=books(here), chosen={adapter}, most=MOST, desk=secrets.token_hex(8))


@router.post("/mix/draw")
async def draw(request: Request, here: Here) -> Response:
    """Draw with the sliders as they are; what was being drawn for this desk before is of no interest any more."""
    from anyio import to_thread

    return await to_thread.run_sync(begin_drawing, request, here, await form_of(request))


def begin_drawing(request: Request, here: Studio, form: Mapping[str, str]) -> Response:
    """Queue a picture."""
    parts, desk = parts_in(here, form), form.get("desk", "")[:40]
    words = " ".join(dict.fromkeys(part.adapter.description.trigger for part in parts if part.adapter.description.trigger))
    prompt = form.get("prompt", "").strip() or words
    if not parts or not prompt:
        raise Refusal(400, "nothing_to_draw", "Nothing to draw yet", "Choose an adapter, and write what it should draw.")
    for job in here.store.list(kinds=("generate",), states=ACTIVE, metadata={"mix": desk}):
        here.store.cancel(job.id)
    settings = {"prompts": [prompt], "stack": [part.text for part in parts], "seeds": [form.get("seed", "0")], "steps": STEPS}
    queued = here.store.add("generate", job_settings(here, "generate", settings), name=f"mix: {prompt}", priority=SOON,
                            metadata={"mix": desk})  # fmt: skip
    return show_drawn(request, here, queued.id)


@router.get("/mix/drawn/{id}")
def show_drawn(request: Request, here: Here, id: Name) -> Response:
    """The picture, or how far it is."""
    job = here.store.get(id)
    return show(request, "_drawn", job=job, pictures=pictures_of(job, here.watch.of(job.id).kind("picture")))


@router.post("/mix/meet")
async def meet(request: Request, here: Here) -> Response:
    """Let the doctor look whether the adapters get into each other's way."""
    from anyio import to_thread

    return await to_thread.run_sync(begin_meeting, request, here, await form_of(request))


def begin_meeting(request: Request, here: Studio, form: Mapping[str, str]) -> Response:
    """Queue the examination of a mix, or show the one that there is."""
    parts = parts_in(here, form)
    if len(parts) < 2:
        return show(request, "_meet", job=None, verdict=None)
    files = [Part(part.adapter, part.strength).text for part in parts]
    settings = job_settings(here, "doctor", {"files": files})
    known = here.store.list(kinds=("doctor",), states=(*ACTIVE, "succeeded"), metadata={"mix": "meet"})
    job = next((job for job in known if job.settings == settings), None)
    job = job or here.store.add("doctor", settings, name="do they collide?", metadata={"mix": "meet"}, priority=SOON)
    return show_meeting(request, here, job.id)


@router.get("/mix/met/{id}")
def show_meeting(request: Request, here: Here, id: Name) -> Response:
    """What the doctor found, or how far it is."""
    job = here.store.get(id)
    return show(request, "_meet", job=job, verdict=verdict_of(here, job) if job.state == "succeeded" else None)


def verdict_of(here: Studio, job: Job) -> dict[str, Any]:
    """Which adapters collide, and the blocks of those that would make room."""
    result = job.result or {}
    ids = {str(one.path): one for one in here.library.all()}
    found = [ids.get(one["about"]["path"]) for one in result.get("files", [])]
    name = lambda place: found[place].path.stem if found[place] else f"number {place + 1}"  # type: ignore[union-attr]  # noqa: E731
    room = [(found[one["place"]], one["lbw"]) for one in result.get("suggestions", []) if one["factors"] and one["lbw"]]
    return {
        "twins": [tuple(map(name, pair)) for pair in result.get("twins", [])],
        "pairs": [(*map(name, one["pair"]), one["before"], one["after"]) for one in result.get("relief", [])],
        "room": [(adapter, lbw) for adapter, lbw in room if adapter],
        "strangers": "collision" not in result,
    }


@router.post("/mix/merge")
async def merge(request: Request, here: Here) -> Response:
    """One file of all, at the strengths of the sliders."""
    from anyio import to_thread

    job = await to_thread.run_sync(begin_merge, here, await form_of(request))
    return go(f"/jobs/{job.id}")


def begin_merge(here: Studio, form: Mapping[str, str]) -> Job:
    """Queue the merge of a mix."""
    parts = parts_in(here, form)
    if not parts:
        raise Refusal(400, "nothing_to_merge", "Nothing to merge yet", "Choose adapters first.")
    output = form.get("name", "").strip() or "-and-".join(slug(part.adapter.path.stem) for part in parts)[:80]
    settings = job_settings(here, "merge", {"files": [part.text for part in parts], "output": output})
    return here.store.add("merge", settings, name=output)


def parts_in(here: Studio, form: Mapping[str, str]) -> list[Part]:
    """The adapters that a form chooses. Raises Refusal for a strength that is no number."""
    found = []
    for one in here.library.all():
        if form.get(f"in-{one.id}"):
            try:
                strength = float(form.get(f"strength-{one.id}") or 1)
            except ValueError:
                raise Refusal(400, "no_number", f"the strength of {one.path.stem} is no number", "e.g. 0.8") from None
            found.append(Part(one, strength, form.get(f"blocks-{one.id}", "")))
    return found
