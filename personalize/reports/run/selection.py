"""Which checkpoint was chosen, why, and at which strengths it is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..kit.curves import Panel, plot
from .read import Record, Run, number

HEADS = {"fit": "error gone", "validation": "not learned", "drift": "drift", "contrast": "contrast", "score": "score"}
LINES = (("fit", "error gone", "smooth"), ("validation", "on pictures not learned", "ink"), ("drift", "drift", "text"))


@dataclass(frozen=True)
class Selection:
    """What the page says about the chosen checkpoint."""

    step: int
    best: int
    judged_by: str
    learned: bool  # whether the pictures are known better than by the base
    range: str
    heads: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...], bool], ...]  # step, its figures under the heads, whether it was chosen
    unseen: bool  # whether validation is more than the fit
    panels: tuple[Panel, ...]


def selection(run: Run) -> Selection | None:
    """The selection of a run that made one, if all its scores are there; None otherwise."""
    chosen = run.chosen
    by_step = {record["step"]: record for record in run.scored if record["strength"] == 1}
    if not chosen or chosen["step"] not in by_step:
        return None
    step = chosen["step"]
    own = {float(record["strength"]): record for record in run.scored if record["step"] == step}
    unseen = any(record["validation"] != record["fit"] for record in by_step.values())
    keys = [key for key in HEADS if unseen or key != "validation"]
    low, high = chosen["low"], chosen["high"]
    return Selection(
        step=step,
        best=chosen["best"],
        judged_by=chosen["judged_by"],
        learned=(number(by_step[step]["fit"]) or 0.0) > 0,
        range=f"{low:g} to {high:g}" if low != high else f"{low:g}",
        heads=tuple(HEADS[key] for key in keys),
        rows=tuple((at, tuple(cell(record, key) for key in keys), at == step) for at, record in sorted(by_step.items())),
        unseen=unseen,
        panels=tuple(
            drawn
            for title, records in (("by step", sorted(by_step.items())), (f"step {step} by strength", sorted(own.items())))
            if (drawn := curves(title, records, unseen))
        ),
    )


def cell(record: Record, key: str) -> str:
    """A figure: shares in per cent, the score as it is."""
    value = number(record[key])
    if value is None:
        return "–"
    return f"{value:.2f}" if key == "score" else f"{100 * value:.0f} %"


def curves(title: str, records: Sequence[tuple[float, Record]], unseen: bool) -> Panel | None:
    """Curves over steps or strengths, in per cent of the base's error."""
    lines = []
    for key, label, kind in LINES:
        points = [(x, 100 * value) for x, record in records if (value := number(record[key])) is not None]
        if len(points) > 1 and (unseen or key != "validation"):
            lines.append((kind, label, points))
    return plot(title, lines, []) if lines else None
