"""Pictures of nothing: leaves, cells, patterns, clouds and clippings, which teach a decoder edges and grain of every kind.

None is one of the benchmark's styles or individuals: shapes, periods, angles and colours are drawn anew for each.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

OVER = 4  # drawn so many times larger, then reduced
Rng = np.random.Generator


def draw_texture(rng: Rng, size: int) -> np.ndarray:
    """A picture `[size, size, 3]` uint8."""
    kinds: tuple[Callable[[Rng, int], np.ndarray], ...] = (_leaves, _leaves, _cells, _pattern, _pattern, _clouds)
    picture = kinds[int(rng.integers(len(kinds)))](rng, size)
    if rng.random() < 0.35:  # one shows through the other
        other = kinds[int(rng.integers(len(kinds)))](rng, size)
        picture = np.where(_waves(rng, size, float(rng.uniform(8, 64)))[..., None] > rng.uniform(0.3, 0.7), picture, other)
    if rng.random() < 0.3:
        picture = picture + rng.normal(0, rng.uniform(2, 24), (size, size, int(rng.choice((1, 3)))))
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def _colour(rng: Rng) -> np.ndarray:
    """Any colour; often an extreme one, or a grey."""
    kind = rng.random()
    if kind < 0.2:
        return np.full(3, rng.choice((rng.uniform(0, 40), rng.uniform(215, 255), rng.uniform(0, 255))))
    colour = rng.uniform(0, 255, 3)
    return np.clip((colour - 128) * 1.8 + 128, 0, 255) if kind < 0.5 else colour


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    place = np.arange(size, dtype=np.float32) + 0.5
    return place[:, None], place[None]


def _leaves(rng: Rng, size: int) -> np.ndarray:
    """Shapes over shapes, of sizes as in nature (few large, many small), with or without outlines."""
    side = size * OVER
    image = Image.new("RGB", (side, side), tuple(int(v) for v in _colour(rng)))
    draw = ImageDraw.Draw(image)
    small, outlined = rng.uniform(1.0, 4.0), rng.random() < 0.4
    line = tuple(int(v) for v in _colour(rng))
    width = int(OVER * rng.uniform(0.5, 1.8))
    for _ in range(int(rng.integers(20, 260))):
        radius = OVER * min(small / np.sqrt(rng.uniform(0.002, 1)), size / 2)
        x, y = rng.uniform(0, side, 2)
        fill, kind = tuple(int(v) for v in _colour(rng)), rng.random()
        edge = line if outlined else None
        if kind < 0.35:
            stretch = rng.uniform(0.4, 1)
            draw.ellipse((x - radius, y - radius * stretch, x + radius, y + radius * stretch), fill, edge, width)
        elif kind < 0.75:
            turns = np.sort(rng.uniform(0, 2 * pi, int(rng.integers(3, 7))))
            points = [(x + radius * cos(t), y + radius * sin(t)) for t in turns]
            draw.polygon(points, fill)
            if edge:
                draw.line([*points, points[0]], edge, width)
        else:
            t = rng.uniform(0, pi)
            draw.line(
                (x - radius * cos(t), y - radius * sin(t), x + radius * cos(t), y + radius * sin(t)),
                fill,
                max(1, int(OVER * rng.uniform(0.5, 3))),
            )
    return np.asarray(image.reduce(OVER), np.float32)


def _cells(rng: Rng, size: int) -> np.ndarray:
    """Panes around random points, with or without a border between them."""
    y, x = _grid(size * 2)
    seeds = rng.uniform(0, size * 2, (int(rng.integers(6, 90)), 2)).astype(np.float32)
    far = (y[None] - seeds[:, 0, None, None]) ** 2 + (x[None] - seeds[:, 1, None, None]) ** 2
    nearest = np.argpartition(far, 1, axis=0)[:2]
    near, other = (np.take_along_axis(far, nearest[i : i + 1], 0)[0] ** 0.5 for i in (0, 1))
    colours = np.stack([_colour(rng) for _ in seeds])
    picture = colours[np.where(near < other, nearest[0], nearest[1])]
    if rng.random() < 0.6:
        border = np.clip(np.abs(other - near) - 2 * rng.uniform(0.2, 1.6), 0, 1)[..., None]
        picture = picture * border + _colour(rng) * (1 - border)
    return picture.reshape(size, 2, size, 2, 3).mean((1, 3))


def _wave(rng: Rng, size: int, period: float) -> np.ndarray:
    y, x = _grid(size)
    turn, phase = rng.choice((0, pi / 2, rng.uniform(0, pi))), rng.uniform(0, 2 * pi)
    return np.cos((x * cos(turn) + y * sin(turn)) * 2 * pi / period + phase)


def _pattern(rng: Rng, size: int) -> np.ndarray:
    """Stripes, checks, dots, grids and rings of any period and angle, hard or soft, over a colour that changes slowly."""
    period, hard = float(np.exp(rng.uniform(np.log(2.2), np.log(16)))), float(np.exp(rng.uniform(0, np.log(12))))
    kind, level = int(rng.integers(5)), rng.uniform(-0.7, 0.7)
    first, second = _wave(rng, size, period), _wave(rng, size, period)
    y, x = _grid(size)
    middle = rng.uniform(0, size, 2)
    crest = (
        first,
        first * second,
        (first + second) / 2,
        np.maximum(first, second),
        np.cos(np.hypot(y - middle[0], x - middle[1]) * 2 * pi / period),
    )[kind]
    if rng.random() < 0.4:  # as a print does: more ink where it is darker
        crest = crest - (_waves(rng, size, float(rng.uniform(12, 64))) - 0.5) * 2
    mask = (np.clip((crest - level) * hard, -1, 1) * 0.5 + 0.5)[..., None]
    below = _colour(rng) if rng.random() < 0.5 else _clouds(rng, size)
    above = _colour(rng) if rng.random() < 0.7 else _clouds(rng, size)
    return below * (1 - mask) + above * mask


def _waves(rng: Rng, size: int, scale: float) -> np.ndarray:
    """Smooth noise `[size, size]` of about 0..1."""
    cells = max(2, int(size / scale) + 2)
    small = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def _clouds(rng: Rng, size: int) -> np.ndarray:
    """Noise of several scales between two colours, as in photographs."""
    steepness, total = rng.uniform(0.35, 0.8), np.zeros((size, size))
    for octave in range(5):
        total += steepness**octave * (_waves(rng, size, size / 2**octave) - 0.5)
    share = np.clip(total * rng.uniform(1, 2.5) + 0.5, 0, 1)[..., None]
    return _colour(rng) * share + _colour(rng) * (1 - share)
