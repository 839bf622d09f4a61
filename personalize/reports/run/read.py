"""A run folder read into values. Whatever is missing, torn or broken is left out; only a missing folder is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import DataError
from ...text import parse_toml
from ...training.events import read_events
from ...training.sample_names import drawing_of

Record = Mapping[str, Any]
MARKS = ("events.jsonl", "recipe.toml")  # files of a run


class Key(NamedTuple):
    """What sample pictures of several steps have in common."""

    prompt: str
    seed: int
    drawing: str  # of their names, another one for each way of drawing; empty where they do not tell

    @classmethod
    def of(cls, record: Record) -> Key:
        """Of a sample's or sweep's record."""
        return cls(record["prompt"], record["seed"], drawing_of(record["path"]))


@dataclass(frozen=True)
class Run:
    """What a run folder says, in the order in which it was written."""

    folder: Path
    started: Record
    steps: tuple[Record, ...]
    samples: tuple[Record, ...]
    sweeps: tuple[Record, ...]
    scored: tuple[Record, ...]
    judged: tuple[Record, ...]
    encoded: tuple[Record, ...]
    chosen: Record | None
    saved: tuple[Record, ...]
    finished: Record | None
    failure: str  # why it ended early; empty if it did not say
    starts: int  # how often it was started or resumed
    changes: tuple[str, ...]  # what is otherwise than when it began, as it went on
    notes: tuple[str, ...]  # warnings and steps down the memory ladder, as sentences
    recipe: Record  # flat names, as flags have them
    toml: str
    metrics: tuple[Record, ...]
    sidecar: Record = field(default_factory=dict)

    @cached_property
    def adapter(self) -> Path | None:
        """The finished adapter, or else the newest checkpoint that is there."""
        named = [self.finished.get("path")] if self.finished else []
        named += [record["path"] for record in reversed(self.saved)]
        found = (inside(self.folder, path) for path in named if isinstance(path, str))
        return next((path for path in found if path), None) or next(iter(sorted(self.folder.glob("*.safetensors"))), None)

    @cached_property
    def trigger(self) -> str:
        """The word that calls the subject."""
        value = self.started.get("trigger") or self.recipe.get("trigger")
        return str(value or self.name)

    @cached_property
    def triggers(self) -> tuple[str, ...]:
        """The words that call each of several concepts; a single one's is `trigger`."""
        images = self.started.get("images")
        words = [one.get("trigger") for one in images if isinstance(one, dict)] if isinstance(images, list) else []
        return tuple(dict.fromkeys([self.trigger, *(str(word) for word in words if word)]))

    @cached_property
    def name(self) -> str:
        """Stem of the adapter file; the run folder's own name before there is one."""
        value = self.started.get("name") or self.recipe.get("name")
        return str(value or (self.adapter.stem if self.adapter else self.folder.resolve().name))

    @cached_property
    def class_name(self) -> str:
        return str(self.started.get("class_name") or self.recipe.get("class") or "")

    @cached_property
    def goal(self) -> int:
        """Steps the run was meant to take; 0 if nothing says so."""
        return int(number(self.recipe.get("steps")) or 0)

    @cached_property
    def done(self) -> int:
        """Steps the run has taken."""
        reached = [record["step"] for record in (*self.steps[-1:], *self.saved)]
        return max(reached, default=0)


def _runs_in(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if any((one / name).is_file() for name in MARKS))


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: the folder does not exist, or holds runs and is none.
    """
    if not folder.is_dir():
        raise DataError(f"no run folder at {folder}", "give the folder that `personalize train` wrote, such as runs/NAME")
    if not any((folder / name).is_file() for name in MARKS) and (inner := _runs_in(folder)):
        raise DataError(f"{folder} is no run, but holds {len(inner)}", f"give one of them, such as {inner[0]}")
    records = read_events(folder / "events.jsonl")
    starts, toml = _of(records, "started"), _text(folder / "recipe.toml")
    recipe = _toml(toml) or (section(starts[-1], "recipe") if starts else {})
    run = Run(
        folder=folder,
        started=starts[-1] if starts else {},
        steps=_steps(records),
        samples=_of(records, "sample"),
        sweeps=_of(records, "sweep"),
        scored=_of(records, "scored"),
        judged=_of(records, "judged"),
        encoded=_of(records, "encoded"),
        chosen=next(iter(reversed(_of(records, "chosen"))), None),
        saved=_of(records, "saved"),
        finished=_end_record(records),
        failure=_failure(records),
        starts=len(starts),
        changes=tuple(str(one) for record in starts for one in record.get("changes") or [] if isinstance(one, str)),
        notes=tuple(_notes(records)),
        recipe=_flat(recipe),
        toml=toml,
        metrics=_metrics(folder),
    )
    return replace(run, sidecar=_json(folder / f"{run.name}.json"))


def inside(folder: Path, relative: str) -> Path | None:
    """The file at a relative path, or None if it is not there or lies outside the folder."""
    path = folder / relative
    try:
        return path if path.resolve().is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError):  # a loop of links, a NUL in the name
        return None


def section(record: Record, name: str) -> Record:
    """A nested mapping; empty if it is missing or something else."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def number(value: object) -> float | None:
    """A finite number, or None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _of(records: Sequence[Record], kind: str) -> tuple[Record, ...]:
    return tuple(record for record in records if record["event"] == kind)


def _steps(records: Sequence[Record]) -> tuple[Record, ...]:
    """Step records by step; a resumed run repeats some, and the last record wins."""
    steps: dict[int, Record] = {}
    for record in records:
        if record["event"] == "step":
            steps[record["step"]] = record
        elif record["event"] == "started" and isinstance(record.get("resumed"), int):
            steps = {step: kept for step, kept in steps.items() if step <= record["resumed"]}
    return tuple(steps[step] for step in sorted(steps))


def _end_record(records: Sequence[Record]) -> Record | None:
    """How the run ended, if it did after its last step. The record of a finished run that was asked for again says less."""
    ends = [record for record in records if record["event"] == "finished"]
    fresh = [record for record in ends if not record.get("again")]
    last_step = max((i for i, record in enumerate(records) if record["event"] == "step"), default=-1)
    return (fresh or ends)[-1] if ends and records.index(ends[-1]) > last_step else None


def _failure(records: Sequence[Record]) -> str:
    """Why the run's last life ended early; empty if it did not say."""
    last = records[-1] if records else {}
    return str(last.get("message", "")) if last.get("event") == "error" else ""


def _notes(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if record["event"] == "warned":
            yield f"after step {record['step']}: {record['text']}"
        if record["event"] == "steppeddown":
            yield f"memory ran out ({record['why']}): {record['what']} gave way, and the run went on after step {record['step']}"


def _toml(text: str) -> dict[str, Any]:
    try:
        return parse_toml(text)
    except ValueError:
        return {}


def _flat(recipe: Record) -> Record:
    """Settings by their flat names, which are unique over all sections."""
    plain = {key: value for key, value in recipe.items() if not isinstance(value, dict)}
    return plain | {key: value for part in recipe.values() if isinstance(part, dict) for key, value in part.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _metrics(folder: Path) -> tuple[Record, ...]:
    """Rows of metrics.json that have a name and a figure."""
    rows = _json(folder / "metrics.json").get("rows")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return tuple(row for row in rows if isinstance(row.get("name"), str) and number(row.get("adapter")) is not None)
