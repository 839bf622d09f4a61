"""What is known of a base whose verdicts are calibrated: a small table, made by `python -m tools.pocket.calibration fit`."""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.model import Base
from ..models.sources import locate

CALIBRATED = "pocket"  # the one base whose world can be drawn at will, so that the truth of an adapter is known
FILE = Path(__file__).parents[1] / CALIBRATED / "verdict.json"
RECOGNIZER = FILE.with_name("recognizer.safetensors")


@dataclass(frozen=True)
class Autoencoder:
    """How well the base's autoencoder keeps the images that it was made for, in dB: the mean, and what 95 of 100 reach."""

    mean: float
    low: float


@dataclass(frozen=True)
class Factor:
    """One factor of the verdict: the logistic function of `bias` + sum of weight * sign, or its mean over images."""

    bias: float
    weights: Mapping[str, float]

    def __call__(self, signs: Mapping[str, Any], of: str = "") -> float:
        """The factor by signs of the whole, or `of` images: "called" or "plain"."""
        rows = signs_of_images(signs, of, tuple(self.weights)) if of else [[signs[name] for name in self.weights]]
        each = [logistic(self.bias + sum(map(operator.mul, self.weights.values(), row))) for row in rows]
        return sum(each) / len(each)


def signs_of_images(signs: Mapping[str, Any], of: str, names: Sequence[str]) -> list[list[float]]:
    """A row of signs for each "called" or "plain" image. "all_NAME" is the mean of NAME over all of them.

    Where an adapter has learned its subject, an image that looks otherwise is more often a poor view of it than another one.
    """
    columns = []
    for name in names:
        column = signs[f"{of}_{name.removeprefix('all_')}"]
        columns.append([sum(column) / len(column)] * len(column) if name.startswith("all_") else column)
    return [list(row) for row in zip(*columns, strict=True)]


def logistic(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-min(30.0, max(-30.0, x))))


@dataclass(frozen=True)
class Verdict:
    """An estimate of the truth, 0..1, with the interval in which it lies in 80 of 100 cases, and its four factors."""

    value: float
    low: float
    high: float
    identity: float
    fidelity: float
    leak: float
    kept: float


@dataclass(frozen=True)
class Calibration:
    """The table of a base."""

    nouns: tuple[str, ...]  # the classes that the base was taught
    autoencoder: Autoencoder
    factors: Mapping[str, Factor]  # shown (of each image: identity and leak), fidelity, kept
    errors: Sequence[Sequence[float]]  # (estimate, error): 80 of 100 truths are no further from such an estimate

    def verdict(self, signs: Mapping[str, Any]) -> Verdict:
        """Identity x fidelity x (1 - leak) x kept, as the benchmarks' judge would find them on many images."""
        identity, leak = (self.factors["shown"](signs, of) for of in ("called", "plain"))
        fidelity, kept = (self.factors[name](signs) for name in ("fidelity", "kept"))
        value = identity * fidelity * (1 - leak) * kept
        error = between(self.errors, value)
        return Verdict(value, max(0.0, value - error), min(1.0, value + error), identity, fidelity, leak, kept)


def between(rows: Sequence[Sequence[float]], x: float) -> float:
    """The y of rows (x, y) at an x, on the line between neighbouring rows; the ends hold beyond them."""
    if x <= rows[0][0]:
        return rows[0][1]
    for left, right in itertools.pairwise(rows):
        if x <= right[0]:
            share = (x - left[0]) / (right[0] - left[0])
            return left[1] + share * (right[1] - left[1])
    return rows[-1][1]


def calibration_of(base: Base) -> Calibration | None:
    """The table of a base, None where there is none: for the embedded base there is one."""
    return _read() if Path(base.path).resolve() == Path(locate(CALIBRATED)).resolve() else None


@functools.cache
def _read() -> Calibration:
    told: dict[str, Any] = json.loads(FILE.read_text())
    factors = {name: Factor(**one) for name, one in told["factors"].items()}
    own = Autoencoder(**told["autoencoder"])
    return Calibration(tuple(told["nouns"]), own, factors, told["errors"])
