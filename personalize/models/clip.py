"""What looks at images: a CLIP with both towers, from a base's `clip/` folder or the hub's cache, and a DINOv2 beside it.

Nothing is downloaded: for bases that have no CLIP, `hf download openai/clip-vit-large-patch14` brings one, and
`hf download facebook/dinov2-base` the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..families.tokens import load_tokenizer
from .folder import load_model
from .model import quiet
from .recognizer import Recognizer
from .sources import read_json

HALF = [0.5, 0.5, 0.5]  # mean and deviation of a CLIP folder without its own: pixels in -1..1
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP_ID, DINO_ID = "openai/clip-vit-large-patch14", "facebook/dinov2-base"


class Clip:
    """A CLIP with both towers: pictures and texts as unit vectors in one space."""

    def __init__(self, model: Any, tokenizer: Any, mean: Sequence[float], deviation: Sequence[float]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mean, self.deviation = (torch.tensor(values)[:, None, None] for values in (mean, deviation))

    @classmethod
    def of(cls, base: Path) -> Clip | None:
        """The CLIP in a base's `clip/` folder, None if it has none. Raises BaseModelError for a broken one.

        Where the base's own text encoder is its text tower, as in SD 1.x, the folder may leave that out.
        """
        folder = base / "clip"
        if not (folder / "config.json").is_file():
            return None
        text = load_frozen("CLIPTextModel", base / "text_encoder").state_dict()
        lent = {f"text_model.{key.removeprefix('text_model.')}": weight for key, weight in text.items()}
        model = load_frozen("CLIPModel", folder, lent)
        tokenizer = load_tokenizer((folder if (folder / "tokenizer").is_dir() else base) / "tokenizer")
        return cls(model, tokenizer, *pixel_statistics(folder, HALF, HALF))

    @classmethod
    def at_hand(cls) -> Clip | None:
        """The hub's CLIP, if its files are in the cache."""
        if folder := cached_folder(CLIP_ID):
            return cls(load_frozen("CLIPModel", folder), load_tokenizer(folder), *pixel_statistics(folder, HALF, HALF))
        return None

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Square pictures => unit vectors [n, d]."""
        chunks = self._pixels(pictures).split(64)
        return torch.cat([F.normalize(feature_tensor(self.model.get_image_features(chunk)), dim=-1) for chunk in chunks])

    @torch.no_grad()
    def patches(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Square pictures => unit vectors [n, p, d], one for each patch of the image tower."""
        tower, found = self.model.vision_model, []
        for chunk in self._pixels(pictures).split(64):
            tokens = tower.post_layernorm(tower(pixel_values=chunk).last_hidden_state[:, 1:])
            found.append(F.normalize(self.model.visual_projection(tokens), dim=-1))
        return torch.cat(found)

    def _pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pixels [n, 3, h, w] as the image tower takes them."""
        return to_pixels(pictures, self.model.config.vision_config.image_size, self.mean, self.deviation)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts => unit vectors [n, d]; longer ones are cut to the model's window."""
        window = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=window, truncation=True, return_tensors="pt")
        return F.normalize(feature_tensor(self.model.get_text_features(tokens.input_ids)), dim=-1)

    def cosines(self, a: Sequence[Image.Image], b: Sequence[Image.Image]) -> Tensor:
        """The cosine [n] of each picture of `a` with its partner in `b`."""
        return (self.pictures(a) * self.pictures(b)).sum(-1)


def feature_tensor(features: Any) -> Tensor:
    """Projected features [n, d]: transformers 5 wraps them in an output object, 4 gave the tensor."""
    found = features if isinstance(features, Tensor) else features.pooler_output
    assert isinstance(found, Tensor)
    return found


class Dino:
    """DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193): images as vectors that tell individuals apart."""

    SIDE = 224  # 16 x 16 patches

    def __init__(self, model: Any, mean: Sequence[float], deviation: Sequence[float]) -> None:
        self.model = model
        self.mean, self.deviation = (torch.tensor(values)[:, None, None] for values in (mean, deviation))

    @classmethod
    def at_hand(cls) -> Dino | None:
        """The hub's DINOv2, if its files are in the cache."""
        if folder := cached_folder(DINO_ID):
            return cls(load_frozen("Dinov2Model", folder), *pixel_statistics(folder, *IMAGENET))
        return None

    @torch.no_grad()
    def look(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Square pictures => unit vectors [n, d] of the whole and [n, p, d] of the patches."""
        pixels = to_pixels(pictures, self.SIDE, self.mean, self.deviation)
        tokens = torch.cat([self.model(pixel_values=chunk).last_hidden_state for chunk in pixels.split(16)])
        return F.normalize(tokens[:, 0], dim=-1), F.normalize(tokens[:, 1:], dim=-1)


@dataclass(frozen=True)
class View:
    """Images as they are seen: unit vectors."""

    whole: Tensor  # [n, d]
    patches: Tensor  # [n, p, d]
    words: Tensor  # [n, e], in the space of CLIP's texts

    def __getitem__(self, which: slice) -> View:
        return View(self.whole[which], self.patches[which], self.words[which])


@dataclass(frozen=True)
class Eyes:
    """What images are compared by (DINOv2 where it is at hand, else CLIP), and what they are named by (CLIP)."""

    clip: Clip
    dino: Dino | None = None
    recognizer: Recognizer | None = None  # of the embedded base's own world

    def look(self, pictures: Sequence[Image.Image]) -> View:
        """What is seen of square pictures."""
        words = self.clip.pictures(pictures)
        return View(*(self.dino.look(pictures) if self.dino else (words, self.clip.patches(pictures))), words)


def eyes_for(base: Path) -> Eyes | None:
    """A base's own CLIP; else what the hub's cache has; None where that is nothing. Raises BaseModelError for a broken one."""
    if own := Clip.of(base):
        weights = base.parent / "recognizer.safetensors"
        return Eyes(own, recognizer=Recognizer.load(weights) if weights.is_file() else None)
    clip = Clip.at_hand()
    return Eyes(clip, Dino.at_hand()) if clip else None


def load_frozen(kind: str, folder: Path, lent: Mapping[str, Tensor] = MappingProxyType({})) -> Any:
    """A model of transformers, by its class, to look with: in float32. Raises BaseModelError."""
    import transformers

    with quiet():
        return load_model(getattr(transformers, kind), folder, torch.float32, lent).eval().requires_grad_(False)


def cached_folder(name: str) -> Path | None:
    """The folder of a hub repository whose config and weights are in the cache."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(name, file) for file in ("config.json", "model.safetensors")]
    return Path(found[0]).parent if all(isinstance(one, str) for one in found) else None  # type: ignore[arg-type]


def pixel_statistics(folder: Path, mean: Sequence[float], deviation: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of pixels that a model wants: its folder's, else those given."""
    own = folder / "preprocessor_config.json"
    about = read_json(own) if own.is_file() else {}
    return about.get("image_mean", mean), about.get("image_std", deviation)


def to_pixels(pictures: Sequence[Image.Image], side: int, mean: Tensor, deviation: Tensor) -> Tensor:
    """Square pictures => [n, 3, side, side]."""
    squares = [np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for picture in pictures]
    return (torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255 - mean) / deviation
