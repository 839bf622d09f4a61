"""Bases of every family's true structure with random weights, as diffusers folders and as single files in LDM's names.

They are tiny, or of their true size: `python tests/bases.py sd1 FILE.safetensors` writes the 2 GB of an SD 1.5 checkpoint.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from personalize.families.clip import Clip
from personalize.families.family import Family, addresses, weights
from personalize.families.names import ROWS, canonical
from personalize.families.sd import SCHEDULER
from personalize.families.unet import UNet
from tools.bench import memory

TEXT_WIDTHS = {"sd1": (32,), "sd2": (64,), "sdxl": (32, 64), "sdxl-refiner": (64,)}
VAE = memory.VAE | {"block_out_channels": (32, 32, 64, 64), "sample_size": 64}
TRUE_VAE = memory.VAE | {"sample_size": 512}  # of SD 1, SD 2 and SDXL
PREDICTS = {"prediction_type": "epsilon"}


def tiny(name: str) -> Family:
    """A family's row with its own depths, and widths of next to nothing."""
    row, widths = ROWS[name], TEXT_WIDTHS[name]
    unet = row.denoiser
    assert isinstance(unet, UNet)
    clips = [text for text in row.texts if isinstance(text, Clip)]
    texts = tuple(replace(text, width=width, layer_count=3) for text, width in zip(clips, widths, strict=True))
    added = texts[-1].width + unet.told * 16 if unet.added else 0
    channels = (32, *[64] * (len(unet.channels) - 1))
    depth = tuple(min(depth, 2) for depth in unet.depth)
    unet = replace(unet, channels=channels, depth=depth, middle=min(unet.middle, 2), context=sum(widths), added=added)
    return replace(row, denoiser=unet, texts=texts)


def row(name: str, true: bool) -> Family:
    """A family's row as it is, or tiny."""
    return ROWS[name] if true else tiny(name)


