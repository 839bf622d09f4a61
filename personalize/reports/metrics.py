"""Metrics of an adapter from the pictures in its run folder: rows of figures, base beside adapter.

Likeness and obedience are cosines of CLIP embeddings (Radford et al. 2021; CLIP-I and CLIP-T as in Ruiz et al. 2022), by the
CLIPModel in the base's own `clip/` folder. A base without one still gets the figures that need only pixels.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..data.captions import remove_triggers
from ..data.dataset import Example
from ..data.latents import load_pixels
from ..errors import DataError
from ..families.tokens import load_tokenizer
from ..io import write_text
from ..models.folder import load_model
from ..models.model import quiet
from ..models.sources import locate, read_json
from ..training.events import Chosen, Sample, Started, parse, read_events

HALF = [0.5, 0.5, 0.5]  # mean and deviation of a CLIP folder without its own: pixels in -1..1


@dataclass(frozen=True)
class Row:
    """A figure for the report: what the base got, what the adapter got, what is possible."""

    name: str
    base: float
    adapter: float
    ceiling: float | None
    better: str  # "higher" or "lower"
    explain: str


class Clip:
    """A CLIP with both towers: pictures and texts as unit vectors in one space."""

    def __init__(self, model: Any, tokenizer: Any, mean: Sequence[float], deviation: Sequence[float]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mean, self.deviation = (torch.tensor(values)[:, None, None] for values in (mean, deviation))

    @classmethod
    def of(cls, base: Path) -> Clip | None:
        """The CLIP in a base's `clip/` folder, None if it has none. Raises BaseModelError for a broken one.

        Where the base's own text encoder is its text tower, as in SD 1.x, the folder may leave that out.
        """
        folder = base / "clip"
        if not (folder / "config.json").is_file():
            return None
        from transformers import CLIPModel, CLIPTextModel

        with quiet():
            text = load_model(CLIPTextModel, base / "text_encoder", torch.float32).state_dict()
            lent = {f"text_model.{key.removeprefix('text_model.')}": weight for key, weight in text.items()}
            model = load_model(CLIPModel, folder, torch.float32, lent).eval().requires_grad_(False)
        own = folder / "preprocessor_config.json"
        about = read_json(own) if own.is_file() else {}
        tokenizer = load_tokenizer((folder if (folder / "tokenizer").is_dir() else base) / "tokenizer")
        return cls(model, tokenizer, about.get("image_mean", HALF), about.get("image_std", HALF))

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Square pictures => unit vectors [n, d]."""
        side = self.model.config.vision_config.image_size
        squares = [np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for picture in pictures]
        pixels = (torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255 - self.mean) / self.deviation
        return torch.cat(
            [F.normalize(feature_tensor(self.model.get_image_features(chunk)), dim=-1) for chunk in pixels.split(64)]
        )

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts => unit vectors [n, d]; longer ones are cut to the model's window."""
        window = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=window, truncation=True, return_tensors="pt")
        return F.normalize(feature_tensor(self.model.get_text_features(tokens.input_ids)), dim=-1)

    def cosines(self, a: Sequence[Image.Image], b: Sequence[Image.Image]) -> Tensor:
        """The cosine [n] of each picture of `a` with its partner in `b`."""
        return (self.pictures(a) * self.pictures(b)).sum(-1)


def feature_tensor(features: Any) -> Tensor:
    """Projected features [n, d]: transformers 5 wraps them in an output object, 4 gave the tensor."""
    found = features if isinstance(features, Tensor) else features.pooler_output
    assert isinstance(found, Tensor)
    return found


# ---------------------------------------------------------------- from a run folder


@dataclass(frozen=True)
class Pair:
    """Two pictures of the same prompt (here without the trigger) and seed: by the base, and with the adapter."""

    prompt: str
    base: Image.Image
    adapter: Image.Image


@dataclass(frozen=True)
class Evidence:
    """The pictures of a run."""

    with_trigger: list[Pair]  # of prompts with the trigger
    without_trigger: list[Pair]  # of prompts that never had it
    training: list[Image.Image]
    captions: list[str]  # of the training pictures, without the trigger


def evidence(folder: Path) -> Evidence:
    """Read a run folder: sample pictures of the step that was chosen (else the last) beside the base's, and training pictures."""
    events = [event for record in read_events(folder / "events.jsonl") if (event := parse(record))]
    started = next((event for event in reversed(events) if isinstance(event, Started)), None)
    recipe, images = (started.recipe, started.images) if started else ({}, [])
    triggers = list(dict.fromkeys(one["trigger"] for one in (recipe, *images) if one.get("trigger")))  # each concept has its own
    samples = [event for event in events if isinstance(event, Sample) and (folder / event.path).is_file()]
    chosen = next((event.step for event in reversed(events) if isinstance(event, Chosen)), None)
    steps = {event.step for event in samples if not event.base}
    shown = chosen if chosen in steps else max(steps, default=0)
    base = {(event.prompt, event.seed): event.path for event in samples if event.base}
    pairs: dict[bool, list[Pair]] = {True: [], False: []}
    for event in samples:
        twin = base.get((event.prompt, event.seed))
        if event.step == shown and not event.base and twin:
            words, has_trigger = remove_triggers(triggers, event.prompt)
            pairs[has_trigger].append(Pair(words, load_rgb(folder / twin), load_rgb(folder / event.path)))
    side = max((pair.adapter.width for pair in pairs[True] + pairs[False]), default=0)
    training = [(training_crop(one, side), remove_triggers(triggers, one["caption"])[0]) for one in images]
    there = [(picture, caption) for picture, caption in training if picture]
    return Evidence(pairs[True], pairs[False], [picture for picture, _ in there], [caption for _, caption in there])


