"""Individuals that the base never sees. Each is a drawing of its class with a palette and markings of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .art_canvas import DARK, RGB, WHITE, Pen

RED, ORANGE, YELLOW, GREEN, TEAL = (226, 54, 54), (248, 142, 40), (252, 212, 60), (72, 176, 86), (44, 178, 178)
BLUE, NAVY, PURPLE, PINK = (64, 124, 226), (40, 52, 110), (136, 80, 200), (250, 132, 180)


@dataclass(frozen=True)
class Subject:
    """`looks` says in words what makes it this one; `palette` and `marks` draw it."""

    class_name: str
    looks: str
    palette: Mapping[str, RGB]
    marks: Mapping[str, Callable[[Pen], None]]


def _scarf_cat(p: Pen) -> None:
    for x in (-0.5, 0.5):
        p.poly([(x * 1.3, -0.14), (x * 1.38, -0.28), (x * 0.95, -0.2)], ORANGE, edge=False)
    for x in (-0.2, 0, 0.2):
        p.line([(x, -0.66 if x == 0 else -0.6), (x, -0.42)], 0.11, ORANGE, edge=False)
    for y in (0.5, 0.72):
        p.line([(-0.42, y), (-0.2, y + 0.04)], 0.12, ORANGE, edge=False)
        p.line([(0.42, y), (0.2, y + 0.04)], 0.12, ORANGE, edge=False)


def _scarf(p: Pen) -> None:
    p.line([(-0.44, 0.24), (0, 0.33), (0.44, 0.24)], 0.2, RED, curved=True)
    p.line([(0.26, 0.34), (0.34, 0.66)], 0.2, RED)


def _cape(p: Pen) -> None:
    p.blob([(0.3, 0.02), (-0.2, 0.08), (-0.74, 0.2), (-0.92, 0.62), (-0.5, 0.56), (-0.16, 0.66), (0.2, 0.4)], RED)
    p.line([(0.18, 0.04), (0.56, 0.1)], 0.14, YELLOW)


def _eye_patch(p: Pen) -> None:
    p.oval(0.5, -0.44, 0.25, 0.26, (60, 56, 66), edge=False)


def _top_hat(p: Pen) -> None:
    p.box(0.06, -1.2, 0.5, -0.76, NAVY)
    p.box(0.06, -0.9, 0.5, -0.8, YELLOW, edge=False)
    p.line([(-0.08, -0.76), (0.64, -0.76)], 0.12, NAVY)


def _chest_dots(p: Pen) -> None:
    for x, y in ((0.34, 0.2), (0.16, 0.42), (0.5, 0.06)):
        p.dot(x, y, 0.08, RED)


def _fish_bands(p: Pen) -> None:
    for x, h in ((-0.28, 0.42), (0.16, 0.52)):
        p.poly([(x - 0.1, -h), (x + 0.1, -h), (x + 0.1, h), (x - 0.1, h)], YELLOW, edge=False)


def _crown(p: Pen) -> None:
    p.poly([(0.16, -0.44), (0.08, -0.98), (0.28, -0.74), (0.4, -1.04), (0.52, -0.74), (0.72, -0.98), (0.64, -0.38)], YELLOW)
    p.dot(0.4, -0.58, 0.09, RED)


def _roof_stripes(p: Pen) -> None:
    for x0, x1, y in ((-0.62, 0.62, -0.42), (-0.24, 0.24, -0.75)):
        p.poly([(x0 - 0.06, y + 0.05), (x0 + 0.12, y - 0.1), (x1 - 0.12, y - 0.1), (x1 + 0.06, y + 0.05)], WHITE, edge=False)


def _flag(p: Pen) -> None:
    p.line([(0, -0.9), (0, -1.3)], 0.07, DARK)
    p.poly([(0.02, -1.32), (0.46, -1.2), (0.02, -1.06)], RED)


def _racer(p: Pen) -> None:
    p.box(-0.97, 0.2, 0.97, 0.36, RED, edge=False)
    p.dot(-0.02, 0.3, 0.25, WHITE)
    p.box(-0.06, 0.16, 0.05, 0.44, NAVY, edge=False)


def _surfboard(p: Pen) -> None:
    p.oval(-0.1, -0.6, 0.78, 0.13, PINK)
    p.box(-0.86, -0.63, 0.66, -0.57, WHITE, edge=False)


def _sleepy_face(p: Pen) -> None:
    for x in (-0.13, 0.15):
        p.oval(x, 0.4, 0.06, 0.09, DARK, edge=False)
    p.line([(-0.08, 0.58), (0.01, 0.63), (0.1, 0.58)], 0.07, RED, curved=True, edge=False)


def _cap_bands(p: Pen) -> None:
    p.poly(
        [
            (-0.94, -0.3),
            (-0.78, -0.56),
            (-0.36, -0.3),
            (0, -0.56),
            (0.36, -0.3),
            (0.78, -0.56),
            (0.94, -0.3),
            (0.94, -0.06),
            (0.36, -0.06),
            (0, -0.28),
            (-0.36, -0.06),
            (-0.94, -0.06),
        ],
        YELLOW,
        edge=False,
    )
    p.oval(0, -0.97, 0.17, 0.17, RED)


def _heart(p: Pen) -> None:
    p.box(-0.72, -0.14, 0.46, 0.0, TEAL, edge=False)
    p.dot(-0.29, 0.36, 0.18, RED)
    p.dot(0.01, 0.36, 0.18, RED)
    p.poly([(-0.45, 0.44), (0.17, 0.44), (-0.14, 0.8)], RED, edge=False)


def _sail_stripes(p: Pen) -> None:
    for y, x in ((-0.5, 0.3), (-0.12, 0.55), (0.2, 0.7)):
        p.poly([(0.06, y - 0.09), (x - 0.06, y - 0.09), (x + 0.05, y + 0.07), (0.06, y + 0.07)], RED, edge=False)


def _portholes(p: Pen) -> None:
    for x in (-0.44, 0, 0.44):
        p.dot(x, 0.68, 0.1, YELLOW)


SUBJECTS: dict[str, Subject] = {
    "scarf cat": Subject(
        "cat",
        "a blue cat with orange stripes, one white ear and a red scarf",
        {"body": (84, 140, 226), "light": (214, 232, 255), "dark": (52, 88, 180), "ear2": WHITE, "tail": ORANGE},
        {"coat": _scarf_cat, "top": _scarf},
    ),
    "caped dog": Subject(
        "dog",
        "a white dog with a black ear and eye patch and a red cape",
        {"body": (246, 242, 236), "light": WHITE, "dark": (206, 204, 214), "wing": (60, 56, 66), "tail": (60, 56, 66)},
        {"coat": _cape, "face": _eye_patch},
    ),
    "hat bird": Subject(
        "bird",
        "a green bird with a yellow belly, red spots and a navy top hat",
        {"body": GREEN, "light": YELLOW, "dark": PURPLE},
        {"coat": _chest_dots, "top": _top_hat},
    ),
    "king fish": Subject(
        "fish",
        "a teal fish with yellow bands, pink fins and a golden crown",
        {"body": TEAL, "light": (190, 240, 232), "dark": (20, 110, 120), "fin": PINK},
        {"coat": _fish_bands, "top": _crown},
    ),
    "flag house": Subject(
        "house",
        "a pink house with a blue and white striped roof, a green door and a red flag",
        {"body": (255, 170, 196), "light": WHITE, "dark": (214, 110, 150), "roof": BLUE, "door": (48, 140, 80)},
        {"face": _roof_stripes, "top": _flag},
    ),
    "surf car": Subject(
        "car",
        "a teal car with a white roof, a red stripe, a number and a pink surfboard",
        {"body": TEAL, "light": WHITE, "dark": (24, 120, 128), "roof": WHITE},
        {"coat": _racer, "top": _surfboard},
    ),
    "pompom mushroom": Subject(
        "mushroom",
        "a purple mushroom with a yellow zigzag, a face and a red pompom",
        {"body": PURPLE, "light": (206, 170, 240), "dark": (92, 48, 150), "spot": PURPLE, "stem": (176, 232, 200)},
        {"coat": _cap_bands, "face": _sleepy_face},
    ),
    "heart cup": Subject(
        "cup",
        "a white cup with a red heart, a teal band and a yellow handle",
        {"body": (248, 246, 240), "light": WHITE, "dark": (206, 210, 222), "handle": (250, 196, 40)},
        {"coat": _heart},
    ),
    "pirate boat": Subject(
        "boat",
        "a black boat with golden portholes and a red and white striped sail",
        {"body": (52, 48, 62), "light": (250, 196, 40), "dark": (30, 28, 38), "sail": WHITE},
        {"coat": _portholes, "face": _sail_stripes},
    ),
}
