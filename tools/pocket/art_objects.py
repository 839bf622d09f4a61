"""The things of the pocket world, one drawing each. Units: [-1, 1], y down, the ground at y = 1; facing right or the viewer."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, radians, sin

from .art_canvas import CREAM, DARK, WHITE, Pen, mix

PINK, GOLD, LEAF, WOOD, GLASS = (255, 158, 170), (255, 205, 80), (92, 168, 88), (150, 104, 72), (190, 230, 246)
TYRE, STEEL, LAMP = (58, 54, 70), (206, 212, 226), (255, 232, 140)


def cat(p: Pen) -> None:
    """Sitting, facing the viewer: pointed ears, a curled tail."""
    lift, look = p.some(-0.12, 0.12), p.some(-1, 1)
    p.line([(0.3, 0.86), (0.78, 0.8), (0.86, 0.4 + lift), (0.66, 0.2 + lift)], 0.2, p["tail"], curved=True)
    p.blob([(-0.34, 0.1), (0.34, 0.1), (0.5, 0.7), (0.42, 0.98), (-0.42, 0.98), (-0.5, 0.7)], p["body"])
    p.oval(0, 0.66, 0.24, 0.3, p["belly"], edge=False)
    for side, part in ((-1, "ear"), (1, "ear2")):
        p.poly([(side * 0.66, -0.3), (side * 0.62, -0.98), (side * 0.1, -0.6)], p[part])
        p.poly([(side * 0.56, -0.45), (side * 0.54, -0.8), (side * 0.28, -0.6)], mix(p[part], PINK, 0.65), edge=False)
    p.oval(0, -0.22, 0.7, 0.5, p["body"])
    p.mark("coat")
    p.oval(0, -0.02, 0.3, 0.2, p["muzzle"], edge=False)
    p.eye(-0.32, -0.24, 0.17, look)
    p.eye(0.32, -0.24, 0.17, look)
    p.oval(0, -0.1, 0.09, 0.06, (226, 96, 120), edge=False)
    for x in (-0.24, 0.24):
        p.oval(x, 0.94, 0.17, 0.1, p["light"])
    p.mark("top")


def dog(p: Pen) -> None:
    """Standing, seen from the side: long muzzle, hanging ear, raised tail."""
    wag, nod = p.some(-0.14, 0.14), p.some(-0.05, 0.05)
    p.line([(-0.58, 0.3), (-0.86, 0.05), (-0.86 + wag, -0.3)], 0.19, p["tail"], curved=True)
    for x in (-0.42, 0.3):
        p.line([(x, 0.5), (x, 0.9)], 0.22, p["dark"])
    p.blob([(-0.66, 0.2), (0, 0.14), (0.5, 0.0), (0.62, 0.45), (0.3, 0.66), (-0.4, 0.64), (-0.7, 0.5)], p["body"])
    p.mark("coat")
    for x in (-0.58, 0.48):
        p.line([(x, 0.5), (x, 0.88)], 0.22, p["body"])
        p.oval(x + 0.05, 0.93, 0.16, 0.08, p["light"])
    p.oval(0.4, -0.38 + nod, 0.44, 0.42, p["body"])
    p.oval(0.76, -0.2 + nod, 0.28, 0.2, p["muzzle"])
    p.mark("face")
    p.oval(0.94, -0.32 + nod, 0.12, 0.1, DARK)
    p.blob([(0.68, -0.02 + nod), (0.86, -0.04 + nod), (0.86, 0.12 + nod), (0.74, 0.16 + nod)], (240, 110, 130), edge=False)
    p.eye(0.5, -0.44 + nod, 0.15, 0.6)
    p.blob([(0.16, -0.74 + nod), (0.3, -0.5 + nod), (0.22, -0.02 + nod), (0.02, 0.04 + nod), (-0.08, -0.3 + nod)], p["wing"])
    p.mark("top")


def bird(p: Pen) -> None:
    """A plump bird from the side."""
    flap, hop = p.some(-16, 14), p.some(-0.04, 0.04)
    for x in (-0.12, 0.16):
        p.line([(x, 0.62), (x, 0.94), (x + 0.16, 0.95)], 0.09, (236, 146, 54))
    p.poly([(-0.4, 0.1), (-1.0, -0.16), (-1.02, 0.1), (-0.84, 0.3), (-0.4, 0.5)], p["dark"])
    p.poly([(0.68, -0.44), (1.04, -0.26), (0.68, -0.1)], (246, 160, 50))
    p.blob(
        [(-0.62, 0.3), (-0.3, -0.2), (0.0, -0.78), (0.5, -0.82), (0.78, -0.36), (0.6, 0.3), (0.2, 0.7), (-0.34, 0.68)], p["body"]
    )
    p.blob([(0.12, 0.0), (0.6, -0.02), (0.54, 0.34), (0.16, 0.66), (-0.16, 0.6)], p["belly"], edge=False)
    p.mark("coat")
    p.oval(-0.2, 0.18 + hop, 0.4, 0.24, p["wing"], turn=flap)
    p.eye(0.4, -0.4, 0.17, 0.6)
    p.mark("top")


def fish(p: Pen) -> None:
    """A round fish that swims just above the ground."""
    sway, fin = p.some(-0.12, 0.12), p.some(-0.08, 0.08)
    p.blob([(-0.5, 0.04), (-0.98, -0.44 + sway), (-0.86, 0.04 + sway), (-0.98, 0.52 + sway)], p["fin"])
    p.blob([(-0.3, -0.42), (-0.2, -0.86 + fin), (0.24, -0.74 + fin), (0.34, -0.4)], p["fin"])
    p.blob([(-0.14, 0.5), (-0.24, 0.86), (0.16, 0.7), (0.2, 0.5)], p["fin"])
    p.oval(0.14, 0.04, 0.78, 0.56, p["body"])
    p.blob([(-0.4, 0.3), (0.2, 0.24), (0.74, 0.22), (0.5, 0.44), (0.1, 0.56)], p["belly"], edge=False)
    p.mark("coat")
    p.blob([(-0.1, 0.02), (-0.42, 0.0), (-0.34, 0.24), (-0.06, 0.22)], p["fin"], edge=False)
    p.eye(0.5, -0.1, 0.19, 0.5)
    p.line([(0.82, 0.24), (0.68, 0.27), (0.6, 0.22)], 0.07, mix(p["dark"], DARK, 0.5), curved=True, edge=False)
    p.mark("top")


def house(p: Pen) -> None:
    """A small house with a gable, a door and lit windows."""
    side, x = (-1 if p.chance(0.5) else 1), p.some(0.3, 0.45)
    p.box(side * x - 0.13, -0.92, side * x + 0.13, -0.3, p["dark"])
    p.box(-0.7, -0.2, 0.7, 0.98, p["body"])
    p.mark("coat")
    p.poly([(-0.98, -0.1), (0, -0.96), (0.98, -0.1)], p["roof"])
    p.mark("face")
    p.box(-side * 0.36 - 0.2, 0.34, -side * 0.36 + 0.2, 0.98, p.palette.get("door", (122, 78, 62)), edge=False)
    p.dot(-side * 0.36 + 0.1, 0.66, 0.06, GOLD)
    p.box(side * 0.32 - 0.26, 0.16, side * 0.32 + 0.26, 0.64, WHITE, edge=False)
    p.box(side * 0.32 - 0.2, 0.22, side * 0.32 + 0.2, 0.58, LAMP, edge=False)
    p.dot(0, -0.4, 0.17, WHITE)
    p.dot(0, -0.4, 0.11, LAMP)
    p.mark("top")


def tree(p: Pen) -> None:
    """A round leafy tree."""
    a, b = p.some(-0.06, 0.06), p.some(-0.06, 0.06)
    p.poly([(-0.15, 0.2), (0.15, 0.2), (0.2, 0.98), (-0.2, 0.98)], WOOD)
    p.line([(0.05, 0.6), (0.34, 0.3)], 0.12, WOOD)
    p.oval(-0.46, 0.02 + a, 0.42, 0.38, p["body"])
    p.oval(0.46, 0.02 + b, 0.42, 0.38, p["body"])
    p.oval(-0.26, -0.46 + b, 0.44, 0.42, p["body"])
    p.oval(0.3, -0.42 + a, 0.44, 0.42, p["body"])
    p.oval(0, -0.1, 0.5, 0.48, p["body"])
    p.blob(
        [(-0.78, 0.1 + a), (-0.3, 0.24), (0.3, 0.24), (0.8, 0.08 + b), (0.5, 0.4 + b), (0, 0.36), (-0.5, 0.4 + a)],
        p["dark"],
        edge=False,
    )
    glow = mix(p["body"], p["light"], 0.5)
    p.blob(
        [(-0.6, -0.5 + b), (-0.34, -0.8 + b), (0.02, -0.7), (0.3, -0.76 + a), (0.4, -0.6 + a), (-0.2, -0.52), (-0.52, -0.28 + b)],
        glow,
        edge=False,
    )
    p.oval(-0.62, -0.1 + a, 0.13, 0.16, glow, turn=20, edge=False)
    p.mark("coat")
    p.mark("top")


def car(p: Pen) -> None:
    """A little rounded car from the side."""
    back = p.some(-0.7, -0.58)
    p.blob([(back, 0.2), (back + 0.14, -0.36), (-0.1, -0.52), (0.3, -0.44), (0.62, 0.16)], p.palette.get("roof", p["body"]))
    p.blob([(back + 0.14, 0.1), (back + 0.22, -0.22), (-0.14, -0.34), (-0.14, 0.1)], GLASS, edge=False)
    p.blob([(0.0, 0.1), (0.0, -0.34), (0.24, -0.28), (0.44, 0.1)], GLASS, edge=False)
    p.blob(
        [(-1, 0.34), (-0.88, 0.08), (-0.4, 0.06), (0.5, 0.06), (0.92, 0.18), (1.02, 0.5), (0.9, 0.7), (-0.9, 0.7), (-1, 0.6)],
        p["body"],
    )
    p.blob([(-0.98, 0.56), (0, 0.5), (1, 0.56), (0.9, 0.7), (-0.9, 0.7)], p["dark"], edge=False)
    p.mark("coat")
    p.dot(0.86, 0.34, 0.12, LAMP)
    p.box(-0.98, 0.28, -0.86, 0.44, (236, 92, 84), edge=False)
    for x in (-0.52, 0.54):
        p.oval(x, 0.7, 0.28, 0.28, TYRE)
        p.dot(x, 0.7, 0.14, STEEL)
    p.mark("top")


def boat(p: Pen) -> None:
    """A sailing boat on a small wave."""
    puff, sail = p.some(0, 0.14), p.palette.get("sail", CREAM)
    p.line([(-0.04, -0.94), (-0.04, 0.5)], 0.1, WOOD)
    p.blob([(0.06, -0.84), (0.5 + puff, -0.2), (0.74 + puff, 0.28), (0.06, 0.3)], sail)
    p.poly([(-0.14, -0.6), (-0.14, 0.3), (-0.7, 0.3)], mix(sail, p["body"], 0.7))
    p.mark("face")
    p.poly([(-0.04, -0.98), (-0.42, -0.86), (-0.04, -0.74)], p["body"])
    p.poly([(-0.98, 0.42), (0.98, 0.42), (0.66, 0.94), (-0.62, 0.94)], p["hull"])
    p.poly([(-0.98, 0.42), (0.98, 0.42), (0.92, 0.54), (-0.9, 0.54)], p["light"], edge=False)
    p.mark("coat")
    wave = [
        (-1, 0.9),
        (-0.66, 0.8),
        (-0.34, 0.92),
        (0, 0.8),
        (0.34, 0.92),
        (0.66, 0.8),
        (1, 0.9),
        (0.9, 1.02),
        (0, 1.04),
        (-0.9, 1.02),
    ]
    p.blob(wave, (120, 190, 226))
    p.mark("top")


def mushroom(p: Pen) -> None:
    """A toadstool with a spotted cap."""
    lean, low = p.some(-0.08, 0.08), p.some(-0.04, 0.06)
    stem = p.palette.get("stem", (252, 236, 206))
    p.blob([(-0.24, 0.0), (0.24, 0.0), (0.3 + lean, 0.6), (0.4 + lean, 0.94), (-0.4 + lean, 0.94), (-0.3 + lean, 0.6)], stem)
    p.mark("face")
    p.blob(
        [
            (-0.98, 0.1 + low),
            (-0.84, -0.5),
            (-0.3, -0.94),
            (0.3, -0.94),
            (0.84, -0.5),
            (0.98, 0.1 + low),
            (0.5, 0.24),
            (-0.5, 0.24),
        ],
        p["body"],
    )
    p.blob([(-0.86, 0.12 + low), (0, 0.02), (0.86, 0.12 + low), (0.46, 0.22), (-0.46, 0.22)], p["dark"], edge=False)
    for x, y, rx, ry in ((-0.5, -0.3, 0.2, 0.19), (0.1, -0.6, 0.24, 0.18), (0.58, -0.2, 0.17, 0.17), (0.06, -0.12, 0.16, 0.12)):
        p.oval(x, y, rx, ry, p["spot"], edge=False)
    p.mark("coat")
    p.mark("top")


def cup(p: Pen) -> None:
    """A mug of something hot."""
    curl = p.some(-0.1, 0.1)
    for x in (-0.36, 0.06):
        p.line([(x, -0.48), (x + curl, -0.66), (x - curl, -0.8), (x + curl, -0.96)], 0.09, (236, 240, 248), curved=True)
    ring = [(0.4, -0.02), (0.84, -0.08), (0.9, 0.3), (0.74, 0.56), (0.36, 0.62)]
    p.line(ring, 0.2, p.palette.get("handle", p["body"]), curved=True)
    p.blob(
        [(-0.74, -0.36), (0.46, -0.36), (0.46, 0.3), (0.36, 0.84), (0.1, 0.98), (-0.38, 0.98), (-0.64, 0.84), (-0.74, 0.3)],
        p["body"],
    )
    p.blob([(0.2, -0.3), (0.47, -0.3), (0.45, 0.3), (0.34, 0.86), (0.1, 0.96), (0.22, 0.5)], p["dark"], edge=False)
    p.oval(-0.14, -0.36, 0.62, 0.16, p["light"])
    p.oval(-0.14, -0.34, 0.5, 0.1, (112, 70, 52), edge=False)
    if "coat" not in p.marks:
        p.dot(-0.3, 0.28, 0.15, p["spot"])
        p.dot(-0.02, 0.28, 0.15, p["spot"])
        p.poly([(-0.43, 0.36), (0.11, 0.36), (-0.16, 0.64)], p["spot"], edge=False)
    p.mark("coat")
    p.mark("top")


def flower(p: Pen) -> None:
    """A daisy-like flower with a stem and two leaves."""
    bend, turn = p.some(-0.1, 0.1), p.some(0, 60)
    p.line([(bend, -0.2), (bend * 0.4, 0.4), (0, 0.96)], 0.13, LEAF, curved=True)
    p.blob([(0.02, 0.82), (0.24, 0.5), (0.66, 0.42), (0.46, 0.76)], LEAF)
    p.blob([(-0.02, 0.9), (-0.24, 0.62), (-0.64, 0.56), (-0.44, 0.86)], LEAF)
    for k in range(6):
        a = radians(turn + 60 * k)
        p.oval(bend + 0.42 * cos(a), -0.34 + 0.42 * sin(a), 0.27, 0.24, p["body"], turn=turn + 60 * k)
    yellow = p["body"][0] > 230 and p["body"][1] > 180 and p["body"][2] < 120
    p.oval(bend, -0.34, 0.25, 0.25, (150, 88, 50) if yellow else GOLD)
    p.dot(bend - 0.06, -0.4, 0.08, (190, 124, 80) if yellow else (255, 236, 160))
    p.mark("coat")
    p.mark("top")


def umbrella(p: Pen) -> None:
    """An open umbrella with a hooked handle."""
    hook, grip = (-1 if p.chance(0.5) else 1), p.palette.get("handle", (128, 84, 62))
    p.line([(0, -0.98), (0, 0.72), (hook * 0.08, 0.9), (hook * 0.24, 0.9), (hook * 0.32, 0.74)], 0.11, grip)
    p.dome(0, 0.1, 0.98, 0.94, p["body"])
    for x in (-0.66, 0, 0.66):
        p.dome(x, 0.11, 0.33, 0.14, p["dark"], edge=False)
    p.blob([(0, -0.84), (0.24, -0.4), (0.33, 0.1), (0, 0.02), (-0.33, 0.1), (-0.24, -0.4)], p["panel"], edge=False)
    p.mark("coat")
    p.mark("top")


DRAWINGS: dict[str, Callable[[Pen], None]] = {
    f.__name__: f for f in (cat, dog, bird, fish, house, tree, car, boat, mushroom, cup, flower, umbrella)
}
