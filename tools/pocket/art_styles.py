"""The picture-wide styles: how shapes are laid down (coats), and what happens to the finished picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .art_canvas import CREAM, DARK, RGB, WHITE, Coat, luminance, mix

Filter = Callable[[Image.Image, np.random.Generator], Image.Image]
INK: RGB = (34, 28, 34)


@dataclass(frozen=True)
class Style:
    """`thing` and `scenery` lay down the object and the background; `backdrop` alters the background, `finish` everything."""

    thing: Coat
    scenery: Coat
    finish: Filter | None = None
    backdrop: Filter | None = None
    grid: int = 0  # draw on a grid of this many cells and enlarge them
    shadow: tuple[int, int, int, int] = (40, 30, 60, 46)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def clip_pixels(pixels: np.ndarray) -> Image.Image:
    """Pixels `[h, w, 3]` as a picture; what is out of 0..255 is cut."""
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def mesh(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in 64ths of the picture: y [size, 1] and x [1, size]."""
    a = (np.arange(size, dtype=np.float32) + 0.5) * (64 / size)
    return a[:, None], a[None]


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise [size, size] of about -1..1 that is the same at every resolution."""
    small = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def _saturate(c: RGB, by: float) -> RGB:
    grey = luminance(c) * 255
    return tuple(int(min(255, max(0, grey + (x - grey) * by))) for x in c)


def duotone(image: Image.Image, low: RGB, high: RGB) -> np.ndarray:
    """A picture in the tones between two colours, `[h, w, 3]`."""
    t = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    return np.array(low, np.float32) + np.subtract(high, low, dtype=np.float32) * t


def _paper(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    size = image.width
    return clip_pixels(_pixels(image) + 5 * _noise(rng, size, 40)[..., None])


def _wash(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Watercolour: blotches of pigment, fading to white paper at a ragged border."""
    size = image.width
    y, x = mesh(size)
    pigment = _pixels(image) + (14 * _noise(rng, size, 7) + 7 * _noise(rng, size, 22))[..., None]
    inside = np.minimum(np.minimum(x, 64 - x), np.minimum(y, 64 - y)) + 1.8 * _noise(rng, size, 8)
    keep = np.clip((inside - 2.6) / 1.6, 0, 1)[..., None]
    rim = np.clip(1 - np.abs(inside - 4.4) / 1.4, 0, 1)[..., None]
    return clip_pixels((pigment - 20 * rim) * keep + np.array((253, 250, 243), np.float32) * (1 - keep))


