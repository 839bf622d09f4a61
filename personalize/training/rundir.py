"""The run folder: what lies where, events.jsonl, and the state that a run is resumed from.

NAME.safetensors, .png, .json     the adapter, its preview, its sidecar for UIs
checkpoints/NAME-000050...        adapters on the way and the last;  checkpoints/state.safetensors: what the run goes on from
folds/01/                         runs that left a picture out
samples/000050-a-rex-dog-s0.png   pictures by step, prompt and seed; those of step 0 are the base's own
samples/000050-a-rex-dog-563043-s0.png  the same, drawn in another way than the first one of that name
samples/000200-a-rex-dog-s0-x0.50.png   pictures of the finished adapter by strength
control, .lock                    a word to the run that goes on (control.py), and who that is
checkpoints/.commit               there for a moment while the states of several runs take their places: see Commit
class_images/                     drawn by the base, for prior preservation
tensorboard/, wandb/              what trackers keep
recipe.toml, events.jsonl, report.html
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import OutputError
from ..io import atomic, disk_error, write_text
from ..lock import hold
from ..text import command_line
from .control import take_words
from .events import Event, Finished, event_record, parse, read_events
from .sample_names import drawing_of

OURS = (
    "checkpoints",
    "samples",
    "class_images",
    "folds",
    "events.jsonl",
    "recipe.toml",
    "metrics.json",
    "report.html",
    "tensorboard",
    "wandb",
)


@dataclass(frozen=True)
class State:
    """Where a run stands after `done` steps: everything that its remaining steps depend on."""

    done: int
    about: dict[str, Any]  # the recipe's settings and the pictures, to tell whether the run may go on
    tensors: dict[str, Tensor]
    more: dict[str, Any] = field(default_factory=dict)  # how the run fits into memory, which steps failed, what it began with


@dataclass(frozen=True)
class Commit:
    """What makes the states that several runs have written count, all at the same moment: a file in the folder of one of them.

    Each state names the file and its token. A state beside the last one counts as soon as the file holds its token, whether it
    has taken the other's place yet or not.
    """

    path: Path
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def make(self) -> None:
        """From now on, the states count. Raises OutputError."""
        write_text(self.path, self.token)

    def clear(self) -> None:
        """Forget it, once each state has its place. Raises OutputError."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(self.path, error, "another --output") from error

    def record(self, folder: Path) -> dict[str, str]:
        """What the state of a run in a folder says of it."""
        try:
            return {"at": os.path.relpath(self.path, folder), "token": self.token}
        except ValueError:  # another drive of Windows
            return {"at": str(self.path.absolute()), "token": self.token}