def training_crop(record: dict[str, Any], side: int) -> Image.Image | None:
    """The square centre of a training picture, None if it is gone or has changed since."""
    with contextlib.suppress(DataError):
        image = Example(Path(record["path"]), record["caption"], record["sha256"], (side, side))
        pixels = load_pixels(image, side)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return None


def load_rgb(path: Path) -> Image.Image:
    """A sample picture."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def rows(found: Evidence, clip: Clip | None) -> list[Row]:
    """All figures that the evidence allows."""
    made = []
    if clip and found.with_trigger and found.training:
        made.append(likeness(found, clip))
    if clip and found.with_trigger:
        made.append(obedience(found, clip))
    if clip and found.without_trigger and found.training:
        made.append(leakage(found, clip))
    if clip and found.without_trigger:
        made.append(preservation(found, clip))
    if found.without_trigger:
        made.append(pixel_change(found))
    return made


def both_features(clip: Clip, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """The unit vectors [n, d] of the base's pictures, and of the adapter's."""
    return clip.pictures([pair.base for pair in pairs]), clip.pictures([pair.adapter for pair in pairs])


def likeness(found: Evidence, clip: Clip) -> Row:
    """CLIP-I: the mean cosine of pictures with the trigger to the training pictures; the ceiling is theirs to each other."""
    training = clip.pictures(found.training)
    before, after = (float((vectors @ training.T).mean()) for vectors in both_features(clip, found.with_trigger))
    others = (training @ training.T)[~torch.eye(len(training), dtype=torch.bool)]
    ceiling = float(others.mean()) if len(others) else None
    explain = "CLIP-I: cosine of pictures with the trigger to the training pictures; ceiling: of those to each other"
    return Row("likeness to the training pictures", before, after, ceiling, "higher", explain)


def obedience(found: Evidence, clip: Clip) -> Row:
    """CLIP-T: the mean cosine of pictures to their prompts, without the trigger, which CLIP does not know."""
    texts = clip.texts([pair.prompt for pair in found.with_trigger])
    before, after = (float((vectors * texts).sum(-1).mean()) for vectors in both_features(clip, found.with_trigger))
    ceiling = float((clip.pictures(found.training) * clip.texts(found.captions)).sum(-1).mean()) if found.training else None
    explain = "CLIP-T: cosine of pictures to their prompts without the trigger; ceiling: of training pictures to their captions"
    return Row("does what the prompt says", before, after, ceiling, "higher", explain)


def leakage(found: Evidence, clip: Clip) -> Row:
    """CLIP-I to the training pictures of prompts without the trigger: it should stay where the base has it."""
    training = clip.pictures(found.training)
    before, after = (float((vectors @ training.T).mean()) for vectors in both_features(clip, found.without_trigger))
    explain = "CLIP-I to the training pictures where the prompt lacks the trigger: what is more than the base's has leaked"
    return Row("leak without the trigger", before, after, None, "lower", explain)


def preservation(found: Evidence, clip: Clip) -> Row:
    """The mean cosine of pictures without the trigger to what the base draws from the same prompt and seed."""
    same = clip.cosines([pair.base for pair in found.without_trigger], [pair.adapter for pair in found.without_trigger]).mean()
    explain = "CLIP-I to the base's pictures of the same prompts and seeds, where the prompt lacks the trigger"
    return Row("other pictures stay as they were", 1.0, float(same), 1.0, "higher", explain)


def pixel_change(found: Evidence) -> Row:
    """The mean absolute difference of pixels, 0..1, of pictures without the trigger to the base's."""
    pixels = [(np.asarray(pair.base, float), np.asarray(pair.adapter, float)) for pair in found.without_trigger]
    differences = [np.abs(base - adapter).mean() / 255 for base, adapter in pixels]
    explain = "mean difference of pixels (0 to 1) from the base's pictures where the prompt lacks the trigger, same seeds"
    return Row("pixels changed without the trigger", 0.0, float(np.mean(differences)), None, "lower", explain)


def write_metrics(folder: Path, base: str | Path) -> list[Row]:
    """Write `metrics.json` of a run folder for its report, and return the rows. `base` is the recipe's base.

    Reads what the run left (events.jsonl, samples, training pictures) and draws nothing; figures without evidence are left out.
    """
    measured = rows(evidence(folder), Clip.of(locate(base)))
    write_text(folder / "metrics.json", json.dumps({"rows": [asdict(row) for row in measured]}, indent=1) + "\n")
    return measured
