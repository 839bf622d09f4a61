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
from ..families.family import Family
from ..families.names import ROWS
from ..families.recognition import detect
from ..formats.header import PICKLES, read_header
from ..text import first_line
from .loaded import Loaded, Unfilled, check_family, vae_dtype
from .sources import CONFIG, SCHEDULER, TEXTS, denoiser_in, missing, read_json


def load_folder(folder: Path, dtype: torch.dtype) -> Loaded:
    """Read a folder. Raises BaseModelError, which names what is missing or does not fit."""
    from diffusers import AutoencoderKL

    family = examine(folder)
    part = family.denoiser.part
    return Loaded(
        family,
        read_json(folder / "scheduler" / SCHEDULER),
        {row.part: row.load_tokenizer(folder / TEXTS[row.part]) for row in family.texts},
        load_model(family.denoiser.model(), folder / part, dtype),
        load_model(AutoencoderKL, folder / "vae", vae_dtype(dtype)),
        {row.part: load_model(row.model(), folder / row.part, dtype) for row in family.texts},
        stored={part: dtypes_in(folder / part) for part in (part, "vae", *(row.part for row in family.texts))},
    )


def examine(folder: Path) -> Family:
    """The family of a folder that holds every part, in safetensors. Reads no weights. Raises BaseModelError."""
    if lacking := missing(folder):
        raise BaseModelError(
            f"{folder} is not a diffusers folder of Stable Diffusion: it lacks {', '.join(lacking)}",
            "give the folder that holds model_index.json",
        )
    part = denoiser_in(folder)
    config = read_json(folder / part / CONFIG)
    texts = [text for text in TEXTS if (folder / text).is_dir()]
    family = detect(config, texts, part)
    if family.denoiser.part != part:
        what = f"{folder} is no base of a known family: its {part} is {config.get('_class_name', 'unknown')}"
        raise BaseModelError(what, f"known: {', '.join(ROWS)}")
    check_family(folder, family, int(config.get("in_channels", 4)) - int(config.get("out_channels", 4)))
    for each in (part, "vae", *texts):
        check_weights(folder / each)
    if lacking := [row.part for row in family.texts if row.part not in texts]:
        title, which = family.title, ", ".join(lacking)
        raise BaseModelError(f"{folder} is {title} and lacks its second text encoder, {which}", "is the download complete?")
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
        with Unfilled():
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
