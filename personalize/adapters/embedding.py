"""Textual inversions: vectors that stand for a word (Gal et al. 2022, https://arxiv.org/abs/2208.01618)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import AdapterError, HostileFileError
from ..formats.header import Entry, open_file, read_header, short
from ..formats.tensors import TORCH, read_tensor, write_tensors
from ..formats.writer import with_ending
from ..io import atomic
from .adapter import Adapter
from .dialects import file_of
from .words import vectors_in, words_in

_WRITTEN = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"}  # where there are several


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
        """Read the vectors of a word in any spelling of words.py.

        Raises AdapterError for a missing file or one that is no textual inversion, HostileFileError for an unsound one.
        """
        header = read_header(Path(path).expanduser())
        known = vectors_in(header.tensors)
        if not known:
            inside = "; its words are inside an adapter: personalize convert --words takes them out" * bool(
                words_in(header.tensors)
            )
            held = ", ".join(map(short, list(header.tensors)[:3]))
            if any(key.endswith("_out") for key in header.tensors):
                inside = (
                    "; vectors of an encoder's output (_out) are read by OneTrainer alone: train it without output embeddings"
                )
            raise AdapterError(f"{path} is no textual inversion", f"it holds {held}{inside}")
        sizes = [header.tensors[key].shape for key in known.values()]
        if any(len(size) not in (1, 2) or 0 in size for size in sizes) or len({size[:-1] for size in sizes}) > 1:
            found = " and ".join(str(list(size)) for size in sizes)
            raise HostileFileError(f"{path} is no sound textual inversion: {found} are not as many vectors for each text encoder")
        with open_file(header.path) as file:
            vectors = {part: read_tensor(file, key, header.tensors[key]).float() for part, key in known.items()}
        if sick := [part for part, value in vectors.items() if not value.isfinite().all()]:
            raise HostileFileError(f"{path} holds NaN or Inf for the {sick[0]}")
        return cls({part: value if value.ndim == 2 else value[None] for part, value in vectors.items()}, header.metadata)

    @classmethod
    def from_words(cls, words: Mapping[str, Mapping[str, Tensor]], folder: Path) -> list[tuple[Path, Embedding]]:
        """The words of an adapter (Adapter.words), each with a path in `folder` that no two share.

        Raises AdapterError for vectors that stand for an encoder's output (OneTrainer), which no file of their own can say.
        """
        found: dict[Path, Embedding] = {}
        for word, vectors in words.items():
            embedding = cls.of_word(word, vectors)
            name = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", word).strip(". ") or "word"
            path = folder / f"{name}.safetensors"
            if path in found:
                raise AdapterError(f"two words would be written as {path}", "rename one of them")
            found[path] = embedding
        return list(found.items())

    @classmethod
    def of_word(cls, word: str, vectors: Mapping[str, Tensor]) -> Embedding:
        """A word of an adapter (Adapter.words). Raises AdapterError for vectors of an encoder's output (OneTrainer's `_out`)."""
        shapes = {key: Entry("F32", tuple(value.shape), 0, 0) for key, value in vectors.items()}
        if not (own := vectors_in(shapes)):
            raise AdapterError(f"the word {short(word)!r} is no textual inversion", f"it holds {', '.join(vectors)}")
        return cls({part: vectors[key].reshape(-1, vectors[key].shape[-1]) for part, key in own.items()})

    def inside(self) -> dict[str, Tensor]:
        """Its vectors by the keys that they have inside an adapter: those that A1111, ComfyUI and OneTrainer read there."""
        if self.vectors.keys() == {"text_encoder"}:
            return {"string_to_param.*": self.vectors["text_encoder"]}
        return {_WRITTEN[part]: value for part, value in self.vectors.items()}

    def save(self, path: str | Path, dtype: str = "fp32") -> Path:
        """Write it as UIs read it; returns the path, which always ends in .safetensors."""
        path = with_ending(path)
        alone = self.vectors.keys() == {"text_encoder"}
        names = _WRITTEN | ({"text_encoder": "emb_params"} if alone else {})
        with atomic(path) as temporary:
            tensors = {names[part]: value.to(TORCH[dtype]) for part, value in self.vectors.items()}
            write_tensors(temporary, tensors, {"format": "pt", **self.metadata})
        return path


def vectors_of(words: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    """Word => text encoder => its vectors [tokens, width], of those words of an adapter that can be read in a prompt."""
    found: dict[str, Mapping[str, Tensor]] = {}
    for word, vectors in words.items():
        with contextlib.suppress(AdapterError):  # vectors of an encoder's output: told when the file was read
            found[word] = Embedding.of_word(word, vectors).vectors
    return found


def load_learned(path: str | Path, word: str = "") -> Adapter:
    """An adapter, or a textual inversion as an adapter that brings one word, by its file's name, and changes no layer.

    The word is `word`, if one is given.

    Raises what `Adapter.load` raises, and `Embedding.load`.
    """
    header = read_header(file_of(Path(path).expanduser()))
    if not vectors_in(header.tensors):
        return Adapter.load(path)
    embedding = Embedding.load(path)
    return Adapter({}, embedding.metadata, {word or Path(path).stem: embedding.inside()})


def save_learned(adapter: Adapter, path: Path, dialect: str, metadata: Mapping[str, str], dtype: str = "fp32") -> Path:
    """Write an adapter; one that changes no layer and brings one word, as a textual inversion. Returns the path.

    Raises OutputError where the disk refuses, AdapterError for what the dialect or dtype cannot hold.
    """
    if adapter.deltas or len(adapter.words) != 1:
        return adapter.save(path, dialect, metadata, dtype)
    ((word, vectors),) = adapter.words.items()
    return Embedding(Embedding.of_word(word, vectors).vectors, {**adapter.metadata, **metadata}).save(path, dtype)
