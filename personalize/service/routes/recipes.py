"""What forms are made of: presets, the schema of each kind of job, and a recipe with everything filled in."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ...recipe.about import about, settings_of
from ...recipe.resolve import presets
from ...recipe.settings import flatten
from ..errors import not_found
from ..requests import job_schema, job_settings, kinds
from .common import Body, Here, Name, many

router = APIRouter(tags=["recipes"])


class Settings(Body):
    """Settings of a training."""

    settings: dict[str, Any]


@router.get("/presets")
def list_presets() -> dict[str, Any]:
    """The presets: what each is for, why it is as it is, and what it sets."""
    return many([{"name": name, "about": about(path), "settings": settings_of(path)} for name, path in presets().items()])


@router.get("/schemas")
def list_schemas() -> dict[str, Any]:
    """The kinds of jobs, each with the JSON schema of its settings."""
    return many([{"kind": kind, "schema": job_schema(kind)} for kind in kinds()])


@router.get("/schemas/{kind}")
def get_schema(kind: Name) -> dict[str, Any]:
    """The JSON schema of the settings of a kind of job."""
    if kind not in kinds():
        raise not_found("kind of job", kind, "GET /api/schemas lists them")
    return job_schema(kind)


@router.post("/recipe")
def resolve_recipe(here: Here, body: Settings) -> dict[str, Any]:
    """The recipe that a training with these settings would have, with every setting filled in; nothing is queued."""
    from ...api.recipes import explain

    recipe, told = explain(job_settings(here, "train", body.settings), needed=False)
    return {"recipe": flatten(recipe), "taken_for": told, "remarks": recipe.remarks}
