"""Textual inversions as files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from personalize.adapters.adapter import Adapter
from personalize.adapters.describe import describe
from personalize.adapters.embedding import Embedding
from personalize.errors import AdapterError, UnmatchedKeysError

SD1, SDXL = {"text_encoder": torch.randn(2, 768)}, {"text_encoder": torch.randn(3, 768), "text_encoder_2": torch.randn(3, 1280)}


@pytest.mark.parametrize("vectors", [SD1, SDXL])
def test_written_and_read_it_is_the_same(vectors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = Embedding(vectors, {"who": "me"}).save(tmp_path / "word")
    read = Embedding.load(path)
    assert read.vectors.keys() == vectors.keys() and all(torch.equal(read.vectors[part], vectors[part]) for part in vectors)
    assert read.tokens == len(vectors["text_encoder"]) and read.metadata["who"] == "me"
    assert describe(path).kind == "textual inversion"
    with pytest.raises(UnmatchedKeysError, match="textual inversion"):
        Adapter.load(path)


def test_diffusers_keeps_one_vector_under_the_word(tmp_path: Path) -> None:
    save_file({"<cat-toy>": torch.ones(768)}, tmp_path / "learned.safetensors")
    assert Embedding.load(tmp_path / "learned.safetensors").vectors["text_encoder"].shape == (1, 768)


@pytest.mark.parametrize("tensors", [{"emb_params": torch.ones(2, 2, 2)}, {"a": torch.ones(2, 2), "b": torch.ones(2)}, {}])
def test_anything_else_is_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="textual inversion"):
        Embedding.load(tmp_path / "a.safetensors")
