"""/v1/models: the bases that came along, and what was trained here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ...jobs import Job
from ...models.sources import NAMED
from ..errors import Refusal, not_found
from ..routes.common import Here
from ..studio import Studio
from .names import OWNER, model_name, parse_model
from .request import adapter_of

router = APIRouter(prefix="/models", tags=["openai"])


@router.get("")
def list_models(here: Here) -> dict[str, Any]:
    """Bases, then fine-tuned models, the newest first."""
    found = [model_object(name, int(path.stat().st_mtime)) for name, path in NAMED.items()]
    jobs = here.store.list(kinds=("train",), states=("succeeded",))
    found += [model_object(model_name(job), at_end(job)) for job in jobs if is_there(here, model_name(job))]
    return {"object": "list", "data": found}


@router.get("/{model:path}")
def get_model(here: Here, model: str) -> dict[str, Any]:
    """One of them, or a checkpoint of one."""
    if model in NAMED:
        return model_object(model, int(NAMED[model].stat().st_mtime))
    adapter_of(here, model)
    named = parse_model(model)
    assert named
    return model_object(model, at_end(here.store.get(named.job)))


@router.delete("/{model:path}")
def delete_model(here: Here, model: str) -> dict[str, Any]:
    """Remove the adapter of a training, or a checkpoint; not while a job needs it."""
    if model in NAMED:
        raise Refusal(403, "a_base", f"{model} came along with the program", "only models that were trained here can be removed")
    if parse_model(model) is None:
        raise not_found("model", model, "GET /v1/models lists them")
    path = adapter_of(here, model)
    here.check_unused(path)
    path.unlink(missing_ok=True)
    return {"id": model, "object": "model", "deleted": True}


def is_there(here: Studio, model: str) -> bool:
    """Whether a model's file is there."""
    try:
        adapter_of(here, model)
    except Refusal:
        return False
    return True


def at_end(job: Job) -> int:
    """When a job ended, or else when it came."""
    return int(job.finished_at or job.created_at)


def model_object(name: str, created: int) -> dict[str, Any]:
    """A model as OpenAI has it."""
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER}
