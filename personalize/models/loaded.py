"""What reading a base gives, from wherever it was read, and the bases that are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import BaseModelError
from ..families.family import Family, Network
from ..families.recognition import refusal


class Unfilled(TorchFunctionMode):
    """Inside, layers are made without the numbers that training from nothing would begin with: theirs come from files.

    What is counted, as positions are, is in memory also where layers are not. On the meta device either would cost nothing but
    torch's kernels in Python, which import sympy to know a dtype.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func is torch.arange:
            return func(*args, **kwargs | {"device": "cpu"})
        if func is torch.empty_like:  # of what a file lacks
            return torch.empty(args[0].shape, **{"dtype": args[0].dtype, "device": args[0].device} | kwargs)
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Loaded:
    """The models and configs of a base, on the CPU, in the dtype that was asked for."""

    family: Family
    scheduler: Mapping[str, Any]
    tokenizers: Mapping[str, Any]  # text encoder's part => its tokenizer
    denoiser: Any
    vae: Any
    texts: Mapping[str, Any]  # part => model
    stored: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # part => bytes on the disk by dtype


def build(row: Network, config: Mapping[str, Any]) -> Any:
    """A model of a config, with weights of its own."""
    kind = row.model()
    return kind(kind.config_class.from_dict(dict(config))) if hasattr(kind, "config_class") else kind(**config)


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a VAE computes in: never float16, in which SDXL's own overflows."""
    return torch.float32 if dtype == torch.float16 else dtype


def check_family(path: Path, family: Family, beside: int) -> None:
    """Raise BaseModelError for a model that can neither be trained nor drawn with here."""
    if why := refusal(family, beside):
        raise BaseModelError(f"{path} is {why}", "use the text-to-image model that it was made from")
