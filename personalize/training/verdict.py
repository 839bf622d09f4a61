"""How good an adapter is, in words that follow from what was drawn and measured, and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .events import Judged

GOOD, HALF = 0.7, 0.5  # of images; below half nobody calls it good
COPIED = 0.6  # of the way from as near to a training image as usual to being one: see docs/verdict.md
WORLD = 0.36  # likeness to what the base knows: 0.39 to 0.68 of 33 individuals of its world, 0.33 of photographs of a cat
WEAK, LEAKS = 0.2, 0.25  # of the way from the base's images to the training images
CHANGED = 0.15  # cosine that unrelated images lost


@dataclass(frozen=True)
class Words:
    """A verdict as people read it."""

    level: str  # good | fair | poor | uncalibrated | copies
    headline: str
    reasons: tuple[str, ...]


def describe(judged: Judged) -> Words:
    """The words for a judgement. Percentages are told only where they were calibrated: of images of the base's own world."""
    if judged.signs.get("world", 1.0) < WORLD:  # what compares images knows nothing of such ones
        headline = "the training images look like nothing that this base can draw: look at what came of them"
        return Words("uncalibrated", headline, ())
    if math.isnan(judged.value):
        return evidence_words(judged)
    if copies := copy_words(judged):  # nothing like it is among the runs that the estimate was calibrated on
        return Words("copies", "copies, not new images: look at them", tuple(copies))
    return calibrated_words(judged)


def calibrated_words(judged: Judged) -> Words:
    """The estimate with its interval, and the factors that cost most.

    >>> describe(Judged(350, 1.0, 0.82, 0.7, 0.92, 0.9, 0.95, 0.02, 0.97)).headline
    'good: about 82 of 100 images come out right (70 to 92)'
    >>> describe(Judged(350, 1.0, 0.3, 0.1, 0.52, 0.4, 0.8, 0.02, 0.95)).headline
    'poor: about 30 of 100 images come out right (10 to 52)'
    """
    level = "good" if judged.value >= GOOD and judged.low >= HALF else "fair" if judged.value >= HALF else "poor"
    span = f"({percent(judged.low)} to {percent(judged.high)})" + (
        f" at strength {judged.strength:g}" if judged.strength != 1 else ""
    )
    return Words(
        level, f"{level}: about {percent(judged.value)} of 100 images come out right {span}", tuple(factor_words(judged))
    )


def factor_words(judged: Judged) -> list[str]:
    """A clause for each factor, the costliest first."""
    clauses = {
        f"with the trigger, {percent(judged.identity)} of 100 show what was taught": judged.identity,
        f"the rest of the prompt is followed in {percent(judged.fidelity)} of 100": judged.fidelity,
        f"without the trigger, {percent(judged.leak)} of 100 show it all the same": 1 - judged.leak,
        f"images of other things are as good as before in {percent(judged.kept)} of 100": judged.kept,
    }
    return sorted(clauses, key=lambda text: clauses[text])


def copy_words(judged: Judged) -> list[str]:
    """A clause where images repeat training images, background included."""
    copied = judged.signs.get("repeats", 0.0) > COPIED
    return ["images with the trigger nearly repeat the training images: fewer steps, or more images"] if copied else []


def evidence_words(judged: Judged) -> Words:
    """What was seen on a base for which nothing is calibrated: comparisons with the base's own images, without percentages."""
    signs, told = judged.signs, []
    toward, leaked, same = (mean_of(signs, name) for name in ("called_toward", "plain_toward", "others_same"))
    if not math.isnan(toward):
        told.append("images with the trigger come nearer to the training images than the base's" if toward > WEAK else
                    "images with the trigger are hardly nearer to the training images than the base's")  # fmt: skip
    if not math.isnan(leaked):
        told.append("so do images without it: it leaks" if leaked > LEAKS else "images without it stay where the base has them")
    if not math.isnan(same):
        told.append("images of other things changed much" if same < -CHANGED else "images of other things hardly changed")
    headline = (
        "not calibrated on this base: look at the images" if told else "not judged by images: no CLIP is at hand for this base"
    )
    return Words("uncalibrated", headline, (*told, *copy_words(judged)))


def kept_words(mean: float, usual: float | None) -> str:
    """How much an autoencoder keeps, in dB, beside what it was made for.

    >>> kept_words(21.6, 32.26)
    'keeps 22 dB of these images, and 32 of the drawings that it was made for'
    """
    return f"keeps {mean:.0f} dB of these images" + (f", and {usual:.0f} of the drawings that it was made for" if usual else "")


def mean_of(signs: Mapping[str, Any], name: str) -> float:
    """A sign, or the mean of one that each image has; nan where it was not measured."""
    value = signs.get(name, math.nan)
    return sum(value) / len(value) if isinstance(value, list) else float(value)


def percent(share: float) -> int:
    """A share as a whole number of a hundred."""
    return round(100 * share)
