"""Sample and training pictures of a run, in pairs and grids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

from ...data.captions import missing_trigger
from ...families.notation import escape
from ...inference.record import read_record
from ..kit.pictures import Picture
from .pictures import Inline, training_picture
from .read import Key, Run, inside, number

MOST_INPUTS, MOST_ROWS, MOST_COLUMNS = 48, 12, 9
WORDS = {
    "sampler": "{}",
    "steps": "{} sampler steps",
    "guidance": "guidance {:g}",
    "size": "{}",
    "negative": "without {}",
    "model": "{}",
    "precision": "{}",
}  # a request's record, as a row's title says it


class Sides(NamedTuple):
    """Longest side in pixels of large pictures and of pictures in grids."""

    large: int
    cell: int


@dataclass(frozen=True)
class Strip:
    """Pictures of one prompt and seed: (label, picture or None for one that is missing)."""

    prompt: str
    seed: int
    way: str  # how they were drawn, where the same prompt and seed were drawn in other ways too
    triggered: bool
    frames: tuple[tuple[str, Picture | None], ...]

    @property
    def title(self) -> str:
        return f"{self.prompt or '(empty prompt)'} · {self.drawn}"

    @property
    def drawn(self) -> str:
        return f"seed {self.seed}" + (f" · {self.way}" if self.way else "")

    @property
    def whole(self) -> bool:
        return all(picture for _, picture in self.frames)


@dataclass(frozen=True)
class Grid:
    """Strips with the same labels; `stages` are the rows (one per prompt) that play in large."""

    labels: tuple[str, ...]
    strips: tuple[Strip, ...]
    stages: frozenset[str] = frozenset()
    left_out: int = 0


def before_and_after(run: Run, inline: Inline, side: int) -> list[Strip]:
    """The base's and the adapter's picture of every prompt and seed: of the step that was chosen, else the newest."""
    chosen = run.chosen["step"] if run.chosen else -1
    rows = []
    for key, by_step, base in samples_by_prompt(run):
        frames = [("base", base)] if base else []
        frames += [("adapter", by_step.get(chosen, by_step[max(by_step)]))] if by_step else []
        rows.append(strip(run, key, frames, inline, side))
    return [row for row in rows if any(picture for _, picture in row.frames)][: 2 * MOST_ROWS]


def main_pair(pairs: list[Strip]) -> Strip | None:
    """The pair at the top: a prompt with the trigger and something more, when there is one."""
    ready = sorted((pair for pair in pairs if pair.whole), key=lambda pair: (not pair.triggered, -len(pair.frames)))
    return ready[0] if ready else None


def checkpoint_grid(run: Run, inline: Inline, side: int) -> Grid | None:
    """Checkpoints x prompts: the base first, then the samples of each step."""
    drawn = samples_by_prompt(run)[:MOST_ROWS]
    steps = choose_steps(sorted({step for _, by_step, _ in drawn for step in by_step}))
    based = any(base for *_, base in drawn)
    if len(steps) + based < 3:
        return None
    columns = (["base"] if based else []) + [f"step {step}" for step in steps]
    rows = []
    for key, by_step, base in drawn:
        frames = ([("base", base)] if based else []) + [(f"step {step}", by_step.get(step)) for step in steps]
        rows.append(strip(run, key, frames, inline, side))
    return grid(columns, rows, len(samples_by_prompt(run)) - len(rows))


def strength_grid(run: Run, inline: Inline, side: int) -> Grid | None:
    """Strengths x prompts."""
    found: dict[Key, dict[float, str]] = {}
    for record in run.sweeps:
        found.setdefault(Key.of(record), {})[float(record["strength"])] = record["path"]
    strengths = sorted({strength for row in found.values() for strength in row})
    if len(strengths) < 2:
        return None
    keys = list(found)[:MOST_ROWS]
    rows = [strip(run, key, [(f"strength {s:g}", found[key].get(s)) for s in strengths], inline, side) for key in keys]
    return grid([f"{strength:g}" for strength in strengths], rows, len(found) - len(keys))


def training_pictures(run: Run, inline: Inline, side: int) -> list[tuple[Picture, str, str]]:
    """Training pictures as (picture, caption, file name)."""
    listed = run.started.get("images")
    records = [image for image in listed if isinstance(image, dict)] if isinstance(listed, list) else []
    out = []
    for image in records[:MOST_INPUTS]:
        path = str(image.get("path", ""))
        picture = inline(path, min(side, 512)) or training_picture(path, str(image.get("sha256", "")), min(side, 512))
        out += [(picture, str(image.get("caption", "")), str(image.get("name") or PurePath(path).name))] if picture else []
    return out


def training_picture_count(run: Run) -> int:
    listed = run.started.get("images")
    return len(listed) if isinstance(listed, list) else int(number(listed) or 0)


def example_prompt(run: Run) -> str:
    """A prompt with the trigger and a scene, as somebody would type it."""
    prompts = list(dict.fromkeys(record["prompt"] for record in run.samples if has_trigger(record["prompt"], run.triggers)))
    return prompts[min(1, len(prompts) - 1)] if prompts else escape(f"{run.trigger} {run.class_name}".strip())


def samples_by_prompt(run: Run) -> list[tuple[Key, dict[int, str], str | None]]:
    """Sample pictures by prompt, seed and way of drawing: the adapter's by step, and the base's; those with the trigger first,
    and of several ways the one that came last."""
    found: dict[Key, tuple[dict[int, str], list[str]]] = {}
    for record in run.samples:
        by_step, base = found.setdefault(Key.of(record), ({}, []))
        if record.get("base") is True:
            base.append(record["path"])
        else:
            by_step[record["step"]] = record["path"]
    rows = [(key, by_step, base[-1] if base else None) for key, (by_step, base) in found.items()]
    places = {key[:2]: place for place, key in reversed([*enumerate(found)])}  # of prompt and seed, in whichever way
    return sorted(rows[::-1], key=lambda row: (not has_trigger(row[0].prompt, run.triggers), places[row[0][:2]]))


def strip(run: Run, key: Key, frames: Iterable[tuple[str, str | None]], inline: Inline, side: int) -> Strip:
    shown = tuple((label, inline(path, side) if path else None) for label, path in frames)
    return Strip(key.prompt, key.seed, way_of_drawing(run, key), has_trigger(key.prompt, run.triggers), shown)


def way_of_drawing(run: Run, key: Key) -> str:
    """In what the drawing of a row differs from that of others of the same prompt and seed; empty if there are none."""
    paths = {Key.of(record): record["path"] for record in run.samples}
    ways = {one: read_way(run, path) for one, path in paths.items() if one[:2] == key[:2]}
    return ", ".join(words for name, words in ways.get(key, {}).items() if len({way.get(name) for way in ways.values()}) > 1)


def read_way(run: Run, relative: str) -> dict[str, str]:
    """How a picture was drawn, as far as WORDS say it, by their names; empty for one that is damaged or not there."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        record = read_record(inside(run.folder, relative) or run.folder)
        shown = {**record, "size": "x".join(map(str, record.get("size") or ()))}
        return {name: words.format(shown[name]) for name, words in WORDS.items() if shown.get(name)}
    return {}


def grid(labels: list[str], strips: list[Strip], left_out: int) -> Grid | None:
    strips = [strip for strip in strips if any(picture for _, picture in strip.frames)]
    first = {strip.prompt: strip.title for strip in reversed(strips) if strip.whole}
    return Grid(tuple(labels), tuple(strips), frozenset(list(first.values())[::-1][:4]), left_out) if strips else None


def choose_steps(steps: list[int], most: int = MOST_COLUMNS) -> list[int]:
    """At most that many steps, evenly chosen, the first and last among them."""
    return steps if len(steps) <= most else [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def has_trigger(prompt: str, triggers: Iterable[str]) -> bool:
    """Whether a trigger is in the prompt, as the encoder reads it."""
    return any(not missing_trigger(trigger, [prompt]) for trigger in triggers if trigger)
