"""What an adapter has learned and what it has forgotten: the figures of one task, between the base and true renders."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.embedding import vectors_of
from personalize.models.clip import Clip
from personalize.tuning.attach import attach

from ..judge import Judge, agreement
from ..marks import Eyes
from .drawing import Artist, Pictures, obedience, renders
from .figures import Figure, gap_closed, share
from .tasks import Task

GAP, FALL, LEAK, SECONDS, DETAILS = 0.80, 0.05, 0.05, 90.0, 0.80  # the goals


@dataclass(frozen=True)
class Drawn:
    """The pictures of one task: what the base drew, what it drew with the adapter, and what is true."""

    base: Pictures  # of the plain prompts
    called: Pictures  # with the adapter, of the prompts with the trigger
    leaked: Pictures  # with the adapter, of the plain prompts
    unrelated_base: Pictures
    unrelated: Pictures
    true: Pictures  # of the called scenes
    true_plain: Pictures


def draw(artist: Artist, task: Task, adapter: Adapter) -> Drawn:
    """All pictures of a task. The base alone draws first: its pictures are kept for the next adapter."""
    base, unrelated_base = artist.draw_base(task.plain, f"{task.name}, base"), artist.draw_base(task.unrelated)
    layers = attach(artist.base, adapter) if adapter.deltas else contextlib.nullcontext()
    with layers, artist.base.knowing(vectors_of(adapter.words)):
        called = artist.draw(task.called, task.name)
        leaked, unrelated = artist.draw(task.plain), artist.draw(task.unrelated)
    side = artist.base.resolution
    return Drawn(base, called, leaked, unrelated_base, unrelated, renders(task.called, side), renders(task.plain, side))


def measure(judge: Judge, clip: Clip | None, task: Task, drawn: Drawn) -> dict[str, Any]:
    """The figures of one task: numbers by name, groups of them as {floor | base, value, ceiling}."""
    known = {name: is_it(judge, task, pictures) for name, pictures in vars(drawn).items()}
    said = {
        "base": obedience(judge, drawn.base, task.plain, task.attributes),
        "value": obedience(judge, drawn.called, task.called, task.attributes),
        "true": obedience(judge, drawn.true, task.called, task.attributes),
        "true_plain": obedience(judge, drawn.true_plain, task.plain, task.attributes),
    }
    base = {head: share(said["base"][head], said["true_plain"][head]) for head in task.attributes}
    value = {head: share(said["value"][head], said["true"][head]) for head in task.attributes}
    return {
        "identity": {"floor": known["base"], "value": known["called"], "ceiling": known["true"]},
        "fidelity": {"base": mean(base.values()), "value": mean(value.values()), "by_head": {"base": base, "value": value}},
        "leak": {"base": known["base"], "value": known["leaked"]},
        "drift": drift(judge, clip, task, drawn),
    }


def is_it(judge: Judge, task: Task, pictures: Pictures) -> float:
    """The share of pictures that the judge takes for the task's subject or style."""
    return agreement(judge.verdict(pictures), task.head, [task.name] * len(pictures))


def details(eyes: Eyes, task: Task, drawn: Drawn) -> dict[str, Any]:
    """The share of its marks that a subject or style shows, by the base, with the adapter, and on true renders; mark by mark."""
    seen = {name: eyes.share_by_mark(task.name, getattr(drawn, name)) for name in ("base", "called", "true")}
    shares = {mark: {name: found[mark] for name, found in seen.items()} for mark in seen["true"]}
    means = {name: mean(found.values()) for name, found in seen.items()}
    return {"floor": means["base"], "value": means["called"], "ceiling": means["true"], "by_mark": shares}


HEADS = ("object", "colour", "background", "style")


def drift(judge: Judge, clip: Clip | None, task: Task, drawn: Drawn) -> dict[str, float]:
    """How pictures of unrelated prompts changed, same seeds: obedience before and after, verdicts that changed, pixels, CLIP."""
    before, after = (obedience(judge, pictures, task.unrelated, HEADS) for pictures in (drawn.unrelated_base, drawn.unrelated))
    verdicts = [judge.verdict(pictures) for pictures in (drawn.unrelated_base, drawn.unrelated)]
    same = mean(agreement(verdicts[1], head, verdicts[0][head]) for head in HEADS)
    found = {
        "base": mean(before[head] for head in HEADS),
        "value": mean(after[head] for head in HEADS),
        "changed": 1 - same,
        "pixels": pixel_distance(drawn.unrelated_base, drawn.unrelated),
    }
    return found | ({"clip": float(clip.cosines(drawn.unrelated_base, drawn.unrelated).mean())} if clip else {})


def pixel_distance(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> float:
    """The mean absolute difference of two rows of pictures, 0..1."""
    return float(np.mean([np.abs(np.asarray(x, float) - np.asarray(y, float)).mean() for x, y in zip(a, b, strict=True)])) / 255


def mean(values: Any) -> float:
    """The mean of some numbers; 0 of none."""
    numbers = list(values)
    return float(np.mean(numbers)) if numbers else 0.0


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Figure]]:
    """The figures of all tasks: subjects, styles, and both together."""
    tables = {}
    for kind, title in (("subject", "Subjects"), ("style", "Styles")):
        if rows := [record for record in records if record["kind"] == kind]:
            tables[f"{title} ({len(rows)}, means)"] = mean_figures(kind, rows)
    return tables


def mean_figures(kind: str, rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The means over tasks of one kind, with their goals. (A style's identity is measured on objects that no lesson shows.)"""

    def over(*keys: str) -> float:
        found = []
        for row in rows:
            value: Any = row
            for key in keys:
                value = value[key]
            found.append(value)
        return mean(found)

    floor, value, ceiling = (over("identity", key) for key in ("floor", "value", "ceiling"))
    gap, fall = gap_closed(floor, value, ceiling), over("fidelity", "base") - over("fidelity", "value")
    leak, seconds = over("leak", "value"), max(row["seconds"] for row in rows)
    bare, seen, true = (over("details", key) for key in ("floor", "value", "ceiling"))
    kept = share(seen, true)
    identity = "identity" if kind == "subject" else "style on new objects"
    figures = [
        Figure(identity, floor, value, ceiling, f"closes {100 * gap:.0f} % of the gap; >= {100 * GAP:.0f} %", gap >= GAP),
        Figure("its marks seen", bare, seen, true,
               f"{100 * kept:.0f} % of true renders; >= {100 * DETAILS:.0f} %", kept >= DETAILS),
        Figure("prompt fidelity (of ceiling)", over("fidelity", "base"), over("fidelity", "value"), 1.0,
               f"falls {100 * fall:.1f} points; <= {100 * FALL:.0f}", fall <= FALL),
        Figure("leak without the trigger", over("leak", "base"), leak, None, f"<= {100 * LEAK:.0f} %", leak <= LEAK),
        Figure("unrelated prompts obeyed", over("drift", "base"), over("drift", "value"), None),
        Figure("unrelated verdicts changed", None, over("drift", "changed"), None),
        Figure("unrelated pixels changed", None, over("drift", "pixels"), None),
        Figure("training, slowest", None, seconds, None, f"<= {SECONDS:.0f} s", seconds <= SECONDS, "s"),
    ]  # fmt: skip
    if all("clip" in row["drift"] for row in rows):
        figures.insert(-1, Figure("unrelated, CLIP-I to the base's", None, over("drift", "clip"), 1.0, unit=""))
    return figures
