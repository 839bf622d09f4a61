"""VAEs under LDM's names: in a single-file checkpoint, or in a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import BaseModelError
from ..families.family import Family
from ..formats.header import read_header
from ..formats.shapes import Shape
from ..formats.tensors import read_tensor
from .folder import load_model
from .loaded import Unfilled, vae_dtype

PREFIX = "first_stage_model."  # of a VAE's keys in a checkpoint
ANOTHER = "name another with --vae: a .safetensors file or a folder"


def vae_in(path: Path, family: Family, dtype: torch.dtype) -> Any:
    """The VAE of a checkpoint or a VAE's own file. Raises BaseModelError where there is none, or not all of it."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    entries = read_header(path).tensors
    shapes = {key: entry.shape for key, entry in entries.items()}
    prefix = PREFIX if any(key.startswith(PREFIX) for key in shapes) else ""
    shapes = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    shapes = {key: shape for key, shape in shapes.items() if key.startswith(("encoder.", "decoder.", "quant", "post_quant"))}
    if not shapes:
        raise BaseModelError(f"{path} has no VAE in it", ANOTHER)
    try:
        config = _config(shapes, family)
        with torch.device("meta"), Unfilled():
            model = AutoencoderKL(**config)
        with path.open("rb") as file:  # one after the other: what is converted does not stay in memory as it was too
            tensors = {PREFIX + key: read_tensor(file, prefix + key, entries[prefix + key]).to(dtype) for key in shapes}
        model.load_state_dict(convert_ldm_vae_checkpoint(tensors, config), assign=True)
    except (KeyError, RuntimeError) as error:
        told = f"lacks {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise BaseModelError(f"the VAE in {path} cannot be loaded: {told}", ANOTHER) from error
    return model


def other_vae(path: Path, family: Family, dtype: torch.dtype) -> Any:
    """A VAE from elsewhere: its diffusers folder, a base's folder, or a file of a VAE or of a whole checkpoint."""
    from diffusers import AutoencoderKL

    dtype = vae_dtype(dtype)
    if path.is_dir():
        return load_model(AutoencoderKL, path / "vae" if (path / "vae").is_dir() else path, dtype)
    return vae_in(path, family, dtype)


def _config(shapes: Mapping[str, Shape], family: Family) -> dict[str, Any]:
    """The numbers of an AutoencoderKL, from LDM's names. Raises KeyError for what is not there."""
    levels = 1 + max((int(key.split(".")[2]) for key in shapes if key.startswith("encoder.down.")), default=0)
    channels = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": channels,
        "layers_per_block": sum(f"encoder.down.0.block.{i}.conv1.weight" in shapes for i in range(8)),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": family.latents.scale,
        "sample_size": family.latents.side,
        "force_upcast": family.latents.upcast,
        **({"shift_factor": family.latents.shift} if family.latents.shift else {}),
    }
