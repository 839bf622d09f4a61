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


def studio_of(request: Request) -> Studio:
    """The studio that a request is for."""
    found: Studio = request.app.state.studio
    return found


Here = Annotated[Studio, Depends(studio_of)]
Name = Annotated[str, StringConstraints(max_length=200)]
Flag = Annotated[bool, Form()]


def incoming(files: Iterable[UploadFile]) -> list[Incoming]:
    """Files of a form, with the paths that they have in a folder."""
    found = [Incoming(one.filename or "", one.file) for one in files]
    if not found:
        raise Refusal(400, "no_files", "no files were sent", "send them as `files`")
    return found


def many(data: list[Any], **more: Any) -> dict[str, Any]:
    """A list as it is answered."""
    return {"object": "list", "data": data, **more}
