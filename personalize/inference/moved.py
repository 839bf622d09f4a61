"""Old names of this folder, until their callers have the new ones; then this file goes, and `__getattr__` of sampling.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from ..models.model import Base
from ..recipe.samplers import AUTO
from .img2img import InitLatents
from .pipeline import draw_images
from .png import read_record as read_parameters
from .png import save_picture
from .request import DEFAULTS, Request
from .sampling import denoise
from .sampling import eval_mode as evaluating
from .sampling import to_images as to_pictures
from .schedulers import Shape, Size
from .sheet import contact_sheet as grid
from .sheet import enlarge as enlarged
from .sheet import save_sheet

Parameters = Request

__all__ = ["DEFAULTS", "Parameters", "diffuse", "drawing", "enlarged", "evaluating", "grid", "read_parameters", "save_picture",
           "save_sheet", "settings_of", "to_pictures"]  # fmt: skip


def drawing(
    base: Base, prompts: Sequence[str], seeds: Sequence[int], *, size: Size | None = None, batch_size: int = 8, **how: Any
) -> Iterator[Image.Image]:
    """`draw_images`, from prompts and seeds."""
    sides = (size, size) if isinstance(size, int) else size
    requests = [Request(prompt, seed, size=sides, **how) for prompt, seed in zip(prompts, seeds, strict=True)]
    return draw_images(base, requests, batch_size=batch_size)


def diffuse(
    base: Base, prompts: Sequence[str], seeds: Sequence[int], shape: Shape, *, beginning: InitLatents | None = None, **how: Any
) -> Tensor:
    """`denoise`, from prompts and seeds."""
    size = (shape[2] * base.factor, shape[1] * base.factor)
    return denoise(
        base, [Request(prompt, seed, size=size, **how) for prompt, seed in zip(prompts, seeds, strict=True)], beginning
    )


def settings_of(base: Base, *, prompt: str, seed: int, size: tuple[int, int], sampler: str = AUTO, **how: Any) -> Request:
    """The request as it is drawn."""
    return Request(prompt, seed, size=size, sampler=sampler, **how).complete(base)
