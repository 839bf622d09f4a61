"""The small recipe of the tests: what each of them trains, unless it says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from personalize.families.pocket import POCKET
from personalize.recipe.fields import Recipe
from personalize.recipe.resolve import resolve

LATENT = (POCKET.latents.channels, *[64 // POCKET.latents.factor] * 2)  # of one image, for the embedded base
SMALL = {"class": "cat", "steps": 4, "batch_size": 2, "rank": 2, "checkpoint_every": 2, "choose": "none"}
QUIET = {"sample_prompts": [], "sample_seeds": [0], "sample_steps": 1}


def small_recipe(base: Path, folder: Path, /, **flags: Any) -> Recipe:
    """Four steps of two images at rank 2 with two checkpoints; nothing is sampled, nothing is chosen. `flags` come over it."""
    return resolve(flags={"base": str(base), "folder": folder, **SMALL, **QUIET, **flags})
