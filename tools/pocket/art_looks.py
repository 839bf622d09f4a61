"""Invented looks, endless and never twice: tints, outlines, rims and finishes that pretraining draws besides the named styles.

None of the world's unseen styles is among them; they teach the base that a picture's treatment is a thing apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageFilter

from .art_canvas import CREAM, DARK, RGB, WHITE, Coat, Tint, luminance, mix, pick, shade, some
from .art_styles import Filter, Style, clip_pixels, mesh


def _by_tone(low: RGB, high: RGB, steps: int) -> Tint:
    def tint(c: RGB) -> RGB:
        t = luminance(c)
        return mix(low, high, round(t * steps) / steps if steps else t)

    return tint


def _invent_tint(rng: np.random.Generator, colours: Mapping[str, RGB]) -> tuple[Tint, str]:
    """A change of every colour, and its name."""
    first, second = (pick(rng, colours) for _ in range(2))
    a, b = shade(rng, colours[first]), shade(rng, colours[second])
    low, high = sorted((a, b), key=luminance)
    order, t, k = rng.permutation(3), some(rng, 0.2, 0.65), some(rng, 0.1, 1.8)
    steps = int(rng.choice((0, 0, 2, 3, 4)))

    def strengthen(c: RGB) -> RGB:
        grey = luminance(c) * 255
        return tuple(int(np.clip(grey + (x - grey) * k, 0, 255)) for x in c)

    named: list[tuple[Tint, str]] = [
        (lambda c: mix(c, a, t), f"{first} tinted"),
        (_by_tone(mix(low, DARK, 0.4), mix(high, WHITE, 0.4), steps), f"{first} and {second}"),
        (_by_tone(mix(high, WHITE, 0.5), mix(low, DARK, 0.5), steps), "negative"),
        (lambda c: tuple(c[i] for i in order), "false colour"),
        (lambda c: tuple(int(255 * (x / 255) ** (1 / (0.5 + k))) for x in c), "bright" if k > 0.5 else "dark"),
        (strengthen, "vivid" if k > 1 else "faded"),
    ]
    return pick(rng, named)


def _finish(rng: np.random.Generator, colours: Mapping[str, RGB]) -> tuple[Filter | None, str]:
    """What happens to the finished picture, and its name. Lengths are in 64ths of the picture."""
    kind, strength, wave, turn = int(rng.integers(8)), some(rng, 0.3, 1), some(rng, 3, 10), some(rng, 0, pi)
    seed, tone = int(rng.integers(2**31)), shade(rng, pick(rng, colours.values()))

    def overlay(image: Image.Image, mask: np.ndarray, by: float) -> Image.Image:
        x = np.asarray(image, np.float32)
        return clip_pixels(x + (np.array(tone, np.float32) - x) * (mask * by)[..., None])

    def lines(image: Image.Image, _: np.random.Generator) -> Image.Image:
        y, x = mesh(image.width)
        crest = np.cos((x * cos(turn) + y * sin(turn)) * 2 * pi / wave)
        return overlay(image, np.clip(crest * 3 - 1, 0, 1), 0.5 * strength)

    def shade_waves(image: Image.Image, _: np.random.Generator) -> Image.Image:
        y, x = mesh(image.width)
        crest = np.cos((x * cos(turn) + y * sin(turn)) * 2 * pi / (0.6 * wave)) * 0.5 + 0.5
        return overlay(image, np.clip((crest - np.asarray(image.convert("L"), np.float32) / 255) * 4, 0, 1), strength)

    def tiles(image: Image.Image, _: np.random.Generator) -> Image.Image:
        y, x = mesh(image.width)
        across, down = x * cos(turn) + y * sin(turn), -x * sin(turn) + y * cos(turn)
        crest = np.maximum(np.cos(across * 2 * pi / wave), np.cos(down * 2 * pi / wave))
        return overlay(image, np.clip(crest * 6 - 5, 0, 1), strength)

    def grain(image: Image.Image, _: np.random.Generator) -> Image.Image:
        cells = int(10 + 5 * wave)
        noise = Image.fromarray(np.random.default_rng(seed).normal(0, 26 * strength, (cells, cells)).astype(np.float32))
        spread = np.asarray(noise.resize(image.size, Image.Resampling.BICUBIC))
        return clip_pixels(np.asarray(image, np.float32) + spread[..., None])

    def blur(image: Image.Image, _: np.random.Generator) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(strength * image.width / 56))

    def glowing(image: Image.Image, _: np.random.Generator) -> Image.Image:
        halo = np.asarray(image.filter(ImageFilter.GaussianBlur(image.width / (14 + 2 * wave))), np.float32)
        return clip_pixels(np.asarray(image, np.float32) + (halo - 110) * strength)

    def frame(image: Image.Image, _: np.random.Generator) -> Image.Image:
        y, x = mesh(image.width)
        inside = np.minimum(np.minimum(x, 64 - x), np.minimum(y, 64 - y))
        return overlay(image, np.clip((wave * 0.6 - inside) / (4 * strength), 0, 1), 1)

    named: list[tuple[Filter | None, str]] = [
        (None, ""), (lines, "lined"), (shade_waves, "hatched"), (tiles, "tiled"), (grain, "grainy"), (blur, "blurred"),
        (glowing, "glowing"), (frame, "framed"),
    ]  # fmt: skip
    return named[kind]


def _invent_outline(rng: np.random.Generator, colours: Mapping[str, RGB]) -> tuple[Tint | None, str]:
    kind, t = int(rng.integers(5)), some(rng, 0.3, 0.9)
    if kind == 0:
        return None, ""
    if kind == 1:
        return lambda c: mix(c, DARK, t), "dark outlines"
    if kind == 2:
        return lambda c: mix(c, WHITE, t), "light outlines"
    name = pick(rng, ("black", "white", *colours))
    line = shade(rng, colours[name])
    return lambda c: line, f"{name} outlines"


def invent_look(rng: np.random.Generator, colours: Mapping[str, RGB]) -> tuple[Style, str]:
    """A picture-wide style and its phrase: tints of thing and scenery, outlines, a rim, a finish, sometimes coarse cells."""
    tint, shown = _invent_tint(rng, colours) if rng.random() < 0.8 else (lambda c: c, "")
    scene_tint = tint if rng.random() < 0.5 else _invent_tint(rng, colours)[0]
    outline, edged = _invent_outline(rng, colours)
    finish, finished = _finish(rng, colours)
    each, wide = bool(rng.random() < 0.6), some(rng, 0.4, 1.6)
    rim = pick(rng, (None, WHITE, CREAM, DARK))
    falls = some(rng, 1.2, 2.6) if rng.random() < 0.15 else 0.0
    thing = Coat(tint, outline, wide if outline else 0.0, rim, some(rng, 0.5, 1.5), each, falls)
    scenery = Coat(scene_tint, outline if rng.random() < 0.6 else None, some(rng, 0.3, 0.9), each=each, shadow=falls)
    grid = int(rng.integers(16, 41)) if rng.random() < 0.08 else 0
    opacity, medium = int(rng.choice((0, 40, 70))), pick(rng, ("picture", "print", "drawing"))
    words = " ".join(word for word in (finished, shown, "cells" if grid else medium) if word)
    style = Style(thing, scenery, None if grid else finish, None, grid, (40, 30, 60, opacity))
    return style, f"{words} with {edged}" if edged and each else words
