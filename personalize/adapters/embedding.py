"""Textual inversions: vectors that stand for a word (Gal et al. 2022, https://arxiv.org/abs/2208.01618)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import AdapterError, HostileFileError
from ..formats.header import open_file, read_header, short
from ..formats.tensors import TORCH, read_tensor, with_ending, write_tensors
from ..io import atomic

# key of a file => the text encoder whose vectors it holds: A1111 (SD 1.x, 2.x), SDXL's two encoders
KEYS = {"emb_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}


@dataclass(frozen=True, eq=False, repr=False)
class Embedding:
    """Text encoder => its vectors [tokens, width] in fp32. The word itself is the file's name."""

    vectors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = {part: value.detach().to("cpu", torch.float32, copy=True) for part, value in self.vectors.items()}
        counts = {tuple(value.shape)[:-1] for value in own.values()}
        if not own or len(counts) > 1 or any(value.ndim != 2 for value in own.values()):
            raise AdapterError("a textual inversion holds vectors [tokens, width], as many for each text encoder")
        object.__setattr__(self, "vectors", MappingProxyType(own))

    def __repr__(self) -> str:
        return f"Embedding({self.tokens} tokens, {' + '.join(self.vectors)})"

    @property
    def tokens(self) -> int:
        """How many tokens of a prompt the word takes."""
        return len(next(iter(self.vectors.values())))

    @classmethod
    def load(cls, path: str | Path) -> Embedding:
        """Read A1111's `emb_params`, SDXL's `clip_l` and `clip_g`, or diffusers' one tensor under the word itself.

        Raises AdapterError for a missing file or one that is no textual inversion, HostileFileError for an unsound one.
        """
        header = read_header(Path(path).expanduser())
        known = {key: KEYS[key] for key in header.tensors if key in KEYS}
        if not known and len(header.tensors) == 1 and len(next(iter(header.tensors.values())).shape) in (1, 2):
            known = dict.fromkeys(header.tensors, "text_encoder")
        if not known or known.keys() != header.tensors.keys() or len(set(known.values())) < len(known):
            raise AdapterError(f"{path} is no textual inversion", f"it holds {', '.join(map(short, list(header.tensors)[:3]))}")
        sizes = [header.tensors[key].shape for key in known]
        if any(len(size) not in (1, 2) or 0 in size for size in sizes) or len({size[:-1] for size in sizes}) > 1:
            found = " and ".join(str(list(size)) for size in sizes)
            raise HostileFileError(f"{path} is no sound textual inversion: {found} are not as many vectors for each text encoder")
        with open_file(header.path) as file:
            vectors = {part: read_tensor(file, key, header.tensors[key]).float() for key, part in known.items()}
        if sick := [part for part, value in vectors.items() if not value.isfinite().all()]:
            raise HostileFileError(f"{path} holds NaN or Inf for the {sick[0]}")
        return cls({part: value if value.ndim == 2 else value[None] for part, value in vectors.items()}, header.metadata)

    def save(self, path: str | Path, dtype: str = "fp32") -> Path:
        """Write it as UIs read it; returns the path, which always ends in .safetensors."""
        path = with_ending(path)
        both = "text_encoder_2" in self.vectors
        names = {"text_encoder": "clip_l" if both else "emb_params", "text_encoder_2": "clip_g"}
        with atomic(path) as temporary:
            tensors = {names[part]: value.to(TORCH[dtype]) for part, value in self.vectors.items()}
            write_tensors(temporary, tensors, {"format": "pt", **self.metadata})
        return path
