"""The pocket world: a procedurally drawn, captioned world in which the truth of every picture is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, radians, sin
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw

from .art_backgrounds import PLACES_DRAWN
from .art_canvas import Pen, article, paint, pick, shades
from .art_objects import DRAWINGS
from .art_styles import SEEN, UNSEEN, Style
from .art_subjects import SUBJECTS, Subject
from .colours import COLOURS

OBJECTS: tuple[str, ...] = tuple(DRAWINGS)
SIZES = ("small", "medium", "large")
PLACES = ("left", "middle", "right")
BACKGROUNDS: tuple[str, ...] = tuple(PLACES_DRAWN)
STYLES: tuple[str, ...] = tuple(SEEN)
UNSEEN_STYLES: tuple[str, ...] = tuple(UNSEEN)
TRIGGERS: tuple[str, ...] = ("zwx", "vok", "qib", "plerf", "druz", "jyx", "mubz", "krelv", "thwop", "xiv")

HEIGHT = {"small": 0.34, "medium": 0.50, "large": 0.68}  # of the picture
CENTRE = {"left": 0.28, "middle": 0.5, "right": 0.72}
FLOOR = {"small": 0.83, "medium": 0.88, "large": 0.94}  # where the object stands
STYLE_WEIGHTS = (0.28, 0.18, 0.18, 0.18, 0.18)
HELD_OUT_PERCENT = 8
SALT = {"colour": 286, "background": 25, "style": 22}  # these spread the held-out combinations over all values


@dataclass(frozen=True)
class Scene:
    """All that is true of a picture. `seed` drives the pose; `subject` names an individual, which replaces object and colour."""

    object: str
    colour: str
    size: str
    place: str
    background: str
    style: str
    seed: int
    subject: str | None = None


# ------------------------------------------------------------------ scenes


def _rare(kind: str, a: str, b: str) -> bool:
    return crc32(f"{kind}{SALT[kind]}:{a}:{b}".encode()) % 100 < HELD_OUT_PERCENT


def is_held_out(scene: Scene) -> bool:
    """Whether a combination in the scene is kept from training: object with colour, with background or with style."""
    return (
        _rare("colour", scene.object, scene.colour)
        or _rare("background", scene.object, scene.background)
        or _rare("style", scene.object, scene.style)
    )


def scenes(seed: int, held_out: bool = False) -> Iterator[Scene]:
    """Endless random scenes: those for training, or only those with a held-out combination."""
    rng = np.random.default_rng([seed, 77])
    while True:
        style = STYLES[int(np.searchsorted(np.cumsum(STYLE_WEIGHTS), rng.random() * 0.999999))]
        scene = Scene(
            pick(rng, OBJECTS),
            pick(rng, COLOURS),
            pick(rng, SIZES),
            pick(rng, PLACES),
            pick(rng, BACKGROUNDS),
            style,
            int(rng.integers(2**31)),
        )
        if is_held_out(scene) == held_out:
            yield scene


# ------------------------------------------------------------------ captions

STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("flat illustration", "plain illustration", "flat picture", "simple flat drawing"),
    "ink": ("ink drawing", "pen and ink drawing", "ink sketch"),
    "pixel": ("pixel art", "pixel art sprite", "8-bit pixel art"),
    "pastel": ("pastel drawing", "soft pastel", "pastel illustration"),
    "watercolour": ("watercolour", "watercolour painting", "watercolour picture"),
} | {name: (name,) for name in UNSEEN_STYLES}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("medium sized", "medium"), "large": ("large", "big", "huge")}
PLACE_WORDS = {
    "left": ("on the left", "on the left side", "at the left"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "on the right side", "at the right"),
}
BACKGROUND_WORDS = {
    "beach": ("on the beach", "on a beach by the sea", "at the beach"),
    "forest": ("in the forest", "in a forest", "among the trees"),
    "snow": ("in the snow", "in snowy mountains", "on snow"),
    "night": ("at night", "under the moon", "under a night sky"),
    "city": ("in the city", "on a city street", "in front of city buildings"),
    "desert": ("in the desert", "in a desert", "on desert sand"),
    "meadow": ("in a meadow", "in a grassy field", "on the grass"),
    "room": ("in a room", "inside a room", "indoors"),
}


def _style_first(style: str, body: str) -> str:
    return f"{article(style)} of {body}"


def caption(scene: Scene, seed: int, name: str | None = None, style: str | None = None) -> str:
    """A true sentence about the scene, in varied words. `name` stands for "red cat", `style` for the style's phrase."""
    rng = np.random.default_rng([seed, scene.seed, 5])
    look = style or pick(rng, STYLE_WORDS[scene.style])
    short = rng.random() < 0.2
    noun = name or (SUBJECTS[scene.subject].class_name if scene.subject else scene.object)
    if not name and not scene.subject and not (short and rng.random() < 0.4):
        noun = f"{scene.colour} {noun}"
    with_size, with_place, with_background = rng.random(3) < ((0, 0, 0) if short else (0.6, 0.6, 0.85))
    words = article(f"{pick(rng, SIZE_WORDS[scene.size])} {noun}" if with_size else noun)
    where = [pick(rng, BACKGROUND_WORDS[scene.background])] * bool(with_background)
    where += [pick(rng, PLACE_WORDS[scene.place])] * bool(with_place)
    if rng.random() < 0.5:
        where.reverse()
    body = " ".join([words, *where])
    if scene.style == "plain" and not style and rng.random() < 0.5:
        return body
    form = rng.random()
    if form < 0.4:
        return f"{body}, {look}"
    if form < 0.6:
        return f"{look}, {body}"
    return _style_first(look, body)


