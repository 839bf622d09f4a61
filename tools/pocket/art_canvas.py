"""Vector drawing for the pocket world: a pen records shapes in unit coordinates, `paint` lays them down in a look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import cos, radians, sin
from typing import TypeVar

import numpy as np
from PIL import ImageDraw

RGB = tuple[int, ...]
Points = Sequence | np.ndarray  # [n, 2]
Item = TypeVar("Item")
Tint = Callable[[RGB], RGB]

WHITE: RGB = (255, 255, 255)
CREAM: RGB = (255, 244, 222)
DARK: RGB = (50, 40, 62)
# a part that the palette does not name takes the colour of another part
PARTS = {
    "light": "body",
    "dark": "body",
    "spot": "light",
    "belly": "light",
    "ear": "body",
    "ear2": "ear",
    "tail": "body",
    "muzzle": "light",
    "roof": "dark",
    "fin": "dark",
    "wing": "dark",
    "panel": "light",
    "inside": "dark",
    "hull": "body",
}


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """The colour a fraction `t` of the way from `a` to `b`."""
    return tuple(int(x + (y - x) * t + 0.5) for x, y in zip(a, b, strict=True))


def luminance(c: RGB) -> float:
    """Perceived brightness, 0..1."""
    return (0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2]) / 255


def shades(main: RGB) -> dict[str, RGB]:
    """The palette that one main colour gives: body, light, dark and a contrasting spot."""
    lum = luminance(main)
    if lum > 0.9:
        return {"body": main, "light": WHITE, "dark": (196, 202, 218), "spot": (186, 196, 216)}
    if lum < 0.25:
        return {"body": main, "light": (112, 110, 130), "dark": (30, 28, 38), "spot": (206, 206, 218)}
    return {"body": main, "light": mix(main, CREAM, 0.62), "dark": mix(main, (60, 20, 70), 0.34), "spot": mix(main, WHITE, 0.86)}


def article(words: str) -> str:
    """`a cat`, `an 8-bit cat`."""
    return ("an " if words[0] in "aeiou8" else "a ") + words


def some(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between two."""
    return float(rng.uniform(low, high))


def pick(rng: np.random.Generator, values: Iterable[Item]) -> Item:
    """One of the values (of a mapping: one of its keys)."""
    values = tuple(values)
    return values[int(rng.integers(len(values)))]


def shade(rng: np.random.Generator, colour: RGB) -> RGB:
    """A colour near another, so that a name covers many shades."""
    return tuple(int(np.clip(c + rng.normal(0, 16), 0, 255)) for c in colour)


@dataclass(frozen=True)
class Shape:
    """A closed outline (`width` 0) or a stroke of `width`, in the pen's units; `edge` shapes make the silhouette."""

    points: np.ndarray  # [n, 2]
    fill: RGB
    width: float = 0.0
    edge: bool = True


@lru_cache(maxsize=64)
def _circle(n: int) -> np.ndarray:
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([np.cos(a), np.sin(a)], 1)


@lru_cache(maxsize=4)
def _spline(n: int) -> np.ndarray:
    """Catmull-Rom weights [n, 4] of the four neighbouring points."""
    t = np.linspace(0, 1, n, endpoint=False)[:, None]
    rows = np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
    return np.concatenate([t**0, t, t**2, t**3], 1) @ rows


def smooth(points: Points, closed: bool, n: int = 6) -> np.ndarray:
    """A curve through `points` [k, 2], with `n` steps between neighbours."""
    p = np.asarray(points, float)
    ring = np.concatenate([p[-1:], p, p[:2]] if closed else [2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    windows = np.stack([ring[i : len(ring) - 3 + i] for i in range(4)], 1)  # [segments, 4, 2]
    curve = (_spline(n) @ windows).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])


