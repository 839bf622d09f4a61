"""Sheets of pictures: prompts x seeds, or along one or two axes, such as strength=0,0.5,1 and steps=10,20."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..adapters.strengths.curves import ALWAYS
from ..adapters.strengths.grammar import WHOLE, Weighting, read
from ..errors import AdapterError, RecipeError, nearest
from ..recipe.samplers import named
from .pipeline import Job
from .prompts import Use, tagged

Find = Callable[[str], str]  # a name as typed => an adapter's name; raises RecipeError
NUMBERS = {"seed": (int, 0), "steps": (int, 1), "guidance": (float, 0), "denoise": (float, 0)}  # what they are, and the least
NAMES = (*NUMBERS, "sampler", "strength", "adapter")


@dataclass(frozen=True)
class Axis:
    """What differs along a row or a column of a sheet: a word of NAMES or an adapter's name, and its values as typed."""

    name: str
    values: tuple[str, ...]

    def at(self, job: Job, value: str, find: Find) -> Job:
        """A job with this value. Raises RecipeError for one that makes no sense."""
        if self.name in NUMBERS:
            return replace(job, **{self.name: number(self.name, value)})  # type: ignore[arg-type]
        if self.name == "sampler":
            return replace(job, sampler=named(value))
        if self.name == "adapter":
            return replace(job, uses=chosen(job, value, find))
        if self.name == "strength":
            if not job.uses:
                raise RecipeError("--xy strength has no adapter to act on", "--adapter FILE, or <lora:NAME> in the prompt")
            return replace(job, uses=tuple(Use(name, changed(old, value)) for name, old in job.uses))
        try:
            name = find(self.name)
        except RecipeError as error:
            raise RecipeError(f"--xy {self.name}= is no axis and no adapter", nearest(self.name, NAMES)) from error
        own = dict(job.uses)
        return replace(job, uses=tuple(Use(*pair) for pair in (own | {name: changed(own.get(name, WHOLE), value)}).items()))


def axis(text: str) -> Axis:
    """An axis as typed: NAME=VALUE,VALUE,... Curves inside are written with semicolons.

    >>> axis("strength=0, 0.5, 0@0;1@1")
    Axis(name='strength', values=('0', '0.5', '0@0;1@1'))
    """
    name, _, values = text.partition("=")
    pieces = tuple(piece.strip() for piece in values.split(",") if piece.strip())
    if not name.strip() or not pieces:
        raise RecipeError(f"--xy {text!r} is no axis", "e.g. --xy strength=0,0.5,1 --xy steps=10,20")
    return Axis(name.strip(), pieces)


def number(name: str, value: str) -> int | float:
    """A value of a numbered axis. Raises RecipeError."""
    kind, least = NUMBERS[name]
    try:
        found = kind(value)
    except ValueError:
        found = least - 1
    if not least <= found < 2**32 or (name == "denoise" and found > 1):
        raise RecipeError(f"--xy {name}={value} makes no sense", f"numbers from {least}, e.g. {name}=0,1")
    return found


def chosen(job: Job, value: str, find: Find) -> tuple[Use, ...]:
    """The adapters of NAME, NAME+NAME or none, as much of each as the job has of it."""
    if value == "none":
        return ()
    try:
        names = [find(value)]
    except RecipeError:
        if "+" not in value:
            raise
        names = [find(piece.strip()) for piece in value.split("+")]
    own = dict(job.uses)
    return tuple(Use(name, own.get(name, WHOLE)) for name in names)


def changed(old: Weighting, value: str) -> Weighting:
    """Another strength; blocks, patterns and steps stay as they are where the new one says nothing of them."""
    try:
        new = read(value.split(":"))
    except AdapterError as error:
        raise RecipeError(f"{value!r} on an axis: {error.what}", error.hint) from error
    window = old.window if new.window == ALWAYS else new.window
    return Weighting(new.parts, new.blocks or old.blocks, new.patterns or old.patterns, window)


@dataclass(frozen=True)
class Sheet:
    """Pictures to stand together, row by row, and what is written over the columns and rows."""

    jobs: tuple[Job, ...]
    heads: tuple[str, ...]
    rows: tuple[str, ...]
    labels: tuple[str, ...]  # of each picture, for its file's name


def sheets(jobs: Sequence[Job], seeds: Sequence[int], axes: Sequence[Axis], find: Find) -> list[Sheet]:
    """Of jobs for every prompt with every seed: a row per prompt and a column per seed; with one axis a row per job; with two
    a sheet per job, the first across, the second down. Raises RecipeError for axes that make no sense."""
    if len(axes) > 2:
        raise RecipeError(f"{len(axes)} axes do not fit on a sheet", "--xy once or twice")
    if not axes:
        labels = tuple("" for _ in jobs)
        rows = titles(jobs[:: len(seeds)])
        return [Sheet(tuple(jobs), tuple(f"seed {seed}" for seed in seeds), rows, labels)]
    if any(one.name == "seed" for one in axes):
        jobs = jobs[:: len(seeds)]
    across = axes[0]
    heads = tuple(f"{across.name} {value}" for value in across.values)
    if len(axes) == 1:
        cells = tuple(across.at(job, value, find) for job in jobs for value in across.values)
        rows = titles(jobs, seeds=across.name != "seed")
        return [Sheet(cells, heads, rows, tuple(f"{across.name}{value}" for _ in jobs for value in across.values))]
    down = axes[1]
    places = [(y, x) for y in down.values for x in across.values]
    labels = tuple(f"{across.name}{x}-{down.name}{y}" for y, x in places)
    made = []
    for job, title in zip(jobs, titles(jobs, seeds="seed" not in (across.name, down.name)), strict=True):
        rows = tuple(f"{down.name} {value} · {title}" for value in down.values)
        made.append(Sheet(tuple(across.at(down.at(job, y, find), x, find) for y, x in places), heads, rows, labels))
    return made


def titles(jobs: Sequence[Job], seeds: bool = False) -> tuple[str, ...]:
    """What to write over each job's row: its prompt, with its tags where jobs differ in them, and its seed."""
    tags = any(job.uses != jobs[0].uses for job in jobs)
    said = [tagged(job.prompt, job.uses) if tags else job.prompt for job in jobs]
    return tuple(f"{text} · seed {job.seed}" if seeds else text for text, job in zip(said, jobs, strict=True))
