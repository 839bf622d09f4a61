"""A base of pocket's exact structure with random weights, as a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.pocket import autoencoder, diffusion

LATENT = 16  # channels of the base that ships; what `tools/pocket` makes now has other ones, and a level more
POCKET_UNET = diffusion.CONFIG | {
    "sample_size": 8,
    "block_out_channels": (96, 192),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "attention_head_dim": (4, 8),
    "in_channels": LATENT,
    "out_channels": LATENT,
}
NARROW = {  # of one level; a fraction of the work
    "block_out_channels": (64,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 64,
    "attention_head_dim": (4,),
}
POCKET_VAE = autoencoder.CONFIG | {
    "sample_size": 64,
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.8,
    "latent_channels": LATENT,
}
SCHEDULER = diffusion.SCHEDULE | {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with single bytes as its whole vocabulary (514 tokens): any typed word tokenizes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def build_base(folder: Path, *, seed: int = 0, scheduler: dict[str, object] | None = None, narrow: bool = False) -> Path:
    """Write an ordinary diffusers folder of pocket's structure with random weights and return it.

    A narrow one has all kinds of its layers but those that change the size, in other widths: it is read as a Stable Diffusion of
    strange sizes.
    """
    torch.manual_seed(seed)
    tokenizer, unet = byte_tokenizer(), POCKET_UNET | (NARROW if narrow else {})
    width = unet["cross_attention_dim"]
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    AutoencoderKL(**POCKET_VAE).save_pretrained(folder / "vae")
    UNet2DConditionModel(**unet).save_pretrained(folder / "unet")
    DDIMScheduler(**(SCHEDULER | (scheduler or {}))).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder
