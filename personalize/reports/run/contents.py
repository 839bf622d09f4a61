"""What the page shows, in the order it shows it: run folder values -> template values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any, NamedTuple

from ...recipe.settings import settings
from ...text import fits, loaded
from . import use
from .choice import choice
from .curves import figure, panels
from .pictures import Inline, Picture, inliner, original
from .read import Key, Record, Run, number, section

MOST_INPUTS, MOST_ROWS, MOST_COLUMNS = 48, 12, 9


class Sides(NamedTuple):
    """Longest side in pixels of large pictures and of pictures in grids."""

    large: int
    cell: int


@dataclass(frozen=True)
class Strip:
    """Pictures of one prompt and seed: (label, picture or None for one that is missing)."""

    prompt: str
    seed: int
    triggered: bool
    frames: tuple[tuple[str, Picture | None], ...]

    @property
    def title(self) -> str:
        return f"{self.prompt or '(empty prompt)'} · seed {self.seed}"

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


@dataclass(frozen=True)
class Meter:
    """A row of the figures table; places are per cent along its track, None where there is no value."""

    name: str
    explain: str
    unit: str
    lower: bool
    values: dict[str, float | None]
    places: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    good: bool | None = None


def gather(run: Run, sides: Sides) -> dict[str, Any]:
    """Everything that the template needs."""
    inline = inliner(run.folder)
    pairs = compare(run, inline, sides.large)
    prompt = example_prompt(run)
    return {
        "run": run,
        "base": PurePath(str(run.recipe.get("base") or "")).name,
        "subject": f"{run.trigger} {run.class_name}".strip(),
        "adapter_bytes": run.adapter.stat().st_size if run.adapter else None,
        "images": count_of_images(run),
        "inputs": inputs(run, inline, sides.large),
        "pairs": pairs,
        "hero": hero(pairs),
        "choice": choice(run),
        "growth": growth(run, inline, sides.cell),
        "sweep": sweep(run, inline, sides.cell),
        "panels": panels(run.steps),
        "saved": sorted({record["step"] for record in run.saved}),
        "meters": [meter(row) for row in run.metrics],
        "settings": changes(run.recipe),
        "warnings": remarks(run),
        "machine": machine(run),
        "seconds": seconds(run),
        "started": moment(run.started.get("time")),
        "uses": use.uses(run, prompt),
        "command": use.generate(run, prompt) if run.adapter else "",
    }


def compare(run: Run, inline: Inline, side: int) -> list[Strip]:
    """The base's and the adapter's picture of every prompt and seed: of the step that was chosen, else the newest."""
    chosen = run.chosen["step"] if run.chosen else -1
    drawn = {key: (by_step, base) for key, by_step, base in _drawn(run)}
    rows = []
    for key, (by_step, base) in drawn.items():
        frames = [("base", base)] if base else []
        frames += [("adapter", by_step.get(chosen, by_step[max(by_step)]))] if by_step else []
        rows.append(_strip(run, key, frames, inline, side))
    return [row for row in rows if any(picture for _, picture in row.frames)][: 2 * MOST_ROWS]


def hero(pairs: list[Strip]) -> Strip | None:
    """The pair at the top: a prompt with the trigger and something more, when there is one."""
    ready = sorted((pair for pair in pairs if pair.whole), key=lambda pair: (not pair.triggered, -len(pair.frames)))
    return ready[0] if ready else None


def growth(run: Run, inline: Inline, side: int) -> Grid | None:
    """Checkpoints x prompts: the base first, then the samples of each step."""
    drawn = _drawn(run)[:MOST_ROWS]
    steps = _spread(sorted({step for _, by_step, _ in drawn for step in by_step}))
    based = any(base for *_, base in drawn)
    if len(steps) + based < 3:
        return None
    columns = (["base"] if based else []) + [f"step {step}" for step in steps]
    rows = []
    for key, by_step, base in drawn:
        frames = ([("base", base)] if based else []) + [(f"step {step}", by_step.get(step)) for step in steps]
        rows.append(_strip(run, key, frames, inline, side))
    return _grid(columns, rows, len(_drawn(run)) - len(rows))


def sweep(run: Run, inline: Inline, side: int) -> Grid | None:
    """Strengths x prompts."""
    found: dict[Key, dict[float, str]] = {}
    for record in run.sweeps:
        found.setdefault((record["prompt"], record["seed"]), {})[float(record["strength"])] = record["path"]
    strengths = sorted({strength for row in found.values() for strength in row})
    if len(strengths) < 2:
        return None
    keys = list(found)[:MOST_ROWS]
    rows = [_strip(run, key, [(f"strength {s:g}", found[key].get(s)) for s in strengths], inline, side) for key in keys]
    return _grid([f"{strength:g}" for strength in strengths], rows, len(found) - len(keys))


def inputs(run: Run, inline: Inline, side: int) -> list[tuple[Picture, str, str]]:
    """Training pictures as (picture, caption, file name)."""
    listed = run.started.get("images")
    records = [image for image in listed if isinstance(image, dict)] if isinstance(listed, list) else []
    out = []
    for image in records[:MOST_INPUTS]:
        path = str(image.get("path", ""))
        picture = inline(path, min(side, 512)) or original(path, str(image.get("sha256", "")), min(side, 512))
        out += [(picture, str(image.get("caption", "")), str(image.get("name") or PurePath(path).name))] if picture else []
    return out


def count_of_images(run: Run) -> int:
    listed = run.started.get("images")
    return len(listed) if isinstance(listed, list) else int(number(listed) or 0)


def example_prompt(run: Run) -> str:
    """A prompt with the trigger and a scene, as somebody would type it."""
    asked = list(dict.fromkeys(record["prompt"] for record in run.samples if _says(record["prompt"], run.triggers)))
    return asked[min(1, len(asked) - 1)] if asked else f"{run.trigger} {run.class_name}".strip()


def meter(row: Record) -> Meter:
    """A row of metrics.json with places on a track and a verdict."""
    values = {key: number(row.get(key)) for key in ("floor", "base", "adapter", "ceiling")}
    known = [value for value in values.values() if value is not None]
    unit, lower = str(row.get("unit") or ""), row.get("better") == "lower"
    low, high = min(0.0, *known), max(*known, 100.0 if unit == "%" else 1.0 if max(known) <= 1 else 0.0)
    span = (high - low) or 1.0
    verdict, good = judge(values["base"], values["adapter"], values["ceiling"], lower, span)
    places = {key: round(100 * (value - low) / span, 2) for key, value in values.items() if value is not None}
    return Meter(str(row["name"]), str(row.get("explain") or ""), unit, lower, values, places, verdict, good)


def judge(base: float | None, adapter: float | None, ceiling: float | None, lower: bool, span: float) -> tuple[str, bool | None]:
    """What the adapter did to a figure that ranges over `span`, and whether that is good (None: it hardly matters)."""
    if base is None or adapter is None:
        return "", None
    change, gap = adapter - base, (base if ceiling is None else ceiling) - base
    if abs(gap) > 0.1 * span and (gap < 0) == lower and change / gap >= 0:
        return f"{change / gap:.0%} of the gap closed", change / gap >= 0.5
    good = None if abs(change) <= 0.05 * span else (change < 0) == lower
    return f"{'+' if change > 0 else ''}{figure(change)}" if change else "unchanged", good


def changes(recipe: Record) -> list[tuple[str, str, str, str]]:
    """Settings that differ from their defaults: (name, value, default, help), in the recipe's own order."""
    filled = {name: setting.default for name, setting in settings().items()} | dict(recipe)
    out = []
    for name, setting in settings().items():
        default = setting.info.get_default(call_default_factory=True, validated_data=filled)
        follows = name == "output" or (name == "name" and recipe.get("name") == recipe.get("trigger"))
        if name in recipe and not follows and _plain(recipe[name]) != _plain(default):
            out.append((name, _plain(recipe[name]), _plain(default), setting.help))
    return out


def remarks(run: Run) -> list[str]:
    """Warnings of the run and what its events tell between the lines."""
    said = run.started.get("warnings")
    out = [str(warning) for warning in said] if isinstance(said, list) else []
    lost = sum(number(record.get("loss")) is None or record.get("skipped") is True for record in run.steps)
    out += [f"{lost} step{'s' * (lost > 1)} had a loss or gradient that was not finite and changed nothing"] if lost else []
    out += [f"step {record['step']}: {cause}" for record in run.steps if (cause := record.get("cause"))][:3]
    return [*out, *run.remarks]


def machine(run: Run) -> list[tuple[str, str]]:
    """Time, memory and versions as (what, value)."""
    took = [value for value in (number(record.get("seconds")) for record in run.steps) if value]
    middle = sorted(took)[len(took) // 2] if took else 0.0
    batch = number(run.recipe.get("batch_size")) or 0.0
    finished = run.finished or {}
    rows: list[tuple[str, str | None]] = [
        ("training", duration(seconds(run))),
        ("command to adapter", duration(number(finished.get("total_seconds")))),
        ("one step", duration(middle or None)),
        ("speed", f"{batch / middle:.3g} pictures/s" if middle and batch else None),
        ("peak memory", size(number(finished.get("peak_bytes")))),
        ("fits as", fits(fit) if (fit := section(run.started, "fit")).get("words") else None),
        ("base", loaded(facts) if (facts := section(run.started, "base")) else None),
        ("device", " ".join(str(run.started[key]) for key in ("device", "dtype") if run.started.get(key))),
        ("trainable", f"{number(run.started.get('parameters')) or 0:,.0f} parameters" if run.started.get("parameters") else None),
        ("adapter file", f"{run.adapter.name}, {size(run.adapter.stat().st_size)}" if run.adapter else None),
        ("resumed", f"{run.lives - 1} time{'s' * (run.lives > 2)}" if run.lives > 1 else None),
        *((name, str(version)) for name, version in section(run.started, "versions").items()),
    ]
    return [(what, value) for what, value in rows if value]


def seconds(run: Run) -> float | None:
    """Seconds of training: as the run said, else the sum over its steps."""
    said = number((run.finished or {}).get("seconds"))
    return said if said is not None else sum(number(record.get("seconds")) or 0.0 for record in run.steps) or None


def words() -> dict[str, Callable[..., Any]]:
    """The template's filters."""
    return {"duration": duration, "size": size}


def duration(value: float | None) -> str:
    """Seconds in words.

    >>> duration(0.0123), duration(48.2), duration(95), duration(7300)
    ('12 ms', '48 s', '1 min 35 s', '2 h 2 min')
    """
    if value is None:
        return ""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"
    unit, small, step = ("min", "s", 60) if value < 3600 else ("h", "min", 3600)
    whole, rest = divmod(round(value) if step == 60 else round(value / 60), 60)
    return f"{whole} {unit}" + (f" {rest} {small}" if rest else "")


def size(value: float | None) -> str:
    """Bytes in words.

    >>> size(532), size(1_234_567)
    ('532 B', '1.2 MB')
    """
    if value is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.2g} {unit}" if unit != "B" and value < 10 else f"{value:.0f} {unit}"
        value /= 1000
    raise AssertionError


