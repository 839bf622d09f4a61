"""The places of the pocket world. Units: [0, 1] over the picture, y down; the ground starts at 0.62 to 0.7."""

from __future__ import annotations

from collections.abc import Callable

from .art_canvas import RGB, WHITE, Pen, mix


def _sky(p: Pen, top: RGB, low: RGB, horizon: float = 0.7, bands: int = 4) -> None:
    for k in range(bands):
        y = horizon * k / bands
        p.box(-0.1, y - (0.1 if k == 0 else 0), 1.1, horizon + 0.05, mix(top, low, k / max(1, bands - 1)), edge=False)


def _cloud(p: Pen, x: float, y: float, s: float, fill: RGB) -> None:
    for dx, dy, r in ((-0.09, 0.01, 0.05), (0, -0.02, 0.075), (0.09, 0.01, 0.055)):
        p.oval(x + dx * s, y + dy * s, r * s * 1.25, r * s, fill, edge=False)


def _hill(p: Pen, y: float, bumps: list[float], fill: RGB) -> None:
    xs = [-0.1 + 1.2 * k / (len(bumps) - 1) for k in range(len(bumps))]
    p.blob([(-0.3, y), *[(x, y + b) for x, b in zip(xs, bumps, strict=True)], (1.3, y), (1.3, 1.3), (-0.3, 1.3)], fill)


def beach(p: Pen) -> None:
    x, y = p.some(0.1, 0.9), p.some(0.5, 0.52)
    _sky(p, (150, 216, 240), (214, 240, 244), 0.55, 3)
    p.oval(x, p.some(0.12, 0.2), 0.09, 0.09, (255, 232, 150))
    p.box(-0.1, y, 1.1, 0.75, (74, 176, 204))
    p.box(-0.1, y + 0.07, 1.1, 0.75, (112, 200, 214), edge=False)
    _hill(p, 0.66, [0.02, p.some(-0.02, 0.02), p.some(-0.01, 0.03), 0.0], (240, 250, 248))
    _hill(p, 0.69, [0.02, p.some(-0.02, 0.02), p.some(-0.01, 0.03), 0.0], (246, 222, 168))


def forest(p: Pen) -> None:
    _sky(p, (150, 190, 160), (190, 214, 170), 0.7, 2)
    step = p.some(-0.05, 0.05)
    for k in range(5):
        x = step + k * 0.25
        p.box(x - 0.045, -0.1, x + 0.045, 0.75, (96, 92, 80))
    for k in range(5):
        p.oval(step - 0.1 + k * 0.3, p.some(0.0, 0.06), 0.22, 0.16, (72, 124, 88))
    _hill(p, 0.64, [p.some(-0.05, 0.03) for _ in range(4)], (92, 140, 88))
    _hill(p, 0.72, [p.some(-0.02, 0.02) for _ in range(4)], (116, 152, 92))


def snow(p: Pen) -> None:
    _sky(p, (176, 204, 232), (222, 234, 246), 0.7, 3)
    a, b = p.some(0.1, 0.4), p.some(0.6, 0.95)
    for x, y, w in ((a, 0.24, 0.36), (b, 0.32, 0.32)):
        p.poly([(x - w, 0.7), (x, y), (x + w, 0.7)], (146, 172, 206))
        p.poly([(x - w * 0.34, y + 0.16), (x, y), (x + w * 0.34, y + 0.16), (x, y + 0.11)], WHITE, edge=False)
    _hill(p, 0.66, [p.some(-0.03, 0.03) for _ in range(4)], (232, 240, 250))
    _hill(p, 0.8, [p.some(-0.03, 0.03) for _ in range(4)], (248, 251, 255))
    for _ in range(9):
        p.dot(p.rng.random(), p.some(0, 0.6), 0.013, WHITE)


def night(p: Pen) -> None:
    _sky(p, (34, 38, 84), (70, 68, 126), 0.72, 4)
    x, y = p.some(0.12, 0.88), p.some(0.13, 0.22)
    for _ in range(11):
        p.dot(p.rng.random(), p.some(0.02, 0.55), p.some(0.009, 0.016), (250, 240, 190))
    p.oval(x, y, 0.1, 0.1, (255, 240, 186))
    p.dot(x + 0.05, y - 0.03, 0.085, (40, 44, 90))
    _hill(p, 0.66, [p.some(-0.05, 0.03) for _ in range(4)], (52, 58, 106))
    _hill(p, 0.74, [p.some(-0.02, 0.02) for _ in range(4)], (62, 76, 112))


