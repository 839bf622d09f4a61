"""One broken file, fed to everything that reads files. Each answer is a result or one line; all else is a bug."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import shutil
import struct
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalize.adapters import dialects
from personalize.adapters.adapter import Adapter
from personalize.adapters.describe import describe
from personalize.adapters.doctor.exam import examine
from personalize.adapters.embedding import Embedding
from personalize.cli import run
from personalize.errors import PersonalizeError
from personalize.families.checkpoint import open_weights
from personalize.formats.header import read_header

from . import mutations, sources

SECONDS = 2.0  # of processor time for any one reader: other work on the machine is nobody's fault
MEMORY = 64 << 20  # bytes that any one reader may take beyond four times the file
PER_ENTRY = (1e-7, 24)  # seconds and bytes more for the doctor, who may multiply out one dW at a time, for each of its entries
SMALL = 1 << 20  # entries of dW in a file: those with more are loaded and no more
FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError, MemoryError, NameError),
    *(OSError, RuntimeError, StopIteration, SyntaxError, SystemError, TypeError, ValueError, Warning, struct.error),
)  # what is none of these ends the worker, which is counted too
LONG = 1000  # characters of an error
SAMPLED = 0.1  # of the files go through the command line too


@dataclass(frozen=True)
class Trial:
    """What became of one input: reader => "read" or "refused", and bugs in a line each with their traceback."""

    number: int
    mutation: str
    source: str
    outcomes: dict[str, str]
    bugs: tuple[tuple[str, str], ...]
    seconds: float  # of the slowest reader
    memory: int  # of the hungriest, in bytes


def make_input(seed: int, number: int) -> tuple[str, sources.Draft, bytes, bytes | None]:
    """An input by its number: the mutation's name, the draft, the file's bytes, and those that it is replaced by while read."""
    draw = random.Random(f"{seed}/{number}")
    name = mutations.NAMES[number % len(mutations.NAMES)]
    draft = sources.drafts(draw)
    raw = mutations.mutate(draw, draft, mutations.choose_mutations(draw, name))
    later = None
    if name == mutations.REPLACED:
        other = draft if draw.random() < 0.6 else sources.drafts(draw)
        later = mutations.mutate(
            draw, other, mutations.choose_mutations(draw, draw.choice([*mutations.NAMES[:-3], "truncated", "truncated"]))
        )
    return name, draft, raw, later


def try_input(seed: int, number: int, folder: Path) -> Trial:
    """Make an input, and have everything read it."""
    name, draft, raw, later = make_input(seed, number)
    shutil.rmtree(folder, ignore_errors=True)
    inside = "base/unet/diffusion_pytorch_model.safetensors" if draft.kind == "folder" else "bad.safetensors"
    path = sources.write_file(folder / inside, raw, draft.hole)
    draw = random.Random(number)
    trial = Trial(number, name, draft.kind, {}, (), 0.0, 0)
    for reader, read in readers(path, folder, draw.random() < SAMPLED).items():
        if later is not None:
            sources.write_file(path, raw, draft.hole)
        with replacing(path, later):
            trial = after(trial, reader, read, path)
    return trial


def readers(path: Path, folder: Path, sampled: bool) -> dict[str, Callable[[], Any]]:
    """Everything that opens a stranger's file, by name."""
    whole = folder / "base" if "base" in path.parts else path
    found: dict[str, Callable[[], Any]] = {
        "describe": lambda: describe(path),
        "load": lambda: used(Adapter.load(path), folder),
        "load the rest": lambda: Adapter.load(path, allow_unmatched=True),
        "open and save": lambda: Adapter.open(path).save(folder / "again"),
        "embedding": lambda: Embedding.load(path).save(folder / "again"),
        "doctor": lambda: examine(path),
        "checkpoint": lambda: open_checkpoint(whole),
    }
    if sampled:
        found |= {"show": lambda: type_command("show", path), "show --json": lambda: type_command("show", path, "--json")}
        found |= {
            "personalize doctor": lambda: type_command("doctor", path),
            "doctor --json": lambda: type_command("doctor", path, "--json"),
        }
    return found


