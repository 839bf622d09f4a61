"""Pictures -> the VAE's posterior, captions -> conditioning: computed once, one at a time, and cached.

One at a time, because the last bits of a convolution depend on how many pictures share its batch (seen: 1e-6): what a
picture encodes to must not depend on which of its neighbours were cached already.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base import model, text
from ..base.cond import Cond
from ..errors import BaseModelError
from ..recipe import Recipe
from . import pictures, store
from .folder import Dataset, Example
from .pictures import load_pixels

if TYPE_CHECKING:
    from ..base import Base


@dataclass(frozen=True, slots=True)
class Latents:
    """A dataset as the UNet sees it, on the CPU. Row 0 of `mean` and `std` is upright; row 1, if there, is mirrored."""

    mean: Tensor  # [1 or 2, n, c, h, w], scaled
    std: Tensor  # [1 or 2, n, c, h, w], scaled
    captions: list[str]  # n of them
    cond: Cond | None  # of distinct captions + 1, the last of the empty caption; None: the text encoder trains
    cond_index: Tensor  # [n], each picture's row of cond
    warnings: list[str]


def cached(base: Base, dataset: Dataset, recipe: Recipe, windows: int = 0) -> Latents:
    """Encode a dataset with the base, or find it in the cache ($PERSONALIZE_CACHE, else ~/.cache/personalize).

    Keys cover the pictures' bytes, resolution, mirroring, captions, the encoders' weights and configs, the device and the code.
    Raises BaseModelError for latents that are not finite, DataError for a picture that changed meanwhile.
    """
    examples, resolution = dataset.examples, recipe.data.resolution or base.resolution
    warnings = _enlarged(examples, resolution)
    mean, std = _encode(base, examples, resolution, recipe.data.flip, warnings)
    captions = [example.caption for example in examples]
    distinct = list(dict.fromkeys(captions))
    cond = None if recipe.optim.text_encoder_lr else _embed(base, [*distinct, ""], windows or base.windows(distinct), warnings)
    return Latents(mean, std, captions, cond, torch.tensor([distinct.index(caption) for caption in captions]), warnings)


def _encode(base: Base, examples: Sequence[Example], resolution: int, flip: bool, warnings: list[str]) -> tuple[Tensor, Tensor]:
    """Posterior mean and std, each [1 or 2, n, c, h, w]."""
    vae = identity(base, base.vae)

    def posterior(example: Example, mirrored: bool) -> dict[str, Tensor]:
        name = store.key(kind="latents", vae=vae, picture=example.sha256, resolution=resolution, mirrored=mirrored)
        return store.recall(name, lambda: _posterior(base, example, resolution, mirrored), warnings)

    sides = [[posterior(example, mirrored) for example in examples] for mirrored in ((False, True) if flip else (False,))]
    mean, std = (torch.stack([torch.stack([entry[part] for entry in side]) for side in sides]) for part in ("mean", "std"))
    return mean, std


@torch.no_grad()
def _posterior(base: Base, example: Example, resolution: int, mirrored: bool) -> dict[str, Tensor]:
    pixels = load_pixels(example, resolution)[None].float() / 127.5 - 1  # uint8 => [-1, 1]
    mean, std = base.encode(pixels.flip(-1) if mirrored else pixels)
    if not (mean.isfinite().all() and std.isfinite().all()):
        what = f"the VAE of {base.name} gives latents that are not finite for {example.path.name}"
        raise BaseModelError(what, "its weights are damaged" if base.dtype == torch.float32 else "use float32")
    return {"mean": mean[0].float(), "std": std[0].float()}


def _embed(base: Base, captions: Sequence[str], windows: int, warnings: list[str]) -> Cond:
    """Conditioning of captions, a row each, in the base's dtype."""
    texts = [[identity(base, text.model), text.layer] for text in base.texts]

    @torch.no_grad()
    def embed(caption: str) -> dict[str, Tensor]:
        cond = base.embed([caption], windows=windows)
        return {"tokens": cond.tokens} | ({} if cond.pooled is None else {"pooled": cond.pooled})

    def recalled(caption: str) -> Cond:
        tokens = [text.tokenizer(caption, verbose=False).input_ids for text in base.texts]
        name = store.key(kind="cond", texts=texts, caption=caption, tokens=tokens, windows=windows)
        return Cond(**store.recall(name, lambda: embed(caption), warnings))

    return Cond.cat(recalled(caption) for caption in captions)


def identity(base: Base, encoder: Any) -> str:
    """Everything but its input that decides what an encoder gives: weights, config, device, and the code around it."""
    config = dict(encoder.config) if isinstance(encoder.config, Mapping) else encoder.config.to_dict()
    plain = {name: str(value) for name, value in config.items() if not name.startswith("_")}  # "_name_or_path" and the like
    weights = store.fingerprint(encoder.state_dict())
    return store.key(weights=weights, config=plain, device=base.device.type, code=code(model.__name__, text.__name__))


@functools.cache
def code(*modules: str) -> str:
    """The sources and libraries that turn files into latents: an edit or an upgrade must not meet what the old ones left."""
    sources = [inspect.getsource(sys.modules[module]) for module in (pictures.__name__, __name__, *modules)]
    return store.key(sources=sources, libraries=[version(name) for name in ("torch", "diffusers", "transformers", "pillow")])


def _enlarged(examples: Sequence[Example], resolution: int) -> list[str]:
    small = [example for example in examples if min(example.size) < resolution]
    if not small:
        return []
    worst = min(small, key=lambda example: min(example.size))
    size = " x ".join(map(str, worst.size))
    what = f"{len(small)} of {len(examples)} pictures are smaller than {resolution} pixels and get blurred by enlarging"
    return [f"{what}, such as {worst.path.name} ({size})"]
