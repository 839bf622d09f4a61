"""One picture file -> RGB pixels of a shape, whatever it is stored as. Without torch, so that a look at a folder is quick."""

from __future__ import annotations

import contextlib
import functools
import importlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import DataError
from ..io import sha256_of
from .buckets import Shape, centre

if TYPE_CHECKING:
    from .dataset import Example

REFUSED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # programs, data and video, not pixels
PLUGINS = ("pillow_heif", "pillow_avif", "pillow_jxl")
ADVICE = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "this format needs a plugin: pip install pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "this format needs a plugin: pip install pillow-avif-plugin"),
    ".jxl": "this format needs a plugin: pip install pillow-jxl-plugin",
    **dict.fromkeys((".svg", ".eps", ".ps", ".wmf", ".emf"), "a drawing, not pixels: export it as PNG"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"), "a camera's raw data: export it as JPEG"),
}
BRANDS = {**dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), ".heic"), b"avif": ".avif", b"avis": ".avif"}
# What Pillow's decoders raise on files that are not what they claim to be.
DAMAGE = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, AssertionError, EOFError,
          RuntimeError, struct.error, zlib.error)  # fmt: skip
SPARE = 3  # how many times larger than needed a picture stays when it is averaged down
STRIP = 256  # rows of a large picture that are handled at a time
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(Exception):
    """A picture that cannot be read; the message says why in a few words."""


@functools.cache
def formats() -> list[str]:
    """Names of the formats that this Pillow and its installed plugins open, in the order in which to try them."""
    for plugin in PLUGINS:
        with contextlib.suppress(ImportError):
            getattr(importlib.import_module(plugin), "register_heif_opener", lambda: None)()
    Image.init()
    return [name for name in Image.ID if name in Image.OPEN and name not in REFUSED]


def is_picture(path: Path) -> bool:
    """Whether the suffix (in any case) says that it is a picture: one that we read, or one to give advice about."""
    return path.suffix.lower() in ADVICE or _by_suffix(path.suffix) in formats()


def probe(path: Path) -> tuple[str, tuple[int, int]]:
    """(sha256, upright (width, height)) of a picture that decodes to its last byte. Raises Unreadable."""
    with open_image(path) as (sha256, image):
        stored = image.size
        scaled = image.draft(None, (64, 64))
        _fit_image(image, (8, 8))
        size = stored if scaled else image.size  # TIFF turns itself while it loads
        return sha256, size[::-1] if _orientation(image) >= 5 else size


def load_picture(example: Example, shape: Shape) -> Image.Image:
    """RGB of `shape`: upright (EXIF), resized (Lanczos) to cover it, centre-cropped, what is transparent over white.

    Raises DataError when the file cannot be read any more, or is not the one that `read_folder` saw.
    """
    return over("white", load_image(example.path, example.sha256, shape))


def load_image(path: Path, sha256: str, shape: Shape) -> Image.Image:
    """RGB or RGBA of `shape`, upright. Raises DataError unless it is the very file that was seen before."""
    try:
        with open_image(path) as (now, image):
            if now != sha256:
                raise Unreadable("changed while it was in use")
            double = (2 * shape[0], 2 * shape[1])
            image.draft(None, _stored_shape(image, double))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
            return _fit_image(image, shape)
    except Unreadable as error:
        raise DataError(f"{path}: {error}", "run the command again") from error


