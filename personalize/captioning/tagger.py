"""Tags, by a model that says how likely each is: WD taggers as they are published, or a classifier of transformers.

model.onnx, selected_tags.csv      booru tags with categories; needs `pip install 'personalize[tag]'`
config.json, *.safetensors         any image classification; its labels are the tags
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BaseModelError
from ..models.sources import CONFIG, read_json
from ..pictures.metadata import read_text
from ..text import first_line
from .captioner import AUTO, Captioner, Manner, Say, load_with_processor, opening

if TYPE_CHECKING:
    from PIL import Image

ONNX, TAGS = "model.onnx", "selected_tags.csv"
CHARACTER, RATING = "4", "9"  # categories of booru tags
WORD = re.compile(r"[^\W_]{2}")  # two letters in a row: o_o is a face and keeps its underscore
Likely = Callable[[Sequence["Image.Image"]], np.ndarray]  # images => how likely each tag is, [n, tags]


@dataclass(frozen=True)
class Tag:
    """A tag as people write it, and its category."""

    name: str
    category: str = ""


def recognise(folder: Path) -> bool:
    """Whether a folder holds such a model."""
    if (folder / ONNX).is_file() and (folder / TAGS).is_file():
        return True
    kinds = read_json(folder / CONFIG).get("architectures") if (folder / CONFIG).is_file() else None
    return any(str(kind).endswith("ForImageClassification") for kind in kinds or ())


def open_tagger(folder: Path, manner: Manner) -> Say:
    """What a folder holds."""
    tags, likely = open_onnx(folder, manner) if (folder / TAGS).is_file() else open_classifier(folder, manner)

    def say(images: Sequence[Image.Image]) -> list[str]:
        return [", ".join(choose_tags(tags, row, manner)) for row in likely(images)]

    return say


def choose_tags(tags: Sequence[Tag], likely: np.ndarray, manner: Manner) -> list[str]:
    """The tags that are likely enough: characters first, then the others, the likeliest first. Ratings are no tags.

    >>> choose_tags([Tag("cat"), Tag("rex", "4"), Tag("dog")], np.array([0.5, 0.9, 0.1]), TAGGER.defaults)
    ['rex', 'cat']
    """
    found = []
    for tag, share in zip(tags, map(float, likely), strict=True):
        is_character = tag.category == CHARACTER
        enough = manner.character_threshold if is_character else manner.threshold
        if tag.category != RATING and enough is not None and share >= enough:
            found.append((not is_character, -share, tag.name))
    return [name for _, _, name in sorted(found)]


def written_name(name: str) -> str:
    """A tag with spaces for underscores, unless it is a face.

    >>> written_name("long_hair"), written_name("o_o"), written_name("||_||")
    ('long hair', 'o_o', '||_||')
    """
    return name.replace("_", " ") if WORD.search(name) else name


# ---------------------------------------------------------------- onnx


def read_tags(path: Path) -> list[Tag]:
    """The tags of selected_tags.csv, in the model's order. Raises BaseModelError."""
    try:
        return [Tag(written_name(row["name"]), row["category"]) for row in csv.DictReader(read_text(path).splitlines())]
    except (KeyError, csv.Error) as error:
        raise BaseModelError(f"{path} is no table of tags", "its first line names the columns name and category") from error


def open_onnx(folder: Path, manner: Manner) -> tuple[list[Tag], Likely]:
    """A WD tagger. Raises BaseModelError."""
    import torch

    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError as error:
        raise BaseModelError(f"{folder} needs onnxruntime", "pip install onnxruntime") from error
    tags, path = read_tags(folder / TAGS), folder / ONNX
    wanted = ["CUDAExecutionProvider"] * (manner.place[0].type == "cuda") + ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    own = [one for one in vars(state).values() if isinstance(one, type) and issubclass(one, Exception)]
    failures: tuple[type[Exception], ...] = (RuntimeError, ValueError, *own)  # its own have no root in common
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except failures as error:
        raise BaseModelError(f"{path} cannot be opened: {first_line(error)}", "is the download complete?") from error
    (given, *_), (made, *_) = session.get_inputs(), session.get_outputs()
    if len(given.shape) != 4 or given.shape[3] != 3 or given.shape[1] != given.shape[2] or not isinstance(given.shape[1], int):
        raise BaseModelError(f"{path} takes {given.shape}", "a WD tagger takes [n, side, side, 3]")
    if made.shape[-1] != len(tags):
        raise BaseModelError(
            f"{path} tells {made.shape[-1]} tags apart, and {TAGS} names {len(tags)}", "both must be of one model"
        )

    def likely(images: Sequence[Image.Image]) -> np.ndarray:
        pixels = np.stack([bgr_square(image, given.shape[1]) for image in images])
        if isinstance(given.shape[0], int):  # made for so many at a time
            return np.concatenate([session.run(None, {given.name: one[None]})[0] for one in pixels])
        return np.asarray(session.run(None, {given.name: pixels})[0])

    return tags, likely


def bgr_square(image: Image.Image, side: int) -> np.ndarray:
    """An image on a white square as WD taggers take it: [side, side, 3], blue first, 0 to 255."""
    from PIL import Image

    whole = Image.new("RGB", (max(image.size),) * 2, "white")
    whole.paste(image, ((whole.width - image.width) // 2, (whole.height - image.height) // 2))
    return np.asarray(whole.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)[:, :, ::-1]


# ---------------------------------------------------------------- transformers


def open_classifier(folder: Path, manner: Manner) -> tuple[list[Tag], Likely]:
    """A classifier of transformers: many labels at a time where its config says so, else one. Raises BaseModelError."""
    import torch
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoImageProcessor

    device, dtype = manner.place
    with opening(folder):
        model, processor = load_with_processor(folder, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoImageProcessor, dtype)
    model.to(device)
    names = model.config.id2label
    tags = [Tag(written_name(str(names[number]))) for number in range(len(names))]
    many = model.config.problem_type == "multi_label_classification"

    @torch.no_grad()
    def likely(images: Sequence[Image.Image]) -> np.ndarray:
        logits = model(**processor(images=list(images), return_tensors="pt").to(device, dtype)).logits.float()
        return np.asarray((logits.sigmoid() if many else logits.softmax(-1)).cpu())

    return tags, likely


DEFAULTS = Manner(threshold=0.35, character_threshold=0.85, device=AUTO, precision="float32")
TAGGER = Captioner("a tagger", recognise, open_tagger, DEFAULTS)
