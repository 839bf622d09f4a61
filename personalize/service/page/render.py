"""How the rooms of the page are shown: templates, and what goes wrong, in words for a person."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response
from starlette.templating import Jinja2Templates

from ...errors import NoSuchJobError, PersonalizeError
from ...text import compact, duration, readable
from ...version import __version__
from ..errors import status_of
from ..prefix import below_prefix

HERE = Path(__file__).parent
STATIC = HERE / "static"
ROOMS = (("train", "/", "Train"), ("dataset", "/dataset", "Dataset"), ("compare", "/compare", "Compare"),
         ("library", "/library", "Library"), ("mix", "/mix", "Mix"), ("jobs", "/jobs", "Jobs"))  # fmt: skip
TEMPLATES = Jinja2Templates(
    env=Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(HERE / "templates"),
    )
)


def ago(when: float | None) -> str:
    """How long ago something was.

    >>> ago(time.time() - 7200), ago(None)
    ('2 h ago', '')
    """
    if when is None:
        return ""
    seconds = max(0, int(time.time() - when))
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return "just now"


TEMPLATES.env.globals |= {"version": __version__, "rooms": ROOMS}
TEMPLATES.env.filters |= {"ago": ago, "duration": duration, "size": readable, "figure": compact}


def is_fragment(request: Request) -> bool:
    """Whether a part of the page asks, and not the browser for all of it."""
    return "hx-request" in request.headers


def is_wanted(request: Request) -> bool:
    """Whether a person looks for a page, and not a program for an answer."""
    asks = "text/html" in request.headers.get("accept", "")
    return asks and not request.url.path.startswith(("/api/", "/v1/", "/static/"))


def show(request: Request, name: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page, or a part of one, from a template."""
    html = TEMPLATES.get_template(f"{name}.html.j2").render(request=request, **values)
    return HTMLResponse(below_prefix(request, html), status)


def go(address: str, fragment: bool = True) -> Response:
    """Send the browser elsewhere."""
    return Response(status_code=204, headers={"HX-Redirect": address}) if fragment else Response(
        status_code=303, headers={"Location": address}
    )  # fmt: skip


def nothing(*events: str) -> Response:
    """Nothing is to be shown; parts of the page are told that something happened."""
    return Response(status_code=204, headers={"HX-Trigger": ", ".join(events)} if events else None)


class Room(APIRoute):
    """A route of the page: what goes wrong is told to a person, in a page or beside what was being done."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with errors as pages."""
        handle = super().get_route_handler()

        async def handle_and_tell(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                return tell(request, 400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}", "")
            except NoSuchJobError:
                return tell(request, 404, "There is no such job", "It may have been of another workspace.")
            except PersonalizeError as error:
                return tell(request, status_of(error), error.what, error.hint)

        return handle_and_tell


def tell(request: Request, status: int, what: str, hint: str) -> Response:
    """What went wrong and what to do, as a page of its own or as a message over this one."""
    what = what[:1].upper() + what[1:]
    if not is_fragment(request):
        return show(request, "error", status, what=what, hint=hint, room="")
    answer = show(request, "_toast", status, what=what, hint=hint)
    answer.headers.update({"HX-Retarget": "#toast", "HX-Reswap": "innerHTML"})
    return answer