def load_whole(path: Path) -> Image.Image:
    """RGB in its own size: upright (EXIF), what is transparent over white. Raises DataError."""
    try:
        with open_image(path) as (_, image):
            image.load()
            turn, flat = TURNS.get(_orientation(image)), over("white", eight_bit(image, white_of(image)))
    except Unreadable as error:
        raise DataError(f"{path}: {error}", "give another picture") from error
    return flat if turn is None else flat.transpose(turn)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """(sha256, opened picture) of a file. Whatever Pillow finds wrong, here or in the block, becomes Unreadable."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise Unreadable(f"cannot be opened: {error.strerror}") from error
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF and the like: the pixels are what matters
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            sha256 = sha256_of(file)
            file.seek(0)
            with Image.open(file, formats=formats()) as image:
                yield sha256, image
        except Image.UnidentifiedImageError as error:
            raise Unreadable(_advice(file, path)) from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise Unreadable(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller first") from error
        except DAMAGE as error:
            raise Unreadable(f"damaged: {str(error) or type(error).__name__}") from error


def _advice(file: BufferedReader, path: Path) -> str:
    """Why Pillow does not know a file, and what to do. Phones and chats like to call HEIC pictures .jpg: look inside."""
    file.seek(0)
    start = file.read(12)
    if not start:
        return "empty"
    suffix = BRANDS.get(start[8:], path.suffix.lower()) if start[4:8] == b"ftyp" else path.suffix.lower()
    known = _by_suffix(suffix) in formats()
    return "not a picture, whatever its name says" if known else ADVICE.get(suffix, "not a picture that Pillow reads")


def _by_suffix(suffix: str) -> str:
    """Pillow's format for a suffix in any case, or ""."""
    return Image.registered_extensions().get(suffix.lower(), "")


def _stored_shape(image: Image.Image, shape: Shape) -> Shape:
    """An upright shape as it lies in the file: turned, where EXIF says that the picture is."""
    return shape[::-1] if _orientation(image) >= 5 else shape


def _fit_image(image: Image.Image, shape: Shape) -> Image.Image:
    """RGB or RGBA of `shape`: the centre of a picture, upright."""
    image.load()
    turn, lying = TURNS.get(_orientation(image)), _stored_shape(image, shape)
    flat = _shrink(image, lying)
    small = flat.resize(lying, Image.Resampling.LANCZOS, box=centre(flat.size, lying))
    return small if turn is None else small.transpose(turn)


def over(colour: str, image: Image.Image) -> Image.Image:
    """RGB, what is transparent over a colour."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def _shrink(image: Image.Image, shape: Shape) -> Image.Image:
    """RGB or RGBA; the centre of a picture much larger than `shape` is averaged down, in strips that need little memory."""
    left, top, right, bottom = centre(image.size, shape)
    factor, white = int(min((right - left) / shape[0], (bottom - top) / shape[1])) // SPARE, white_of(image)
    if factor < 2:
        return eight_bit(image, white)
    width, height, strip = round(right - left) // factor, round(bottom - top) // factor, max(1, STRIP // factor)
    left, top = (image.width - width * factor) // 2, (image.height - height * factor) // 2
    parts = []
    for row in range(0, height, strip):
        box = (left, top + row * factor, left + width * factor, top + min(row + strip, height) * factor)
        part = eight_bit(image.crop(box), white)
        # averaged colours must be weighted by their alpha, which is what RGBa holds
        parts.append(part.convert("RGBa").reduce(factor).convert("RGBA") if part.mode == "RGBA" else part.reduce(factor))
    whole = Image.new(parts[0].mode, (width, height))
    for i, part in enumerate(parts):
        whole.paste(part, (0, i * strip))
    return whole


def eight_bit(image: Image.Image, white: float) -> Image.Image:
    """Any mode -> RGB, or RGBA where something can be transparent; `white` is the brightest value of 16- and 32-bit greys."""
    if not _is_deep(image):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    values = np.nan_to_num(np.asarray(image, dtype=np.float32)) * (255 / white)
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8)).convert("RGB")


def white_of(image: Image.Image) -> float:
    """What is white in a deep grey. I;16 spans its range; I and F say nothing of theirs: the least usual one that holds all."""
    if not _is_deep(image) or image.mode.startswith("I;16"):
        return 65535.0
    values = np.asarray(image)
    peak = float(np.max(values, where=np.isfinite(values), initial=0))
    return next((top for top in (1.0, 255.0, 65535.0) if peak <= top and (top > 1 or image.mode == "F")), peak)


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Damaged EXIF is no reason to lose the picture."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except DAMAGE:
        return 1
