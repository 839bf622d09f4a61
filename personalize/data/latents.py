"""Pictures -> the VAE's posterior, captions -> conditioning: computed once, one at a time, and cached.

One at a time, because the last bits of a convolution depend on how many pictures share its batch (seen: 1e-6): what a
picture encodes to must not depend on which of its neighbours were cached already.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BaseModelError
from ..families import emphasis, text
from ..families.cond import Cond
from ..families.notation import variants
from ..models import model
from ..recipe.fields import Recipe
from . import buckets
from . import cache as store
from . import images as pictures
from .buckets import Grid, Shape, enlarges, grid
from .dataset import Dataset, Example
from .images import load_picture
from .masks import load_mask

if TYPE_CHECKING:
    from ..models.model import Base


@dataclass(frozen=True)
class Latents:
    """A dataset as the denoiser sees it, on the CPU: each picture in its bucket's shape, and whatever else a step asks of it."""

    captions: list[str]  # n of them
    sizes: list[Shape]  # of the pictures themselves, upright
    shapes: list[Shape]  # of their buckets
    repeats: list[int]
    masks: list[Tensor | None]  # [h, w] in latents, 0..1
    mirrored: bool  # whether pictures are shown mirrored half of the time
    posterior: Callable[[int, Shape, bool], tuple[Tensor, Tensor]]  # number, shape, mirrored -> mean, std [c, h, w], scaled
    cond: Cond | None  # of distinct captions + 1, the last of the empty caption; None: to be embedded at each step
    cond_index: Tensor  # [n], each picture's row of cond, by the first of its variants
    variants: list[list[str]]  # of each caption: what it says in turn, where it leaves a choice
    rows: dict[str, int]  # row of cond by what a caption says
    warnings: list[str]

    @functools.cached_property
    def buckets(self) -> dict[Shape, list[int]]:
        """Numbers of the pictures in each shape, each as often as it is repeated."""
        common = math.gcd(*self.repeats)
        found: dict[Shape, list[int]] = {shape: [] for shape in sorted(set(self.shapes))}
        for number, (shape, repeats) in enumerate(zip(self.shapes, self.repeats, strict=True)):
            found[shape] += [number] * (repeats // common)
        return found


def encode_dataset(base: Base, dataset: Dataset, recipe: Recipe, windows: int = 0) -> Latents:
    """Encode a dataset with the base, or find it in the cache ($PERSONALIZE_CACHE, else ~/.cache/personalize).

    Keys cover the pictures' bytes, shape, mirroring, captions, the encoders' weights and configs, the device and the code.
    Raises BaseModelError for latents that are not finite, DataError for a picture that changed meanwhile, or a mask of which
    the crop leaves nothing, RecipeError for a --bucket-step that does not fit the base.
    """
    latents = on_demand(base, dataset, recipe, keep=None, windows=windows)
    for number, shape in enumerate(latents.shapes):
        for mirrored in (False, True) if latents.mirrored else (False,):
            latents.posterior(number, shape, mirrored)
    return latents


def on_demand(base: Base, dataset: Dataset, recipe: Recipe, keep: int | None = 256, windows: int = 0) -> Latents:
    """As `encode_dataset`, but a picture is encoded when a step first wants it in some shape; so many are kept in memory."""
    examples, places = dataset.examples, grid_of(base, recipe)
    shapes = [places.shape_of(example.size) for example in examples]
    warnings = [*_enlarged_warning(examples, shapes), *_small(examples, shapes, places)]
    vae = identity(base, base.vae)

    @functools.lru_cache(keep)
    def posterior(number: int, shape: Shape, mirrored: bool) -> tuple[Tensor, Tensor]:
        example = examples[number]
        name = store.key(kind="latents", vae=vae, picture=example.sha256, shape=shape, mirrored=mirrored)
        entry = store.recall(name, lambda: encode_example(base, example, shape, mirrored), warnings)
        return entry["mean"], entry["std"]

    captions = [example.caption for example in examples]
    ways = [variants(caption) for caption in captions]
    distinct = list(dict.fromkeys(itertools.chain(*ways)))
    anew = recipe.reading_steps or recipe.data.varies
    cond = None if anew else embed_captions(base, [*distinct, ""], windows or base.windows(distinct, weighted=True), warnings)
    masks = [_mask(base, example, shape) for example, shape in zip(examples, shapes, strict=True)]
    return Latents(
        captions=captions,
        sizes=[example.size for example in examples],
        shapes=shapes,
        repeats=[example.repeats for example in examples],
        masks=masks,
        mirrored=recipe.data.flip,
        posterior=posterior,
        cond=cond,
        cond_index=torch.tensor([distinct.index(one[0]) for one in ways]),
        variants=ways,
        rows={caption: row for row, caption in enumerate(distinct)},
        warnings=warnings,
    )


def grid_of(base: Base, recipe: Recipe) -> Grid:
    """Where a recipe's pictures go on a base."""
    return grid(recipe.data, base.resolution, base.factor * base.family.denoiser.multiple)


def load_pixels(example: Example, shape: int | Shape) -> Tensor:
    """uint8 [3, h, w] of a shape (width, height), or a square of a side: see `load_picture`. Raises DataError."""
    picture = load_picture(example, (shape, shape) if isinstance(shape, int) else shape)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


@torch.no_grad()
def encode_example(base: Base, example: Example, shape: Shape, mirrored: bool) -> dict[str, Tensor]:
    """Mean and std [c, h, w] of an image's posterior in a shape. Raises DataError; BaseModelError where not finite."""
    pixels = load_pixels(example, shape)[None].float() / 127.5 - 1  # uint8 => [-1, 1]
    mean, std = base.encode(pixels.flip(-1) if mirrored else pixels)
    if not (mean.isfinite().all() and std.isfinite().all()):
        what = f"the VAE of {base.name} gives latents that are not finite for {example.path.name}"
        raise BaseModelError(what, "its weights are damaged" if base.dtype == torch.float32 else "use float32")
    return {"mean": mean[0].float(), "std": std[0].float()}


def _mask(base: Base, example: Example, shape: Shape) -> Tensor | None:
    return torch.from_numpy(load_mask(example, shape, base.factor)) if example.mask else None


def embed_captions(base: Base, captions: Sequence[str], windows: int, warnings: list[str]) -> Cond:
    """Conditioning of captions as the base reads them, a row each, in its dtype, on the CPU; cached as latents are.

    Each is read by itself: a row's bits don't depend on its company, and memory not on their number.
    """
    texts = [[identity(base, text.model), text.layer] for text in base.texts]

    @torch.no_grad()
    def embed(caption: str) -> dict[str, Tensor]:
        cond = base.embed([caption], windows=windows, weighted=True)
        return {"tokens": cond.tokens} | ({} if cond.pooled is None else {"pooled": cond.pooled})

    def recall(caption: str) -> Cond:
        tokens = [text.tokenizer(caption, verbose=False).input_ids for text in base.texts]
        name = store.key(kind="cond", texts=texts, caption=caption, tokens=tokens, windows=windows)
        return Cond(**store.recall(name, lambda: embed(caption), warnings))

    return Cond.cat(recall(caption) for caption in captions)


def identity(base: Base, encoder: Any) -> str:
    """Everything but its input that decides what an encoder gives: weights, config, device, and the code around it."""
    config = dict(encoder.config) if isinstance(encoder.config, Mapping) else encoder.config.to_dict()
    plain = {name: str(value) for name, value in config.items() if not name.startswith("_")}  # "_name_or_path" and the like
    weights = store.fingerprint(encoder.state_dict())
    own = code(model.__name__, text.__name__, emphasis.__name__)
    return store.key(weights=weights, config=plain, device=base.device.type, code=own)


@functools.cache
def code(*modules: str) -> str:
    """The sources and libraries that turn files into latents: an edit or an upgrade must not meet what the old ones left."""
    sources = [inspect.getsource(sys.modules[module]) for module in (buckets.__name__, pictures.__name__, __name__, *modules)]
    return store.key(sources=sources, libraries=[version(name) for name in ("torch", "diffusers", "transformers", "pillow")])


def _enlarged_warning(examples: Sequence[Example], shapes: Sequence[Shape]) -> list[str]:
    small = [example for example, shape in zip(examples, shapes, strict=True) if enlarges(example.size, shape)]
    what = f"{len(small)} of {len(examples)} pictures are too small for their shape and get blurred by enlarging"
    return [f"{what}, such as {_smallest(small)}"] if small else []


def _small(examples: Sequence[Example], shapes: Sequence[Shape], places: Grid) -> list[str]:
    own = [example for example, shape in zip(examples, shapes, strict=True) if shape not in places.shapes]
    what = f"{len(own)} of {len(examples)} pictures are too small for a resolution of {places.side} and learned at their own size"
    return [f"{what} (--upscale enlarges them), such as {_smallest(own)}"] if own else []


def _smallest(examples: Sequence[Example]) -> str:
    worst = min(examples, key=lambda example: min(example.size))
    return f"{worst.path.name} ({worst.size[0]} x {worst.size[1]})"
