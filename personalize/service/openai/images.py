"""/v1/images: pictures drawn by a job of the quick lane, which a request waits for."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import StreamingResponse

from ... import errors
from ...errors import PersonalizeError
from ...jobs import Job
from ...jobs.engine import is_served
from ..errors import Refusal, error_response
from ..records import address
from ..routes.common import Here
from ..routes.datasets import UPLOADS
from ..studio import Studio
from .files import keep_file
from .request import FORMATS, Drawing, drawing, form_values

router = APIRouter(prefix="/images", tags=["openai"])
PRIORITY = 10  # somebody waits for it
LOOK = 1.0  # seconds between two looks whether the client is still there
FIELDS = 100  # of a form
FORM = {
    "type": "object",
    "required": ["image", "prompt"],
    "additionalProperties": True,
    "properties": {name: {"type": "string", "format": "binary"} for name in ("image", "mask")}
    | {name: {"type": "string"} for name in ("prompt", "model", "n", "size", "seed", "denoise", "response_format")},
}


@router.post("/generations")
async def generate_images(here: Here, request: Request, body: Drawing) -> Any:
    """Draw pictures. Every setting of `personalize generate` may stand beside OpenAI's keys: steps, guidance, negative, ..."""
    settings = await to_thread.run_sync(drawing, here, body)
    return await answer(here, request, await begin(here, settings), body, "image_generation")


@router.post(
    "/edits",
    tags=[UPLOADS],
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}},
)
async def edit_images(here: Here, request: Request) -> Any:
    """Draw pictures that begin with one that is sent; `denoise` says how much of it is drawn anew.

    With a `mask` of its size, only where that is see-through (or white, where nothing is): there all of it, if nothing is said.
    """
    async with request.form(max_files=2, max_fields=FIELDS) as form:
        image = next((one for name, one in form.multi_items() if name in ("image", "image[]")), None)
        if not isinstance(image, UploadFile):
            raise Refusal(400, "no_image", "no picture was sent", "send it as `image`", "image")
        fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        asked = parse_drawing(form_values(fields))
        kept: dict[str, str] = {}
        try:
            for name, sent in {"image": image, "mask": form.get("mask")}.items():
                if isinstance(sent, str):
                    raise Refusal(400, "bad_mask", "the mask is no file", "send it as the picture is sent", "mask")
                if sent is not None:
                    kept[name] = await to_thread.run_sync(keep_picture, here, sent)
            settings = await to_thread.run_sync(drawing, here, asked, kept)
            job = await begin(here, settings)
        except PersonalizeError:
            remove_files(here, kept)
            raise
    return await answer(here, request, job, asked, "image_edit", lambda: remove_files(here, kept))


def keep_picture(here: Studio, sent: UploadFile) -> str:
    """Keep a picture that was sent as long as a request lasts; the id of its file."""
    name = sent.filename or "image.png"
    return keep_file(here, name if "." in name else f"{name}.png", sent.file, "vision").id


def remove_files(here: Studio, kept: Mapping[str, str]) -> None:
    """Let go of what was kept for a request."""
    for id in kept.values():
        here.files.remove(id)


def parse_drawing(values: dict[str, Any]) -> Drawing:
    """What is asked for in a form. Raises Refusal."""
    try:
        return Drawing.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise Refusal(400, "invalid_value", f"{name}: {first['msg']}", "", name) from error


async def begin(here: Studio, settings: dict[str, Any]) -> Job:
    """The job that draws. Raises Refusal where nobody would run it."""
    if not is_served(here.workspace.root):
        raise Refusal(409, "nobody_works", "nothing runs the jobs of this workspace", "personalize serve does")
    return await to_thread.run_sync(lambda: here.store.add("generate", settings, priority=PRIORITY))


async def answer(
    here: Studio, request: Request, job: Job, asked: Drawing, kind: str, clean_up: Callable[[], None] = lambda: None
) -> Any:
    """The pictures of a job as OpenAI answers, as a stream on demand; then `clean_up`."""
    if asked.stream:
        return StreamingResponse(stream(here, request, job, asked, kind, clean_up), media_type="text/event-stream")
    try:
        job = await end_of(here, request, job)
    finally:
        clean_up()
    data = await to_thread.run_sync(lambda: [image_object(request, job, path, asked) for path in pictures_of(job)])
    return {"created": int(time.time()), "data": data, "output_format": asked.output_format or "png"}


async def end_of(here: Studio, request: Request, job: Job) -> Job:
    """A job when it has succeeded. It is cancelled when the client goes away. Raises what it failed by."""
    seen = -1
    while not job.ended:
        if await request.is_disconnected():
            await to_thread.run_sync(here.store.cancel, job.id)
            raise Refusal(400, "gone", "the client has gone")
        seen = await here.live.wait(seen, LOOK)
        job = await to_thread.run_sync(here.store.get, job.id)
    if job.state == "succeeded":
        return job
    raise failure_of(job)


def failure_of(job: Job) -> PersonalizeError:
    """Why a job did not succeed, as the error that it ended by."""
    if job.state == "cancelled" or not job.error:
        return Refusal(409, job.state, f"the job {job.id} was {job.state}", "send the request again")
    kind = getattr(errors, job.error.get("kind", ""), None)
    what, hint = job.error.get("message", ""), job.error.get("hint", "")
    if isinstance(kind, type) and issubclass(kind, PersonalizeError):
        return kind(what, hint)
    return Refusal(500, "failed", what, hint)


async def stream(
    here: Studio, request: Request, job: Job, asked: Drawing, kind: str, clean_up: Callable[[], None]
) -> AsyncIterator[bytes]:
    """Signs of life while a job draws, then an event for each picture."""
    try:
        seen = -1
        while not job.ended:
            yield KEEPALIVE_COMMENT
            seen = await here.live.wait(seen, LOOK)
            job = await to_thread.run_sync(here.store.get, job.id)
        if job.state != "succeeded":
            raise failure_of(job)
        for path in pictures_of(job):
            one = await to_thread.run_sync(image_object, request, job, path, asked)
            size = one.pop("size")
            about = {"type": f"{kind}.completed", "created_at": int(time.time()), "size": size, "quality": "auto",
                     "background": "opaque", "output_format": asked.output_format or "png", **one}  # fmt: skip
            yield format_sse_event(event=f"{kind}.completed", data_str=json.dumps(about))
    except PersonalizeError as error:
        yield format_sse_event(event="error", data_str=bytes(error_response(error).body).decode())
    finally:
        if not job.ended:
            here.store.cancel(job.id)
        clean_up()


def pictures_of(job: Job) -> list[Path]:
    """The pictures that a job drew."""
    found = (job.result or {}).get("pictures") or []
    return [Path(one["path"]) for one in found if one.get("number") is not None]


def image_object(request: Request, job: Job, path: Path, asked: Drawing) -> dict[str, Any]:
    """A picture as OpenAI has it: its bytes, its address, or both where nothing was said."""
    raw = path.read_bytes()
    with Image.open(path) as image:
        size = f"{image.width}x{image.height}"
        if asked.output_format in ("webp", "jpeg"):
            image.save(target := io.BytesIO(), format=FORMATS[asked.output_format], quality=92)
            raw = target.getvalue()
    found: dict[str, Any] = {"revised_prompt": None, "size": size}
    if asked.response_format in (None, "b64_json") or asked.stream:
        found["b64_json"] = base64.b64encode(raw).decode()
    if asked.response_format in (None, "url") and not asked.stream:
        found["url"] = str(request.base_url).rstrip("/") + address(job, path)
    return found
