"""Vectors that words stand for, as what learns: textual inversion (Gal et al. 2022, https://arxiv.org/abs/2208.01618), alone or
beside an adapter on layers (pivotal tuning: Roich et al. 2021, https://arxiv.org/abs/2106.05744).

Everything else in a text encoder is frozen, its table of tokens too: prompts meet the vectors where the word stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.embedding import Embedding, save_learned, vectors_of
from ..errors import AdapterError, RecipeError
from ..models.model import Base
from ..recipe.adapter import EMBEDDING
from .tunable import LayerAdapter

Vectors = Mapping[str, Mapping[str, Tensor]]  # word => text encoder => its vectors [tokens, width]
STYLE = "style"  # what the word of a style begins as


def begin_words(base: Base, words: Mapping[str, str], count: int) -> Vectors:
    """`count` vectors in each text encoder for each word, that begin as what another word says: word => that other one.

    Raises RecipeError for one that says nothing to a text encoder.
    """
    for word, other in words.items():
        for text in base.texts:
            if not text.tokenizer(other, add_special_tokens=False, verbose=False).input_ids:
                raise RecipeError(f"--init-word: {other!r} says nothing to the {text.part}", f"what is {word}? e.g. dog")
    return {word: {text.part: text.vectors_of(other, count) for text in base.texts} for word, other in words.items()}


def continue_words(start: Vectors, adapter: Adapter, name: str) -> Vectors:
    """The vectors that a file holds, in the place of those of `start`; a lone word goes by any name, and others by their own.

    Raises AdapterError for vectors of other shapes.
    """
    found = held_words(start, adapter)
    for word, own in found.items():
        shapes, wanted = ({part: tuple(one.shape) for part, one in vectors[word].items()} for vectors in (found, start))
        if shapes != wanted:
            held = " and ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
            needed = " and ".join(f"{part} {list(shape)}" for part, shape in wanted.items())
            count = len(next(iter(own.values())))
            raise AdapterError(f"{name} holds vectors {held}, and those to train are {needed}", f"--vectors {count}, on its base")
    return {**start, **found}


def held_words(start: Vectors, adapter: Adapter) -> dict[str, Mapping[str, Tensor]]:
    """The vectors of these words that an adapter brings."""
    brought = vectors_of(adapter.words)
    if len(start) == len(brought) == 1:
        return {next(iter(start)): next(iter(brought.values()))}
    return {word: brought[word] for word in start if word in brought}


class WordsLearned:
    """A Tunable: words whose vectors are learned, beside adapter layers, of which there may be none.

    `company` are all that share passes with this one: a backward pass reaches the vectors of each.
    """

    def __init__(self, layers: LayerAdapter, start: Vectors, company: list[WordsLearned]) -> None:
        self.base, self.layers, self.company = layers.base, layers, company
        self.vectors: dict[str, dict[str, nn.Parameter]] = {
            word: {part: nn.Parameter(one.detach().to(self.base.device, torch.float32, copy=True)) for part, one in own.items()}
            for word, own in start.items()
        }
        company.append(self)

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """`embedding` -> {'embedding WORD.' + text encoder: vectors [tokens, width]}, and what the layers have."""
        own = {f"{EMBEDDING} {word}.{part}": one for word, parts in self.vectors.items() for part, one in parts.items()}
        return {EMBEDDING: own, **self.layers.parameters()}

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the words are read as they are spelled."""
        with self.layers.off(), self.base.knowing({}):
            yield

    @contextlib.contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """Inside, the layers count `strength` times; without any, words do as UIs' prompts say it: (word:strength)."""
        with self.layers.at(strength), self.base.knowing(self.vectors, 1.0 if self.layers.layers else strength):
            yield

    def dropout(self, seed: int) -> contextlib.AbstractContextManager[None]:
        """Inside, dropout of the layers is active."""
        return self.layers.dropout(seed)

    @contextlib.contextmanager
    def computing(self, *others: WordsLearned) -> Iterator[None]:
        """Inside, prompts are read with these words, and rows go through the layers; see LayerAdapter."""
        with self.layers.computing(*(other.layers for other in others)), self.base.knowing(self.vectors):
            yield

    def cast_once(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the layers' tensors are cast once; vectors are when they are read."""
        return self.layers.cast_once()

    def collect_gradients(self) -> None:
        """The vectors have theirs: the parameters are their own."""
        self.layers.collect_gradients()

    def drop_gradients(self) -> None:
        """Forget all gradients, those of the company among them."""
        for leaf in self.leaves():
            leaf.grad = None

    def leaves(self) -> list[nn.Parameter]:
        """The layers' parameters, and the vectors of the whole company."""
        return [*self.layers.leaves(), *(one for each in self.company for own in each.vectors.values() for one in own.values())]

    def bound(self, most: float) -> int:
        """Scale back the layers' updates that are larger than `most`; how many. Vectors are no updates."""
        return self.layers.bound(most)

    @torch.no_grad()
    def put(self, saved: Adapter) -> None:
        """Take over vectors, and updates of layers, of the same shapes."""
        self.layers.put(saved)
        for word, own in held_words(self.vectors, saved).items():
            for part, one in self.vectors[word].items():
                one.copy_(own[part])

    def snapshot(self, metadata: Mapping[str, str] | None = None) -> Adapter:
        """A copy of what was learned, on the CPU: an adapter that brings the words along."""
        layers = self.layers.snapshot(metadata)
        words = {
            word: Embedding({part: one.detach() for part, one in own.items()}).inside() for word, own in self.vectors.items()
        }
        return Adapter(layers.deltas, layers.metadata, words)

    def save(self, path: Path, dialect: str, metadata: Mapping[str, str] | None = None) -> Path:
        """Write a snapshot. Raises OutputError where that is not possible."""
        return save_learned(self.snapshot(), path, dialect, metadata or {})


def words_beside(members: Sequence[LayerAdapter], words: Sequence[Vectors]) -> list[WordsLearned]:
    """Members that share passes, each with words of its own."""
    company: list[WordsLearned] = []
    for member, own in zip(members, words, strict=True):
        WordsLearned(member, own, company)
    return company