def moment(value: object) -> str:
    """A time stamp, ISO or unix, as a date and minutes."""
    try:
        if isinstance(value, str):
            when = datetime.fromisoformat(value)
        else:
            when = datetime.fromtimestamp(number(value) or 0.0, timezone.utc)
    except (ValueError, OverflowError, OSError):
        return ""
    return f"{when.day} {when:%B %Y, %H:%M %Z}".rstrip() if value else ""


def _drawn(run: Run) -> list[tuple[Key, dict[int, str], str | None]]:
    """Sample pictures by (prompt, seed): the adapter's by step, and the base's; prompts with the trigger come first."""
    found: dict[Key, tuple[dict[int, str], list[str]]] = {}
    for record in run.samples:
        by_step, base = found.setdefault((record["prompt"], record["seed"]), ({}, []))
        if record.get("base") is True:
            base.append(record["path"])
        else:
            by_step[record["step"]] = record["path"]
    rows = [(key, by_step, base[-1] if base else None) for key, (by_step, base) in found.items()]
    return sorted(rows, key=lambda row: not _says(row[0][0], run.triggers))


def _strip(run: Run, key: Key, frames: Iterable[tuple[str, str | None]], inline: Inline, side: int) -> Strip:
    shown = tuple((label, inline(path, side) if path else None) for label, path in frames)
    return Strip(*key, _says(key[0], run.triggers), shown)


def _grid(labels: list[str], strips: list[Strip], left_out: int) -> Grid | None:
    strips = [strip for strip in strips if any(picture for _, picture in strip.frames)]
    first = {strip.prompt: strip.title for strip in reversed(strips) if strip.whole}
    return Grid(tuple(labels), tuple(strips), frozenset(list(first.values())[::-1][:4]), left_out) if strips else None


def _spread(steps: list[int], most: int = MOST_COLUMNS) -> list[int]:
    """At most that many steps, evenly chosen, the first and last among them."""
    return steps if len(steps) <= most else [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _says(prompt: str, triggers: Iterable[str]) -> bool:
    """Whether a trigger is one of the prompt's words."""
    plain = "".join(c if c.isalnum() or c in "_-" else " " for c in prompt.lower()).split()
    return any(all(word in plain for word in trigger.lower().split()) for trigger in triggers if trigger)


def _plain(value: object) -> str:
    """A setting as one reads it."""
    if isinstance(value, list | tuple):
        return " | ".join(_plain(one) for one in value)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return figure(value) if isinstance(value, float) else str(value)
    return "" if value is None else str(value)