def used(adapter: Adapter, folder: Path) -> None:
    """What one does with an adapter that loads: its dW, sums, strengths, and saving it again."""
    if sum(abs(math.prod(delta.shape)) for delta in adapter.deltas.values()) > SMALL:
        return
    for delta in adapter.deltas.values():
        if not delta.needs_base and not delta.delta().isfinite().all():
            raise ArithmeticError(f"{delta!r} loads, and dW is not finite")
        if not math.isfinite(delta.norm()):
            raise ArithmeticError(f"{delta!r} loads, and its norm is not finite")
    half = adapter * 0.5
    for act in (
        lambda: adapter + adapter,
        lambda: half.save(folder / "half") and None,
        lambda: adapter.save(folder / "peft", "peft"),
    ):
        with contextlib.suppress(PersonalizeError):  # what depends on the base cannot be added, and not every dialect holds all
            act()
    if not any(delta.needs_base for delta in adapter.deltas.values()):
        with contextlib.suppress(PersonalizeError):
            Adapter.load(adapter.save(folder / "whole"))


def open_checkpoint(path: Path) -> None:
    """A checkpoint, and its first parameters."""
    weights = open_weights(path)
    for name in list(weights)[:3]:
        weights[name].float().sum()


def type_command(command: str, path: Path, *flags: str) -> None:
    """A command as one types it. Raises what it said if it failed; ArithmeticError for what no terminal or program should get."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([command, str(path), *flags])
    if code:
        raise PersonalizeError(err.getvalue().removesuffix("\n"))
    said = out.getvalue()
    if not all(letter.isprintable() or letter == "\n" for letter in said):
        raise ArithmeticError(f"{command} writes control characters")
    if flags:
        json.loads(said, parse_constant=_no_json)


def _no_json(name: str) -> None:
    raise ArithmeticError(f"{name} in what should be JSON")


def claimed_entries(path: Path) -> int:
    """The entries of the largest dW that a file speaks of."""
    header = read_header(path)
    return max((abs(math.prod(dialects.shape(header, slot))) for slot in dialects.read_keys(header).slots.values()), default=0)


def after(trial: Trial, reader: str, read: Callable[[], Any], path: Path) -> Trial:
    """A trial with one more reader's answer in it."""
    outcome, bugs, base, size = "read", list(trial.bugs), _resident(fresh=True), path.stat().st_size
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read()
    except PersonalizeError as error:
        outcome = "refused"
        bugs += [(f"{reader}: {fault}", str(error)[:2000]) for fault in faults(str(error))]
    except FAILURES as error:
        outcome = "bug"
        bugs.append((f"{reader}: {type(error).__name__}: {str(error)[:200]}", traceback.format_exc()))
    seconds, memory = time.process_time() - began, max(0, _resident() - base)
    if seconds > SECONDS or memory > MEMORY + 4 * size:
        entries = claimed_entries(path) if "doctor" in reader else 0
        if seconds > SECONDS + entries * PER_ENTRY[0]:
            bugs.append((f"{reader}: slow", f"{seconds:.1f} s"))
        if memory > MEMORY + 4 * size + entries * PER_ENTRY[1]:
            bugs.append((f"{reader}: {memory >> 20} MB", f"of {size} bytes that claim {entries} entries"))
    outcomes = trial.outcomes | {reader: outcome}
    worst = max(trial.seconds, seconds), max(trial.memory, memory)
    return Trial(trial.number, trial.mutation, trial.source, outcomes, tuple(bugs), *worst)


def faults(message: str) -> Iterator[str]:
    """What is wrong with an error, if anything is."""
    if not message.isprintable():
        yield "an error with control characters"
    if len(message) > LONG:
        yield "an endless error"
    if not any(name in message for name in (".safetensors", "base", "whole", "half")):
        yield "an error that names no file"


@contextlib.contextmanager
def replacing(path: Path, later: bytes | None) -> Iterator[None]:
    """Inside, the file becomes another one after it was opened for the first time."""
    original, seen = Path.open, 0

    def swapping(self: Path, *arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += self == path
        if later is not None and self == path and seen == 2:
            sources.write_file(path, later)
        return original(self, *arguments, **options)

    Path.open = swapping  # type: ignore[method-assign]
    try:
        yield
    finally:
        Path.open = original  # type: ignore[method-assign]


def _resident(fresh: bool = False) -> int:
    """The most bytes that were resident since it was asked `fresh`; where the system does not tell, since the start."""
    try:
        if fresh:
            Path("/proc/self/clear_refs").write_text("5")
        words = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()
        return int(words[0]) << 10
    except (OSError, LookupError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
