"""Which family a base belongs to, what diffusers and transformers call its numbers, and how its layers are named in each.

The rows themselves are in adapters/architecture.py, the one home of names. A base with other numbers than any row (pruned,
distilled, tiny) is of the family whose structure it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .family import A1111 as A1111
from .family import Text
from .names import FAMILIES, Family, UNet

NAMED = {"pocket": Path(__file__).parents[1] / "pocket" / "weights"}  # bases that came along
UNKNOWN = Family("unknown", UNet((), (), 0, 0), (), "unknown", "unknown/lora")
ROWS = {family.name: family for family in FAMILIES}
TITLES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "sdxl-refiner": "SDXL refiner", "pocket": "pocket"}
# What a UNet is that reads so many channels beside the noisy picture.
BESIDE = {1: "a depth-to-image model", 4: "an image-editing model (InstructPix2Pix)", 5: "an inpainting model"}


def detect(unet: Mapping[str, Any], texts: Iterable[str] = ("text_encoder",)) -> Family:
    """The family of a UNet's config (`unet/config.json`) and the parts that are text encoders; UNKNOWN for what is no SD UNet."""
    try:
        row = _row(unet)
    except (KeyError, TypeError, ValueError):
        return UNKNOWN
    if known := [family for family in FAMILIES if family.unet == row]:
        return known[0]
    if row.added:
        name = "sdxl" if "text_encoder" in texts else "sdxl-refiner"
    else:
        name = "sd2" if row.linear else "sd1"
    return replace(ROWS[name], unet=row)


def refusal(family: Family, beside: int) -> str:
    """Why a UNet that reads `beside` more channels than a noisy picture's can neither be trained nor drawn with; "" if it can."""
    title = TITLES.get(family.name, family.name)
    if beside > 0:
        what = BESIDE.get(beside, f"a model with {beside} more channels")
        return f"{what} of {title}: its UNet reads more than a noisy picture"
    if family.name == "sdxl-refiner":
        return f"the {title}, which only ends what another model began"
    return ""


def unet_config(family: Family) -> dict[str, Any]:
    """A row as the config of a `UNet2DConditionModel`. No file tells heads: SD 1 has 8, later ones some of 64 channels each."""
    row = family.unet
    cross = [bool(depth) for depth in row.depth]
    heads = 8 if family.name == "sd1" else [max(1, channels // 64) for channels in row.channels]
    told = 5 if family.name == "sdxl-refiner" else 6  # numbers about size and crop, embedded beside the pooled text
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (row.added - family.texts[-1].width) // told if row.added else None,
        "projection_class_embeddings_input_dim": row.added,
    }
    return {
        "sample_size": {"sd1": 64, "sd2": 64}.get(family.name, 128),
        "in_channels": row.latent,
        "out_channels": row.latent,
        "block_out_channels": row.channels,
        "layers_per_block": row.layers,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in cross],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(cross)],
        "transformer_layers_per_block": [depth or row.middle for depth in row.depth],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": row.context,
        "attention_head_dim": heads,
        "use_linear_projection": row.linear,
        **(added if row.added else {}),
    }


def text_config(text: Text, tokens: int, openclip: bool) -> dict[str, Any]:
    """A row as the config of a `CLIPTextModel`; `tokens` is the size of its vocabulary, whose last two are begin and end."""
    return {
        "vocab_size": tokens,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": max(1, text.width // 64),
        "projection_dim": text.width,
        "hidden_act": "gelu" if openclip else "quick_gelu",
        "max_position_embeddings": 77,
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
        "pad_token_id": 0 if openclip else tokens - 1,
    }


def canonical(part: str, path: str) -> str:
    """A module's own path => its canonical one."""
    middle = "text_model." if part.startswith("text_encoder") and not path.startswith(("text_model.", "text_projection")) else ""
    return f"{part}.{middle}{path}"


def native(path: str, models: Mapping[str, Any]) -> tuple[str, str]:
    """A canonical path => part and the module's own path there: CLIPTextModel lost its `text_model` in transformers 5.6."""
    part, _, own = path.partition(".")
    flat = part != "unet" and not hasattr(models.get(part), "text_model")
    return part, own.removeprefix("text_model.") if flat else own


def _row(unet: Mapping[str, Any]) -> UNet:
    """A UNet's numbers. Raises KeyError, TypeError or ValueError for configs that no row can tell."""
    channels, cross = tuple(unet["block_out_channels"]), [block.startswith("CrossAttn") for block in unet["down_block_types"]]
    depths = unet.get("transformer_layers_per_block", 1)
    depths = [depths] * len(channels) if isinstance(depths, int) else list(depths)
    return UNet(
        channels=channels,
        depth=tuple(depth if yes else 0 for depth, yes in zip(depths, cross, strict=True)),
        middle=int(depths[-1]),
        context=int(unet["cross_attention_dim"]),
        layers=int(unet.get("layers_per_block", 2)),
        latent=int(unet.get("out_channels", 4)),
        linear=bool(unet.get("use_linear_projection", False)),
        added=int(unet.get("projection_class_embeddings_input_dim") or 0),
    )
