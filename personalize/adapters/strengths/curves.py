"""Strengths that change while a picture is drawn: curves through points, and windows of steps. No torch.

A curve `0@0,1@0.5,0@1` is a strength per position, straight in between and level outside, as sd-webui-loractl has it; two
points at one position are a jump. A window is open from `start` up to `stop`, without the step `stop` itself.

Positions are shares of the way, 0 at the first step and 1 at the last. If any position of a curve or of a window is above 1,
all of them are steps, counted from 0. A `stop` of 1 is the end.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from decimal import Decimal

from ...errors import AdapterError

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
POINT = rf"{NUMBER}[@~]{NUMBER}"
CURVE = rf"{POINT}(?:[,;]{NUMBER}(?:[@~]{NUMBER})?)*"


def number(value: float) -> str:
    """Every digit of a number, without an exponent.

    >>> number(0.00001), number(1.0), number(0.1 + 0.2)
    ('0.00001', '1', '0.30000000000000004')
    """
    return f"{Decimal(repr(value)):f}".removesuffix(".0")


@dataclass(frozen=True)
class Curve:
    """Points (position, strength) in the order of their positions."""

    points: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        return ",".join(f"{number(strength)}@{number(position)}" for position, strength in self.points)

    def at(self, step: int, steps: int) -> float:
        """The strength at a step of 0 .. steps - 1.

        >>> [curve("0@0,1@0.5,0@1").at(step, 5) for step in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
        """
        places = [position for position, _ in self.points]
        here = float(step) if places[-1] > 1 else progress(step, steps)
        after = bisect_right(places, here)
        if after in (0, len(places)):
            return self.points[max(0, after - 1)][1]
        (left, before), (right, then) = self.points[after - 1 : after + 1]
        share = (here - left) / (right - left)
        return before * (1 - share) + then * share


Strength = float | Curve


@dataclass(frozen=True)
class Window:
    """The steps in which an adapter counts at all. Raises AdapterError for one that never opens."""

    start: float = 0.0
    stop: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise AdapterError(
                f"start={number(self.start)} is not before stop={number(self.stop)}" if self.start >= 0 else "start is below 0",
                "steps count from 0, e.g. start=5:stop=10 or start=0.5",
            )
        if not math.isinf(self.stop) and self.stop > 1 and not self.start.is_integer():
            raise AdapterError(f"start={number(self.start)} is a share and stop={number(self.stop)} a step", "use one of both")

    def __str__(self) -> str:
        """As typed; "" for always."""
        start = [f"start={number(self.start)}"] if self.start else []
        return ":".join([*start, *([f"stop={number(self.stop)}"] if not math.isinf(self.stop) else [])])

    def open(self, step: int, steps: int) -> bool:
        """Whether a step of 0 .. steps - 1 is inside.

        >>> [Window(0, 0.5).open(step, 4) for step in range(4)]
        [True, True, False, False]
        """
        by_step = self.start > 1 or 1 < self.stop < math.inf
        here = float(step) if by_step else progress(step, steps)
        return self.start <= here and (here < self.stop or self.stop == 1)


ALWAYS = Window()


def progress(step: int, steps: int) -> float:
    """0 at the first step, 1 at the last."""
    return step / (steps - 1) if steps > 1 else 0.0


def curve(text: str) -> Curve:
    """A curve as people type it: `0@0,1@0.5`, with `~` for `@` and `;` for `,`; a point without a position is the end."""
    points = []
    for piece in re.split("[,;]", text):
        strength, _, position = re.sub("~", "@", piece).partition("@")
        points.append((float(position or 1), float(strength)))
    if any(position < 0 for position, _ in points):
        raise AdapterError(f"the curve {text} has a position below 0", "positions are 0 to 1, or steps counted from 0")
    return Curve(tuple(sorted(points, key=lambda point: point[0])))


def strength(text: str) -> Strength:
    """A number or a curve."""
    return curve(text) if re.search("[@~]", text) else float(text)


def strength_text(value: Strength) -> str:
    """A strength as typed."""
    return str(value) if isinstance(value, Curve) else number(value)


def level(value: Strength, step: int, steps: int) -> float:
    """A strength at a step."""
    return value.at(step, steps) if isinstance(value, Curve) else value
