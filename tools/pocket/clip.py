"""The pocket's CLIP: text and pictures of the same world, aligned by contrast (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from .autoencoder import pixels
from .pool import shuffled_batches
from .running import Plan, run

TEXT = dict(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=77,
    projection_dim=128,
)
OPPOSITES = (("left", "right"), ("small", "large"), ("little", "big"), ("tiny", "huge"))
VISION = dict(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, patch_size=8, projection_dim=128
)


def build(tokenizer: CLIPTokenizer, size: int) -> CLIPModel:
    """A small CLIPModel with random weights for pictures of `size` pixels."""
    ids = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=TEXT | ids, vision_config=VISION | {"image_size": size}, projection_dim=128))


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token numbers `[n, 77]`, padded as Stable Diffusion pads."""
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def carry_over(old: CLIPModel, old_words: CLIPTokenizer, words: CLIPTokenizer) -> CLIPModel:
    """A trained CLIP under another vocabulary: a token that is new starts as the mean of the letters that spell it."""
    model = build(words, old.config.vision_config.image_size)
    state, name, known = old.state_dict(), "text_model.embeddings.token_embedding.weight", old_words.get_vocab()
    vectors = state.pop(name)

    def vector(token: str) -> Tensor:
        letters, ending = list(token.removesuffix("</w>")), "</w>" * token.endswith("</w>")
        spelled = [token] if token in known else [*letters[:-1], letters[-1] + ending]
        return vectors[[known[piece] for piece in spelled]].mean(0)

    state[name] = torch.stack([vector(token) for token in words.convert_ids_to_tokens(range(len(words)))])
    model.load_state_dict(state, strict=False)
    return model


def opposite(tokenizer: CLIPTokenizer, ids: Tensor) -> Tensor:
    """Captions `[n, t]` that say the opposite: left for right, small for large. Those without such a word stay."""
    known, other = tokenizer.get_vocab(), ids.clone()
    for a, b in (pair for pair in OPPOSITES if all(word + "</w>" in known for word in pair)):
        one, two = known[a + "</w>"], known[b + "</w>"]
        other[ids == one], other[ids == two] = two, one
    return other


def contrast(model: CLIPModel, ids: Tensor, wrong: Tensor, x: Tensor) -> Tensor:
    """The symmetric contrastive loss; identical captions in a batch count as matches of one another.

    The `wrong` captions are further negatives for every picture (Yuksekgonul et al. 2023), unless one is true of some picture.
    """
    n = len(ids)
    logits = model(input_ids=torch.cat([ids, wrong]), pixel_values=x).logits_per_text  # [2n texts, n pictures]
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    true = (wrong[:, None] == ids[None]).all(-1).any(1)
    told = torch.cat([logits[:n], logits[n:].masked_fill(true[:, None], -1e4)])
    per_picture = F.cross_entropy(told.T, torch.cat([target, torch.zeros_like(target)], 1))
    return (F.cross_entropy(logits[:n], target) + per_picture) / 2


def train(
    folder: Path,
    model: CLIPModel,
    pictures: np.ndarray,
    ids: Tensor,
    tokenizer: CLIPTokenizer,
    plan: Plan,
    device: str,
    bf16: bool,
) -> CLIPModel:
    """Train on a pool, resumably, and return the averaged model. Batches are cut to their longest caption: the text is causal."""
    model = model.to(device)
    ends = (ids == tokenizer.eos_token_id).int().argmax(1) + 1

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for i in shuffled_batches(len(pictures), plan.batch, 2, start):
            told = ids[i, : int(ends[i].max())].to(device)
            yield told, opposite(tokenizer, told), pixels(pictures[i], device)

    def loss_of(batch: tuple[Tensor, Tensor, Tensor], step: int) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return contrast(model, *batch)

    model.load_state_dict(run(folder, model, plan, batches, loss_of), strict=False)
    return model.eval()
