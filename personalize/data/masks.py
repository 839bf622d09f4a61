"""What of a picture is learned: NAME-masklabel.png beside it (white: learn; black: leave), or its own alpha channel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError
from .buckets import Shape
from .images import Unreadable, flattener, load_image, open_image, over, probe

if TYPE_CHECKING:
    from .dataset import Example

SKEW = 0.02  # by how much a mask's proportions may differ from its picture's


def mask_of(picture: Path, mask: Path | None, sha256: str, size: Shape, alpha: bool) -> tuple[Path | None, str]:
    """(mask, its sha256) of a picture: the file `mask` beside it, else its alpha channel if that is asked for, else (None, "").

    Raises DataError for a mask that cannot be read, is all black, or has other proportions than its picture.
    """
    try:
        if mask is None:
            return (picture, sha256) if alpha and _lightest(picture, alpha=True) is not None else (None, "")
        sha256, drawn = probe(mask)
        _lightest(mask)
    except Unreadable as error:
        raise DataError(f"the mask {mask}: {error}", "save it as PNG, white where the picture is to be learned") from error
    if abs(drawn[0] * size[1] / (drawn[1] * size[0]) - 1) > SKEW:
        what = f"the mask {mask} is {drawn[0]} x {drawn[1]} pixels and its picture {size[0]} x {size[1]}"
        raise DataError(what, "draw it over the picture, so that they match")
    return mask, sha256


def load_mask(example: Example, shape: Shape, factor: int) -> np.ndarray:
    """float32 [h / factor, w / factor] in 0..1 of an example with a mask: cut like its picture, averaged over each latent.

    Raises DataError when the crop leaves nothing of it, or the file is not the one that `read_folder` saw.
    """
    assert example.mask
    image = load_image(example.mask, example.mask_sha256, shape)
    grey = image.getchannel("A") if example.mask == example.path else over("black", image).convert("L")
    values = np.asarray(grey.reduce(factor), dtype=np.float32) / 255
    if not values.any():
        what = f"nothing is left of the mask {example.mask} where its picture is cut to {shape[0]} x {shape[1]} pixels"
        raise DataError(what, "crop the picture yourself, around what is white")
    return values


def _lightest(path: Path, *, alpha: bool = False) -> int | None:
    """The brightest value of a mask, or of a picture's alpha channel: None without one. Raises DataError if that is 0."""
    with open_image(path) as (_, image):
        if alpha and not image.has_transparency_data:
            return None
        image.load()
        flat = flattener(image)(image)
        grey = flat.getchannel("A") if alpha else over("black", flat).convert("L")
        brightest = int(np.asarray(grey).max())
    if brightest == 0:
        what = f"{path} is transparent everywhere" if alpha else f"the mask {path} is all black"
        raise DataError(f"{what}: nothing of the picture would be learned", "white is what is learned; or remove it")
    return brightest
