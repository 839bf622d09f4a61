"""/v1/uploads: large files in parts."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, UploadFile
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ..errors import Refusal
from ..files import StoredFile
from ..routes.common import Here, Name
from ..routes.datasets import UPLOADS
from ..studio import DAY
from .files import file_object, keep_file

router = APIRouter(prefix="/uploads", tags=["openai"])
PART = 64 << 20  # bytes, as at OpenAI


class NewUpload(BaseModel):
    """A file that will come in parts."""

    model_config = ConfigDict(extra="ignore")
    filename: Annotated[str, StringConstraints(min_length=1, max_length=300)]
    bytes: Annotated[int, Field(ge=1)]
    mime_type: Name = ""
    purpose: Name


class Completion(BaseModel):
    """The parts in their order."""

    model_config = ConfigDict(extra="ignore")
    part_ids: list[Name]
    md5: Name | None = None


@router.post("")
def create_upload(here: Here, body: NewUpload) -> dict[str, Any]:
    """Announce a file."""
    if body.bytes > here.options.limits.upload:
        raise Refusal(413, "too_large", f"{body.bytes:,} bytes", f"at most {here.options.limits.upload:,}", "bytes")
    return upload_object(here, here.files.begin(body.filename, body.bytes, body.purpose, {"status": "pending"}))


@router.post("/{upload_id}/parts", tags=[UPLOADS])
def add_part(here: Here, upload_id: Name, data: UploadFile) -> dict[str, Any]:
    """Send a part."""
    upload = pending(here, upload_id)
    id = here.files.add_part(upload, data.file, PART)
    return {"id": id, "object": "upload.part", "created_at": upload.created_at, "upload_id": upload_id}


@router.post("/{upload_id}/complete")
def complete_upload(here: Here, upload_id: Name, body: Completion) -> dict[str, Any]:
    """Put the parts together."""
    upload = pending(here, upload_id)
    with here.files.join_parts(upload, body.part_ids).open("rb") as file:
        if body.md5 and hashlib.file_digest(file, "md5").hexdigest() != body.md5.lower():
            raise Refusal(400, "wrong_md5", "the bytes are not those that the checksum is of", "send them again", "md5")
        file.seek(0)
        kept = keep_file(here, upload.filename, file, upload.purpose)
    here.files.remove(upload_id)
    return upload_object(here, replace(upload, about={"status": "completed"})) | {"file": file_object(kept)}


@router.post("/{upload_id}/cancel")
def cancel_upload(here: Here, upload_id: Name) -> dict[str, Any]:
    """Forget it."""
    upload = pending(here, upload_id)
    here.files.remove(upload_id)
    return upload_object(here, replace(upload, about={"status": "cancelled"}))


def pending(here: Here, id: str) -> StoredFile:
    """An upload that goes on. Raises Refusal."""
    if not id.startswith("upload-"):
        raise Refusal(404, "not_found", f"there is no upload {id!r}", "POST /v1/uploads begins one")
    return here.files.get(id)


def upload_object(here: Here, upload: StoredFile) -> dict[str, Any]:
    """An upload as OpenAI has it."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.about.get("status", "pending"),
        "expires_at": upload.created_at + here.options.limits.days * DAY,
        "file": None,
    }
