"""pocket, the base that comes along: Stable Diffusion in miniature, with the same classes and folder layout as SD 1.5."""

from __future__ import annotations

from .clip import Clip, side_by_side
from .family import Family, LatentFormat
from .sd import SCHEDULER
from .unet import UNet

POCKET = Family(
    "pocket",
    "pocket",
    UNet((96, 192), (1, 1), 1, 192, layers_per_block=1, latent=16),
    (Clip(192, 4),),
    side_by_side,
    "pocket",
    "pocket/lora",
    preset="pocket",
    latents=LatentFormat(channels=16),
    scheduler=SCHEDULER,
    blocks=("diffusers",),
    kin=False,
)