@dataclass
class Pen:
    """Records shapes. Coordinates are the caller's, y down: [-1, 1] with the ground at 1 for objects, [0, 1] for backgrounds."""

    rng: np.random.Generator
    palette: Mapping[str, RGB] = field(default_factory=dict)
    marks: Mapping[str, Callable[[Pen], None]] = field(default_factory=dict)
    shapes: list[Shape] = field(default_factory=list)

    def __getitem__(self, part: str) -> RGB:
        while part not in self.palette:
            part = PARTS[part]
        return self.palette[part]

    def mark(self, layer: str) -> None:
        """Where an individual's own markings go: `coat` (on the body), `face`, `top` (over everything)."""
        if layer in self.marks:
            self.marks[layer](self)

    def some(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def oval(self, x: float, y: float, rx: float, ry: float, fill: RGB, turn: float = 0, edge: bool = True) -> None:
        points = _circle(28 if edge else 16) * (rx, ry)
        if turn:
            c, s = cos(radians(turn)), sin(radians(turn))
            points = points @ np.array([[c, s], [-s, c]])
        self.shapes.append(Shape(np.add(points, (x, y)), fill, edge=edge))

    def dot(self, x: float, y: float, r: float, fill: RGB) -> None:
        self.oval(x, y, r, r, fill, edge=False)

    def poly(self, points: Points, fill: RGB, edge: bool = True) -> None:
        self.shapes.append(Shape(np.asarray(points, float), fill, edge=edge))

    def blob(self, points: Points, fill: RGB, edge: bool = True) -> None:
        self.shapes.append(Shape(smooth(points, True), fill, edge=edge))

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: RGB, r: float = 0, edge: bool = True) -> None:
        if not r:
            return self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, edge)
        arc = _circle(20)
        sign = np.where(np.abs(arc) < 1e-9, 0, np.sign(arc))
        corner = np.array([(x1 + x0) / 2, (y1 + y0) / 2]) + sign * ((x1 - x0) / 2 - r, (y1 - y0) / 2 - r)
        self.shapes.append(Shape(corner + arc * r, fill, edge=edge))

    def dome(self, x: float, y: float, rx: float, ry: float, fill: RGB, edge: bool = True) -> None:
        """The upper half of an oval whose flat side is at `y`."""
        self.shapes.append(Shape(_circle(40)[20:] * (rx, ry) + (x, y), fill, edge=edge))

    def line(self, points: Sequence, width: float, fill: RGB, curved: bool = False, edge: bool = True) -> None:
        curve = smooth(points, False) if curved else np.asarray(points, float)
        self.shapes.append(Shape(curve, fill, width, edge))

    def eye(self, x: float, y: float, r: float, look: float = 0) -> None:
        """A round eye that looks to the side by `look` (-1..1)."""
        self.oval(x, y, r, r * 1.12, WHITE, edge=False)
        self.oval(x + look * r * 0.25, y + r * 0.06, r * 0.74, r * 0.86, (38, 32, 48), edge=False)
        self.dot(x + look * r * 0.25 + r * 0.22, y - r * 0.3, r * 0.3, WHITE)


@dataclass(frozen=True)
class Coat:
    """How shapes are laid down. Widths are in 64ths of the picture."""

    tint: Tint = lambda c: c
    outline: Tint | None = None  # the outline's colour, from the shape's
    width: float = 0.0
    rim: RGB | None = None
    rim_width: float = 0.0
    each: bool = False  # outline every shape, rather than the silhouette of all
    shadow: float = 0.0  # offset of a drop shadow under each shape


def _stroke(draw: ImageDraw.ImageDraw, points: list, width: float, fill: tuple, closed: bool) -> None:
    w = max(1, round(width))
    draw.line(points + points[:2] if closed else points, fill, w, joint="curve" if w > 3 else None)
    if not closed and w > 2:
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill)


def _fill(draw: ImageDraw.ImageDraw, points: list, thick: float, fill: tuple) -> None:
    if thick:
        _stroke(draw, points, thick, fill, False)
    else:
        draw.polygon(points, fill)


def paint(draw: ImageDraw.ImageDraw, shapes: Sequence[Shape], matrix: np.ndarray, shift: np.ndarray, coat: Coat) -> None:
    """Draws `shapes` moved by `points @ matrix + shift` (pixels) onto a square picture."""
    unit = draw.im.size[0] / 64
    scale = abs(np.linalg.det(matrix)) ** 0.5
    items = [(s, [tuple(p) for p in (s.points @ matrix + shift).tolist()], s.width * scale) for s in shapes]
    rim, line = coat.rim_width * unit, coat.width * unit
    border = [(s, p, w) for s, p, w in items if s.edge]
    if coat.rim and rim:
        for s, p, w in border:
            _stroke(draw, p, w + 2 * (rim + line), coat.rim, s.width == 0)
    if coat.outline and not coat.each:
        for s, p, w in border:
            _stroke(draw, p, w + 2 * line, coat.outline(s.fill), s.width == 0)
    for s, p, w in items:
        if coat.shadow and s.edge:
            d = coat.shadow * unit
            _fill(draw, [(x + d * 0.7, y + d) for x, y in p], w, (30, 20, 40, 90))
        if coat.outline and coat.each and s.edge:
            _stroke(draw, p, w + 2 * line, coat.outline(s.fill), s.width == 0)
        _fill(draw, p, w, coat.tint(s.fill))
