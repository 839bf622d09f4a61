"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): a UNet that listens to two text encoders, and is told sizes.

It reads the last layer but one of both, without their final norm (section 2), and was taught that zeros mean no caption.
"""

from __future__ import annotations

from .clip import Clip, side_by_side
from .family import Family, LatentFormat
from .sd import SCHEDULER
from .unet import UNet

_LATENTS = LatentFormat(scale=0.13025, side=1024, upcast=True)
_BIG_G = Clip(
    1280, 32, "lora_te2", projection=True, part="text_encoder_2", prefix="conditioner.embedders.1.model.", openclip=True,
    layer=2, normed=False,
)  # fmt: skip

SDXL = Family(
    "sdxl",
    "SDXL",
    UNet((320, 640, 1280), (0, 2, 10), 10, 2048, linear=True, added=2816),
    (Clip(768, 12, "lora_te1", prefix="conditioner.embedders.0.transformer.", layer=2, normed=False), _BIG_G),
    side_by_side,
    "sdxl_base_v1-0",
    "stable-diffusion-xl-v1-base/lora",
    preset="sdxl",
    pipeline="StableDiffusionXLPipeline",
    a1111="SDXL",
    latents=_LATENTS,
    scheduler=SCHEDULER,
    blocks=("ldm", "diffusers"),  # UIs take SDXL's convolutions under LDM's names only
    silent=True,
)

REFINER = Family(  # its only text encoder is SDXL's second: diffusers calls it so, ComfyUI alone patches it, and as `lora_te`
    "sdxl-refiner",
    "SDXL refiner",
    UNet((384, 768, 1536, 1536), (0, 4, 4, 0), 4, 1280, linear=True, added=2560, told=5),
    (
        Clip(1280, 32, projection=True, part="text_encoder_2", prefix="conditioner.embedders.0.model.", openclip=True, layer=2,
             normed=False),
    ),
    side_by_side,
    "sdxl_refiner_v1-0",
    "stable-diffusion-xl-v1-refiner/lora",
    preset="sdxl-refiner",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    a1111="SDXL",
    scheduler=SCHEDULER,
    blocks=("ldm", "diffusers"),
    silent=True,
    refused="only ends what another model began",
)  # fmt: skip
