"""What commands say: one-line errors and warnings on stderr, and with --json one answer for programs on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, is_dataclass
from os import PathLike
from typing import Any, TextIO

import click

from ..errors import PersonalizeError
from ..text import plain

LINE = 4000  # letters of a message: errors shorten themselves, so that their hints stay whole


@dataclass
class Answer:
    """What a command tells a program: `values` under names of its own, warnings, and what went wrong."""

    command: str
    values: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None

    def line(self, code: int) -> str:
        """The answer as one line of strict JSON in ASCII, which every code page has."""
        if code and not self.error:
            self.error = {"kind": "Stopped", "what": "stopped", "hint": "the same command goes on"} if code == 130 else None
        head = {"command": self.command, "ok": code == 0, "error": self.error, "warnings": self.warnings}
        return json.dumps(strict(head | self.values), allow_nan=False)


_ANSWER: ContextVar[Answer | None] = ContextVar("answer", default=None)


def answer(**values: Any) -> None:
    """Add to what --json prints; without it, nothing happens."""
    if current := _ANSWER.get():
        current.values |= values


@contextlib.contextmanager
def answer_in_json(command: str) -> Iterator[tuple[Answer, TextIO]]:
    """Inside, what is meant for a person goes to stderr. Yields what `answer` fills, and where its line belongs."""
    found, out = Answer(command), sys.stdout
    token = _ANSWER.set(found)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield found, out
    finally:
        _ANSWER.reset(token)


def strict(value: Any) -> Any:
    """A value as JSON has it: paths as text, dataclasses as objects, numbers that are not finite as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): strict(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [strict(one) for one in value]
    return str(value) if isinstance(value, PathLike) else value


def error_record(error: PersonalizeError | str) -> dict[str, str]:
    """An error as an object: its kind (a class of errors.py), what happened, and what to try."""
    if isinstance(error, PersonalizeError):
        return {"kind": type(error).__name__, "what": error.what, "hint": error.hint}
    return {"kind": "PersonalizeError", "what": error, "hint": ""}


def print_error(error: PersonalizeError | str) -> int:
    """Print an error; returns the exit code of a command that ends with it. A program is told the first."""
    if (current := _ANSWER.get()) and not current.error:
        current.error = error_record(error)
    echo(f"personalize: {plain(str(error), LINE)}", err=True)
    return 2


def print_warning(message: str) -> None:
    """Print a warning."""
    if current := _ANSWER.get():
        current.warnings.append(plain(message, LINE))
    echo(f"warning: {plain(message, LINE)}", err=True)


def echo(text: object, *, file: TextIO | None = None, err: bool = False) -> None:
    """Print a line in the stream's own encoding: where that is ASCII, click writes UTF-8 unless the stream is named. Bytes of a
    name that are no text become `?`."""
    click.echo(str(text).encode(errors="replace").decode(), file=file or (sys.stderr if err else sys.stdout))


def show_in_any_code_page() -> None:
    """Letters that the console, the file or the pipe cannot hold become `?`, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # none where a host has put something else there
            reconfigure(errors="replace")


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Our own Python warnings as one line each, without file and line number; those of libraries stay silent."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module=r"personalize\b")
        warnings.showwarning = lambda message, *_, **__: print_warning(str(message))
        yield
