"""A job, its events and its checkpoints as OpenAI's objects. Pure functions of what the store says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...jobs import Job
from ...training.events import EVENTS, Judged, parse
from ...training.verdict import describe
from .names import JOB, RESULT, model_name

# Where there is no such state at OpenAI: a paused job waits, and the event says for what.
STATUS = {"paused": "queued"}
Numbered = tuple[int, Mapping[str, Any]]


def fine_tuning_job(job: Job, now: float) -> dict[str, Any]:
    """A training as `fine_tuning.job`. Beside OpenAI's keys: `paused`, `progress`, `settings` and `name`."""
    asked = job.metadata.get("openai") or {}
    left = job.progress.get("eta") if job.state == "running" else None
    return {
        "id": f"{JOB}{job.id}",
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": int(job.finished_at) if job.finished_at else None,
        "model": asked.get("model") or str(job.settings.get("base") or "pocket"),
        "fine_tuned_model": model_name(job) if job.state == "succeeded" else None,
        "organization_id": "personalize",
        "status": STATUS.get(job.state, job.state),
        "error": error_of(job),
        "training_file": asked.get("training_file") or "",
        "validation_file": asked.get("validation_file"),
        "hyperparameters": hyperparameters(asked),
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters(asked)}},
        "result_files": [f"{RESULT}{job.id}"] if job.state == "succeeded" else [],
        "seed": int(job.settings.get("seed") or 0),
        "trained_tokens": None,  # pictures have none
        "estimated_finish": math.ceil(now + left) if left is not None else None,
        "integrations": [],
        "metadata": own_metadata(job),
        "name": job.name,
        "paused": job.state == "paused",
        "progress": job.progress,
        "settings": job.settings,
    }


def own_metadata(job: Job) -> dict[str, str]:
    """What the client gave a job to remember."""
    return {key: value for key, value in job.metadata.items() if isinstance(value, str)}


def hyperparameters(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the request; what it left out was chosen here."""
    given = asked.get("hyperparameters") or {}
    return {name: given.get(name, "auto") for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}


def error_of(job: Job) -> dict[str, Any] | None:
    """Why a job failed."""
    if job.state != "failed" or not job.error:
        return None
    message, hint = job.error.get("message", ""), job.error.get("hint", "")
    return {"code": job.error.get("kind") or "failed", "message": f"{message} ({hint})" if hint else message, "param": None}


def event(job: Job, number: int, record: Mapping[str, Any], at: float) -> dict[str, Any]:
    """An event as `fine_tuning.job.event`: steps are metrics, all others messages; `data` is the whole record."""
    kind = str(record.get("event"))
    return {
        "id": f"ftevent-{job.id}-{number}",
        "object": "fine_tuning.job.event",
        "created_at": int(at),
        "level": "error" if kind in ("error", "failed") or record.get("state") == "failed" else level_of(kind),
        "message": message_of(record),
        "type": "metrics" if kind == "step" else "message",
        "data": dict(record) | ({"train_loss": record.get("loss")} if kind == "step" else {}),
    }


def level_of(kind: str) -> str:
    """How much an event matters."""
    return "warn" if kind in ("warned", "steppeddown") else "info"


def message_of(record: Mapping[str, Any]) -> str:
    """An event as a sentence."""
    kind = str(record.get("event"))
    if kind == "judged" and isinstance(judged := parse(record), Judged):
        return f"Step {judged.step}: {describe(judged).headline}"
    written = MESSAGES.get(kind)
    if written is None:
        return str(record.get("text") or record.get("message") or record.get("error") or record.get("state") or kind)
    try:
        return written.format_map(record)
    except (KeyError, ValueError, TypeError):  # of another version: a null where a number was, a key that has gone
        return kind


MESSAGES = {
    "started": "The training has started",
    "step": "Step {step}: training loss={loss:.4f}",
    "sample": "Step {step}: drawn '{prompt}' with seed {seed}",
    "sweep": "Drawn at strength {strength:g}: '{prompt}' with seed {seed}",
    "encoded": "What the base's autoencoder makes of the pictures: {path}",
    "saved": "Step {step}: saved {path}",
    "scored": "Step {step}: examined, score {score:.3f}",
    "chosen": "Step {step} is chosen among {among} checkpoints, good at strengths {low:.2g} to {high:.2g}",
    "steppeddown": "Memory ran out after step {step}: {what} gave way",
    "stopped": "Stopped after step {step}, the state is saved",
    "finished": "Finished after step {step}: {path}",
    "state": "The job is {state}",
}


def with_times(job: Job, events: Iterable[Numbered]) -> Iterator[tuple[int, Mapping[str, Any], float]]:
    """Events with when they happened, as they say it; one that does not, with the last that did."""
    at = job.created_at
    for number, record in events:
        told = record.get("at")
        at = float(told) if isinstance(told, int | float) else at
        yield number, record, at


def events_page(job: Job, events: Iterable[Numbered]) -> list[dict[str, Any]]:
    """All events of a job, the newest first, as OpenAI lists them."""
    return [event(job, number, record, at) for number, record, at in with_times(job, events)][::-1]


def checkpoints(job: Job, events: Sequence[Numbered]) -> list[dict[str, Any]]:
    """The checkpoints of a training, the last first, with the scores that it got.

    train_loss is the loss of that step; full_valid_loss is the error on pictures that were held back, as a share of the base's.
    """
    losses: dict[int, float] = {}
    scores: dict[int, dict[str, Any]] = {}
    saved: dict[int, tuple[str, float]] = {}
    for _, record, at in with_times(job, events):
        kind, step = record.get("event"), record.get("step")
        if kind not in EVENTS or not isinstance(step, int) or parse(record) is None:
            continue
        if kind == "step":
            losses[step] = record["loss"]
        elif kind == "scored" and record["strength"] == 1:
            scores[step] = {key: record[key] for key in ("fit", "validation", "drift", "contrast", "score")}
        elif kind == "saved" and "/" in record["path"]:
            saved[step] = record["path"], at
    return [checkpoint(job, step, *saved[step], losses.get(step), scores.get(step, {})) for step in sorted(saved, reverse=True)]


def checkpoint(
    job: Job, step: int, path: str, at: float, loss: float | None, scores: Mapping[str, float | None]
) -> dict[str, Any]:
    """One of them."""
    validation = scores.get("validation") if job.settings.get("holdout") else None  # else it is that of the training pictures
    metrics = {"step": step, "train_loss": loss, "valid_loss": None}
    metrics["full_valid_loss"] = 1 - validation if validation is not None else None
    return {
        "id": f"ftckpt-{job.id}-{step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(at),
        "fine_tuned_model_checkpoint": model_name(job, step),
        "fine_tuning_job_id": f"{JOB}{job.id}",
        "metrics": metrics | dict(scores),
        "step_number": step,
        "path": path,
    }


def page(items: Sequence[Mapping[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """A part of a list, as OpenAI pages: behind the item with the id `after`; an unknown one leaves nothing.

    >>> page([{"id": "a"}, {"id": "b"}, {"id": "c"}], "a", 1)
    {'object': 'list', 'data': [{'id': 'b'}], 'first_id': 'b', 'last_id': 'b', 'has_more': True}
    """
    ids = [str(item["id"]) for item in items]
    start = 0 if after is None else ids.index(after) + 1 if after in ids else len(ids)
    data = list(items[start : start + limit])
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    more = len(items) > start + limit
    return {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": more}
