"""The FastAPI app of a workspace.

app = create_app(Studio.open(Options(Path("studio")), lanes=("cpu",)))    # uvicorn serves it; serve.py does so
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

from anyio import to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path
from starlette.staticfiles import StaticFiles

from ..errors import NoSuchJobError, PersonalizeError
from ..text import plain
from ..version import __version__
from . import openapi, page
from .errors import error_body, error_response
from .openai import files, images, jobs, models, uploads
from .prefix import Prefix
from .routes import datasets, library, recipes
from .routes import jobs as queue
from .routes.datasets import UPLOADS
from .security import TOO_LARGE, Guard
from .studio import Studio

ROUTERS = (
    (queue.router, "/api"),
    (datasets.router, "/api"),
    (library.router, "/api"),
    (recipes.router, "/api"),
    (files.router, "/v1"),
    (uploads.router, "/v1"),
    (jobs.router, "/v1"),
    (models.router, "/v1"),
    (images.router, "/v1"),
    (page.router, ""),
)


def create_app(studio: Studio) -> FastAPI:
    """The app of a studio. While it lives, its engine, if it has one, runs the jobs."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with studio.live.running():
            if studio.engine:
                await to_thread.run_sync(studio.engine.start)
                await to_thread.run_sync(studio.remove_leftovers)
            try:
                yield
            finally:
                studio.live.close()
                if studio.engine:
                    await to_thread.run_sync(studio.engine.stop)

    app = FastAPI(title="personalize", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
                  openapi_url="/api/openapi.json")  # fmt: skip
    app.state.studio = studio
    for router, prefix in ROUTERS:
        app.include_router(router, prefix=prefix)
    app.mount("/static", StaticFiles(directory=page.STATIC), name="static")
    app.add_api_route("/health", health, methods=["GET"], tags=["service"])
    app.add_exception_handler(PersonalizeError, on_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_fault)
    app.add_middleware(Guard, options=studio.options, large=large_paths())
    app.add_middleware(Prefix, token=studio.options.token)
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    return app


def large_paths() -> list[re.Pattern[str]]:
    """The paths of routes that take uploads: to all others, large bodies are refused before they are read."""
    routes = [(prefix, route) for router, prefix in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    return [compile_path(prefix + route.path)[0] for prefix, route in routes if UPLOADS in route.tags]


async def health(request: Request) -> dict[str, Any]:
    """Whether the service answers."""
    return {"status": "ok", "version": __version__}


async def on_fault(_: Request, error: Exception) -> Response:
    """A mistake of ours: it is told as every error is, and the server's log has the rest."""
    what = f"something went wrong in the service: {type(error).__name__}"
    return JSONResponse(error_body(500, "fault", what, "its log says where; please report it"), 500)


async def on_error(_: Request, error: Exception) -> Response:
    """What a person can mend, or stands in the way."""
    assert isinstance(error, PersonalizeError)
    if isinstance(error, NoSuchJobError):  # which speaks of the workspace's place, and of a command
        error = NoSuchJobError(error.what.partition(" in ")[0], "GET /api/jobs lists them")
    return error_response(error)


async def on_invalid(_: Request, error: Exception) -> Response:
    """A body, query or path that is not as the document says."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "model_attributes_type" and first["loc"] == ("body",):
        what, hint = "the body is no JSON object", "send one, with Content-Type: application/json"
        return JSONResponse(error_body(400, "invalid_value", what, hint), 400)
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(where) or None
    what = f"{param}: {first['msg']}" if param else first["msg"]
    return JSONResponse(error_body(400, "invalid_value", what, "GET /api/openapi.json says what is taken", param), 400)


async def on_http(request: Request, error: Exception) -> Response:
    """No such route, another method, too large a body."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(error.status_code, "http_error")
    if code == "too_large":
        return error_response(TOO_LARGE)
    if error.status_code == 404 and request.method == "GET" and page.is_wanted(request):
        return page.tell(request, 404, "There is nothing here", "The rooms are above.")
    what, hint = str(error.detail), ""
    if error.status_code in (404, 405) and what in ("Not Found", "Method Not Allowed"):
        what, hint = f"there is no route {request.method} {plain(request.url.path, 200)}", "GET /api/openapi.json lists them"
    return JSONResponse(error_body(error.status_code, code, what, hint), error.status_code, headers=error.headers)
