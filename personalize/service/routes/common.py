"""What routes share: the studio of a request, bodies that say what they may hold, answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import Depends, Form, Request, UploadFile
from pydantic import BaseModel, ConfigDict, StringConstraints

from ..errors import Refusal
from ..studio import Studio
from ..uploads import Incoming


class Body(BaseModel):
    """A body of a request; what it does not know is an error."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(BaseModel):
    """What went wrong. `message` holds the hint too; `param` is the setting that is to blame, `code` a word for programs."""

    message: str
    type: str
    param: str | None
    code: str
    hint: str


class ErrorBody(BaseModel):
    """How every error is answered."""

    error: ErrorDetail


def studio_of(request: Request) -> Studio:
    """The studio that a request is for."""
    found: Studio = request.app.state.studio
    return found


Here = Annotated[Studio, Depends(studio_of)]
Name = Annotated[str, StringConstraints(max_length=200)]
Flag = Annotated[bool, Form()]
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "what was sent cannot be used",
        401: "a token is needed",
        403: "not allowed, or outside of the workspace",
        404: "there is no such thing",
        409: "not now, or it is there already",
        413: "too large",
        421: "another host was meant",
    }.items()
}


def incoming(files: Iterable[UploadFile]) -> list[Incoming]:
    """Files of a form, with the paths that they have in a folder."""
    found = [Incoming(one.filename or "", one.file) for one in files]
    if not found:
        raise Refusal(400, "no_files", "no files were sent", "send them as `files`")
    return found


def many(data: list[Any], **more: Any) -> dict[str, Any]:
    """A list as it is answered."""
    return {"object": "list", "data": data, **more}
