"""Other trainers' scripts as they are: their command lines, and the base and pictures that they read."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from personalize.errors import TrainingError
from personalize.families.recognition import detect
from personalize.families.tokens import clip_tokenizer
from personalize.io import write_text
from personalize.models.model import quiet
from personalize.recipe.fields import Recipe
from personalize.training.memory.estimate import Configs, ghost
from personalize.training.memory.ladder import ComputePlan

from ..pocket.proof import peer

FOREVER = 10**6  # steps
KOHYA = {"sd1": "train_network.py", "sdxl": "sdxl_train_network.py"}
CLIPS = {"tokenizer": "openai/clip-vit-large-patch14", "tokenizer_2": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDPMScheduler"}


def run(
    program: str, result: Path, script: Path, flags: Sequence[str], *told: object, limit: float | None = None, cpu: bool = False
) -> Any:
    """What one of our programs beside this file leaves in `result`, as JSON, when it runs a script. Raises TrainingError."""
    start = [*peer.launcher(result.parent / "stand-in"), str(Path(__file__).with_name(program)), str(result.resolve())]
    command = [*start, *map(str, told), str(script.resolve()), *flags]
    places = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": places} | ({"ACCELERATE_USE_CPU": "true"} if cpu else {})
    result.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit, env=environment)
    except subprocess.TimeoutExpired as error:
        raise TrainingError(f"{script.name} did not end within {limit:g} s") from error
    if done.returncode or not result.is_file():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise TrainingError(f"{script.name} ended with {done.returncode}: {last}", "is it that of the installed diffusers?")
    return json.loads(result.read_text(encoding="utf-8"))


def flag_list(told: Mapping[str, object]) -> list[str]:
    """Flags with their values; a flag of True stands alone."""
    return [text for name, value in told.items() for text in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def diffusers_flags(folder: Path, recipe: Recipe, side: int, precision: str, steps: int) -> list[str]:
    """Of `train_dreambooth_lora.py` and `_sdxl.py`; the rest are their defaults."""
    told = {
        "pretrained_model_name_or_path": folder / "base",
        "instance_data_dir": folder / "pictures",
        "instance_prompt": "a sks dog",
        "output_dir": folder / "out",
        "resolution": side,
        "train_batch_size": recipe.batch_size,
        "max_train_steps": steps,
        "checkpointing_steps": FOREVER,
        "rank": recipe.adapter.rank,
        "mixed_precision": precision,
    }
    return flag_list(told)


def kohya_flags(folder: Path, recipe: Recipe, side: int, sdxl: bool) -> list[str]:
    """Of `train_network.py` and `sdxl_train_network.py`: only the UNet learns, latents (and SDXL's captions) are cached."""
    told = {
        "pretrained_model_name_or_path": folder / "base",
        "tokenizer_cache_dir": folder / "tokenizers",
        "train_data_dir": folder / "train",  # in which `1_sks dog` is
        "output_dir": folder / "out",
        "resolution": f"{side},{side}",
        "train_batch_size": recipe.batch_size,
        "max_train_steps": FOREVER,
        "network_module": "networks.lora",
        "network_dim": recipe.adapter.rank,
        "network_alpha": recipe.adapter.rank,
        "network_train_unet_only": True,
        "learning_rate": 1e-4,
        "mixed_precision": "bf16",
        "sdpa": True,
        "cache_latents": True,
        "max_data_loader_n_workers": 0,
    }
    return flag_list(told | ({"cache_text_encoder_outputs": True} if sdxl else {}))


# ---------------------------------------------------------------- what they read


def write_base(folder: Path, configs: Configs) -> None:
    """A diffusers folder without weights."""
    for part, config in (("unet", configs.denoiser), ("vae", configs.vae)):
        write_text(folder / part / "config.json", json.dumps({"_class_name": CLASSES[part], **config}))
    for part, kind in text_classes(configs).items():
        text = {**configs.texts[part], "architectures": [kind], "model_type": "clip_text_model"}
        write_text(folder / part / "config.json", json.dumps(text))
        clip_tokenizer().save_pretrained(folder / part.replace("text_encoder", "tokenizer"))
    from diffusers import DDPMScheduler

    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")


def text_classes(configs: Configs) -> dict[str, str]:
    """The text encoders of a base, and transformers' classes of them."""
    return {row.part: row.model().__name__ for row in detect(configs.denoiser, configs.texts, configs.part).texts}


def write_weights(folder: Path, configs: Configs, device: torch.device) -> None:
    """Random weights in bf16 for such a folder, whose index is written last; nothing if they are there."""
    if (folder / "model_index.json").is_file():
        return
    write_base(folder, configs)
    with quiet():
        base = ghost(configs, ComputePlan("bfloat16"))
        for part, model in base.models.items():
            fill(model, device)
            model.save_pretrained(folder / part)
            model.to("meta")
    parts = {part: ["diffusers", name] for part, name in CLASSES.items()}
    parts |= {part: ["transformers", kind] for part, kind in text_classes(configs).items()}
    parts |= {part.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for part in configs.texts}
    kind = "StableDiffusionXLPipeline" if len(configs.texts) > 1 else "StableDiffusionPipeline"
    write_text(folder / "model_index.json", json.dumps({"_class_name": kind, **parts}))


def write_tokenizers(folder: Path) -> None:
    """CLIP's tokenizers where kohya's tools keep them."""
    for name in CLIPS.values():
        clip_tokenizer().save_pretrained(folder / name.replace("/", "_"))


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Plain pictures."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (side, side), (i % 256, i % 256, i % 256)).save(folder / f"{i}.png")


@torch.no_grad()
def fill(model: torch.nn.Module, device: torch.device) -> None:
    """Random weights that keep activations as large as they are, for a model that is nowhere."""
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(std=(p.numel() / len(p)) ** -0.5)
        else:
            p.fill_(name.endswith("weight"))  # of a norm
    for positions in model.buffers():  # all that there are, in text encoders
        positions.copy_(torch.arange(positions.numel()).reshape(positions.shape))
