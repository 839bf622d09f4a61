"""A base of names and shapes alone, which takes seconds and no memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..families.family import Family, Network
from .folder import CONFIG, read_json
from .loaded import build
from .model import family_at, quiet
from .sources import locate

TOKENS = 49408  # of a vocabulary: no layer's shape depends on it


@dataclass(frozen=True)
class Skeleton:
    """Networks on torch's meta device, as a Base has them."""

    name: str
    family: Family
    parts: Mapping[str, nn.Module]


def skeleton_of(name: str) -> Skeleton:
    """That of a base that is on this machine. Raises BaseModelError for one that is not, or cannot be used."""
    path, family = locate(name, download=False), family_at(name, download=False)

    def config_of(row: Network) -> Mapping[str, Any]:
        if path.is_dir():
            return read_json(path / row.part / CONFIG)
        return row.config(family.texts) if row is family.denoiser else row.config(TOKENS)  # type: ignore[attr-defined]

    with quiet(), torch.device("meta"):
        return Skeleton(name, family, {row.part: build(row, config_of(row)) for row in family.networks})