def plain_unet(row: UNet, groups: int, told: int) -> UNet2DConditionModel:
    """The real class for a row's numbers, as others configure it: a second opinion on `UNet.config`."""
    cross = [bool(depth) for depth in row.depth]
    options: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": told} if row.added else {}
    return UNet2DConditionModel(
        in_channels=row.latent,
        out_channels=row.latent,
        block_out_channels=row.channels,
        layers_per_block=row.layers_per_block,
        down_block_types=["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in cross],
        up_block_types=["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(cross)],
        transformer_layers_per_block=[depth or row.middle for depth in row.depth],
        cross_attention_dim=row.context,
        use_linear_projection=row.linear,
        norm_num_groups=groups,
        projection_class_embeddings_input_dim=row.added or None,
        **options,
    )


def plain_clip(text: Clip, heads: int) -> nn.Module:
    """The same for a text encoder."""
    config = CLIPTextConfig(
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        num_hidden_layers=text.layer_count,
        num_attention_heads=heads,
        projection_dim=text.width,
        vocab_size=8,
    )
    return (CLIPTextModelWithProjection if text.projection else CLIPTextModel)(config)


def text_model(text: Clip) -> Any:
    return text.model()(CLIPTextConfig(**text.config(49408)))


@contextmanager
def halves() -> Iterator[None]:
    """Inside, models are made in fp16: those of true size would take twice the memory."""
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@functools.cache
def models(name: str, channels: int = 4, true: bool = False) -> dict[str, Any]:
    """Every part of a base in fp16, weights as the classes draw them; `channels` is what its UNet reads."""
    torch.manual_seed(sum(map(ord, name)))
    family = row(name, true)
    config = family.denoiser.config(family.texts) | {"in_channels": channels} | ({} if true else {"sample_size": 8})
    scale = 0.13025 if name == "sdxl" else 0.18215
    with halves():
        parts = {text.part: text_model(text) for text in family.texts if isinstance(text, Clip)}
        vae = AutoencoderKL(**(TRUE_VAE if true else VAE), scaling_factor=scale)
        return {"unet": UNet2DConditionModel(**config), "vae": vae, **parts}


def folder(path: Path, name: str, *, channels: int = 4, **scheduler: Any) -> Path:
    """A diffusers folder."""
    from diffusers import EulerDiscreteScheduler

    for part, model in models(name, channels).items():
        model.save_pretrained(path / part)
    family = tiny(name)
    for text in family.texts:
        text.own_tokenizer().save_pretrained(path / text.part.replace("text_encoder", "tokenizer"))
    settings = {
        key: value
        for key, value in (SCHEDULER | scheduler).items()
        if key not in ("_class_name", "set_alpha_to_one", "clip_sample")
    }
    EulerDiscreteScheduler(**settings).save_pretrained(path / "scheduler")
    return path


def single(
    path: Path, name: str, *, channels: int = 4, metadata: dict[str, str] | None = None, without: str = " ", true: bool = False
) -> Path:
    """A single file in LDM's names; `without` leaves out the keys that begin so."""
    tensors = {key: value for key, value in ldm(name, channels, true).items() if not key.startswith(without)}
    save_file(tensors, path, metadata)
    return path


def sd3(path: Path, *, name: str = "sd35-medium", t5: bool = True) -> Path:
    """A diffusers folder of Stable Diffusion 3's structure, in fp32; T5's tokenizer knows letters only."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import T5Config, T5TokenizerFast

    from personalize.families.sd3 import T5, Mmdit

    torch.manual_seed(3)
    row = ROWS[name]
    assert isinstance(row.denoiser, Mmdit)
    numbers = {"count": 2, "heads": 2, "head": 16, "context": 128, "pooled": 96, "side": 8, "largest": 16}
    denoiser = replace(row.denoiser, dual=min(row.denoiser.dual, 1), **numbers)
    clips = [replace(text, width=width, layer_count=3) for text, width in zip(row.texts, (32, 64), strict=False)]  # type: ignore[type-var]
    for text in clips:
        text_model(text).save_pretrained(path / text.part)
        text.own_tokenizer().save_pretrained(path / text.part.replace("text_encoder", "tokenizer"))
    if t5:
        letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,.0123456789"]
        vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0), *letters]
        T5TokenizerFast(vocab=vocabulary, extra_ids=0).save_pretrained(path / "tokenizer_3")
        own = T5(128, 2, 64, 2, 16)
        own.model()(T5Config(**own.config(len(vocabulary)))).save_pretrained(path / own.part)
    denoiser.model()(**denoiser.config(clips)).save_pretrained(path / denoiser.part)
    latents = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    AutoencoderKL(**(VAE | latents), use_quant_conv=False, use_post_quant_conv=False).save_pretrained(path / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(path / "scheduler")
    return path


def ldm(name: str, channels: int = 4, true: bool = False) -> dict[str, Tensor]:
    """Key => tensor, as such files have them. The tensors are everybody's."""
    return dict(_ldm(name, channels, true))


@functools.cache
def _ldm(name: str, channels: int, true: bool) -> dict[str, Tensor]:
    family, parts = row(name, true), models(name, channels, true)
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
        prefix, count = "cond_stage_model.model.transformer.resblocks.", family.texts[0].layer_count
        last, unread = f"{prefix}{count - 1}.", f"{prefix}{count}."
        tensors |= {key.replace(last, unread): value.clone() for key, value in tensors.items() if last in key}
    return tensors | {
        f"first_stage_model.{ldm_vae(key)}": as_conv(key, value) for key, value in parts["vae"].state_dict().items()
    }


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Key => shape of the UNet and text encoders of a family of true size, in LDM's names."""
    found: dict[str, tuple[int, ...]] = {}
    for path, address in addresses(ROWS[name]).items():
        width = {text.part: text.width for text in ROWS[name].texts}.get(path.partition(".")[0], 0)
        table = (77 if "position_embedding" in path else 49408, width)
        shape = weights(ROWS[name]).get(path, table)
        found[address.key] = (3 * shape[0], *shape[1:]) if address.rows else shape
    return found


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


if __name__ == "__main__":
    single(Path(sys.argv[2]), sys.argv[1], true=True)
