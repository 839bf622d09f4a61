"""What runs between nodes: plain values, which ComfyUI may keep for as long as it likes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ADAPTER, DATASET = "PERSONALIZE_ADAPTER", "PERSONALIZE_DATASET"


@dataclass(frozen=True)
class Use:
    """An adapter file of this machine, and how much of it; `id` is the studio's for it, "" where it does not know it yet."""

    path: str
    strength: str = "1"
    id: str = ""

    @property
    def name(self) -> str:
        return Path(self.path).stem


Adapters = tuple[Use, ...]  # one, or several that are used together


@dataclass(frozen=True)
class Dataset:
    """Pictures that the studio has, and what a training of them is told."""

    id: str
    settings: dict[str, Any] = field(default_factory=dict)


def single(adapters: Adapters, for_what: str) -> Use:
    """The one adapter. Raises ValueError for a stack."""
    if len(adapters) != 1:
        raise ValueError(f"{for_what} takes one adapter, and {len(adapters)} are connected; merge them first")
    return adapters[0]
