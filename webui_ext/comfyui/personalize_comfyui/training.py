"""Jobs of the studio as a node waits for them: queued, or found again by what was asked for; shown; cancelled with the node."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import host, pictures
from .client import ENDED, Client, StudioError, address
from .values import Use

EVERY = 0.4  # seconds between two looks: so long Cancel takes
KEY = "comfyui"  # of a job's metadata: the fingerprint of what was asked for
SAMPLES = 2.0  # seconds between two looks for new sample pictures
LIST = "/api/jobs?kind={kind}&limit=1000"


def queue(client: Client, kind: str, settings: Mapping[str, Any], output: str = "") -> dict[str, Any]:
    """The job that does this: one that was queued for the same thing goes on, or is done already; else a new one. `output` is how
    an adapter is to be called that it writes; where another one is called so, a few letters are added."""
    key = hashlib.sha256(json.dumps([kind, settings, output], sort_keys=True).encode()).hexdigest()[:32]
    for job in client.get(LIST.format(kind=kind))["data"]:
        if job["metadata"].get(KEY) != key:
            continue
        if job["state"] == "succeeded" and kind != "doctor" and not adapter_of(client, job):
            continue  # somebody has removed what it made
        action = {"paused": "resume", "cancelled": "requeue"}.get(job["state"])
        if job["state"] != "failed":
            return dict(client.post(f"{address('api', 'jobs', job['id'])}/{action}") if action else job)
    if output:
        names = {one["name"] for one in client.get("/api/adapters")["data"]}
        settings = {**settings, "output": f"{output}-{key[:6]}" if output in names else output}
    return dict(client.post("/api/jobs", {"kind": kind, "settings": dict(settings), "metadata": {KEY: key}}))


def wait(client: Client, job: dict[str, Any], node_id: str) -> dict[str, Any]:
    """The job when it has succeeded. Whatever ends this earlier, such as Cancel, cancels the job. Raises StudioError."""
    show, at = host.progress(node_id), address("api", "jobs", job["id"])
    look = samples_of(client, at) if job["kind"] == "train" else lambda: None
    try:
        while job["state"] not in ENDED:
            host.check_interrupted()
            told = job["progress"]
            host.say(node_id, line_of(job))
            show(int(told.get("done") or 0), max(1, int(told.get("total") or 1)), look())
            time.sleep(EVERY)
            job = client.get(at)
    finally:
        if job["state"] not in ENDED:
            client.post(f"{at}/cancel")
    if job["state"] == "succeeded":
        show(1, 1, None)
        host.say(node_id, "done")
        return job
    error = job["error"] or {}
    hint = f" ({error['hint']})" if error.get("hint") else ""
    log = f"\n{str(error.get('log') or '')[-1500:]}" if error.get("kind") not in ("data", "recipe") else ""
    raise StudioError(f"{job['kind']}: {error.get('message') or job['state']}{hint}{log}")


def line_of(job: Mapping[str, Any]) -> str:
    """How far a job is, in words.

    >>> line_of({"state": "running", "progress": {"done": 20, "total": 60, "doing": "training", "eta": 75.2}})
    'training 20 / 60, 1 min 15 s left'
    """
    told = job["progress"]
    if job["state"] != "running":
        return "waits for its turn" if job["state"] == "queued" else str(job["state"])
    count = f" {told['done']} / {told['total']}" if told.get("total") else ""
    eta = told.get("eta")
    minutes, seconds = divmod(int(eta or 0), 60)
    left = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return f"{told.get('doing') or 'running'}{count}" + (f", {left} left" if eta is not None else "")


def samples_of(client: Client, at: str) -> Callable[[], Any]:
    """A function that returns the newest sample picture, if there is one that it has not returned yet."""
    seen, when = 0, 0.0

    def look() -> Any:
        nonlocal seen, when
        if time.monotonic() - when < SAMPLES:
            return None
        when = time.monotonic()
        found = [one for one in client.get(f"{at}/samples")["data"] if one["url"] and not one["base"]]
        if len(found) <= seen:
            return None
        seen = len(found)
        return pictures.open_picture(client.read(found[-1]["url"]))

    return look


def last_samples(client: Client, job: Mapping[str, Any]) -> list[Any]:
    """The sample pictures of a training's last step, at full strength."""
    at = f"{address('api', 'jobs', job['id'])}/samples"
    found = [one for one in client.get(at)["data"] if one["url"] and not one["base"] and one["strength"] == 1]
    last = max((one["step"] for one in found), default=0)
    return [pictures.open_picture(client.read(one["url"])) for one in found if one["step"] == last]


def adapter_of(client: Client, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the library tells of the adapter that a job made; None where it is there no more."""
    paths = [value for value in (job["result"] or {}).values() if isinstance(value, str) and value.endswith(".safetensors")]
    return next((one for one in client.get("/api/adapters")["data"] if one["path"] in paths), None)


def use_of(client: Client, job: Mapping[str, Any]) -> Use:
    """The adapter that a job made, as a file of this machine. Raises StudioError."""
    if (found := adapter_of(client, job)) is None:
        raise StudioError(f"the job {job['id']} says that it has made no adapter; its log is in the studio")
    return use(client, found)


def use(client: Client, record: Mapping[str, Any]) -> Use:
    """An adapter of the library, as a file of this machine: where the service is elsewhere, a copy."""
    if client.is_here:
        return Use(str(record["path"]), id=str(record["id"]))
    to: Path = host.temporary() / str(record["id"]) / f"{record['name']}.safetensors"
    to.parent.mkdir(exist_ok=True)
    return Use(str(client.fetch(f"{address('api', 'adapters', record['id'])}/file", to)), id=str(record["id"]))
