"""The OpenAPI document: FastAPI's, with the settings of each kind of job as its command and the recipe describe them."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .errors import ErrorBody
from .requests import job_schema, kinds

ABOUT = """Trains adapters and draws pictures: jobs that survive, datasets, adapters.

Under /api lie the service's own routes, under /v1 OpenAI's, as far as they are about training and drawing. Every error has
OpenAI's shape, with a `hint` beside the message."""
FREE = ("CheckSettings", "Settings")  # bodies whose settings are those of a training

ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
ERRORS = {
    status: {"description": text, "content": ERROR}
    for status, text in {
        "400": "what was sent cannot be used",
        "401": "a token is needed",
        "403": "not allowed, or outside of the workspace",
        "404": "there is no such thing",
        "405": "the route has no such method",
        "409": "not now, or it is there already",
        "413": "too large",
        "421": "another host was meant",
    }.items()
}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an app, made once."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=ABOUT, routes=app.routes)
        schemas = found["components"]["schemas"]
        for kind in kinds():
            schemas[settings_name(kind)] = job_schema(kind)
        schemas["NewJob"] = any_job(schemas["NewJob"])
        for name in FREE:
            schemas[name]["properties"]["settings"] = some_of(job_schema("train"))
        schemas["NewFineTuning"]["properties"] = {
            name: one for name, one in job_schema("train")["properties"].items() if name not in ("folder", "base")
        } | schemas["NewFineTuning"]["properties"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # 400 here, like everything that a client can mend
                operation["responses"] |= ERRORS
        schemas["ErrorBody"] = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schemas["ErrorBody"].pop("$defs")
        app.openapi_schema = found
    return app.openapi_schema


def settings_name(kind: str) -> str:
    """The name of the settings of a kind of job among the schemas.

    >>> settings_name("train")
    'TrainSettings'
    """
    return f"{re.sub('[^a-z]', '', kind).capitalize()}Settings"


def any_job(plain: dict[str, Any]) -> dict[str, Any]:
    """The body of a new job: of one kind, with the settings of that kind."""
    of = {kind: {"$ref": f"#/components/schemas/{settings_name(kind)}"} for kind in kinds()}
    return {
        "oneOf": [
            plain | {"properties": plain["properties"] | {"kind": {"const": kind, "type": "string"}, "settings": settings},
                     "required": ["kind", "settings"]}
            for kind, settings in of.items()
        ]
    }  # fmt: skip


def some_of(schema: dict[str, Any]) -> dict[str, Any]:
    """An object of which nothing is required."""
    return {key: value for key, value in schema.items() if key != "required"}
