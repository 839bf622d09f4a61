"""A survey as one screen of text, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ...text import plain
from .findings import Finding
from .looking import Look, Survey

SIGNS = {"bad": "✗", "warning": "!", "note": "·"}
MOST = 12  # rows of the table of shapes


def screen(survey: Survey, found: Sequence[Finding]) -> str:
    """What the folder holds, its shapes, and each finding with what to do."""
    return "\n".join([*_about(survey), "", *_table(survey), "", *_findings(found)])


def as_json(survey: Survey, found: Sequence[Finding]) -> str:
    """Everything, for a program."""
    told = {
        "folder": str(survey.folder),
        "concepts": [{"trigger": one.trigger, "class": one.class_name, "folder": one.folder} for one in survey.dataset.concepts],
        "resolution": survey.grid.side,
        "step": survey.grid.step,
        "pictures": [_record(survey, one) for one in survey.looks],
        "unreadable": [{"path": survey.name(path), "why": why} for path, why in survey.dataset.skipped],
        "buckets": [
            {"shape": list(shape), "pictures": len(some), "cropped": 1 - sum(one.kept for one in some) / len(some)}
            for shape, some in survey.buckets.items()
        ],
        "findings": [
            {
                "level": one.level,
                "mark": one.mark,
                "what": one.what,
                "do": one.do,
                "command": one.command,
                "pictures": [survey.name(path) for path in one.pictures],
            }
            for one in found
        ],
    }
    return json.dumps(told, indent=1, ensure_ascii=False)


def headline(survey: Survey) -> str:
    """How many pictures, of what kind and size."""
    count, sizes = len(survey.looks), [one.example.size for one in survey.looks]
    least, most = min(sizes, key=lambda size: size[0] * size[1]), max(sizes, key=lambda size: size[0] * size[1])
    kinds = ", ".join(f"{kind} {number}" for kind, number in survey.formats.most_common())
    span = f"{least[0]} x {least[1]}" + (f" to {most[0]} x {most[1]}" if most != least else "")
    return f"{count} picture{'s' if count > 1 else ''} ({kinds}), {span} pixels"


def places(survey: Survey) -> str:
    """Where the pictures go."""
    steps = f"shapes in steps of {survey.grid.step}" if survey.grid.buckets else "square crops"
    grows = "small ones enlarged" if survey.grid.upscale or not survey.grid.buckets else "none enlarged"
    return f"resolution {survey.grid.side}, {steps}, {grows}"


def _about(survey: Survey) -> Iterator[str]:
    yield f"{plain(str(survey.folder))}: {headline(survey)}"
    for number, concept in enumerate(survey.dataset.concepts):
        own = [one.example for one in survey.looks if one.example.concept == number]
        is_a = f", class '{concept.class_name}'" if concept.class_name else ""
        share = f": {len(own)} pictures, shown {sum(example.repeats for example in own)} times a round"
        yield plain(f"trigger '{concept.trigger}'{is_a}{share if len(survey.dataset.concepts) > 1 else ''}")
    yield places(survey)


def _table(survey: Survey) -> Iterator[str]:
    yield f"{'shape':>12}  {'pictures':>8}  cropped away (most)"
    shown = sorted(survey.buckets.items(), key=lambda row: -len(row[1]))[:MOST]
    for (width, height), some in sorted(shown):
        cut = [1 - one.kept for one in some]
        yield f"{f'{width} x {height}':>12}  {len(some):>8}  {sum(cut) / len(cut):.0%} ({max(cut):.0%})"
    if len(survey.buckets) > MOST:
        yield f"{'...':>12}  and {len(survey.buckets) - MOST} shapes more"


def _findings(found: Sequence[Finding]) -> Iterator[str]:
    if not found:
        yield "nothing to complain about"
    for finding in found:
        yield f"{SIGNS[finding.level]} {plain(finding.what)}"
        yield f"    {'$ ' if finding.command else ''}{plain(finding.do, 10**6)}"


def _record(survey: Survey, one: Look) -> dict[str, Any]:
    return {
        "path": survey.name(one.example.path),
        "format": one.format,
        "size": list(one.example.size),
        "shape": list(one.shape),
        "cropped": 1 - one.kept,
        "sharpness": one.sharpness,
        "caption": one.example.caption,
        "repeats": one.example.repeats,
        "mask": survey.name(one.example.mask) if one.example.mask else None,
    }
