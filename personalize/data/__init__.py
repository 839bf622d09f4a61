"""From a folder of pictures to batches of latents.

    dataset.py   what a folder is read as: a Dataset of Examples, each of a Concept
    folder.py    which files are images, what each of them is called and shows: `read_folder` -> Dataset
    captions.py  .txt sidecars, metadata.jsonl, the template; triggers that are safe words and file names
    masks.py     what of a picture is learned: NAME-masklabel.png or its alpha channel
    buckets.py   shapes of one area, and which of them a picture goes to
    images.py    one file -> RGB pixels of a shape, whatever it is stored as
    latents.py   pixels -> posterior mean and std, captions -> conditioning, once: `encode_dataset` -> Latents
    cache.py     the content-addressed cache on disk behind it
    batches.py   which pictures a step sees: `batches` -> Batch, a pure function of (seed, step)

Class images for prior preservation are one more Dataset: `on_demand(base, class_images(folder, prompt), recipe)`, and
`batch_at(..., purpose="prior", shape=...)` for a stream of their own, in the shapes of the steps.

Names are imported when first used: latents.py, cache.py and batches.py need torch, and a look at a folder must not wait for it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..lazy import Lazy

if TYPE_CHECKING:
    from .batches import Batch, batch_at, batches, generator
    from .captions import fill, remove_triggers, safe_trigger
    from .dataset import Concept, Dataset, Example
    from .folder import class_images, read_folder, regularization
    from .latents import Latents, encode_dataset, grid_of, load_pixels, on_demand

_HOMES = {
    "Batch": "batches",
    "Concept": "dataset",
    "Dataset": "dataset",
    "Example": "dataset",
    "Latents": "latents",
    "batch_at": "batches",
    "batches": "batches",
    "class_images": "folder",
    "encode_dataset": "latents",
    "fill": "captions",
    "generator": "batches",
    "grid_of": "latents",
    "load_pixels": "latents",
    "on_demand": "latents",
    "read_folder": "folder",
    "regularization": "folder",
    "remove_triggers": "captions",
    "safe_trigger": "captions",
}

__all__ = [
    "Batch",
    "Concept",
    "Dataset",
    "Example",
    "Latents",
    "batch_at",
    "batches",
    "class_images",
    "encode_dataset",
    "fill",
    "generator",
    "grid_of",
    "load_pixels",
    "on_demand",
    "read_folder",
    "regularization",
    "remove_triggers",
    "safe_trigger",
]

sys.modules[__name__].__class__ = Lazy
