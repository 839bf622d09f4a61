"""The library: adapters that were trained, merged or sent; what their headers tell; where they go."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, UploadFile
from starlette.responses import FileResponse, Response

from ..errors import not_found
from ..library import preview_of
from .common import Body, Here, Name, many
from .datasets import UPLOADS
from .jobs import BYTES

router = APIRouter(tags=["adapters"])


class Target(Body):
    """Where an adapter is copied: a folder that was named with `personalize serve --folder`."""

    folder: str
    replace: bool = False


class Source(Body):
    """An adapter file in the workspace, or in a folder that was named or made known."""

    path: str


@router.get("/adapters")
def list_adapters(here: Here, checkpoints: bool = False) -> dict[str, Any]:
    """The adapters of the workspace, the newest first; on demand checkpoints of trainings too."""
    return many([one.record() for one in here.library.all(checkpoints)])


@router.post("/adapters", status_code=201, tags=[UPLOADS])
def add_adapter(here: Here, file: UploadFile) -> dict[str, Any]:
    """Bring an adapter, as .safetensors."""
    return here.library.add(file.filename or "", file.file, here.options.limits).record()


@router.post("/adapters/bring", status_code=201)
def bring_adapter(here: Here, body: Source) -> dict[str, Any]:
    """Keep a copy of an adapter of this machine, such as one that an image UI has; what is kept of it already, where it is."""
    return here.library.bring(here.places.confine(body.path, "path"), here.options.limits).record()


@router.get("/adapters/{id}")
def get_adapter(here: Here, id: Name) -> dict[str, Any]:
    """An adapter and everything in its header."""
    return here.library.details(id)


@router.get("/adapters/{id}/file", responses=BYTES, response_class=Response)
def get_adapter_file(here: Here, id: Name) -> Response:
    """The file itself."""
    path = here.library.get(id).path
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


@router.get("/adapters/{id}/preview", responses=BYTES, response_class=Response)
def get_preview(here: Here, id: Name) -> Response:
    """The picture beside an adapter."""
    if (path := preview_of(here.library.get(id).path)) is None:
        raise not_found("preview", id)
    return FileResponse(path, media_type="image/png")


@router.delete("/adapters/{id}")
def remove_adapter(here: Here, id: Name) -> dict[str, Any]:
    """Remove an adapter; not while a job needs it."""
    here.check_unused(here.library.get(id).path)
    here.library.remove(id)
    return {"id": id, "object": "adapter", "deleted": True}


@router.get("/hosts")
def list_hosts(here: Here) -> dict[str, Any]:
    """The image UIs that adapters can be sent to: in folders that were named, and where `personalize ui` found them."""
    return many([{"name": one.name, "folder": str(one.folder)} for one in here.hosts])


@router.post("/adapters/{id}/send")
def send_adapter(here: Here, id: Name, body: Target) -> dict[str, Any]:
    """Copy an adapter with what image UIs read beside it into a folder of theirs."""
    return {"files": [str(path) for path in here.library.send(id, body.folder, here.targets, body.replace)]}


@router.get("/votes")
def list_votes(here: Here, run: Name | None = None) -> dict[str, Any]:
    """Which of two pictures people liked better in blind comparisons, the oldest first: what tuning by preference learns from."""
    return many(here.votes.all(run))
