"""What an adapter file says about itself: kohya's `ss_*` and Stability's `modelspec.*` keys, the recipe, a thumbnail.

Nothing here depends on the clock: the same recipe gives the same bytes. Times are in events.jsonl.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from .base import Base
from .data import Dataset
from .families import A1111
from .recipe import Recipe, to_json

PREDICTION = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}  # modelspec's words


def describe_run(recipe: Recipe, base: Base, dataset: Dataset, name: str, step: int, sample: Path | None) -> dict[str, str]:
    """The whole metadata of an adapter saved after `step` steps; `sample` is the picture for its thumbnail."""
    return {
        **kohya_keys(recipe, base, dataset, name, step),
        **modelspec_keys(recipe, base, dataset, name, sample),
        "personalize.recipe": to_json(recipe),
        "personalize.step": str(step),
        "personalize.images": json.dumps([example.sha256 for example in dataset.examples]),
        "personalize.versions": json.dumps(versions(), sort_keys=True),
    }


def kohya_keys(recipe: Recipe, base: Base, dataset: Dataset, name: str, step: int) -> dict[str, str]:
    """What kohya's trainer would have written, as far as it has a meaning here; read by A1111, Forge and model sites."""
    optim, spec, side = recipe.optim, recipe.adapter, recipe.data.resolution or base.resolution
    folder, captions = recipe.data.folder.absolute().name, Counter(example.caption for example in dataset.examples)
    seen = step * recipe.batch_size * optim.accumulate
    keys: dict[str, Any] = {
        "ss_output_name": name,
        "ss_base_model_version": base_version(base),
        "ss_sd_model_name": Path(base.name).name,
        "ss_v2": base.family.name == "sd2",
        "ss_network_module": "networks.lora",
        "ss_network_dim": spec.rank,
        "ss_network_alpha": f"{spec.alpha:g}",
        "ss_network_args": json.dumps({"conv_dim": spec.rank, "conv_alpha": f"{spec.alpha:g}"} if "conv" in spec.targets else {}),
        "ss_network_dropout": spec.dropout or None,
        "ss_resolution": f"({side}, {side})",
        "ss_clip_skip": recipe.clip_skip if recipe.clip_skip > 1 else None,
        "ss_num_train_images": len(dataset.examples),
        "ss_num_reg_images": recipe.objective.prior_images if recipe.objective.prior == "images" else 0,
        "ss_num_epochs": -(-seen // len(dataset.examples)),
        "ss_epoch": -(-seen // len(dataset.examples)),
        "ss_steps": step,
        "ss_max_train_steps": recipe.steps,
        "ss_total_batch_size": recipe.batch_size * optim.accumulate,
        "ss_gradient_accumulation_steps": optim.accumulate,
        "ss_learning_rate": optim.lr,
        "ss_unet_lr": optim.lr,
        "ss_text_encoder_lr": optim.text_encoder_lr,
        "ss_optimizer": f"torch.optim.adamw.AdamW(weight_decay={optim.weight_decay},betas=({optim.beta1}, {optim.beta2}))",
        "ss_lr_scheduler": optim.schedule,
        "ss_lr_warmup_steps": optim.warmup,
        "ss_max_grad_norm": optim.clip,
        "ss_min_snr_gamma": recipe.objective.min_snr or None,
        "ss_prior_loss_weight": recipe.objective.prior_weight,
        "ss_noise_offset": None,
        "ss_mixed_precision": "no",
        "ss_seed": recipe.seed,
        "ss_session_id": int(hashlib.sha256(to_json(recipe).encode()).hexdigest()[:8], 16),
        "ss_tag_frequency": json.dumps({folder: captions}, ensure_ascii=False),
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 1, "img_count": len(dataset.examples)}}, ensure_ascii=False),
        "ss_training_comment": f"made with personalize {versions()['personalize']}",
    }
    return {key: str(value) for key, value in keys.items()}


def modelspec_keys(recipe: Recipe, base: Base, dataset: Dataset, name: str, sample: Path | None) -> dict[str, str]:
    """ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec)."""
    side = recipe.data.resolution or base.resolution
    words = f"{dataset.trigger} {recipe.data.class_name}".strip()
    keys = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture(base),
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.description": f"LoRA of {words}, from {len(dataset.examples)} pictures",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": PREDICTION[base.schedule.prediction],
        "modelspec.trigger_phrase": dataset.trigger,
        "modelspec.usage_hint": f'write "{words}" in the prompt',
    }
    return keys | ({"modelspec.thumbnail": thumbnail(sample)} if sample else {})


def sidecar(recipe: Recipe, base: Base, dataset: Dataset) -> str:
    """NAME.json, which A1111 and Forge read beside the file."""
    words = f"{dataset.trigger} {recipe.data.class_name}".strip()
    said = {
        "description": f"{words}, trained on {Path(base.name).name}",
        "sd version": A1111.get(base.family.name, "Unknown"),
        "activation text": words,
        "preferred weight": 1.0,
        "negative text": "",
        "notes": f"{len(dataset.examples)} pictures, {recipe.steps} steps; made with personalize {versions()['personalize']}",
    }
    return json.dumps(said, indent=4, ensure_ascii=False) + "\n"


def thumbnail(picture: Path, side: int = 256) -> str:
    """A small JPEG of a picture as a data URL."""
    with Image.open(picture) as opened:
        small = opened.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def base_version(base: Base) -> str:
    """Kohya's word for the base's family: `sd_v1`, `sd_v2`, ...; with v-prediction `sd_v1_v` and `sd_v2_v`, but SDXL's own."""
    velocity = base.family.name in ("sd1", "sd2") and base.schedule.prediction == "v_prediction"
    return base.family.base_version + ("_v" if velocity else "")


def architecture(base: Base) -> str:
    """ModelSpec's word for the base's family; SD 2 with v-prediction has its own."""
    velocity = base.family.name == "sd2" and base.schedule.prediction == "v_prediction"
    return "stable-diffusion-v2-768-v/lora" if velocity else base.family.architecture


def versions() -> dict[str, str]:
    """The versions that decide what a run gives."""
    from . import __version__

    return {"personalize": __version__} | {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
