"""The report on a dataset as one screen of text, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...findings import Finding
from ...text import plain
from .base import BaseView
from .measure import DatasetStats, ImageStats

SIGNS = {"error": "✗", "warning": "!", "info": "·"}
LEVEL = {"error": "bad", "warning": "warning", "info": "note"}  # in the JSON and in css
MOST = 12  # rows of the table of shapes


def as_text(stats: DatasetStats, found: Sequence[Finding], view: BaseView | None = None) -> str:
    """What the folder holds, its shapes, what the base keeps of them if that was looked at, and each finding with what to do."""
    kept = [view.line] if view and view.line and not any(view.line in one.what for one in view.findings) else []
    return "\n".join([*_about(stats), *kept, "", *_table(stats), "", *_findings(found)])


def as_json(stats: DatasetStats, found: Sequence[Finding], view: BaseView | None = None) -> str:
    """Everything, for a program."""
    seen = view.reconstruction if view else None
    values = {
        "folder": str(stats.folder),
        "concepts": [{"trigger": one.trigger, "class": one.class_name, "folder": one.folder} for one in stats.dataset.concepts],
        "resolution": stats.grid.side,
        "step": stats.grid.step,
        "pictures": [_record(stats, one) for one in stats.images],
        "unreadable": [{"path": stats.name(path), "why": why} for path, why in stats.dataset.skipped],
        "buckets": [
            {"shape": list(shape), "pictures": len(some), "cropped": 1 - sum(one.kept for one in some) / len(some)}
            for shape, some in stats.buckets.items()
        ],
        "autoencoder": {"kept": seen.kept, "mean": seen.mean, "usual": seen.usual} if seen else None,
        "findings": [
            {
                "code": one.code,
                "level": LEVEL[one.level],
                "mark": one.mark,
                "what": one.what,
                "do": one.hint,
                "command": one.command,
                "pictures": [stats.name(Path(path)) for path in one.where],
            }
            for one in found
        ],
    }
    return json.dumps(values, indent=1, ensure_ascii=False)


def headline(stats: DatasetStats) -> str:
    """How many pictures, of what kind and size."""
    count, sizes = len(stats.images), [one.example.size for one in stats.images]
    least, most = min(sizes, key=lambda size: size[0] * size[1]), max(sizes, key=lambda size: size[0] * size[1])
    kinds = ", ".join(f"{kind} {number}" for kind, number in stats.formats.most_common())
    span = f"{least[0]} x {least[1]}" + (f" to {most[0]} x {most[1]}" if most != least else "")
    return f"{count} picture{'s' if count > 1 else ''} ({kinds}), {span} pixels"


def layout(stats: DatasetStats) -> str:
    """Resolution and buckets."""
    steps = f"shapes in steps of {stats.grid.step}" if stats.grid.buckets else "square crops"
    grows = "small ones enlarged" if stats.grid.upscale or not stats.grid.buckets else "none enlarged"
    return f"resolution {stats.grid.side}, {steps}, {grows}"


def _about(stats: DatasetStats) -> Iterator[str]:
    yield f"{plain(str(stats.folder))}: {headline(stats)}"
    for number, concept in enumerate(stats.dataset.concepts):
        own = [one.example for one in stats.images if one.example.concept == number]
        is_a = f", class '{concept.class_name}'" if concept.class_name else ""
        share = f": {len(own)} pictures, shown {sum(example.repeats for example in own)} times a round"
        yield plain(f"trigger '{concept.trigger}'{is_a}{share if len(stats.dataset.concepts) > 1 else ''}")
    yield layout(stats)


def _table(stats: DatasetStats) -> Iterator[str]:
    yield f"{'shape':>12}  {'pictures':>8}  cropped away (most)"
    shown = sorted(stats.buckets.items(), key=lambda row: -len(row[1]))[:MOST]
    for (width, height), some in sorted(shown):
        cut = [1 - one.kept for one in some]
        yield f"{f'{width} x {height}':>12}  {len(some):>8}  {sum(cut) / len(cut):.0%} ({max(cut):.0%})"
    if len(stats.buckets) > MOST:
        yield f"{'...':>12}  and {len(stats.buckets) - MOST} shapes more"


def _findings(found: Sequence[Finding]) -> Iterator[str]:
    if not found:
        yield "nothing to complain about"
    for finding in found:
        yield f"{SIGNS[finding.level]} {plain(finding.what)}"
        yield f"    {'$ ' if finding.command else ''}{plain(finding.hint, 10**6)}"


def _record(stats: DatasetStats, one: ImageStats) -> dict[str, Any]:
    return {
        "path": stats.name(one.example.path),
        "format": one.format,
        "size": list(one.example.size),
        "shape": list(one.shape),
        "cropped": 1 - one.kept,
        "sharpness": one.sharpness,
        "caption": one.example.caption,
        "repeats": one.example.repeats,
        "mask": stats.name(one.example.mask) if one.example.mask else None,
    }
