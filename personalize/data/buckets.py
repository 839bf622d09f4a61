"""Aspect-ratio buckets: shapes of about one area, and which of them a picture goes to. Pure arithmetic, in pixels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RecipeError
from ..recipe.fields import Data

Shape = tuple[int, int]  # (width, height) in pixels
Box = tuple[float, float, float, float]  # left, top, right, bottom

WIDEST = 4  # long side by short side of a bucket
LARGEST_STEP = 64  # what SD 1.x and SDXL were trained with


def buckets(side: int, step: int) -> tuple[Shape, ...]:
    """Shapes in steps of `step` whose area is at most that of a square of `side`, and as large as it gets; the square among them.

    >>> buckets(64, 16)
    ((32, 96), (32, 112), (32, 128), (48, 80), (64, 64), (80, 48), (96, 32), (112, 32), (128, 32))
    """
    lengths = range(step * -(-side // (2 * step)), 2 * side + 1, step)
    found = {(long, side * side // long // step * step) for long in lengths}
    usual = {shape for shape in found if min(shape) > 0 and max(shape) <= WIDEST * min(shape)}
    return tuple(sorted({*usual, *((h, w) for w, h in usual), (side, side)}))


def assign(size: Shape, shapes: Sequence[Shape]) -> Shape:
    """The shape whose proportions are nearest to a picture's, the larger one of equals."""

    def distance(shape: Shape) -> tuple[float, int, Shape]:
        return abs(math.log(size[0] * shape[1] / (size[1] * shape[0]))), -shape[0] * shape[1], shape

    return min(shapes, key=distance)


@dataclass(frozen=True)
class Grid:
    """Where pictures go: the area's side, the step between shapes, and what may be done to a picture."""

    side: int
    step: int
    buckets: bool = True
    upscale: bool = False

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return buckets(self.side, self.step) if self.buckets else ((self.side, self.side),)

    def shape_of(self, size: Shape) -> Shape:
        """A picture's bucket. One that would have to be enlarged gets a smaller shape of its own, unless `upscale` allows it."""
        best = assign(size, self.shapes)
        return best if not self.buckets or self.upscale or not enlarges(size, best) else self._own(size)

    def _own(self, size: Shape) -> Shape:
        """A picture's own size rounded down to steps, at least one; a long strip shrunk to the area of the others."""
        scale = min(1.0, self.side / math.sqrt(size[0] * size[1]))
        longest = 2 * self.side // self.step
        width, height = (min(longest, max(1, int(length * scale) // self.step)) * self.step for length in size)
        return width, height


def grid(data: Data, side: int, multiple: int) -> Grid:
    """The grid of a recipe on a base: `side` is the base's own in pixels, `multiple` what its networks divide a side by.

    The base's own step is 64 pixels, but never more than a quarter of the side. Raises RecipeError for a step that does not fit.
    """
    side = data.resolution or side
    usual = max(1, min(LARGEST_STEP, side // 4) // multiple) * multiple
    if data.bucket_step % multiple:
        near = max(1, round(data.bucket_step / multiple)) * multiple
        raise RecipeError(f"--bucket-step must be a multiple of {multiple} for this base, not {data.bucket_step}", f"try {near}")
    return Grid(side, data.bucket_step or usual, data.buckets, data.upscale)


def covering(size: Shape, shape: Shape) -> float:
    """What a picture is scaled by to just cover a shape."""
    return max(shape[0] / size[0], shape[1] / size[1])


def enlarges(size: Shape, shape: Shape) -> bool:
    """Whether a picture must grow to cover a shape."""
    return size[0] < shape[0] or size[1] < shape[1]


def centre(size: Shape, shape: Shape) -> Box:
    """The largest centred part of a picture that has a shape's proportions, in the picture's pixels."""
    scale = covering(size, shape)
    width, height = min(size[0], shape[0] / scale), min(size[1], shape[1] / scale)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def kept_share(size: Shape, shape: Shape) -> float:
    """The share of a picture's area that is not cropped away."""
    left, top, right, bottom = centre(size, shape)
    return (right - left) * (bottom - top) / (size[0] * size[1])


def frame(size: Shape, shape: Shape) -> tuple[float, ...]:
    """SDXL's micro-conditioning (Podell et al. 2023, section 2.2): original (h, w), crop (top, left), target (h, w).

    The crop is counted in the picture scaled to cover the shape, as SDXL's own training counted it. It is centred, so that a
    mirrored picture has the same one.
    """
    scale = covering(size, shape)
    left, top = (size[0] * scale - shape[0]) / 2, (size[1] * scale - shape[1]) / 2
    return tuple(map(float, (size[1], size[0], max(0.0, top), max(0.0, left), shape[1], shape[0])))
