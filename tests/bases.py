"""Bases of every family's true structure at tiny widths, as diffusers folders and as single files in LDM's names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from personalize.adapters import canonical
from personalize.adapters.architecture import FAMILIES, Family, Text
from personalize.adapters.checkpoint_keys import addresses, text_prefix
from personalize.base.single import SCHEDULER
from personalize.base.tokens import clip_tokenizer
from personalize.families import text_config, unet_config

ROWS = {family.name: family for family in FAMILIES}
TEXT_WIDTHS = {"sd1": (32,), "sd2": (64,), "sdxl": (32, 64), "sdxl-refiner": (64,)}
VAE = {
    "latent_channels": 4,
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 64,
}
PREDICTS = {"prediction_type": "epsilon"}


def tiny(name: str) -> Family:
    """A family's row with its own depths, and widths of next to nothing."""
    row, widths = ROWS[name], TEXT_WIDTHS[name]
    texts = tuple(replace(text, width=width, layers=3) for text, width in zip(row.texts, widths, strict=True))
    added = texts[-1].width + (5 if name == "sdxl-refiner" else 6) * 16 if row.unet.added else 0
    channels = (32, *[64] * (len(row.unet.channels) - 1))
    depth = tuple(min(depth, 2) for depth in row.unet.depth)
    unet = replace(row.unet, channels=channels, depth=depth, middle=min(row.unet.middle, 2), context=sum(widths), added=added)
    return replace(row, unet=unet, texts=texts)


def text_model(text: Text, openclip: bool) -> Any:
    kind = CLIPTextModelWithProjection if text.projection else CLIPTextModel
    return kind(CLIPTextConfig(**text_config(text, 49408, openclip))).half()


def models(name: str, channels: int = 4) -> dict[str, Any]:
    """Every part of a base, random weights in fp16; `channels` is what its UNet reads."""
    torch.manual_seed(sum(map(ord, name)))
    family = tiny(name)
    parts = {text.part: text_model(text, text_prefix(family, text.part)[1]) for text in family.texts}
    unet = UNet2DConditionModel(**unet_config(family) | {"in_channels": channels, "sample_size": 8})
    scale = 0.13025 if name == "sdxl" else 0.18215
    return {"unet": unet.half(), "vae": AutoencoderKL(**VAE, scaling_factor=scale).half(), **parts}


def folder(path: Path, name: str, *, channels: int = 4, **scheduler: Any) -> Path:
    """A diffusers folder."""
    from diffusers import EulerDiscreteScheduler

    for part, model in models(name, channels).items():
        model.save_pretrained(path / part)
    family = tiny(name)
    for text in family.texts:
        pad = "!" if text_prefix(family, text.part)[1] else "<|endoftext|>"
        clip_tokenizer(pad).save_pretrained(path / text.part.replace("text_encoder", "tokenizer"))
    settings = {
        key: value
        for key, value in (SCHEDULER | scheduler).items()
        if key not in ("_class_name", "set_alpha_to_one", "clip_sample")
    }
    EulerDiscreteScheduler(**settings).save_pretrained(path / "scheduler")
    return path


def single(path: Path, name: str, *, channels: int = 4, metadata: dict[str, str] | None = None, without: str = " ") -> Path:
    """A single file in LDM's names; `without` leaves out the keys that begin so."""
    tensors = {key: value for key, value in ldm(name, channels).items() if not key.startswith(without)}
    save_file(tensors, path, metadata)
    return path


def ldm(name: str, channels: int = 4) -> dict[str, Tensor]:
    """Key => tensor, as such files have them."""
    family, parts = tiny(name), models(name, channels)
    values = {
        canonical(f"{part}.{key.removesuffix('.weight')}"): value
        for part, model in parts.items()
        if part != "vae"
        for key, value in model.state_dict().items()
        if value.is_floating_point()
    }
    table = addresses(family)
    found: dict[str, list[tuple[Any, Tensor]]] = {}
    for path, value in values.items():
        found.setdefault(table[path].key, []).append((table[path], value.T if table[path].transposed else value))
    tensors = {
        key: torch.cat([one for _, one in sorted(some, key=lambda pair: pair[0].rows or ())]).contiguous()
        for key, some in found.items()
    }
    if name == "sd2":  # the last of OpenCLIP's layers, which nobody listens to
        prefix = "cond_stage_model.model.transformer.resblocks."
        tensors |= {
            key.replace(f"{prefix}2.", f"{prefix}3."): value.clone() for key, value in tensors.items() if f"{prefix}2." in key
        }
    return tensors | {
        f"first_stage_model.{ldm_vae(key)}": as_conv(key, value) for key, value in parts["vae"].state_dict().items()
    }


def ldm_vae(key: str) -> str:
    """A VAE's key under LDM's names."""
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{1 + int(found[1])}", key)
    key = (
        key.replace("mid_block.attentions.0", "mid.attn_1")
        .replace("conv_norm_out", "norm_out")
        .replace("conv_shortcut", "nin_shortcut")
    )
    for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        key = key.replace(f"attn_1.{ours}", f"attn_1.{theirs}")
    return key


def as_conv(key: str, value: Tensor) -> Tensor:
    """LDM's attention layers are 1x1 convolutions."""
    return value[..., None, None] if "attentions" in key and value.ndim == 2 else value
