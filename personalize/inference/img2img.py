"""Image to image: at which of the sampler's timesteps to begin, and with which latents.

SDEdit (Meng et al. 2021, https://arxiv.org/abs/2108.01073): the image is noised `denoise` of the way, and denoised from there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ..errors import RecipeError
from ..models.model import Base

if TYPE_CHECKING:
    from .request import InitImage

EDGE = 2  # pixels over which a mask's edge is soft, inwards
LARGE = 4  # of the base's own area: twice its side is what people draw over to add detail


@dataclass(frozen=True)
class InitLatents:
    """An image's latents [1, c, h, w] in the denoiser's units, and how much of the way is drawn anew: 0 nothing, 1 all of it.

    With a mask in `image`, what it leaves black is kept: at each step it is the image's own, noised as much as all else (as in
    blended latent diffusion, Avrahami et al. 2023, https://arxiv.org/abs/2206.02779), and in the end its very pixels.
    """

    latents: Tensor
    denoise: float
    image: InitImage | None = None

    def enter(self, sampler: Any, steps: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The timesteps that are left of a sampler set to `steps` steps, and the latents [b, c, h, w] to begin with.

        At 1 these are all, and the picture is noised to the first: with zero-terminal SNR nothing of it is left.
        """
        if not hasattr(sampler, "add_noise"):
            raise RecipeError(f"{type(sampler).__name__} cannot begin with a picture", "leave out --image")
        timesteps = last_timesteps(sampler, steps, self.step_count(steps))
        start = self.latents.to(noise).expand_as(noise)
        return timesteps, sampler.add_noise(start, noise, timesteps[:1].expand(len(noise))) if len(timesteps) else start.clone()

    def keep(self, sampler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Latents [b, c, h, w] before a timestep [1] (none left: [0]), the image's own where the mask does not draw anew."""
        if self.image is None or self.image.mask is None:
            return latents
        kept = self.latents.to(noise).expand_as(noise)
        if len(timestep):
            kept = sampler.add_noise(kept, noise, timestep.expand(len(noise)))
        levels = torch.from_numpy(np.array(self.image.mask))[None, None].to(noise)
        return torch.where(F.adaptive_max_pool2d(levels, noise.shape[-2:]) > 0, latents, kept)

    def paste(self, drawn: Image.Image) -> Image.Image:
        """What was drawn, over the image: soft at the mask's edge, and nothing outside of it is another byte."""
        if self.image is None or self.image.mask is None or self.image.picture is None:
            return drawn
        soft = self.image.mask.filter(ImageFilter.GaussianBlur(EDGE))
        return Image.composite(drawn, self.image.picture, ImageChops.darker(self.image.mask, soft))

    def step_count(self, steps: int) -> int:
        """How many of `steps` steps are left: none at 0 only."""
        return max(round(steps * self.denoise), int(self.denoise > 0))


def last_timesteps(sampler: Any, steps: int, count: int) -> Tensor:
    """The timesteps of the last `count` of `steps` steps; sets the sampler to begin there."""
    if count == steps:
        return sampler.timesteps
    if type(sampler).__name__ == "PNDMScheduler":  # takes its second timestep twice, and Runge-Kutta steps only from the top
        sampler.register_to_config(skip_prk_steps=True)
        sampler.set_timesteps(steps)
        left = torch.cat([sampler.timesteps[:1], sampler.timesteps[2:]])[steps - count :]
        return torch.cat([left[:2], left[1:2], left[2:]])
    first = (steps - count) * sampler.order
    if type(sampler).__name__ == "LMSDiscreteScheduler":  # counts from the top how many steps it can look back to
        sampler.sigmas, sampler.timesteps = sampler.sigmas[first:], sampler.timesteps[first:]
        return sampler.timesteps
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(first)
    return sampler.timesteps[first:]


def encode_image(base: Base, picture: Image.Image) -> Tensor:
    """Latents [1, c, h, w], the posterior's mean, of RGB whose sides are multiples of the base's factor."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        return base.encode(pixels)[0].float()


def fit_start(base: Base, start: InitImage, size: int | tuple[int, int] | None = None) -> tuple[InitImage, str]:
    """An image to begin with, and its mask, as `fit_image` makes them. Raises RecipeError for one that is only a name."""
    if start.picture is None:
        raise RecipeError(f"the picture {start.name} is only a name here", "give its file again: --image")
    picture, notice = fit_image(base, start.picture, size)
    mask = fit_image(base, start.mask, size)[0].convert("L") if start.mask else None
    return replace(start, picture=picture, mask=mask), notice


def fit_image(base: Base, picture: Image.Image, size: int | tuple[int, int] | None = None) -> tuple[Image.Image, str]:
    """RGB that is cut to whole latents, or scaled and cut to `size`; and a warning where it was made smaller, else "".

    Without a size, an image of more than LARGE areas of the base's own is scaled down to that area.
    """
    if size:
        return fit(picture, base.factor, (size, size) if isinstance(size, int) else size), ""
    whole, area = fit(picture, base.factor), base.resolution**2
    if whole.width * whole.height <= LARGE * area:
        return whole, ""
    small = within(picture.size, area, base.factor)
    sizes = f"{picture.width}x{picture.height} is drawn over at {small[0]}x{small[1]}"
    what = f"the picture of {sizes}, as large as {base.name} draws"
    return fit(picture, base.factor, small), f"{what}: --size {whole.width}x{whole.height} keeps it large"


def within(size: tuple[int, int], area: int, factor: int) -> tuple[int, int]:
    """The sides, multiples of `factor`, of about an area in the proportions of `size`.

    >>> within((3000, 2000), 512 * 512, 8)
    (624, 416)
    """
    scale = (area / (size[0] * size[1])) ** 0.5
    width, height = (max(1, round(side * scale / factor)) * factor for side in size)
    return width, height


def fit(picture: Image.Image, factor: int, size: tuple[int, int] | None = None) -> Image.Image:
    """RGB of `size`, scaled to cover it, the centre kept; without a size in its own, cut to multiples of `factor`.

    >>> fit(Image.new("RGB", (67, 130)), 8).size
    (64, 128)
    """
    picture = picture.convert("RGB")
    if size:
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    width, height = (side // factor * factor for side in picture.size)
    if not (width and height):
        raise RecipeError(f"a picture of {picture.width}x{picture.height} pixels is too small", f"give --size {8 * factor}")
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
