"""X/Y plots: prompts x seeds, or requests along one or two axes, such as strength=0,0.5,1 and steps=10,20."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..adapters.strengths.curves import ALWAYS
from ..adapters.strengths.grammar import WHOLE, Weighting, read
from ..errors import AdapterError, RecipeError, nearest
from ..recipe.samplers import sampler_name
from .prompts import Use, with_tags
from .request import Request

Find = Callable[[str], str]  # a name as typed => an adapter's name; raises RecipeError
NUMBERS = {"seed": (int, 0), "steps": (int, 1), "guidance": (float, 0), "denoise": (float, 0)}  # what they are, and the least
NAMES = (*NUMBERS, "sampler", "strength", "adapter")


@dataclass(frozen=True)
class Axis:
    """What differs along a row or a column of a contact sheet: a word of NAMES or an adapter's name, and its values as typed."""

    name: str
    values: tuple[str, ...]

    def apply(self, request: Request, value: str, find: Find) -> Request:
        """The request with this value. Raises RecipeError for one that makes no sense."""
        if self.name in NUMBERS:
            return replace(request, **{self.name: parse_number(self.name, value)})  # type: ignore[arg-type]
        if self.name == "sampler":
            return replace(request, sampler=sampler_name(value))
        if self.name == "adapter":
            return replace(request, adapters=select_adapters(request, value, find))
        if self.name == "strength":
            if not request.adapters:
                raise RecipeError("--xy strength has no adapter to act on", "--adapter FILE, or <lora:NAME> in the prompt")
            return replace(request, adapters=tuple(Use(name, change_strength(old, value)) for name, old in request.adapters))
        try:
            name = find(self.name)
        except RecipeError as error:
            raise RecipeError(f"--xy {self.name}= is no axis and no adapter", nearest(self.name, NAMES)) from error
        own = dict(request.adapters)
        return replace(
            request, adapters=tuple(Use(*pair) for pair in (own | {name: change_strength(own.get(name, WHOLE), value)}).items())
        )


def parse_axis(text: str) -> Axis:
    """An axis as typed: NAME=VALUE,VALUE,... Curves inside are written with semicolons.

    >>> parse_axis("strength=0, 0.5, 0@0;1@1")
    Axis(name='strength', values=('0', '0.5', '0@0;1@1'))
    """
    name, _, values = text.partition("=")
    pieces = tuple(piece.strip() for piece in values.split(",") if piece.strip())
    if not name.strip() or not pieces:
        raise RecipeError(f"--xy {text!r} is no axis", "e.g. --xy strength=0,0.5,1 --xy steps=10,20")
    return Axis(name.strip(), pieces)


def parse_number(name: str, value: str) -> int | float:
    """A value of a numbered axis. Raises RecipeError."""
    kind, least = NUMBERS[name]
    try:
        found = kind(value)
    except ValueError:
        found = least - 1
    if not least <= found < 2**32 or (name == "denoise" and found > 1):
        raise RecipeError(f"--xy {name}={value} makes no sense", f"numbers from {least}, e.g. {name}=0,1")
    return found


def select_adapters(request: Request, value: str, find: Find) -> tuple[Use, ...]:
    """The adapters of NAME, NAME+NAME or none, as much of each as the request has of it."""
    if value == "none":
        return ()
    try:
        names = [find(value)]
    except RecipeError:
        if "+" not in value:
            raise
        names = [find(piece.strip()) for piece in value.split("+")]
    own = dict(request.adapters)
    return tuple(Use(name, own.get(name, WHOLE)) for name in names)


def change_strength(old: Weighting, value: str) -> Weighting:
    """Another strength; blocks, patterns and steps stay as they are where the new one says nothing of them."""
    try:
        new = read(value.split(":"))
    except AdapterError as error:
        raise RecipeError(f"{value!r} on an axis: {error.what}", error.hint) from error
    window = old.window if new.window == ALWAYS else new.window
    return Weighting(new.parts, new.blocks or old.blocks, new.patterns or old.patterns, window)


@dataclass(frozen=True)
class Plot:
    """Requests whose images stand together on a contact sheet, row by row, and what is written over the columns and rows."""

    requests: tuple[Request, ...]
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    labels: tuple[str, ...]  # of each image, for its file's name


def plots(requests: Sequence[Request], seeds: Sequence[int], axes: Sequence[Axis], find: Find) -> list[Plot]:
    """Of requests for every prompt with every seed: a row per prompt and a column per seed; with one axis a row per request;
    with two a plot per request, the first axis across, the second down. Raises RecipeError for axes that make no sense."""
    if len(axes) > 2:
        raise RecipeError(f"{len(axes)} axes do not fit on a sheet", "--xy once or twice")
    if not axes:
        columns, rows = tuple(f"seed {seed}" for seed in seeds), titles(requests[:: len(seeds)])
        return [Plot(tuple(requests), columns, rows, tuple("" for _ in requests))]
    if any(one.name == "seed" for one in axes):
        requests = requests[:: len(seeds)]
    across = axes[0]
    columns = tuple(f"{across.name} {value}" for value in across.values)
    if len(axes) == 1:
        cells = tuple(across.apply(request, value, find) for request in requests for value in across.values)
        labels = tuple(f"{across.name}{value}" for _ in requests for value in across.values)
        return [Plot(cells, columns, titles(requests, seeds=across.name != "seed"), labels)]
    down = axes[1]
    places = [(y, x) for y in down.values for x in across.values]
    labels = tuple(f"{across.name}{x}-{down.name}{y}" for y, x in places)
    made = []
    for request, title in zip(requests, titles(requests, seeds="seed" not in (across.name, down.name)), strict=True):
        rows = tuple(f"{down.name} {value} · {title}" for value in down.values)
        cells = tuple(across.apply(down.apply(request, y, find), x, find) for y, x in places)
        made.append(Plot(cells, columns, rows, labels))
    return made


def titles(requests: Sequence[Request], seeds: bool = False) -> tuple[str, ...]:
    """What to write over each request's row: its prompt, with its tags where requests differ in them, and its seed."""
    tags = any(request.adapters != requests[0].adapters for request in requests)
    prompts = [with_tags(request.prompt, request.adapters) if tags else request.prompt for request in requests]
    return tuple(f"{text} · seed {one.seed}" if seeds else text for text, one in zip(prompts, requests, strict=True))


axis = parse_axis  # its old name, until the command has the new one
