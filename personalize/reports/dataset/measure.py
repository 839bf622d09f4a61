"""Every picture of a folder, measured as training will see it."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ...data.buckets import Grid, Shape, grid, kept_share
from ...data.dataset import Dataset, Example
from ...data.folder import read_folder, without_cut_masks
from ...data.images import Unreadable, load_picture, open_image
from ...errors import BaseModelError, RecipeError
from ...families.family import Family
from ...families.names import ROWS
from ...families.recognition import detect, family_in
from ...formats.header import read_header
from ...models.sources import NAMED, denoiser_in
from ...recipe.fields import Recipe
from ...recipe.settings import as_words, flatten, settings

NAMING = ("base", "preset", "trigger", "class")  # settings that say what is learned, and on what
HASH_SIDE = 8  # the hash has the square of it in bits
HASHED = 256  # width of the picture that is hashed
FLAT = 1e-4  # variance of grey (0..1) below which there is nothing to be sharp about
USUAL_MULTIPLE = 64  # of Stable Diffusion: VAE 8, UNet 8


@dataclass(frozen=True)
class ImageStats:
    """One image: its file format, its bucket, its sharpness at that size, and its perceptual hash."""

    example: Example
    format: str
    shape: Shape
    kept: float  # share of its area that is not cropped away
    sharpness: float | None  # None for a plain surface
    hash: np.ndarray | None  # bool [HASH_SIDE ** 2], None without the library
    mirrored: np.ndarray | None  # the same of its mirror image


@dataclass(frozen=True)
class DatasetStats:
    """All images of a folder as training with a recipe would see them."""

    recipe: Recipe
    dataset: Dataset
    grid: Grid
    multiple: int  # what the base's networks divide a side by
    images: tuple[ImageStats, ...]
    given: Mapping[str, Any] = field(default_factory=dict)  # settings that somebody gave, which commands repeat
    assumption: str = ""  # why the base's resolution is taken to be what it is, where that is not known

    @property
    def folder(self) -> Path:
        return self.recipe.data.folder

    @cached_property
    def buckets(self) -> dict[Shape, list[ImageStats]]:
        """The pictures in each shape."""
        return {shape: [one for one in self.images if one.shape == shape] for shape in sorted({one.shape for one in self.images})}

    @cached_property
    def formats(self) -> Counter[str]:
        return Counter(one.format for one in self.images)

    def given_words(self, without: Sequence[object] = ()) -> list[str]:
        """The settings that were given as words of a command, but for those that other words say anew."""
        anew = {str(word) for word in without}
        kept = {name: value for name, value in self.given.items() if settings()[name].flag not in anew and name != "folder"}
        return as_words(kept)

    def name(self, path: Path) -> str:
        """A picture's path inside the folder."""
        return path.relative_to(self.folder).as_posix()


def measure_dataset(recipe: Recipe, given: Mapping[str, Any] | None = None) -> DatasetStats:
    """Measure every image of the recipe's folder. Raises DataError and RecipeError as `read_folder` and `grid` do.

    `given` are the settings, by flat names, that proposed commands repeat [default: what the recipe says of base and subject].
    """
    if given is None:
        given = {name: value for name, value in flatten(recipe).items() if name in NAMING and value != settings()[name].default}
    side, multiple, why = native_resolution(recipe)
    layout = grid(recipe.data, side, multiple)
    dataset = without_cut_masks(recipe.data.folder, read_folder(recipe.data), layout)
    images = tuple(_measure_image(example, layout) for example in dataset.examples)
    assumption = "" if recipe.data.resolution else why
    return DatasetStats(recipe, dataset, layout, multiple, images, given, assumption)


def native_resolution(recipe: Recipe) -> tuple[int, int, str]:
    """(side, multiple, "") of the recipe's base, from configs or a header alone.

    Of a base that needs a download, what its name makes likely, and why. Raises RecipeError where nothing says.
    """
    path = NAMED.get(recipe.base, Path(recipe.base).expanduser())
    if not path.exists():
        from ...models.sources import is_hub_id, locate  # with torch, which nothing else here needs

        if is_hub_id(recipe.base):
            try:
                path = locate(recipe.base, download=False)
            except BaseModelError:
                return assumed_resolution(recipe.base)
    if path.is_file() and (family := family_in({key: entry.shape for key, entry in read_header(path).tensors.items()})):
        return *_resolution(family), ""
    try:
        part = denoiser_in(path)
        denoiser, vae = (json.loads((path / one / "config.json").read_text(encoding="utf-8")) for one in (part, "vae"))
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        return int(denoiser["sample_size"]) * factor, factor * detect(denoiser, part=part).denoiser.multiple, ""
    except (OSError, ValueError, LookupError, TypeError) as error:
        if recipe.data.resolution:
            return recipe.data.resolution, USUAL_MULTIPLE, ""
        what = f"the resolution of {recipe.base} is not known before it is loaded"
        raise RecipeError(what, "say it: --resolution 512, or 1024 for SDXL") from error


def assumed_resolution(base: str) -> tuple[int, int, str]:
    """(side, multiple, why) of a base on the hub by its name: those of SDXL say so, and most others are SD 1.x.

    >>> assumed_resolution("someone/anime-xl")
    (1024, 32, 'that of SDXL, which its name speaks of')
    """
    if "xl" in base.lower():
        return *_resolution(ROWS["sdxl"]), "that of SDXL, which its name speaks of"
    return *_resolution(ROWS["sd1"]), "that of SD 1.x, as its name does not speak of SDXL"


def _resolution(family: Family) -> tuple[int, int]:
    factor = family.latents.factor
    return family.denoiser.config(family.texts)["sample_size"] * factor, factor * family.denoiser.multiple


def has_imagehash() -> bool:
    """Whether the library for perceptual hashes is installed."""
    return importlib.util.find_spec("imagehash") is not None


def _measure_image(example: Example, layout: Grid) -> ImageStats:
    shape = layout.shape_of(example.size)
    sharp = sharpness(np.asarray(load_picture(example, shape).convert("L"), dtype=np.float64) / 255)
    width, height = example.size
    hashes: tuple[np.ndarray | None, ...] = (None, None)
    if has_imagehash():
        small = load_picture(example, (HASHED, max(1, HASHED * height // width)))
        hashes = _hash(small), _hash(ImageOps.mirror(small))
    return ImageStats(example, _format(example.path), shape, kept_share(example.size, shape), sharp, *hashes)


def _format(path: Path) -> str:
    try:
        with open_image(path) as (_, image):
            return image.format or "?"
    except Unreadable:  # gone since a moment ago
        return "?"


def sharpness(grey: np.ndarray) -> float | None:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) of grey [h, w] in 0..1, by the variance of grey itself.

    Measured at the size in which training sees a picture, where photographs have 0.2 to 3, and less than 0.02 when blurred
    by a Gaussian of three pixels or more, whatever their contrast.
    """
    if grey.var() < FLAT or min(grey.shape) < 3:
        return None
    inner = grey[1:-1, 1:-1]
    laplacian = grey[1:-1, :-2] + grey[1:-1, 2:] + grey[:-2, 1:-1] + grey[2:, 1:-1] - 4 * inner
    return float(laplacian.var() / grey.var())


def _hash(image: Image.Image) -> np.ndarray:
    """The perceptual hash [bits] of a picture: the signs of the lowest frequencies of its lightness."""
    library: Any = importlib.import_module("imagehash")
    return np.asarray(library.phash(image, hash_size=HASH_SIDE).hash).ravel()
