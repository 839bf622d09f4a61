"""Words that stand for vectors: where they are in a text, and what the text model embeds in their place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from personalize.families.words import speaking, tokenize

WORDS = {"cat": torch.full((1, 4), 1.0), "cat <x>": torch.full((2, 4), 2.0)}


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("cat", [-1]),
        ("CAT,", [-1, 44]),
        ("cat <X>", [-2, -3]),
        ("cats", letters("cats")),
        ("a cat cat", [97, -1, -1]),
        ("", []),
    ],
)
def test_words_are_whole_and_the_longest_counts(text: str, tokens: list[int]) -> None:
    assert tokenize(text, WORDS, letters) == tokens


def test_a_text_model_embeds_words_as_their_vectors() -> None:
    class Model(nn.Module):
        table = nn.Embedding(10, 4)

        def get_input_embeddings(self) -> nn.Embedding:
            return self.table

    model = Model()
    ids = torch.tensor([[5, -1, -3], [-2, 6, 0]])
    with speaking(model, ids, WORDS) as known:
        found = model.table(known)
    assert known.tolist() == [[5, 0, 0], [0, 6, 0]]
    assert found[ids < 0].unique(dim=1).flatten().tolist() == [1, 2, 2]
    assert torch.equal(found[ids >= 0], model.table.weight[[5, 6, 0]])
    assert torch.equal(model.table(known), model.table.weight[known]), "the hook stayed"
