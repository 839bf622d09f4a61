"""What an adapter file says about itself: kohya's `ss_*` and Stability's `modelspec.*` keys, the recipe, a thumbnail.

Nothing here depends on the clock: the same recipe gives the same bytes. Times are in events.jsonl.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.contract import BY_TIMESTEP
from ..adapters.kinds import trainable
from ..adapters.kinds.kind import no_rank
from ..data.captions import tags
from ..data.dataset import Dataset
from ..data.latents import grid_of
from ..families.notation import escape
from ..models.model import Base
from ..recipe.adapter import EMBEDDING
from ..recipe.fields import AdapterSpec, Optim, Recipe
from ..recipe.resolve import to_json
from ..version import __version__
from .memory.ladder import ComputePlan

MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # kohya's words
ADAMW = "torch.optim.adamw.AdamW(weight_decay={optim.weight_decay},betas=({optim.beta1}, {optim.beta2}))"  # kohya's words too
PREDICTION = {"v_prediction": "v"}  # modelspec's words
version_of = functools.cache(version)  # which reads a long file each time, and every checkpoint asks for four


def describe_run(
    recipe: Recipe,
    base: Base,
    dataset: Dataset,
    name: str,
    step: int,
    sample: Path | None,
    fit: ComputePlan,
    estimate: Any = None,
    classes: Dataset | None = None,
    peak: int | None = None,
) -> dict[str, str]:
    """The whole metadata of an adapter saved after `step` steps; `sample` is the picture for its thumbnail.

    `classes` are the class images that somebody brought. Of memory, what the shapes tell (`estimate`), and on a GPU the bytes
    that were held at most (`peak`); a CPU's process may not repeat them, and its files must repeat to the byte.
    """
    memory = {"estimate": estimate, "dtypes": dtypes(base)} | ({} if peak is None else {"peak": peak})
    return {
        **kohya_keys(recipe, base, dataset, name, step),
        **dataset_keys(recipe, base, dataset, classes),
        "ss_mixed_precision": MIXED[fit.precision],
        "ss_full_fp16": "False",
        "ss_gradient_checkpointing": str(fit.checkpointing),
        "personalize.fit": json.dumps(fit.record() | memory, sort_keys=True),
        **modelspec_keys(recipe, base, dataset, name, sample),
        **({BY_TIMESTEP: f"{recipe.adapter.rank_by_timestep:g}"} if recipe.adapter.rank_by_timestep else {}),
        "personalize.recipe": to_json(recipe),
        "personalize.step": str(step),
        "personalize.images": json.dumps([example.sha256 for example in dataset.examples]),
        "personalize.versions": json.dumps(versions(), sort_keys=True),
    }


def dtypes(base: Base) -> dict[str, str]:
    """In what each part was held, the adapter as well."""
    return {**base.dtypes, "adapter": "float32"}


def kohya_keys(recipe: Recipe, base: Base, dataset: Dataset, name: str, step: int) -> dict[str, str]:
    """What kohya's trainer would have written, as far as it has a meaning here; read by A1111, Forge and model sites."""
    optim, spec, side = recipe.optim, recipe.adapter, recipe.data.resolution or base.resolution
    seen, pictures = step * recipe.batch_size * optim.accumulate, sum(example.repeats for example in dataset.examples)
    keys: dict[str, Any] = {
        "ss_output_name": name,
        "ss_base_model_version": base.family.version_of(base.noise),
        "ss_sd_model_name": Path(base.name).name,
        "ss_v2": base.family.base_version == "sd_v2",
        **network_keys(spec, optim),
        "ss_network_dropout": spec.dropout or None,
        "ss_resolution": f"({side}, {side})",
        "ss_clip_skip": recipe.clip_skip if recipe.clip_skip > 1 else None,
        "ss_num_train_images": pictures,
        "ss_num_epochs": -(-seen // pictures),
        "ss_epoch": -(-seen // pictures),
        "ss_steps": step,
        "ss_max_train_steps": recipe.steps,
        "ss_total_batch_size": recipe.batch_size * optim.accumulate,
        "ss_gradient_accumulation_steps": optim.accumulate,
        "ss_learning_rate": optim.embedding_lr if spec.kind == EMBEDDING else optim.lr,
        "ss_unet_lr": optim.lr,
        "ss_text_encoder_lr": optim.text_encoder_lr,
        "ss_optimizer": ADAMW.format(optim=optim) if optim.optimizer == "adamw" else optim.optimizer,
        "ss_lr_scheduler": optim.schedule,
        "ss_lr_warmup_steps": optim.warmup,
        "ss_max_grad_norm": optim.clip,
        **({"ss_scale_weight_norms": optim.scale_weight_norms} if optim.scale_weight_norms else {}),
        "ss_min_snr_gamma": recipe.objective.min_snr or None,
        "ss_prior_loss_weight": recipe.objective.prior_weight,
        "ss_noise_offset": recipe.objective.noise_offset or None,
        "ss_seed": recipe.seed,
        "ss_session_id": int(hashlib.sha256(to_json(recipe).encode()).hexdigest()[:8], 16),
        "ss_training_comment": f"made with personalize {versions()['personalize']}",
    }
    return {key: str(value) for key, value in keys.items()}


ALGORITHMS = {"dora": "locon", "oft": "diag-oft"}  # LyCORIS' words for kinds, where they are others


def title_of(kind: str) -> str:
    """What people call a kind that `--kind` names."""
    if kind == EMBEDDING:
        return "textual inversion"
    row = trainable()[kind]
    return row.trained_as or row.title


def network_keys(spec: AdapterSpec, optim: Optim) -> dict[str, Any]:
    """The module and the arguments with which kohya's trainer, or LyCORIS in it, makes such an adapter."""
    if spec.kind == EMBEDDING:
        return {"ss_num_vectors_per_token": spec.vectors, "ss_init_word": spec.init_word}
    kind, row = spec.kind, trainable()[spec.kind]
    alpha = f"{spec.alpha:g}" if row.has_alpha else "0"
    rank = 0 if row.rank is no_rank else spec.oft_block or spec.rank
    arguments: dict[str, Any] = {"conv_dim": rank, "conv_alpha": alpha} if "conv" in spec.targets and rank else {}
    if kind not in ("lora", "norms"):
        arguments["algo"] = ALGORITHMS.get(kind, kind)
    more = {
        "dora_wd": kind == "dora",
        "wd_on_output": False if kind == "dora" else None,
        "rs_lora": spec.rslora,
        "factor": (spec.lokr_factor or -1) if kind == "lokr" else None,
        "full_matrix": spec.lokr_full,
        "train_norm": kind == "norms",
        "loraplus_lr_ratio": f"{optim.lora_plus:g}" if optim.lora_plus != 1 else None,
    }
    arguments |= {key: str(value) for key, value in more.items() if value or (key == "wd_on_output" and value is False)}
    return {
        "ss_network_module": "networks.lora" if kind == "lora" else "lycoris.kohya",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments),
    }


def dataset_keys(recipe: Recipe, base: Base, dataset: Dataset, classes: Dataset | None) -> dict[str, str]:
    """What kohya's trainer would have written about the pictures: folders, tags, buckets and what is done to captions."""
    data, places = recipe.data, grid_of(base, recipe)
    shapes = Counter(places.shape_of(example.size) for example in dataset.examples for _ in range(example.repeats))
    found = {str(i): {"resolution": list(shape), "count": count} for i, (shape, count) in enumerate(sorted(shapes.items()))}
    errors = [abs(e.size[0] / e.size[1] - shape[0] / shape[1]) for e in dataset.examples for shape in [places.shape_of(e.size)]]
    drawn = recipe.objective.prior_images if recipe.objective.prior == "images" else 0
    keys = {
        "ss_num_reg_images": len(classes.examples) if classes else drawn,
        "ss_dataset_dirs": _json(directories(dataset, data.folder)),
        "ss_reg_dataset_dirs": _json(directories(classes, data.regularization) if classes and data.regularization else {}),
        "ss_tag_frequency": _json(frequencies(dataset, data.folder)),
        "ss_enable_bucket": data.buckets,
        "ss_bucket_no_upscale": not data.upscale,
        "ss_min_bucket_reso": min(min(shape) for shape in shapes),
        "ss_max_bucket_reso": max(max(shape) for shape in shapes),
        "ss_bucket_info": _json({"buckets": found, "mean_img_ar_error": sum(errors) / len(errors)} if data.buckets else None),
        "ss_flip_aug": data.flip,
        "ss_random_crop": False,
        "ss_shuffle_caption": data.caption_shuffle,
        "ss_keep_tokens": data.keep_tokens,
        "ss_caption_dropout_rate": data.caption_dropout,
        "ss_caption_tag_dropout_rate": data.tag_dropout,
        "ss_caption_prefix": data.caption_prefix or None,
    }
    return {key: str(value) for key, value in keys.items()}


def directories(dataset: Dataset, root: Path) -> dict[str, dict[str, int]]:
    """Folders by name, with their repeats and numbers of pictures."""
    counts = Counter(example.concept for example in dataset.examples)
    return {_name(one.folder, root): {"n_repeats": one.repeats, "img_count": counts[i]} for i, one in enumerate(dataset.concepts)}


def frequencies(dataset: Dataset, root: Path) -> dict[str, Counter[str]]:
    """How many captions of each folder hold a tag, in lower case as kohya's trainer counts them."""
    found: dict[str, Counter[str]] = {_name(one.folder, root): Counter() for one in dataset.concepts}
    for example in dataset.examples:
        found[_name(dataset.concepts[example.concept].folder, root)].update(tag.lower() for tag in tags(example.caption))
    return found


def _name(folder: str, root: Path) -> str:
    return folder or root.absolute().name


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def trigger_phrases(dataset: Dataset) -> list[str]:
    """How a prompt asks for each concept: its trigger and class, with their brackets escaped as UIs want them."""
    return list(dict.fromkeys(escape(f"{one.trigger} {one.class_name}".strip()) for one in dataset.concepts))


def modelspec_keys(recipe: Recipe, base: Base, dataset: Dataset, name: str, sample: Path | None) -> dict[str, str]:
    """ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec)."""
    side = recipe.data.resolution or base.resolution
    words, title = trigger_phrases(dataset), title_of(recipe.adapter.kind)
    architecture = base.family.architecture_of(base.noise)
    if recipe.adapter.kind == EMBEDDING:
        architecture = f"{architecture.removesuffix('/lora')}/textual-inversion"
    keys = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.description": f"{title} of {' and '.join(words)}, from {len(dataset.examples)} pictures",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": PREDICTION.get(base.noise.prediction, base.noise.prediction),
        "modelspec.trigger_phrase": ", ".join(map(escape, dataset.triggers)),
        "modelspec.usage_hint": "write {} in the prompt".format(" or ".join(f'"{word}"' for word in words)),
    }
    return keys | ({"modelspec.thumbnail": thumbnail(sample)} if sample else {})


def sidecar(recipe: Recipe, base: Base, dataset: Dataset, step: int, weight: float) -> str:
    """NAME.json, which A1111 and Forge read beside the file: an adapter of `step` steps, and its best strength."""
    words = ", ".join(trigger_phrases(dataset))
    said = {
        "description": f"{words}, trained on {Path(base.name).name}",
        "sd version": base.family.a1111 or "Unknown",
        "activation text": words,
        "preferred weight": weight,
        "negative text": "",
        "notes": f"{len(dataset.examples)} pictures, {step} steps; made with personalize {versions()['personalize']}",
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


def versions() -> dict[str, str]:
    """The versions that decide what a run gives."""
    return {"personalize": __version__} | {name: version_of(name) for name in ("torch", "diffusers", "transformers", "peft")}
