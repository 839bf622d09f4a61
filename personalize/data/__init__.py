"""From a folder of pictures to batches of latents.

    folder.py    which files are pictures, and what each of them is called: `read_folder` -> Dataset of Examples
    captions.py  .txt sidecars, metadata.jsonl, the template; triggers that are safe words and file names
    pictures.py  one file -> square RGB pixels, whatever it is stored as: `load_pixels`
    latents.py   pixels -> posterior mean and std, captions -> conditioning, once: `cached` -> Latents
    store.py     the content-addressed cache on disk behind it
    batches.py   which pictures a step sees: `batches` -> Batch, a pure function of (seed, step)

Class images for prior preservation are one more Dataset: `cached(base, class_images(folder, prompt), recipe)`, and
`batches(..., purpose="prior")` for a stream of their own.
"""

from .batches import Batch, batches, generator
from .captions import fill, safe_trigger, without
from .folder import Dataset, Example, class_images, read_folder
from .latents import Latents, cached
from .pictures import load_pixels

__all__ = [
    "Batch",
    "Dataset",
    "Example",
    "Latents",
    "batches",
    "cached",
    "class_images",
    "fill",
    "generator",
    "load_pixels",
    "read_folder",
    "safe_trigger",
    "without",
]