@dataclass(frozen=True)
class Run:
    """A run folder. Paths in events are relative to it."""

    folder: Path
    name: str

    @property
    def adapter(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def state(self) -> Path:
        return self.folder / "checkpoints" / "state.safetensors"

    @property
    def next_state(self) -> Path:
        return self.state.with_name(".state.safetensors.tmp")  # it is gone after a kill

    @property
    def commit(self) -> Path:
        return self.state.with_name(".commit")

    @property
    def class_images(self) -> Path:
        return self.folder / "class_images"

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"{self.name}-{step:06}.safetensors"

    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints that are there, by step."""
        pattern = re.compile(rf"{re.escape(self.name)}-(\d{{6,}})\.safetensors")
        found = [(match, path) for path in (self.folder / "checkpoints").glob("*") if (match := pattern.fullmatch(path.name))]
        return {int(match[1]): path for match, path in sorted(found, key=lambda pair: int(pair[0][1]))}

    def fold(self, number: int) -> Run:
        """The run that leaves a picture out."""
        return Run(self.folder / "folds" / f"{number:02}", self.name)

    def scores(self) -> dict[int, float]:
        """The validation of each checkpoint by step, from events.jsonl."""
        return {r["step"]: r["validation"] for r in self.history() if r["event"] == "scored" and r["strength"] == 1}

    def sample(self, step: int, name: str) -> Path:
        return self.folder / "samples" / f"{step:06}-{name}.png"

    def drawings(self, name: str) -> list[Path]:
        """The pictures of a name that are there, of any step and strength."""
        return [path for path in (self.folder / "samples").glob("*.png") if drawing_of(path.name) == name]

    def sweep(self, step: int, strength: float, name: str) -> Path:
        return self.folder / "samples" / f"{step:06}-{name}-x{strength:.2f}.png"

    def samples(self) -> dict[tuple[int, str, int], list[Path]]:
        """The sample pictures that the diary tells of and that are there, by step, prompt and seed."""
        found: dict[tuple[int, str, int], list[Path]] = {}
        for record in self.history():
            if record["event"] == "sample" and (path := self.folder / record["path"]).is_file():
                found.setdefault((record["step"], record["prompt"], record["seed"]), []).append(path)
        return found

    def relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, nobody else trains into this folder. Raises OutputError, which names the holder, where somebody does."""
        end = command_line("personalize", "tell", self.folder, "stop")
        with hold(self.folder, f"wait for it, end it with `{end}`, or choose another --output"):
            take_words(self.folder)  # to a run that is gone
            yield

    def make(self) -> None:
        """Make the folder. Raises OutputError where that is not possible."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.folder, error, "another --output") from error

    def record(self, event: Event) -> Event:
        """Append an event to the diary, and pass it on."""
        self._append(event_record(event))
        return event

    def record_end(self, kind: str, **about: Any) -> None:
        """Write into the diary what is not an event of `train`: how a run ended that did not finish."""
        self._append({"event": kind, **about})

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            with self.events.open("a", encoding="utf-8", errors="backslashreplace") as diary:
                diary.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise disk_error(self.events, error, "another --output") from error

    def history(self) -> list[dict[str, Any]]:
        """The records of events.jsonl, oldest first, without lines that were cut short; see `read_events`."""
        return read_events(self.events)

    def recipe_text(self) -> str:
        """The recipe.toml that is there; empty if there is none."""
        path = self.folder / "recipe.toml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def open(self, recipe: str, done: int) -> float:
        """Begin, or go on after `done` steps, with `recipe` as the new recipe.toml; returns the seconds of the steps so far."""
        if self._is_committed():  # the run was killed before it took its place
            self.put_state()
        for path in self.folder.rglob(".*.tmp"):  # left behind by a killed run
            path.unlink(missing_ok=True)
        if done:
            self.rewind(done)
        else:
            write_text(self.events, "")
        write_text(self.folder / "recipe.toml", recipe)
        return float(sum(record["seconds"] for record in self.history() if record["event"] == "step"))

    def rewind(self, done: int) -> None:
        """Forget what the diary says about anything after step `done`, and which files it led to: they are made anew."""
        history = self.history()
        reached = max((i for i, r in enumerate(history) if r["event"] == "step" and r["step"] <= done), default=-1)
        kept = [record for i, record in enumerate(history) if is_settled(record, i <= reached, done)]
        write_text(self.events, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))

    def finished_event(self) -> Finished | None:
        """How the run ended, if it did and its adapter is still there."""
        last = parse((self.history() or [{}])[-1])
        return replace(last, again=True) if isinstance(last, Finished) and self.adapter.is_file() else None

    def save_state(self, state: State) -> None:
        """Write the state as ONE file, so that its tensors and its step can never disagree."""
        self.write_state(state)
        self.put_state()

    def write_state(self, state: State) -> None:
        """Write a state beside the one that is there; `put_state` lets it take its place."""
        header = {"done": str(state.done), "about": json.dumps(state.about, ensure_ascii=False, sort_keys=True)}
        header["more"] = json.dumps(state.more, sort_keys=True, ensure_ascii=False)
        with atomic(self.next_state) as temporary:
            temporary.write_bytes(save(state.tensors, header))  # not save_file: a full disk must be an OSError

    def put_state(self) -> None:
        """Let what `write_state` wrote, if anything, take its place. Raises OutputError."""
        try:
            if self.next_state.is_file():
                self.next_state.replace(self.state)
        except OSError as error:
            raise disk_error(self.state, error, "another --output") from error

    def load_state(self) -> State | None:
        """The state that the run goes on from, if there is one. Raises OutputError for a damaged one."""
        path = self.next_state if self._is_committed() else self.state
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata()
                about, more = json.loads(header["about"]), json.loads(header.get("more", "{}"))
                return State(int(header["done"]), about, {key: file.get_tensor(key) for key in file.keys()}, more)  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise OutputError(f"cannot go on from {path}: {error}", "start over with --fresh") from error

    def _is_committed(self) -> bool:
        """Whether a state lies beside the last one that counts, together with those of other runs."""
        try:
            with safe_open(self.next_state, "pt") as file:
                commit = json.loads(file.metadata().get("more", "{}"))["commit"]
            return bool((self.folder / commit["at"]).read_text(encoding="utf-8") == commit["token"])
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError):
            return False

    def clear(self) -> None:
        """Remove what an earlier run left here, and nothing else. Its adapter stays until a new one takes its place."""
        try:
            for path in [self.folder / name for name in OURS]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(self.folder, error, "another --output") from error


def is_settled(record: Mapping[str, Any], before: bool, done: int) -> bool:
    """Whether a record stays true when a run goes on after `done` steps: starts and lowered rungs, the pictures of those steps,
    and the steps and files `before` the end of them."""
    if record["event"] == "sample":
        return bool(record["step"] <= done)
    return record["event"] in ("started", "steppeddown") or (before and record["event"] in ("step", "saved", "warned", "encoded"))
