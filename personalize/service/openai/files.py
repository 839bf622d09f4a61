"""/v1/files: archives of pictures to train on, single pictures, and the adapters that trainings made."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Form, Query, UploadFile
from starlette.responses import FileResponse, Response

from ...jobs import Job
from ...pictures.files import is_picture
from ...text import plain
from ..errors import Refusal, not_found
from ..files import StoredFile, download_name
from ..routes.common import Here, Name
from ..routes.datasets import UPLOADS
from ..routes.jobs import BYTES
from ..studio import Studio
from ..uploads import ARCHIVE, Incoming, fault_of_picture
from .names import RESULT, job_id, model_name
from .request import adapter_of
from .shapes import page

router = APIRouter(prefix="/files", tags=["openai"])
TRAINING = "fine-tune"


@router.post("", tags=[UPLOADS])
def create_file(here: Here, file: UploadFile, purpose: Annotated[Name, Form()]) -> dict[str, Any]:
    """Send a .zip of pictures with captions to train on, or a single picture."""
    return file_object(keep_file(here, file.filename or "file", file.file, purpose))


def keep_file(here: Studio, filename: str, file: BinaryIO, purpose: str) -> StoredFile:
    """Keep a file; the pictures of an archive become a dataset. Raises Refusal for one that is neither archive nor picture."""
    name = plain(Path(filename.replace("\\", "/")).name, 150)
    if name.lower().endswith(ARCHIVE):
        dataset, _ = here.datasets.create(Path(name).stem, [Incoming("pictures.zip", file)])
        file.seek(0)
        return here.files.keep(name, file, purpose, here.options.limits.upload, dataset=dataset)
    if purpose == TRAINING or not is_picture(Path(name)):
        raise Refusal(400, "no_archive", f"{name} is no archive of pictures", "send a .zip: pictures, each with NAME.txt", "file")
    found = here.files.keep(name, file, purpose, here.options.limits.upload)
    if why := fault_of_picture(here.files.content(found.id), here.options.limits):
        here.files.remove(found.id)
        raise Refusal(400, "bad_picture", f"{name}: {why}", "send PNG, JPEG or WebP", "file")
    return found


@router.get("")
def list_files(
    here: Here,
    purpose: Name | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: Name | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The files that were sent, and the adapters that trainings made."""
    jobs = here.store.list(kinds=("train",), states=("succeeded",))
    found = [file_object(one) for one in here.files.all()]
    found += [one for job in jobs if (one := result_object(here, job))]
    found = [one for one in found if purpose in (None, one["purpose"])]
    found.sort(key=lambda one: one["created_at"], reverse=order == "desc")
    return page(found, after, limit)


@router.get("/{file_id}")
def get_file(here: Here, file_id: Name) -> dict[str, Any]:
    """One of them."""
    if file_id.startswith(RESULT):
        found = result_object(here, here.store.get(file_id.removeprefix(RESULT)))
        if found is None:
            raise not_found("file", file_id)
        return found
    return file_object(here.files.get(file_id))


@router.get("/{file_id}/content", responses=BYTES, response_class=Response)
def get_content(here: Here, file_id: Name) -> Response:
    """Its bytes."""
    if file_id.startswith(RESULT):
        path = adapter_of(here, model_name(here.store.get(job_id(file_id.removeprefix(RESULT)))))
        return FileResponse(path, media_type="application/octet-stream", filename=download_name(path.name))
    path, name = here.files.content(file_id), download_name(here.files.get(file_id).filename)
    return FileResponse(path, media_type="application/octet-stream", filename=name)


@router.delete("/{file_id}")
def delete_file(here: Here, file_id: Name) -> dict[str, Any]:
    """Remove a file, with the dataset that was made of it; not while a job needs it."""
    if file_id.startswith(RESULT):
        raise Refusal(400, "a_result", "it is the adapter of a training", "DELETE /v1/models/MODEL removes it", "file_id")
    found = here.files.get(file_id)
    here.check_unused(here.files.content(file_id))
    if found.dataset and found.dataset in here.datasets.ids():
        here.check_unused(here.datasets.folder(found.dataset))
        here.datasets.remove(found.dataset)
    here.files.remove(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def file_object(file: StoredFile) -> dict[str, Any]:
    """A file as OpenAI has it, with the `dataset` of its pictures."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
        "dataset": file.dataset or None,
    }


def result_object(here: Studio, job: Job) -> dict[str, Any] | None:
    """The adapter of a training as a file; None where it is gone."""
    try:
        path = adapter_of(here, model_name(job))
        size = path.stat().st_size
    except (Refusal, OSError):
        return None
    about = StoredFile(f"{RESULT}{job.id}", path.name, size, int(job.finished_at or time.time()), "fine-tune-results")
    return file_object(about)