def city(p: Pen) -> None:
    _sky(p, (196, 196, 222), (240, 220, 214), 0.7, 3)
    x = -0.06
    while x < 1:
        w, h = p.some(0.15, 0.22), p.some(0.14, 0.42)
        fill = mix((128, 130, 164), (168, 158, 184), p.rng.random())
        p.box(x, h, x + w, 0.75, fill)
        for row in range(2):
            for col in (0.3, 0.7):
                y = h + 0.09 + row * 0.11
                p.box(x + w * col - 0.022, y - 0.025, x + w * col + 0.022, y + 0.025, (246, 226, 164), edge=False)
        x += w + 0.01
    p.box(-0.1, 0.68, 1.1, 0.75, (196, 192, 200))
    p.box(-0.1, 0.74, 1.1, 1.1, (122, 122, 138))
    for k in range(4):
        p.box(k * 0.3 - 0.05, 0.93, k * 0.3 + 0.09, 0.955, (232, 226, 210), edge=False)


def desert(p: Pen) -> None:
    _sky(p, (252, 206, 142), (255, 230, 186), 0.7, 3)
    p.oval(p.some(0.15, 0.85), p.some(0.2, 0.3), 0.11, 0.11, (250, 150, 96))
    x = p.some(0.05, 0.2) if p.chance(0.5) else p.some(0.8, 0.95)
    _hill(p, 0.6, [p.some(-0.1, 0.06) for _ in range(4)], (226, 158, 104))
    p.line([(x, 0.42), (x, 0.72)], 0.06, (104, 150, 104))
    p.line([(x, 0.6), (x + 0.075, 0.58), (x + 0.075, 0.5)], 0.04, (104, 150, 104))
    p.line([(x, 0.56), (x - 0.07, 0.54), (x - 0.07, 0.47)], 0.04, (104, 150, 104))
    _hill(p, 0.69, [p.some(-0.03, 0.03) for _ in range(4)], (238, 184, 120))


def meadow(p: Pen) -> None:
    _sky(p, (158, 208, 244), (214, 236, 248), 0.7, 3)
    for x in (p.some(0.05, 0.35), p.some(0.6, 0.95)):
        _cloud(p, x, p.some(0.1, 0.26), p.some(1.1, 1.5), WHITE)
    _hill(p, 0.58, [p.some(-0.06, 0.06) for _ in range(4)], (168, 206, 122))
    _hill(p, 0.68, [p.some(-0.03, 0.03) for _ in range(4)], (142, 194, 102))
    for _ in range(7):
        x, y = p.rng.random(), p.some(0.78, 0.97)
        p.dot(x, y, 0.017, ((255, 250, 236), (252, 214, 120), (246, 170, 186))[p.rng.integers(3)])


def room(p: Pen) -> None:
    p.box(-0.1, -0.1, 1.1, 0.75, (244, 214, 196))
    x = p.some(0.12, 0.88)
    p.box(x - 0.17, 0.1, x + 0.17, 0.46, (252, 246, 236))
    p.box(x - 0.14, 0.13, x + 0.14, 0.43, (176, 214, 232), edge=False)
    p.box(x - 0.012, 0.12, x + 0.012, 0.44, (252, 246, 236), edge=False)
    p.box(x - 0.15, 0.27, x + 0.15, 0.294, (252, 246, 236), edge=False)
    other = x + 0.46 if x < 0.5 else x - 0.46
    p.box(other - 0.09, 0.16, other + 0.09, 0.34, (196, 150, 120))
    p.oval(other, 0.25, 0.055, 0.055, (236, 196, 150), edge=False)
    p.box(-0.1, 0.66, 1.1, 1.1, (196, 146, 112))
    p.box(-0.1, 0.65, 1.1, 0.69, (252, 240, 226))
    p.oval(0.5, 0.87, 0.46, 0.085, (180, 124, 124), edge=False)


PLACES_DRAWN: dict[str, Callable[[Pen], None]] = {f.__name__: f for f in (beach, forest, snow, night, city, desert, meadow, room)}
