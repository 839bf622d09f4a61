"""A base in a diffusers folder: checked before anything is read, then read part by part, safetensors only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import BaseModelError
from ..families.configs import Family, detect
from ..families.tokens import load_tokenizer
from ..formats.header import read_header
from ..text import first_line
from .loaded import Loaded, check_family, vae_dtype
from .sources import CONFIGS, PICKLES, TEXTS, missing, read_json


def load_folder(folder: Path, dtype: torch.dtype) -> Loaded:
    """Read a folder. Raises BaseModelError, which names what is missing or does not fit."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    family = examine(folder)
    texts = [part for part in TEXTS if (folder / part).is_dir()]
    parts = ("unet", "vae", *texts)
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    return Loaded(
        family,
        read_json(folder / "scheduler" / CONFIGS["scheduler"]),
        {part: load_tokenizer(folder / TEXTS[part]) for part in texts},
        load_model(UNet2DConditionModel, folder / "unet", dtype),
        load_model(AutoencoderKL, folder / "vae", vae_dtype(dtype)),
        {part: load_model(kinds[part], folder / part, dtype) for part in texts},
        stored={part: dtypes_in(folder / part) for part in parts},
    )


def examine(folder: Path) -> Family:
    """The family of a folder that holds every part, in safetensors. Reads no weights. Raises BaseModelError."""
    if lacking := missing(folder):
        raise BaseModelError(
            f"{folder} is not a diffusers folder of Stable Diffusion: it lacks {', '.join(lacking)}",
            "give the folder that holds model_index.json",
        )
    unet = read_json(folder / "unet" / CONFIGS["unet"])
    texts = [part for part in TEXTS if (folder / part).is_dir()]
    family = detect(unet, texts)
    check_family(folder, family, int(unet.get("in_channels", 4)) - int(unet.get("out_channels", 4)))
    for part in ("unet", "vae", *texts):
        check_weights(folder / part)
    if family.unet.added and len(texts) < 2:
        raise BaseModelError(f"{folder} is SDXL and lacks its second text encoder, text_encoder_2", "is the download complete?")
    return family


def check_weights(part: Path) -> None:
    """Raise BaseModelError unless `part` has safetensors."""
    if any(part.glob("*.safetensors")):
        return
    if pickles := sorted(file.name for file in part.iterdir() if file.suffix in PICKLES):
        raise BaseModelError(
            f"{part} has only pickled weights ({pickles[0]}), which can run code when opened", "convert them to .safetensors"
        )
    raise BaseModelError(f"{part} has no weights: no .safetensors file in it", "download the base again")


def load_model(kind: Any, part: Path, dtype: torch.dtype, lent: Mapping[str, Tensor] = MappingProxyType({})) -> Any:
    """One model of a folder, every weight of it accounted for: what the files lack may be `lent`. Raises BaseModelError."""
    precision = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
    options = {precision: dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if not whole(part) and half(part):
        options["variant"] = "fp16"
    try:
        model, info = kind.from_pretrained(part, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise BaseModelError(f"{part} cannot be loaded: {first_line(error)}", "is the download complete?") from error
    model.load_state_dict({key: lent[key] for key in info["missing_keys"] if key in lent}, strict=False)
    if absent := sorted(key for key in info["missing_keys"] if key not in lent):
        raise BaseModelError(f"{part} lacks {len(absent)} weights, {absent[0]} for one", "is the download complete?")
    return model


def whole(part: Path) -> list[Path]:
    """A part's files in full precision, in shards or not."""
    return [file for file in sorted(part.glob("*model*.safetensors")) if ".fp16" not in file.name]


def half(part: Path) -> list[Path]:
    """A part's files in half precision."""
    return sorted(part.glob("*model*.fp16*.safetensors"))


def dtypes_in(part: Path) -> dict[str, int]:
    """Bytes on the disk by dtype of a part's weights, as the files say."""
    found: dict[str, int] = {}
    for file in whole(part) or half(part):
        for entry in read_header(file).tensors.values():
            found[entry.dtype] = found.get(entry.dtype, 0) + entry.end - entry.start
    return found
