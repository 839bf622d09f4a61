"""Names of fine-tuned models, and ids of jobs and files, as OpenAI's clients see them.

A model is `ft:BASE:personalize:NAME:JOB`, a checkpoint of it the same with `:ckpt-step-50` behind it.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import NamedTuple

from ...jobs import Job
from ...text import slug

JOB, FILE, RESULT = "ftjob-", "file-", "file-result-"
OWNER = "personalize"
MODEL = re.compile(rf"ft:([^:]+):{OWNER}:([^:]*):([0-9a-f]+)(?::ckpt-step-(\d+))?")


class Model(NamedTuple):
    """What a model's name says: the job that trained it, and the step of a checkpoint."""

    job: str
    step: int | None = None


def model_name(job: Job, step: int | None = None) -> str:
    """The name of what a job trained, or of one of its checkpoints."""
    base = slug(PurePath(str(job.settings.get("base") or "pocket")).stem)
    return f"ft:{base}:{OWNER}:{slug(job.name)}:{job.id}" + (f":ckpt-step-{step}" if step is not None else "")


def parse_model(name: str) -> Model | None:
    """The job and step in a fine-tuned model's name; None for any other name.

    >>> parse_model("ft:pocket:personalize:rex:0a1b2c3d:ckpt-step-50"), parse_model("pocket")
    (Model(job='0a1b2c3d', step=50), None)
    """
    found = MODEL.fullmatch(name)
    return Model(found[3], int(found[4]) if found[4] else None) if found else None


def job_id(id: str) -> str:
    """Our id of a job from OpenAI's: `ftjob-0a1b2c3d`.

    >>> job_id("ftjob-0a1b2c3d")
    '0a1b2c3d'
    """
    return id.removeprefix(JOB)
