"""One picture file -> RGB pixels of a shape, whatever it is stored as. Without torch, so that a look at a folder is quick."""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ..errors import DataError
from ..io import sha256_of
from ..pictures.files import ADVICE, format_of, formats
from .buckets import Shape, centre

if TYPE_CHECKING:
    from .dataset import Example

BRANDS = {**dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), ".heic"), b"avif": ".avif", b"avis": ".avif"}
# What Pillow's decoders raise on files that are not what they claim to be.
DAMAGE = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, AssertionError, EOFError,
          RuntimeError, struct.error, zlib.error)  # fmt: skip
SPARE = 3  # how many times larger than needed a picture stays when it is averaged down
STRIP = 256  # rows of a large picture that are handled at a time
ORIENTATION = 0x0112
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # an ICC profile's colours => how Pillow holds them
BRIGHTEST = 16  # of floats in which 1 is white; what had 255 for white would be black up to here
USUAL_GAMMA = 2.2  # of sRGB, as PNG's gAMA chunk counts: 1 / 2.2 says nothing new
PNG, TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt")
TURNED = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")  # texts that may say which way is up
LONGEST = 2**18  # bytes of such a text, packed
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


Convert = Callable[[Image.Image], Image.Image]


class Unreadable(Exception):
    """A picture that cannot be read; the message says why in a few words."""


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
            turn, flat = TURNS.get(_orientation(image)), over("white", flattener(image)(image))
    except Unreadable as error:
        raise DataError(f"{path}: {error}", "give another picture") from error
    return flat if turn is None else flat.transpose(turn)