# ------------------------------------------------------------------ pictures


def _style(name: str) -> Style:
    return SEEN.get(name) or UNSEEN[name]


def _pose(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The matrix [2, 2] and shift [2] that carry object units to picture units (0..1)."""
    half = HEIGHT[scene.size] / 2 * (1 + rng.uniform(-0.06, 0.06))
    flip = -1 if rng.random() < 0.5 else 1
    a = radians(rng.uniform(-5, 5))
    matrix = np.array([[flip * cos(a), flip * sin(a)], [-sin(a), cos(a)]]) * half
    x = float(np.clip(CENTRE[scene.place] + rng.uniform(-0.02, 0.02), half, 1 - half))
    y = FLOOR[scene.size] + rng.uniform(-0.015, 0.015) - half
    return matrix, np.array([x, y])


def _shadow(draw: ImageDraw.ImageDraw, centre: np.ndarray, half: float, fill: tuple, pixels: int) -> None:
    """A soft contact shadow on the ground under the object."""
    x, y = centre[0] * pixels, (centre[1] + half * 0.97) * pixels
    for grow in (1.0, 0.82):
        rx, ry = half * 0.95 * grow * pixels, half * 0.2 * grow * pixels
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill)


def _thing(scene: Scene, individual: Subject | None, rng: np.random.Generator) -> Pen:
    """The object or individual of the scene, drawn in its own units."""
    if subject := individual or (SUBJECTS[scene.subject] if scene.subject else None):
        pen = Pen(rng, subject.palette, subject.marks)
        DRAWINGS[subject.class_name](pen)
    else:
        pen = Pen(rng, shades(COLOURS[scene.colour]))
        DRAWINGS[scene.object](pen)
    return pen


def _scenery(scene: Scene, rng: np.random.Generator) -> Pen:
    pen = Pen(rng)
    PLACES_DRAWN[scene.background](pen)
    return pen


def _compose(scene: Scene, individual: Subject | None, style: Style, pixels: int) -> Image.Image:
    """The picture before the style's finish, at `pixels` a side."""
    image = Image.new("RGB", (pixels, pixels))
    draw = ImageDraw.Draw(image, "RGBA")
    scenery = _scenery(scene, np.random.default_rng([scene.seed, 1]))
    paint(draw, scenery.shapes, np.eye(2) * pixels, np.zeros(2), style.scenery)
    if style.backdrop:
        image = style.backdrop(image, np.random.default_rng([scene.seed, 2]))
        draw = ImageDraw.Draw(image, "RGBA")
    matrix, centre = _pose(scene, np.random.default_rng([scene.seed, 3]))
    if style.shadow[3]:
        _shadow(draw, centre, HEIGHT[scene.size] / 2, style.shadow, pixels)
    thing = _thing(scene, individual, np.random.default_rng([scene.seed, 4]))
    paint(draw, thing.shapes, matrix * pixels, centre * pixels, style.thing)
    return image


def render(scene: Scene, size: int = 64, individual: Subject | None = None, look: Style | None = None) -> Image.Image:
    """The picture of a scene, RGB, `size` pixels a side: drawn four times larger (or on the style's grid) and reduced.

    An invented `individual` takes the place of the scene's object, an invented `look` that of its style.
    """
    style = look or _style(scene.style)
    cells = style.grid or size
    large = _compose(scene, individual, style, cells * 4)
    if style.grid:  # one flat colour a cell
        return large.resize((cells, cells), Image.Resampling.NEAREST).resize((size, size), Image.Resampling.NEAREST)
    image = large.reduce(4)
    return style.finish(image, np.random.default_rng([scene.seed, 6])) if style.finish else image


__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "OBJECTS",
    "PLACES",
    "SIZES",
    "STYLES",
    "SUBJECTS",
    "TRIGGERS",
    "UNSEEN_STYLES",
    "Scene",
    "caption",
    "is_held_out",
    "render",
    "scenes",
]
