"""Fixtures shared by all tests: a base of pocket's exact structure with random weights, and a folder of pictures."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from hypothesis import settings
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# What is searched for is the same on every machine and every time, however slow it is.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")

POCKET_UNET = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": (96, 192),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 192,
    "attention_head_dim": (4, 8),
    "norm_num_groups": 16,
}
POCKET_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "sample_size": 64,
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 8,
    "scaling_factor": 0.8,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with single bytes as its whole vocabulary (514 tokens): any typed word tokenizes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def build_base(folder: Path, *, seed: int = 0, scheduler: dict[str, object] | None = None) -> Path:
    """Write an ordinary diffusers folder of pocket's structure with random weights and return it."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    AutoencoderKL(**POCKET_VAE).save_pretrained(folder / "vae")
    UNet2DConditionModel(**POCKET_UNET).save_pretrained(folder / "unet")
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


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of pocket's exact structure (v-prediction, zero-terminal SNR), random weights."""
    return build_base(tmp_path_factory.mktemp("tiny_base"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder named `zwx` with four plain pictures of different sizes and no captions."""
    folder = tmp_path_factory.mktemp("data") / "zwx"
    folder.mkdir()
    for i, size in enumerate([(64, 64), (80, 64), (64, 96), (100, 100)]):
        picture = Image.linear_gradient("L").resize(size).convert("RGB")
        picture.paste((60 * i, 200 - 40 * i, 90), (10, 10 + 4 * i, 40, 40 + 4 * i))
        picture.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests and their fixtures of any scope never touch the user's cache; they share one of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSONALIZE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def short_exam() -> Iterator[None]:
    """Checkpoints are asked fewer questions: what is asked does not matter to what is done with the answers."""
    from personalize.training import selection

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PICTURES": 2, "OTHERS": 2, "EVERYDAY": ("a house",), "DRAWN": 1}.items():
            patch.setattr(selection, name, value)
        yield


@pytest.fixture(scope="session")
def base_builder() -> Callable[..., Path]:
    """`build_base`, for tests that need another scheduler or seed."""
    return build_base
