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

from ..data.captions import remove_triggers
from ..data.dataset import Example
from ..data.latents import load_pixels
from ..errors import DataError
from ..io import write_text
from ..models.clip import Clip
from ..models.sources import locate
from ..training.events import Chosen, Sample, Started, parse, read_events
from ..training.sample_names import drawing_of


@dataclass(frozen=True)
class Row:
    """A figure for the report: what the base got, what the adapter got, what is possible."""

    name: str
    base: float
    adapter: float
    ceiling: float | None
    better: str  # "higher" or "lower"
    explain: str


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
    base = {(event.prompt, event.seed, drawing_of(event.path)): event.path for event in samples if event.base}
    pairs: dict[bool, list[Pair]] = {True: [], False: []}
    for event in samples:
        twin = base.get((event.prompt, event.seed, drawing_of(event.path)))
        if event.step == shown and not event.base and twin:
            words, has_trigger = remove_triggers(triggers, event.prompt)
            pairs[has_trigger].append(Pair(words, load_rgb(folder / twin), load_rgb(folder / event.path)))
    side = max((pair.adapter.width for pair in pairs[True] + pairs[False]), default=0)
    training = [picture for one in images if (picture := training_crop(one, side))]
    return Evidence(pairs[True], pairs[False], training)


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
    explain = "CLIP-T: cosine of pictures to their prompts without the trigger"
    return Row("does what the prompt says", before, after, None, "higher", explain)


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
