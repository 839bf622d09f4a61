"""Events of a training run: `train` yields them, the command prints them, events.jsonl keeps them, `parse` reads them back."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints


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
    changes: list[str] = field(default_factory=list)  # what is otherwise than when the run began, or went on before
    init: dict[str, Any] = field(default_factory=dict)  # the adapter that the run began with: file, sha256, steps
    rates: list[dict[str, Any]] = field(default_factory=list)  # where layers learn differently: layers, count, start, scale


@dataclass(frozen=True, slots=True)
class Shared:
    """Runs are about to go side by side on one base; told once, of the first of them. Bytes that a step takes, by estimate."""

    members: int
    at_once: int  # so many members' batches go through the base together
    base: int
    adapter: int  # of each member, all the time: parameters, gradients and moments
    batch: int  # of each member whose batch goes through the base

    @property
    def peak(self) -> int:
        """What all of them take."""
        return self.base + self.members * self.adapter + self.at_once * self.batch


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
    bounded: int = 0  # layers whose update was scaled back to --scale-weight-norms
    embedding_lr: float = 0.0  # of the trigger's vectors


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
class Derived:
    """A file or folder was made of the adapter that a run has ended with. `path` is relative to the run folder."""

    step: int
    path: str
    what: str  # it is, as people are told
    error: float  # share of the update that it lost, by truncation or by rounding


@dataclass(frozen=True, slots=True)
class Scored:
    """An adapter was examined on fixed noise: a checkpoint at strength 1, or the chosen one at another. See selection.py."""

    step: int
    strength: float
    fit: float  # share of the base's error on the training pictures that is gone
    validation: float  # the same on pictures that were not trained on, where there are such; below 0: it grew
    drift: float  # squared change of what is predicted without the trigger, in units of the base's error on the pictures
    contrast: float  # share of the change that needs the trigger; 0: the class has become the subject
    score: float


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the base's autoencoder makes of the training images was saved; `concern` is a sentence where that is not enough."""

    kept: list[float]  # peak signal-to-noise ratios in dB
    path: str
    concern: str = ""
    usual: float = math.nan  # dB of the drawings that the base was made for, where that is known


@dataclass(frozen=True, slots=True)
class Judged:
    """Images of a checkpoint at a strength were drawn and looked at. See verdict.py; nan: not known on this base."""

    step: int
    strength: float
    value: float  # estimate of identity * fidelity * (1 - leak) * kept, 0..1
    low: float  # the truth lies between low and high in 80 of 100 cases
    high: float
    identity: float  # share of images with the trigger that show the subject or style
    fidelity: float  # share of images with the trigger that are what the rest of the prompt says
    leak: float  # share of images without the trigger that show it all the same
    kept: float  # share of images of unrelated things that are as obedient as the base's
    signs: dict[str, Any] = field(default_factory=dict)  # what was measured, see signs.py
    path: str = ""  # the images, where they were saved


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
    judged_by: str  # the pictures that validation was measured on
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
class Stopped:
    """The run was stopped after `step` steps, by Ctrl-C or because somebody asked; its state is saved, and it can go on."""

    step: int


@dataclass(frozen=True, slots=True)
class Failed:
    """One of many runs ended after `step` steps without an adapter; the others go on."""

    step: int
    message: str


Event = (
    Started | Shared | Encoded | Step | Sample | Sweep | Scored | Judged | Fold | Chosen | Saved | Derived | SteppedDown | Warned
    | Stopped | Failed | Finished
)  # fmt: skip

# ---------------------------------------------------------------- as JSON, and back

EVENTS: dict[str, type[Event]] = {kind.__name__.lower(): kind for kind in get_args(Event)}
# A record that lacks one of these fields, or has it of another type, is left out; all others have defaults.
NEEDED: dict[str, tuple[str, ...]] = {
    "shared": ("members", "at_once", "base", "adapter", "batch"),
    "step": ("step",),
    "sample": ("step", "prompt", "seed", "path"),
    "sweep": ("strength", "prompt", "seed", "path"),
    "scored": ("step", "strength", "fit", "validation", "drift", "contrast", "score"),
    "encoded": ("kept", "path"),
    "judged": ("step", "strength", "value", "low", "high"),
    "chosen": ("step", "best", "low", "high", "judged_by"),
    "saved": ("step", "path"),
    "derived": ("step", "path"),
    "steppeddown": ("step", "what", "why"),
    "warned": ("step", "text"),
    "stopped": ("step",),
    "error": ("message",),
}
# Of those, null stands for a number that is not finite.
NULLABLE = {"fit", "validation", "drift", "contrast", "score", "value", "low", "high"}
NEWER = ("bounded", "embedding_lr")
NOTES: dict[str, dict[str, type]] = {"error": {"message": str}}  # the record of a run's end that is no event


def event_record(event: Event) -> dict[str, Any]:
    """An event as strict JSON: its kind under "event", numbers that are not finite as null; what is newer, only where it is."""
    values = {key: value for key, value in asdict(event).items() if value or key not in NEWER}
    return {"event": type(event).__name__.lower()} | {key: _plain(value) for key, value in values.items()}


def parse(record: Any) -> Event | None:
    """The event of a record: the inverse of `event_record`, tolerant of older and of damaged files.

    None for an unknown kind and where a needed field is missing or of a wrong type; other such fields get their default, or
    the empty value of their type (nan for a float). Fields that the event does not have are ignored.

    >>> parse({"event": "saved", "step": 50, "path": "checkpoints/rex-000050.safetensors"})
    Saved(step=50, path='checkpoints/rex-000050.safetensors')
    >>> parse({"event": "saved", "step": "50"})
    """
    if not is_whole(record) or record["event"] not in EVENTS:
        return None
    kind = EVENTS[record["event"]]
    types, values = field_types(record["event"]), dict[str, Any]()
    for one in fields(kind):
        value = record.get(one.name)
        if _has_type(value, types[one.name]):
            values[one.name] = [math.nan if item is None else item for item in value] if isinstance(value, list) else value
        elif one.default is MISSING and one.default_factory is MISSING:
            values[one.name] = math.nan if types[one.name] is float else types[one.name]()
    return kind(**values)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The records of an events.jsonl, oldest first; a missing or unreadable file has none.

    Left out are lines that are no JSON, such as one that a killed run was writing, and records without a needed field.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [record for line in text.split("\n") if is_whole(record := _json(line))]


def is_whole(record: Any) -> bool:
    """Whether this is a record of a known kind that has all needed fields, in their types."""
    kind = record.get("event") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in EVENTS | NOTES:
        return False
    types = field_types(kind)
    return all(
        (key in NULLABLE and key in record and record[key] is None) or _has_type(record.get(key), types[key])
        for key in NEEDED.get(kind, ())
    )


@cache
def field_types(kind: str) -> dict[str, type]:
    """The fields of a kind of record and their types, without what a list or dict holds."""
    if kind in NOTES:
        return NOTES[kind]
    return {name: get_origin(hint) or hint for name, hint in get_type_hints(EVENTS[kind]).items()}


def _has_type(value: Any, kind: type) -> bool:
    return isinstance(value, int | float if kind is float else kind)


def _json(line: str) -> Any:
    """The value of a line of JSON; None for anything else."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_plain(item) for item in value] if isinstance(value, list) else value
