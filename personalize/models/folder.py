"""A base in a diffusers folder: checked before anything is read, then read part by part, safetensors only."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BaseModelError
from ..families.family import Family
from ..families.names import ROWS
from ..families.recognition import detect
from ..formats.header import PICKLES, read_header
from ..text import first_line
from .loaded import Loaded, Unfilled, check_family, vae_dtype
from .sources import CONFIG, SCHEDULER, TEXTS, denoiser_in, missing, read_json

BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)  # what reading a model may end in
STEMS = ("diffusion_pytorch_model", "model")  # of files with weights
LOST = "text_model."  # a level of CLIPTextModel that files have and transformers has lost


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
    with contextlib.suppress(*BROKEN, BaseModelError):
        if model := fill_model(kind, part, dtype, lent):
            return model
    return load_by_library(kind, part, dtype, lent)


def load_by_library(kind: Any, part: Path, dtype: torch.dtype, lent: Mapping[str, Tensor] = MappingProxyType({})) -> Any:
    """The same as the model's own library reads it, with whatever else that sets. Raises BaseModelError."""
    precision = "dtype" if of_transformers(kind) else "torch_dtype"
    options = {precision: dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if not whole(part) and half(part):
        options["variant"] = "fp16"
    try:
        with Unfilled():
            model, info = kind.from_pretrained(part, **options)
    except BROKEN as error:
        raise BaseModelError(f"{part} cannot be loaded: {first_line(error)}", "is the download complete?") from error
    model.load_state_dict({key: lent[key] for key in info["missing_keys"] if key in lent}, strict=False)
    if absent := sorted(key for key in info["missing_keys"] if key not in lent):
        raise BaseModelError(f"{part} lacks {len(absent)} weights, {absent[0]} for one", "is the download complete?")
    return model


def fill_model(kind: Any, part: Path, dtype: torch.dtype, lent: Mapping[str, Tensor]) -> Any | None:
    """A model whose files have every weight of it in its shape, and no other; None for what only its library knows to read.

    Tensors are mapped from the files and, where they have the dtype that is asked for already, never copied.
    """
    config = read_json(part / CONFIG)
    if "quantization_config" in config or getattr(kind, "_keep_in_fp32_modules", None):
        return None
    with torch.device("meta"), Unfilled():
        if of_transformers(kind):
            model = kind(kind.config_class.from_pretrained(part, local_files_only=True, dtype=dtype))
        else:
            model = kind.from_config(config)
    want = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = dict(lent) | read_weights(part, want)
    state = {name: tensor.to(dtype) for name, tensor in found.items()}
    if {name: tensor.shape for name, tensor in state.items()} != want:
        return None
    model.load_state_dict(state, assign=True)
    beside = [tensor for name, tensor in model.named_buffers() if name not in want]
    return None if any(tensor.is_meta or tensor.is_floating_point() for tensor in beside) else model.eval()


def read_weights(part: Path, names: Container[str]) -> dict[str, Tensor]:
    """The tensors of a part by the model's own names; positions, which older files count for it, are left out."""
    found: dict[str, Tensor] = {}
    for path in weight_files(part):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                own = name if name in names else name.removeprefix(LOST)
                if not own.endswith(".position_ids"):
                    found[own] = file.get_tensor(name)
    return found


def weight_files(part: Path) -> list[Path]:
    """A part's files, in shards or not, as both libraries choose them; none where they would not choose the same."""
    for dotted in ("", ".fp16"):
        single = [file for stem in STEMS if (file := part / f"{stem}{dotted}.safetensors").is_file()]
        lists = [file for stem in STEMS if (file := part / f"{stem}.safetensors.index{dotted}.json").is_file()]
        if single or lists:
            return single if not lists else shards(lists[0]) if not single else []
    return []


def shards(index: Path) -> list[Path]:
    """The files that an index lists."""
    return [index.parent / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def of_transformers(kind: Any) -> bool:
    """Whether a class is one of transformers; else it is one of diffusers."""
    return bool(kind.__module__.startswith("transformers"))


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
