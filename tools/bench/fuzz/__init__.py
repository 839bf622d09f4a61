"""Broken files by the ten thousand, each fed to everything that reads files: no crash, one line, little memory, at once.

Sound files of every kind and dialect are made, broken on purpose, and read by `describe`, `Adapter.load`, `Embedding.load`, the
doctor, `open_weights` and the command line. A worker process does it, so that a crash is counted like any other bug. Input N of
a seed is always the same file: `--first N --inputs 1 --keep DIR` makes it again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from personalize.adapters.kinds.kind import MAX_ENTRIES
from personalize.errors import TrainingError
from personalize.io import write_text

from ...pocket.proof.figures import FIGURES, machine, markdown, show_table
from . import mutations, sources, trials
from .trials import Trial

PATIENCE = 60.0  # seconds for one input, before its process is ended
ROOM = 3 << 30  # bytes of address space beyond what the worker starts with
HEADS = ("mutation", "inputs", "refused by all", "read by some", "bugs", "slowest", "memory")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--inputs", type=int, default=20_000, help="files to break")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that found bugs")
    parser.add_argument("--to", type=Path, default=FIGURES, help="folder for fuzz.md and fuzz.json")


# ---------------------------------------------------------------- running


def work(pipe: Connection, seed: int, numbers: range, folder: Path) -> None:
    """The worker: one trial after the other, each announced before it begins."""
    with contextlib.suppress(ImportError, OSError, ValueError, LookupError):
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    import torch

    torch.set_num_threads(1)
    trials.try_input(seed, -1, folder)  # what is imported and cached at first use is nobody's memory
    for number in numbers:
        pipe.send(number)
        pipe.send(trials.try_input(seed, number, folder))
    pipe.send(None)


def every(seed: int, numbers: range, folder: Path, minutes: float | None = None) -> Iterator[Trial]:
    """The trials of these numbers; a worker that dies or hangs is a bug, and another goes on behind it."""
    began, first = time.monotonic(), numbers.start
    context = multiprocessing.get_context("spawn")
    while first < numbers.stop:
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(theirs, seed, range(first, numbers.stop), folder), daemon=True)
        worker.start()
        theirs.close()
        current = first
        try:
            while (told := ours.recv() if ours.poll(PATIENCE) else "hangs") is not None:
                if isinstance(told, int):
                    current = told
                elif isinstance(told, Trial):
                    yield told
                    if minutes is not None and time.monotonic() - began > 60 * minutes:
                        return
                else:
                    yield crash_trial(seed, current, told)
                    break
            else:
                return
        except EOFError:
            worker.join()
            yield crash_trial(seed, current, f"died with {worker.exitcode}")
        finally:
            worker.kill()
            worker.join()
        first = current + 1


def crash_trial(seed: int, number: int, how: str) -> Trial:
    """What is said of an input that took its worker with it."""
    name, draft, _, _ = trials.make_input(seed, number)
    return Trial(number, name, draft.kind, {}, ((f"the process {how}", ""),), PATIENCE if how == "hangs" else 0.0, 0)


def main(options: argparse.Namespace) -> None:
    """Run it, and write what was found. Raises TrainingError if anything was."""
    found: list[Trial] = []
    numbers = range(options.first, options.first + options.inputs)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        for trial in every(options.seed, numbers, Path(folder) / "in", options.minutes):
            found.append(trial)
            for what, where in trial.bugs:
                print(f"{trial.number} ({trial.mutation} of {trial.source}): {what}\n{where}", file=sys.stderr, flush=True)
            if trial.bugs and options.keep:
                keep(options.seed, trial.number, options.keep)
    about = {
        "inputs": f"{len(found):,}, of seed {options.seed}, in {time.monotonic() - began:.0f} s",
        "readers": f"{sum(len(trial.outcomes) for trial in found):,} times a file was read",
        "allowed": f"{trials.SECONDS:g} s of processor time and {trials.MEMORY >> 20} MB + 4 times the file for any one reader; "
        f"the doctor, who multiplies one dW out at a time, {trials.PER_ENTRY[0] * 1e6:g} us and {trials.PER_ENTRY[1]} bytes more "
        f"for each of the entries that the largest one claims, of which {MAX_ENTRIES / 1e6:.0f} million are let through",
        "machine": machine(),
        "command": f"python -m tools.bench fuzz --inputs {len(found)} --seed {options.seed}",
    }
    publish(options.to, about, found)
    if bugs := sum(bool(trial.bugs) for trial in found):
        raise TrainingError(f"{bugs} of {len(found)} inputs found a bug", "--keep DIR keeps them")


def keep(seed: int, number: int, folder: Path) -> None:
    """The input of a number as a file, and what it is replaced by as another."""
    _, draft, raw, later = trials.make_input(seed, number)
    sources.write_file(folder / f"{number}.safetensors", raw, draft.hole)
    if later is not None:
        sources.write_file(folder / f"{number}-later.safetensors", later)


# ---------------------------------------------------------------- telling


def publish(folder: Path, about: dict[str, str], found: Sequence[Trial]) -> None:
    """Tables by mutation and by reader, on the screen and in fuzz.md and fuzz.json."""
    groups = [(name, [trial for trial in found if trial.mutation == name]) for name in mutations.NAMES]
    by_mutation = [row(name, group) for name, group in [*groups, ("all", list(found))] if group]
    readers = list(dict.fromkeys(reader for trial in found for reader in trial.outcomes))
    by_reader = [(reader, *outcomes(reader, found)) for reader in readers]
    kinds = Counter(trial.source for trial in found)
    tables = {"By mutation": (HEADS, by_mutation), "By reader": (("reader", "inputs", "refused", "read", "bugs"), by_reader)}
    parts = ["# Hostile files\n", *(f"- {key}: {value}" for key, value in about.items()), ""]
    for title, (heads, rows) in tables.items():
        show_table(title, heads, rows)
        parts += [f"## {title}\n", markdown(heads, rows)]
    parts += ["Broken were: " + ", ".join(f"{name} ({count:,})" for name, count in sorted(kinds.items())) + "."]
    write_text(folder / "fuzz.md", "\n".join(parts) + "\n")
    data = {title: [dict(zip(heads, row, strict=True)) for row in rows] for title, (heads, rows) in tables.items()}
    write_text(folder / "fuzz.json", json.dumps({"about": about, "tables": data, "sources": kinds}, indent=1) + "\n")


def row(name: str, group: Sequence[Trial]) -> tuple[str, ...]:
    """One mutation's line."""
    bugs = sum(bool(trial.bugs) for trial in group)
    some = sum(not trial.bugs and "read" in trial.outcomes.values() for trial in group)
    slowest, memory = max(trial.seconds for trial in group), max(trial.memory for trial in group)
    counts = (f"{count:,}" for count in (len(group), len(group) - some - bugs, some, bugs))
    return (name, *counts, f"{slowest:.2f} s", f"{memory / 1e6:.0f} MB")


def outcomes(reader: str, found: Sequence[Trial]) -> Sequence[str]:
    """How often a reader was asked, refused, read and failed."""
    counts = Counter(trial.outcomes[reader] for trial in found if reader in trial.outcomes)
    return tuple(f"{count:,}" for count in (counts.total(), counts["refused"], counts["read"], counts["bug"]))
