"""Loss, learning rates and gradient norm over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..kit.curves import Panel, Point, parts, plot, smooth, thin
from .read import Record, number


def panels(steps: Sequence[Record]) -> list[Panel]:
    """Loss, learning rate and gradient norm of a run's step records; panels without data are left out."""
    raw = series(steps, "loss")
    drawn = [("loss", [("smooth", "smoothed", smooth(detrended_loss(steps)))], raw)] if len(raw) > 1 else []
    rates = [("unet", "UNet", series(steps, "lr")), ("text", "text encoder", series(steps, "text_encoder_lr"))]
    rates.append(("words", "trigger", series(steps, "embedding_lr")))
    moving = [(kind, label, thin(points)) for kind, label, points in rates if any(value for _, value in points)]
    drawn += [("learning rate", moving, [])] if moving and len(moving[0][2]) > 1 else []
    norms = series(steps, "grad_norm")
    drawn += [("gradient norm", [("smooth", "smoothed", smooth(norms))], norms)] if len(norms) > 1 else []
    return [plot(*one) for one in drawn]


@dataclass(frozen=True)
class Bar:
    """When layers learn, and how fast: `start` in per cent of the run's steps."""

    layers: str
    start: float
    step: int
    scale: float


def bars(rates: Any, steps: int) -> list[Bar]:
    """The layers of a run that learn differently, those that begin first above; nothing where all learn alike."""
    rows = [row for row in rates if isinstance(row, dict)] if isinstance(rates, list) else []
    found = [(str(row.get("layers", "")), number(row.get("start")), number(row.get("scale"))) for row in rows]
    return [
        Bar(layers, min(100.0, 100 * start / max(1, steps)), int(start), scale)
        for layers, start, scale in found
        if start is not None and scale is not None
    ]


def series(steps: Sequence[Record], key: str) -> list[Point]:
    """The finite values of one key."""
    found = ((record["step"], number(record.get(key))) for record in steps)
    return [(step, value) for step, value in found if value is not None]


def detrended_loss(steps: Sequence[Record]) -> list[Point]:
    """Loss by step with the luck of the timesteps taken out.

    A denoising loss depends far more on the timestep drawn than on what was learned. Each picture's loss is divided by the
    run's mean loss near its timestep and multiplied by the run's mean loss. Without per-picture records it stays as it is.
    """
    pairs = sorted((t, record["step"], loss) for record in steps for t, loss in timestep_losses(record))
    bins = min(12, len(pairs) // 20)
    if bins < 2:
        return series(steps, "loss")
    overall = sum(loss for *_, loss in pairs) / len(pairs)
    out: dict[float, list[float]] = {}
    for part in parts(pairs, bins):
        typical = sum(loss for *_, loss in part) / len(part)
        for _, step, loss in part:
            out.setdefault(step, []).append(loss / typical * overall if typical else loss)
    return sorted((step, sum(losses) / len(losses)) for step, losses in out.items())


def timestep_losses(record: Record) -> list[tuple[float, float]]:
    """(timestep, loss) of each picture in a step."""
    times, losses = record.get("timesteps"), record.get("losses")
    if not isinstance(times, list) or not isinstance(losses, list) or len(times) != len(losses):
        return []
    numbers = [(number(t), number(loss)) for t, loss in zip(times, losses, strict=True)]
    return [(t, loss) for t, loss in numbers if t is not None and loss is not None]
