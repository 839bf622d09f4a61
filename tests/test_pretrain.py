"""Pretraining the pocket: what a kill must not change, and what the tokenizer must take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from personalize.evaluate import Clip
from personalize.pocket import WEIGHTS, clip, pool
from personalize.pocket.pool import shuffled, write_rows
from personalize.pocket.running import Plan, run


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")


PLAN = Plan(steps=6, batch=4, lr=1e-2, warmup=2, save_every=2, log_every=2)


def trained(folder: Path, stop: int = 1000) -> dict[str, Tensor]:
    """A small model (matrices for Muon, biases for AdamW) through the loop; killed when it asks for the batch of step `stop`."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16)), torch.arange(64.0)[:, None].expand(-1, 32) / 64

    def batches(start: int) -> Iterator[Tensor]:
        for step, rows in enumerate(shuffled(64, PLAN.batch, 0, start), start):
            if step == stop:
                raise KeyboardInterrupt
            yield data[rows]

    return run(folder, model, PLAN, batches, lambda x, step: F.mse_loss(model(x), x[:, :16].sin()))


def test_a_killed_stage_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", stop=5)  # one step after the last state
    resumed = trained(tmp_path / "broken")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_rate_warms_up_stays_and_falls() -> None:
    plan = replace(PLAN, steps=100, warmup=10, decay=0.2)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3) and rates[10:80] == [1e-2] * 70
    assert rates[80:] == sorted(rates[80:], reverse=True) and rates[-1] < 1e-3


@pytest.mark.parametrize("start", [0, 3, 7])
def test_batches_go_on_where_they_were(start: int) -> None:
    assert np.array_equal(list(islice(shuffled(12, 4, 5, start), 6)), list(islice(shuffled(12, 4, 5, 0), start, start + 6)))


def test_rows_have_their_name_only_when_whole(tmp_path: Path) -> None:
    file, values = tmp_path / "rows.npy", np.arange(21.0).reshape(7, 3)
    with pytest.raises(IndexError):
        write_rows(file, 7, lambda rows: values[rows] if rows.start < 4 else values[99], batch=2)
    assert not file.exists()
    write_rows(file, 7, lambda rows: values[rows], batch=2)
    assert np.array_equal(np.load(file), values)


def test_the_opposite_of_a_caption_is_another_caption_or_itself(tokenizer: CLIPTokenizer) -> None:
    def said(words: str) -> str:
        return tokenizer.decode(clip.opposite(tokenizer, clip.tokens(tokenizer, [words]))[0], skip_special_tokens=True).strip()

    assert said("a tiny cat on the left") == "a huge cat on the right"
    assert said("a red cat in the snow") == "a red cat in the snow"


def test_a_vocabulary_can_change_under_a_trained_clip(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    pool.build_tokenizer(tmp_path, ["a marmalade cat in the snow"] * 300)
    words, old = CLIPTokenizer.from_pretrained(tmp_path), Clip.of(WEIGHTS).model
    new = clip.carry_over(old, tokenizer, words)
    before, after = (model.text_model.embeddings.token_embedding.weight for model in (old, new))
    old_number, number = tokenizer.get_vocab(), words.get_vocab()
    assert torch.equal(after[number["cat</w>"]], before[old_number["cat</w>"]])
    letters = [*"marmalad", "e</w>"]
    assert torch.allclose(after[number["marmalade</w>"]], before[[old_number[letter] for letter in letters]].mean(0))
    assert torch.equal(new.vision_model.post_layernorm.weight, old.vision_model.post_layernorm.weight)


@pytest.mark.parametrize("text", ["a zwx cat", "Na\u00efve \u732b \u2603 42!", "photo-of_my.Dog"])
def test_any_typed_word_tokenizes(text: str, tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer(text).input_ids
    assert len(ids) > 2 and tokenizer.eos_token_id not in ids[1:-1]
    assert "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) == "".join(text.lower().split())
