"""Errors as the clients of the service get them: one JSON shape, OpenAI's, with a hint beside the message."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from ..errors import (
    AdapterError,
    BaseModelError,
    DataError,
    JobError,
    NoSuchJobError,
    OutputError,
    PersonalizeError,
    RecipeError,
    TrainingError,
)
from ..recipe.settings import settings
from ..text import plain

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
STATUSES: dict[type[PersonalizeError], int] = {  # the first that an error is of
    RecipeError: 400,
    DataError: 400,
    BaseModelError: 400,
    AdapterError: 400,
    NoSuchJobError: 404,
    JobError: 409,
    OutputError: 409,
    TrainingError: 409,
}
LINE = 2000  # letters of a message
NAMED = re.compile(r"--([a-z][a-z-]*)|unknown setting '([^']+)'")


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


class Refusal(PersonalizeError):
    """A request that is not granted, with its HTTP status and a word for programs."""

    def __init__(self, status: int, code: str, what: str, hint: str = "", param: str | None = None) -> None:
        super().__init__(what, hint)
        self.status, self.code, self.param = status, code, param


def not_found(what: str, name: str, hint: str = "") -> Refusal:
    """There is nothing of this kind by this name."""
    return Refusal(404, "not_found", f"there is no {what} {plain(name, 80)!r}", hint)


def status_of(error: PersonalizeError) -> int:
    """The HTTP status of an error: 400 for what a client can mend, 409 for what stands in the way here.

    >>> status_of(RecipeError("unknown setting 'rnak'")), status_of(not_found("job", "x"))
    (400, 404)
    """
    if isinstance(error, Refusal):
        return error.status
    return next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 400)


def parameter_in(message: str) -> str | None:
    """The setting that a message of the recipe is about, if it names one.

    >>> parameter_in("--batch-size must be at least 1, not 0"), parameter_in("unknown setting 'rnak'"), parameter_in("no")
    ('batch_size', 'rnak', None)
    """
    if not (found := NAMED.search(message)):
        return None
    name = found[2] or found[1].replace("-", "_")
    return name if found[2] or name in settings() else None


def code_of(error: PersonalizeError) -> str:
    """A stable word for a kind of error.

    >>> code_of(RecipeError("x"))
    'recipe_error'
    """
    return error.code if isinstance(error, Refusal) else re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


def error_body(status: int, code: str, what: str, hint: str = "", param: str | None = None) -> dict[str, Any]:
    """The JSON of an error: OpenAI's keys, whose `message` holds the hint too, since their clients show that alone."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message = plain(f"{what} ({hint})" if hint else what, LINE)
    return {"error": {"message": message, "type": kind, "param": param, "code": code, "hint": plain(hint, LINE)}}


def error_response(error: PersonalizeError) -> JSONResponse:
    """An error as the answer to a request."""
    status, own = status_of(error), getattr(error, "param", None)
    body = error_body(status, code_of(error), error.what, error.hint, own or parameter_in(error.what))
    return JSONResponse(body, status, headers={"WWW-Authenticate": "Bearer"} if status == 401 else None)