def _blueprint(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    size = image.width
    y, x = mesh(size)
    near = np.minimum(np.abs((x + 4) % 8 - 4), np.abs((y + 4) % 8 - 4))
    lines = np.clip(1 - near / 0.75, 0, 1)[..., None] * 26
    return clip_pixels(duotone(image, (14, 56, 150), (250, 253, 255)) + lines)


def _glow(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    base = _pixels(image)
    halo = _pixels(image.filter(ImageFilter.GaussianBlur(image.width / 32)))
    return clip_pixels(base + 0.9 * halo)


def _shards(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Breaks the background into panes of uneven brightness between lead lines."""
    size = image.width // 2
    y, x = mesh(size)
    seeds = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(-1, 2) * 16 + rng.uniform(1, 15, (16, 2))
    far = (x[None] - seeds[:, 0, None, None]) ** 2 + (y[None] - seeds[:, 1, None, None]) ** 2  # squared [16, size, size]
    near, other = np.argsort(far, axis=0)[:2]
    apart = np.linalg.norm(seeds[near] - seeds[other], axis=-1)
    border = (np.take_along_axis(far, other[None], 0)[0] - np.take_along_axis(far, near[None], 0)[0]) / (2 * apart)
    light = rng.uniform(0.72, 1.25, 16)[near]
    lead = np.clip(border / 0.5 - 0.9, 0, 1)
    gain = Image.fromarray((light * lead).astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    return clip_pixels(_pixels(image) * np.asarray(gain)[..., None])


def _halftone(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Comic print: a turned grid of dots, larger where the picture is darker."""
    y, x = mesh(image.width)
    u, v = (x + y) * 0.7071, (x - y) * 0.7071
    wave = (np.cos(u * 2 * np.pi / 3.9) + np.cos(v * 2 * np.pi / 3.9)) / 4 + 0.5
    tone = np.asarray(image.convert("L"), np.float32) / 255
    dots = np.clip((wave - 0.36 - 0.5 * tone) * 4, 0, 1)[..., None]
    return clip_pixels(_pixels(image) * (1 - 0.5 * dots) + np.array((16, 10, 40), np.float32) * 0.5 * dots)


def _carve(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turns the background's tones into level cuts, thicker where it is darker."""
    y, x = mesh(image.width)
    tone = np.asarray(image.convert("L"), np.float32) / 255
    cuts = 0.5 + 0.5 * np.cos((y + 0 * x) * 2 * np.pi / 4)
    light = np.clip((tone * 1.5 - 0.76 + 0.6 * (cuts - 0.5)) * 6 + 0.5, 0, 1)[..., None]
    return clip_pixels(np.repeat(light * 255, 3, 2))


def _sepia(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return clip_pixels(duotone(image, (66, 34, 20), (244, 220, 174)))


def _block(c: RGB) -> RGB:
    """One of three printed tones."""
    t = luminance(c)
    return (20, 20, 20) if t < 0.3 else (160, 160, 160) if t < 0.6 else (255, 255, 255)


def _soft(c: RGB) -> RGB:
    return mix(mix(c, DARK, 0.5), c, 0.12)


def _dim(c: RGB) -> RGB:
    return mix(_saturate(c, 0.86), (236, 236, 244), 0.12)


def _grey_wash(c: RGB) -> RGB:
    return mix(_saturate(c, 0.55), (252, 245, 226), 0.5)


def _ink_fill(c: RGB) -> RGB:
    return mix(_saturate(c, 1.05), (252, 245, 226), 0.1)


def _pixel_line(c: RGB) -> RGB:
    return mix(c, (236, 228, 246), 0.7) if luminance(c) < 0.26 else mix(c, (24, 16, 48), 0.74)


def _pastel_thing(c: RGB) -> RGB:
    return mix(c, (255, 248, 250), 0.3)


def _pastel_scene(c: RGB) -> RGB:
    return mix(mix(c, (236, 214, 250), 0.26), WHITE, 0.36)


def _bright(c: RGB) -> RGB:
    low = max(c)
    return mix(tuple(int(x * 255 / max(1, low)) for x in c) if low > 70 else (170, 160, 255), WHITE, 0.1)


SEEN: dict[str, Style] = {
    "plain": Style(Coat(outline=_soft, width=0.75, rim=(255, 252, 246), rim_width=0.8), Coat(_dim)),
    "ink": Style(
        Coat(_ink_fill, lambda c: INK, 1.15, rim=(252, 245, 226), rim_width=0.8, each=True),
        Coat(_grey_wash, lambda c: (96, 86, 86), 0.4, each=True),
        shadow=(34, 28, 34, 60),
    ),
    "pixel": Style(Coat(outline=_pixel_line, width=1.9), Coat(), grid=32),
    "pastel": Style(
        Coat(_pastel_thing, lambda c: mix(c, (150, 110, 170), 0.55), 0.7, WHITE, 1.5),
        Coat(_pastel_scene),
        shadow=(160, 120, 180, 50),
    ),
    "watercolour": Style(
        Coat(lambda c: mix(c, CREAM, 0.14), lambda c: mix(c, (70, 50, 90), 0.4), 0.5, (253, 250, 243), 0.7),
        Coat(lambda c: mix(c, (250, 246, 238), 0.42)),
        finish=_wash,
        shadow=(60, 60, 110, 40),
    ),
}

UNSEEN: dict[str, Style] = {
    "stained glass": Style(
        Coat(lambda c: _saturate(c, 1.35), lambda c: (14, 12, 20), 1.5, each=True),
        Coat(lambda c: _saturate(mix(c, (40, 20, 90), 0.2), 2.0), lambda c: (14, 12, 20), 0.8, each=True),
        backdrop=_shards,
        shadow=(0, 0, 0, 0),
    ),
    "blueprint": Style(
        Coat(lambda c: mix((22, 22, 22), (112, 112, 112), luminance(c)), lambda c: WHITE, 1.0, each=True),
        Coat(lambda c: mix((0, 0, 0), (14, 14, 14), luminance(c)), lambda c: (112, 112, 112), 0.4, each=True),
        finish=_blueprint,
        shadow=(0, 0, 0, 40),
    ),
    "neon": Style(
        Coat(lambda c: mix(_bright(c), (10, 4, 26), 0.86), _bright, 1.15, (10, 4, 26), 1.0, each=True),
        Coat(lambda c: mix(c, (10, 4, 26), 0.95), lambda c: mix(_bright(_saturate(c, 2.5)), (50, 10, 130), 0.6), 0.4, each=True),
        finish=_glow,
        shadow=(0, 0, 0, 60),
    ),
    "halftone comic": Style(
        Coat(lambda c: _saturate(c, 1.3), lambda c: (16, 10, 22), 1.3, WHITE, 1.1, each=True),
        Coat(lambda c: _saturate(c, 1.7), lambda c: (16, 10, 22), 0.5, each=True),
        finish=_halftone,
    ),
    "paper cut-out": Style(
        Coat(lambda c: mix(c, (240, 222, 190), 0.08), lambda c: (255, 250, 240), 0.9, each=True, shadow=2.0),
        Coat(lambda c: mix(_saturate(c, 1.4), (226, 176, 120), 0.2), lambda c: (255, 250, 240), 0.8, each=True, shadow=2.4),
        finish=_paper,
        shadow=(0, 0, 0, 0),
    ),
    "sepia woodcut": Style(
        Coat(_block, lambda c: (10, 10, 10), 1.3, WHITE, 1.2, each=True),
        Coat(lambda c: c, lambda c: (20, 20, 20), 0.4, each=True),
        finish=_sepia,
        backdrop=_carve,
        shadow=(0, 0, 0, 90),
    ),
}

COLOURLESS = {"blueprint", "sepia woodcut"}  # styles that have no room for an object's colour
