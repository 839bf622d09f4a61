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
from .pool import shuffled
from .running import Plan, run

TEXT = dict(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=77,
    projection_dim=128,
)
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


def contrast(model: CLIPModel, ids: Tensor, x: Tensor) -> Tensor:
    """The symmetric contrastive loss; identical captions in a batch count as matches of one another."""
    out = model(input_ids=ids, pixel_values=x)
    logits = out.logits_per_text
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train(
    folder: Path, pictures: np.ndarray, ids: Tensor, tokenizer: CLIPTokenizer, plan: Plan, device: str, bf16: bool
) -> CLIPModel:
    """Train on a pool, resumably, and return the averaged model. Batches are cut to their longest caption: the text is causal."""
    model = build(tokenizer, pictures.shape[1]).to(device)
    ends = (ids == tokenizer.eos_token_id).int().argmax(1) + 1

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i in shuffled(len(pictures), plan.batch, 2, start):
            yield ids[i, : int(ends[i].max())].to(device), pixels(pictures[i], device)

    def loss_of(batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return contrast(model, *batch)

    model.load_state_dict(run(folder, model, plan, batches, loss_of), strict=False)
    return model.eval()
