"""Pictures of a run folder as data URLs of sane size."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps

from ...io import sha256_of
from .read import inside

SMALL = 128  # pictures up to this side are kept pixel for pixel and shown enlarged by a whole number
# What Pillow's decoders raise on files that are not what they claim to be.
DAMAGE = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, EOFError, RuntimeError,
          struct.error, zlib.error, Image.DecompressionBombError)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """An inlined picture: a data URL and its size in pixels."""

    src: str
    width: int
    height: int

    @property
    def crisp(self) -> bool:
        """Whether to enlarge it by whole numbers, with hard pixels."""
        return max(self.width, self.height) <= SMALL


Inline = Callable[[str, int], Picture | None]


def inliner(folder: Path) -> Inline:
    """A function (path relative to the folder, longest side) -> Picture, or None for what cannot be shown."""

    @cache
    def inline(relative: str, side: int) -> Picture | None:
        path = inside(folder, relative)
        return _inline(path, side) if path else None

    return inline


def original(path: str, sha256: str, side: int) -> Picture | None:
    """A training picture outside the run folder, upright and square: only if it still is the very one that was trained on."""
    try:
        with open(path, "rb") as file:
            same = sha256_of(file) == sha256
    except (OSError, ValueError):
        return None
    return _inline(Path(path), side, square=True) if same else None


def _inline(path: Path, side: int, square: bool = False) -> Picture | None:
    """A picture that cannot be read is left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files are not the reader's business
            with Image.open(path) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGBA")
    except DAMAGE:
        return None
    image = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    return _encode(ImageOps.fit(image, (min(image.size),) * 2) if square else image, side)


def _encode(image: Image.Image, side: int) -> Picture:
    small = max(image.size) <= SMALL
    if not small:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Where lossless, quality is effort: 20 is within 4 % of the smallest file and 17 times as fast as 90.
    image.save(buffer, "WEBP", lossless=small, quality=20 if small else 82, method=1 if small else 4)
    return Picture("data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), *image.size)
