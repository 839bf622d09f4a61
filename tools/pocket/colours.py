"""The world's named colours."""

from __future__ import annotations

from .art_canvas import RGB

COLOURS: dict[str, RGB] = {
    "red": (226, 56, 54),
    "orange": (248, 140, 36),
    "yellow": (253, 212, 58),
    "green": (74, 174, 78),
    "blue": (56, 120, 224),
    "purple": (136, 78, 196),
    "pink": (252, 146, 190),
    "brown": (142, 90, 54),
    "white": (248, 246, 242),
    "black": (54, 50, 62),
}
