"""Invented individuals, endless and never twice: what pretraining draws besides the named world.

A base that knows only one-coloured things has nothing to build a user's subject from. These teach it coats, markings and
things worn in general; none of the world's subjects is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import cos, pi, sin

import numpy as np

from .art_canvas import DARK, RGB, WHITE, Pen, article, mix, pick, shade, shades, some
from .art_subjects import Subject

HOOKS = ("coat", "top")  # where every drawing takes markings
LAYERS = (  # parts that take a second colour together
    ("light", "belly", "muzzle"),
    ("dark", "fin", "roof", "inside"),
    ("wing", "tail"),
    ("ear",),
    ("ear2",),
    ("spot", "panel"),
    ("hull", "stem"),
    ("door", "sail", "handle"),
)


Marking = Callable[[np.random.Generator, RGB], Callable[[Pen], None]]


def _points(rng: np.random.Generator, corners: int, radius: float, inner: float = 1.0) -> np.ndarray:
    """A polygon or, with `inner` < 1, a star around nought."""
    turn, n = some(rng, 0, 2 * pi), corners * (1 if inner == 1 else 2)
    radii = [radius * (inner if i % 2 and inner < 1 else 1) for i in range(n)]
    return np.array([(cos(turn + 2 * pi * i / n) * r, sin(turn + 2 * pi * i / n) * r) for i, r in enumerate(radii)])


def _dots(rng: np.random.Generator, fill: RGB) -> Callable[[Pen], None]:
    centre, r, n = rng.uniform(-0.3, 0.35, 2), some(rng, 0.06, 0.16), int(rng.integers(2, 7))
    places = centre + rng.uniform(-0.4, 0.4, (n, 2))

    def draw(p: Pen) -> None:
        for x, y in places:
            p.dot(x, y, r, fill)

    return draw


def _stripes(rng: np.random.Generator, fill: RGB) -> Callable[[Pen], None]:
    turn, width, n = some(rng, 0, pi), some(rng, 0.07, 0.17), int(rng.integers(2, 5))
    gap, long, centre = some(rng, 0.2, 0.36), some(rng, 0.2, 0.55), rng.uniform(-0.2, 0.3, 2)
    along, across = np.array([cos(turn), sin(turn)]), np.array([-sin(turn), cos(turn)])

    def draw(p: Pen) -> None:
        for i in range(n):
            middle = centre + across * gap * (i - (n - 1) / 2)
            p.line([tuple(middle - along * long), tuple(middle + along * long)], width, fill, edge=False)

    return draw


def _patch(rng: np.random.Generator, fill: RGB) -> Callable[[Pen], None]:
    x, y, rx, ry, turn = *rng.uniform(-0.45, 0.5, 2), *rng.uniform(0.14, 0.42, 2), some(rng, 0, 180)
    return lambda p: p.oval(x, y, rx, ry, fill, turn=turn, edge=False)


def _badge(rng: np.random.Generator, fill: RGB) -> Callable[[Pen], None]:
    shape = _points(rng, int(rng.integers(3, 6)), some(rng, 0.16, 0.36), some(rng, 0.35, 0.6) if rng.random() < 0.5 else 1.0)
    shape = shape + rng.uniform(-0.35, 0.5, 2)
    return lambda p: p.poly(shape, fill, edge=False)


def _belt(rng: np.random.Generator, fill: RGB) -> Callable[[Pen], None]:
    y, sag, width, half = some(rng, -0.4, 0.7), some(rng, -0.15, 0.2), some(rng, 0.1, 0.24), some(rng, 0.35, 0.8)
    end = (half * 0.6, y + some(rng, 0.2, 0.45))
    loose = rng.random() < 0.4

    def draw(p: Pen) -> None:
        p.line([(-half, y), (0, y + sag), (half, y)], width, fill, curved=True)
        if loose:
            p.line([(half * 0.5, y + sag / 2), end], width, fill)

    return draw


def _hat(rng: np.random.Generator, fill: RGB) -> Callable[[Pen], None]:
    x, y, half, tall = some(rng, -0.3, 0.45), some(rng, -0.85, -0.45), some(rng, 0.2, 0.42), some(rng, 0.25, 0.5)
    kind, brim, lean = int(rng.integers(4)), rng.random() < 0.5, some(rng, -0.15, 0.15)
    trim = mix(fill, WHITE if rng.random() < 0.5 else DARK, some(rng, 0.2, 0.9))

    def draw(p: Pen) -> None:
        if kind == 0:
            p.poly([(x - half, y), (x + half, y), (x + lean, y - tall * 1.4)], fill)
        elif kind == 1:
            p.dome(x, y, half, tall, fill)
        elif kind == 2:
            p.box(x - half * 0.7, y - tall, x + half * 0.7, y, fill)
        else:
            p.blob([(x - half, y), (x - half, y - tall), (x + half * 0.3, y - tall * 1.2), (x + half, y)], fill)
        if brim:
            p.line([(x - half * 1.2, y), (x + half * 1.2, y)], 0.1, trim)

    return draw


def _stick(rng: np.random.Generator, fill: RGB) -> Callable[[Pen], None]:
    """A thing on a stick: a balloon, a lolly, a little sign."""
    x, y, lean, high = some(rng, -0.5, 0.5), some(rng, -0.7, 0.2), some(rng, -0.4, 0.4), some(rng, 0.3, 0.6)
    shape, pole = _points(rng, int(rng.integers(3, 9)), some(rng, 0.12, 0.3)), mix(fill, DARK, 0.6)

    def draw(p: Pen) -> None:
        p.line([(x, y), (x + lean, y - high)], 0.07, pole)
        p.poly(np.add(shape, (x + lean, y - high)), fill)

    return draw


def _load(rng: np.random.Generator, fill: RGB) -> Callable[[Pen], None]:
    """A thing carried or hung on: a bag, a parcel, a wing, a cushion."""
    corners = int(rng.integers(4, 8))
    shape = _points(rng, corners, 1) * rng.uniform(0.16, 0.5, 2) * rng.uniform(0.7, 1.2, (corners, 1)) + rng.uniform(-0.7, 0.7, 2)
    soft, lid = rng.random() < 0.6, mix(fill, DARK if rng.random() < 0.5 else WHITE, 0.5)
    seam = [tuple(shape[0] * 0.8 + shape.mean(0) * 0.2), tuple(shape[corners // 2] * 0.8 + shape.mean(0) * 0.2)]

    def draw(p: Pen) -> None:
        (p.blob if soft else p.poly)(shape, fill)
        p.line(seam, 0.07, lid, edge=False)

    return draw


# what it is called, how it is drawn, and the layers it may lie on
MARKINGS: dict[str, tuple[Marking, tuple[str, ...]]] = {
    "dots": (_dots, ("coat", "top")),
    "stripes": (_stripes, ("coat", "coat", "top")),
    "patch": (_patch, ("coat", "coat", "top")),
    "badge": (_badge, ("coat", "top")),
    "belt": (_belt, ("coat", "top")),
    "hat": (_hat, ("top",)),
    "sign": (_stick, ("top", "coat")),
    "bag": (_load, ("coat", "top")),
}


def invent_individual(rng: np.random.Generator, thing: str, colour: str, colours: Mapping[str, RGB]) -> Subject:
    """An individual of a class whose main colour is named: up to three colours and three markings, told in `looks`."""
    names = [name for name in colours if name != colour]
    second = pick(rng, names)
    body, other = shade(rng, colours[colour]), shade(rng, colours[second])
    palette, light = shades(body), rng.random() < 0.5
    painted = [layer for layer in LAYERS if rng.random() < 0.35]
    for layer in painted:
        palette |= dict.fromkeys(layer, mix(other, WHITE, some(rng, 0, 0.3)) if light else other)
    marks: dict[str, list[Callable[[Pen], None]]] = {hook: [] for hook in HOOKS}
    told = []
    for _ in range(int(rng.choice(4, p=(0.12, 0.38, 0.32, 0.18)))):
        kind = pick(rng, MARKINGS)
        make, hooks = MARKINGS[kind]
        hue = pick(rng, names)
        marks[pick(rng, hooks)].append(make(rng, shade(rng, colours[hue])))
        told.append(f"{hue} {kind}" if kind in ("dots", "stripes") else article(f"{hue} {kind}"))
    words = f"{colour} and {second} {thing}" if painted and rng.random() < 0.8 else f"{colour} {thing}"
    if told and rng.random() < 0.85:  # not everything there is gets told
        told = told[: int(rng.integers(1, len(told) + 1))]
        words += " with " + " and ".join(told)
    return Subject(thing, words, palette, {hook: in_turn(drawn) for hook, drawn in marks.items() if drawn})


def in_turn(drawn: list[Callable[[Pen], None]]) -> Callable[[Pen], None]:
    """One marking of several."""

    def draw(p: Pen) -> None:
        for each in drawn:
            each(p)

    return draw
