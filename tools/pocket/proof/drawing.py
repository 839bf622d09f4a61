"""Pictures for the benchmarks: trials (a prompt, a seed, the scene it should show), drawn and judged."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from personalize.inference import schedulers
from personalize.inference.pipeline import draw_images
from personalize.inference.request import Request
from personalize.io import atomic
from personalize.models.model import Base

from ..judge import Judge, agreement, truth
from ..world import Scene, render

Pictures = list[Image.Image]


@dataclass(frozen=True)
class Trial:
    """A prompt, the seed it is drawn with, and the scene that it asks for."""

    prompt: str
    seed: int
    scene: Scene


class Artist:
    """Draws trials with a base and whatever is attached to it. What the base draws alone is kept in `cache`."""

    def __init__(self, base: Base, cache: Path, options: argparse.Namespace) -> None:
        self.base, self.cache, self.identity = base, cache, identity(base.path)
        sampler = schedulers.sampler_of(base, options.sampler)
        self.how = {"sampler": sampler, "steps": options.sampler_steps, "guidance": options.guidance}
        self.told = f"{options.sampler_steps} steps of {sampler}, guidance {options.guidance:g}"

    def draw(self, trials: Sequence[Trial], label: str = "") -> Pictures:
        """Pictures of trials with what is attached now."""
        requests = [Request(trial.prompt, trial.seed, **self.how) for trial in trials]
        drawn: Pictures = []
        for picture in draw_images(self.base, requests, batch_size=16):
            drawn.append(picture)
            if label and len(drawn) % 48 == 0:
                print(f"{label}: {len(drawn)}/{len(trials)} pictures", flush=True)
        return drawn

    def draw_base(self, trials: Sequence[Trial], label: str = "") -> Pictures:
        """Pictures of trials by the base alone: call it with nothing attached."""
        wanted = json.dumps([self.identity, self.how, [(t.prompt, t.seed) for t in trials]])
        return load_or_draw(
            self.cache / f"{hashlib.sha256(wanted.encode()).hexdigest()[:20]}.npy", lambda: self.draw(trials, label)
        )


def load_or_draw(file: Path, draw: Callable[[], Pictures]) -> Pictures:
    """The pictures in a file, which is made by `draw` if it is not there."""
    if not file.is_file():
        with atomic(file) as temporary, temporary.open("wb") as out:
            np.save(out, np.stack([np.asarray(picture) for picture in draw()]))
    return load_images(file)


def load_images(file: Path) -> Pictures:
    """The pictures in a file of arrays [n, h, w, 3]."""
    return [Image.fromarray(array) for array in np.load(file)]


def identity(folder: Path) -> str:
    """A hash of a base's weights."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*/*.safetensors")):
        if file.parent.name in ("unet", "vae", "text_encoder"):
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def renders(trials: Sequence[Trial], side: int) -> Pictures:
    """The true pictures of the trials' scenes."""
    return [render(trial.scene, side) for trial in trials]


def obedience(
    judge: Judge, pictures: Sequence[Image.Image], trials: Sequence[Trial], heads: Sequence[str]
) -> Mapping[str, float]:
    """The share of pictures on which the judge sees what was asked for, per head and, as "all", at once.

    Scenes that cannot tell a head (the colour in a woodcut) do not count for it.
    """
    verdict = judge.verdict(list(pictures))
    found, whole = {}, [True] * len(trials)
    for head in heads:
        wanted = [truth(trial.scene)[head] for trial in trials]
        told = [i for i, value in enumerate(wanted) if value is not None]
        found[head] = agreement({head: [verdict[head][i] for i in told]}, head, [wanted[i] or "" for i in told])
        whole = [fine and (want is None or said == want) for fine, said, want in zip(whole, verdict[head], wanted, strict=True)]
    return found | {"all": sum(whole) / max(1, len(whole))}
