"""A small network that tells individuals and looks of the pocket's world apart, also those that it never met.

Trained by `python -m tools.pocket.recognizer` on endless invented ones, with renders softened and bent as a generator draws.
Two images of one individual in different places and styles lie near each other, and so do two images in one look.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 64  # pixels; other images are resized to it
WIDTHS = ((32, 2), (56, 2), (96, 1), (128, 2), (160, 1))  # channels and stride of each convolution
SIZE = 48  # of a vector


def convolution(into: int, out: int, stride: int) -> nn.Sequential:
    """A convolution with its normalisation."""
    return nn.Sequential(nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.GroupNorm(8, out), nn.ReLU())


class Recognizer(nn.Module):
    """Images [n, 3, 64, 64] in -1..1 => unit vectors of their individual and of their look, [n, 48] each."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, *(width for width, _ in WIDTHS))
        self.body = nn.Sequential(*(convolution(i, o, s) for i, (o, s) in zip(channels, WIDTHS, strict=False)))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * channels[-1], SIZE) for name in ("individual", "look")})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The vectors by what they are of."""
        seen = self.body(x)
        pooled = torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], 1)
        return {name: F.normalize(head(pooled), dim=-1) for name, head in self.heads.items()}

    @classmethod
    def load(cls, file: Path) -> Recognizer:
        """A trained one."""
        found = cls()
        found.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
        return found.eval().requires_grad_(False)

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image], of: str) -> Tensor:
        """The vectors [n, 48] of images, `of` their individual or of their look."""
        squares = [np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) for image in images]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.cat([self(chunk)[of] for chunk in pixels.split(64)])
