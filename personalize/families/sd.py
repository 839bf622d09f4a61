"""Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv 2112.10752): a UNet that listens to one text encoder."""

from __future__ import annotations

from .clip import Clip, side_by_side
from .family import Family
from .unet import UNet

SCHEDULER = {  # its noise, with the sampler that SDXL's own folder names
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "clip_sample": False,
    "set_alpha_to_one": False,
}

SD1 = Family(
    "sd1",
    "SD 1.x",
    UNet((320, 640, 1280, 1280), (1, 1, 1, 0), 1, 768, heads=8, side=64),
    (Clip(768, 12),),
    side_by_side,
    "sd_v1",
    "stable-diffusion-v1/lora",
    preset="sd15",
    a1111="SD1",
    scheduler=SCHEDULER,
    velocity_version="sd_v1_v",
)

SD2 = Family(  # diffusers leaves out OpenCLIP's last layer, which the denoiser never listens to
    "sd2",
    "SD 2.x",
    UNet((320, 640, 1280, 1280), (1, 1, 1, 0), 1, 1024, linear=True, side=64),
    (Clip(1024, 23, prefix="cond_stage_model.model.", openclip=True, unread=1),),
    side_by_side,
    "sd_v2",
    "stable-diffusion-v2-512/lora",
    preset="sd21",
    a1111="SD2",
    scheduler=SCHEDULER,
    velocity_version="sd_v2_v",
    velocity_architecture="stable-diffusion-v2-768-v/lora",
    velocity_side=96,  # at 768 pixels
    telling="unet.up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
)
