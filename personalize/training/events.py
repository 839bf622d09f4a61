"""What a run tells while it goes on. Training yields these; the command prints them, events.jsonl keeps them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Started:
    """The run is prepared and about to take its first step, or the one after `resumed` steps."""

    time: str  # ISO 8601, UTC
    recipe: dict[str, Any]  # flat names, fully resolved
    images: list[dict[str, Any]]  # path, caption, sha256, trigger
    warnings: list[str]
    parameters: int
    device: str
    dtype: str
    versions: dict[str, str]
    base: dict[str, Any] = field(default_factory=dict)  # what was loaded: family, prediction, parameters, dtypes, bytes
    resumed: int = 0
    shapes: dict[str, int] = field(default_factory=dict)  # pictures (repeats counted) by WIDTHxHEIGHT, in pixels
    fit: dict[str, Any] = field(default_factory=dict)  # how the run fits into memory, what it will take, and why it was chosen


@dataclass(frozen=True, slots=True)
class Step:
    """`step` steps are done. A skipped one (its loss or gradient was not finite) changed nothing, and `cause` says why."""

    step: int
    loss: float
    lr: float
    text_encoder_lr: float
    grad_norm: float
    seconds: float
    timesteps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    skipped: bool = False
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture was drawn. `path` is relative to the run folder; `base` says that it was drawn without the adapter."""

    step: int
    prompt: str
    seed: int
    path: str
    base: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """A picture of the finished adapter at a strength; those at 0 and 1 are sample pictures."""

    step: int
    strength: float
    prompt: str
    seed: int
    path: str


@dataclass(frozen=True, slots=True)
class Scored:
    """An adapter was examined on fixed noise: a checkpoint at strength 1, or the chosen one at another. See choose.py."""

    step: int
    strength: float
    fit: float  # share of the base's error on the training pictures that is gone
    validation: float  # the same on pictures that were not trained on, where there are such; below 0: it grew
    drift: float  # squared change of what is predicted without the trigger, in units of the base's error on the pictures
    contrast: float  # share of the change that needs the trigger; 0: the class has become the subject
    score: float


@dataclass(frozen=True, slots=True)
class Fold:
    """A run that left pictures out is done: at which step it was best on them, and how good."""

    number: int
    of: int
    pictures: list[str]
    step: int
    validation: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """The checkpoint that becomes the adapter, the one that scored best, and the strengths at which the former is good."""

    step: int
    best: int
    among: int  # so many checkpoints
    fit: float
    validation: float
    drift: float
    contrast: float
    judged_by: str  # which pictures told the validation
    low: float
    weight: float  # the preferred strength
    high: float


@dataclass(frozen=True, slots=True)
class Saved:
    """An adapter file was written. `path` is relative to the run folder."""

    step: int
    path: str


@dataclass(frozen=True, slots=True)
class SteppedDown:
    """Memory ran out: `what` gave way, and the run goes on from `step` steps, those of its last checkpoint."""

    step: int
    what: str
    why: str
    fit: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that a person should know, after `step` steps."""

    step: int
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The adapter is there. `again` says that it already was, and nothing was done."""

    step: int
    seconds: float
    path: str
    peak_bytes: int
    again: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """One of many runs ended after `step` steps without an adapter; the others go on."""

    step: int
    message: str


Event = Started | Step | Sample | Sweep | Scored | Fold | Chosen | Saved | SteppedDown | Warned | Failed | Finished


def event_record(event: Event) -> dict[str, Any]:
    """An event as strict JSON: its kind under "event", numbers that are not finite as null."""
    return {"event": type(event).__name__.lower()} | {key: _plain(value) for key, value in asdict(event).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_plain(item) for item in value] if isinstance(value, list) else value