def load_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """What of a picture of `size` is drawn anew: "L", white where the file is see-through, or, without any such place, light.

    Raises DataError, also for a mask of another size or of nothing.
    """
    try:
        with open_image(path) as (_, image):
            clear = ImageOps.invert(image.convert("RGBA").getchannel("A")) if image.has_transparency_data else None
    except Unreadable as error:
        raise DataError(f"{path}: {error}", "give another mask") from error
    mask = clear if clear and clear.getbbox() else load_whole(path).convert("L")
    if mask.size != size:
        sizes = f"{mask.width}x{mask.height} pixels, the picture {size[0]}x{size[1]}"
        raise DataError(f"{path}: the mask has {sizes}", "give a mask of the picture's size")
    if not mask.getbbox():
        raise DataError(f"{path}: the mask is black everywhere", "paint white, or erase, what is to be drawn anew")
    return mask


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """(sha256, opened picture) of a file. Whatever Pillow finds wrong, here or in the block, becomes Unreadable."""
    if path.exists() and not path.is_file():
        raise Unreadable("a folder, a pipe or a device, not a file")
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
            with Image.open(without_texts(file), formats=formats()) as image:
                yield sha256, image
        except Image.UnidentifiedImageError as error:
            raise Unreadable(_advice(file, path)) from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise Unreadable(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller first") from error
        except DAMAGE as error:
            raise Unreadable(f"damaged: {str(error) or type(error).__name__}") from error


def without_texts(file: BinaryIO) -> BinaryIO:
    """A file, without the texts that a PNG carries beside its pixels: Pillow refuses long ones, and the picture with them."""
    if file.read(8) != PNG:
        file.seek(0)
        return file
    kept, dropped = [PNG], False
    while len(head := file.read(8)) == 8:
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        body = file.read(size + 4)  # and its checksum
        if kind in TEXTS and not (body.startswith(TURNED) and size <= LONGEST):
            dropped = True
        else:
            kept += [head, body]
    file.seek(0)
    return io.BytesIO(b"".join(kept)) if dropped else file


def _advice(file: BinaryIO, path: Path) -> str:
    """Why Pillow does not know a file, and what to do. Phones and chats like to call HEIC pictures .jpg: look inside."""
    file.seek(0)
    start = file.read(12)
    if not start:
        return "empty"
    suffix = BRANDS.get(start[8:], path.suffix.lower()) if start[4:8] == b"ftyp" else path.suffix.lower()
    known = format_of(suffix) in formats()
    if start[:4] in (b"II*\0", b"MM\0*"):
        return "a kind of TIFF that Pillow does not read: save it as PNG"
    return "not a picture, whatever its name says" if known else ADVICE.get(suffix, "not a picture that Pillow reads")


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
    factor, flat = int(min((right - left) / shape[0], (bottom - top) / shape[1])) // SPARE, flattener(image)
    if factor < 2:
        return flat(image)
    width, height, strip = round(right - left) // factor, round(bottom - top) // factor, max(1, STRIP // factor)
    left, top = (image.width - width * factor) // 2, (image.height - height * factor) // 2
    parts = []
    for row in range(0, height, strip):
        box = (left, top + row * factor, left + width * factor, top + min(row + strip, height) * factor)
        part = flat(image.crop(box))
        # averaged colours must be weighted by their alpha, which is what RGBa holds
        parts.append(part.convert("RGBa").reduce(factor).convert("RGBA") if part.mode == "RGBA" else part.reduce(factor))
    whole = Image.new(parts[0].mode, (width, height))
    for i, part in enumerate(parts):
        whole.paste(part, (0, i * strip))
    return whole


def flattener(image: Image.Image) -> Convert:
    """What brings an image, or a part of it, to RGB as sRGB means it, or to RGBA where something can be transparent."""
    white, mode, to_srgb = white_of(image), _colours_of(image), _to_srgb(image)

    def flat(part: Image.Image) -> Image.Image:
        part = _grey(part, white) if _is_deep(part) else part
        shown = part if part.mode == "LAB" and to_srgb else part.convert("RGBA" if part.has_transparency_data else "RGB")
        if to_srgb is None:
            return shown
        colour = to_srgb(part if part.mode == mode else shown.convert(mode))
        if shown.mode == "RGBA":
            colour.putalpha(shown.getchannel("A"))
        return colour

    return flat


def _to_srgb(image: Image.Image) -> Convert | None:
    """What brings an image's colours, in the mode `_colours_of` says, to sRGB: by its ICC profile, or a PNG's gamma."""
    mode, gamma = _colours_of(image), image.info.get("gamma")
    if image.mode == "LAB" or image.info.get("icc_profile"):
        return _profile_transform(b"" if image.mode == "LAB" else image.info["icc_profile"], mode)
    if isinstance(gamma, float) and "srgb" not in image.info and abs(gamma * USUAL_GAMMA - 1) > 0.05 and 0.1 < gamma < 10:
        table = [round(255 * (level / 255) ** (1 / (gamma * USUAL_GAMMA))) for level in range(256)]
        return lambda part: part.point(table * len(part.getbands())).convert("RGB")
    return None


@functools.lru_cache(maxsize=8)
def _profile_transform(profile: bytes, mode: str) -> Convert | None:
    """From a profile's colours in a mode ("": CIE Lab's) to sRGB; None for sRGB itself, and for profiles of other colours."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        about = opened.profile
        if PROFILE_MODES.get(about.xcolor_space.strip()) != mode or "srgb" in (about.profile_description or "").lower():
            return None
        how = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB", *how)
    except (ImageCms.PyCMSError, ImportError, *DAMAGE):  # a damaged profile, or Pillow without littlecms
        return None
    return lambda part: ImageCms.applyTransform(part, transform) or part


def _colours_of(image: Image.Image) -> str:
    """The mode in which a profile has the colours of an image: of a grey one, what the profile is of."""
    if image.mode in ("CMYK", "LAB"):
        return image.mode
    grey = _is_deep(image) or image.mode in ("1", "L", "LA", "La")
    return "L" if grey and image.info.get("icc_profile", b"")[16:20] == b"GRAY" else "RGB"


def _grey(image: Image.Image, white: float) -> Image.Image:
    """A deep grey in 8 bits; `white` is its brightest value."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32)) * (255 / white)
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))


def white_of(image: Image.Image) -> float:
    """What is white in a deep grey. I;16 spans its range; I and F say nothing of theirs: the least usual one that holds all. Of
    floats it is 1 also where lights are brighter than that, which are cut."""
    if not _is_deep(image) or image.mode.startswith("I;16"):
        return 65535.0
    values = np.asarray(image)
    peak = float(np.max(values, where=np.isfinite(values), initial=0))
    if image.mode == "F" and peak <= BRIGHTEST:
        return 1.0
    return next((top for top in (255.0, 65535.0) if peak <= top), peak)


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Damaged EXIF is no reason to lose the picture."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except DAMAGE:
        return 1
