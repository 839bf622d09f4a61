"""What the base can draw of the training images, before anything is learned.

An adapter changes what the denoiser wants; all of it passes through the autoencoder. What is lost when the training images are
encoded and decoded, no adapter can draw. `train` asks here before its first step, and `personalize dataset` without training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data.buckets import Shape
from ..data.dataset import Concept, Dataset, Example
from ..data.images import load_picture
from ..data.latents import Latents, load_pixels
from ..findings import Finding
from ..inference.sampling import to_images
from ..inference.sheet import contact_sheet, save_sheet
from ..models.clip import Eyes, eyes_for
from ..models.model import Base
from ..text import spread
from .calibration import calibration_of
from .events import Encoded
from .preflight import RunPlan
from .signs import NOUNS
from .verdict import WORLD, kept_words

SHOWN = 6  # images
POOR = 20.0  # dB: below it, everybody sees that something is missing
CLEARLY = 1.0  # standard deviations over things: pocket's CLIP takes photographs of a cat for a dog by 0.7, the demo's by -0.4
OTHERS = "a base such as SD 1.5 or SDXL draws more (--base FOLDER or FILE)"
FINER = "another autoencoder (--vae FILE) or base may keep more (--base FOLDER or FILE)"

Encode = Callable[[int], Tensor]  # an image's number => the mean of its posterior [c, h, w]


@dataclass(frozen=True)
class Reconstruction:
    """Some training images, as the base's autoencoder gives them back."""

    kept: tuple[float, ...]  # peak signal-to-noise ratio of each, in dB
    usual: float | None  # the same of the drawings that the base was made for, where that is known
    sheet: Image.Image  # the images above what became of them
    concern: Finding | None  # where that is not enough

    @property
    def mean(self) -> float:
        """In dB."""
        return sum(self.kept) / len(self.kept)


@torch.no_grad()
def reconstruct(base: Base, example: Example, shape: Shape, mean: Tensor) -> tuple[Image.Image, Image.Image, float]:
    """An image as the base sees it, what its autoencoder makes of it, and the peak signal-to-noise ratio in dB."""
    pixels = load_pixels(example, shape)[None]
    decoded = base.decode(mean[None].to(base.device, base.dtype)).float().cpu()
    error = float((decoded - (pixels.float() / 127.5 - 1)).square().mean())
    image = Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())
    return image, to_images(decoded)[0], 10 * math.log10(4 / error) if error else 99.0


def reconstruct_some(
    base: Base, examples: Sequence[Example], shapes: Sequence[Shape], encode: Encode, most: int = SHOWN
) -> Reconstruction:
    """At most so many training images, evenly chosen, above what the autoencoder gives back of each, and what is kept of them."""
    found = [reconstruct(base, examples[i], shapes[i], encode(i)) for i in spread(len(examples), most)]
    side = min(192, 2 * max(image.width for image, _, _ in found))
    cells = [fit_square(image, side) for image, _, _ in found] + [fit_square(image, side) for _, image, _ in found]
    sheet = contact_sheet(cells, len(found), rows=("training images", "as the base's autoencoder gives them back"), side=side)
    kept, known = tuple(round(ratio, 2) for _, _, ratio in found), calibration_of(base)
    return Reconstruction(kept, known.autoencoder.mean if known else None, sheet, concern_about(base, kept))


def show_reconstruction(plan: RunPlan, latents: Latents) -> Encoded:
    """Save some training images above what the autoencoder makes of them, and tell how much it keeps."""
    found = reconstruct_some(
        plan.base, plan.dataset.examples, latents.shapes, lambda i: latents.posterior(i, latents.shapes[i], False)[0]
    )
    path = plan.run.folder / "samples" / "autoencoder.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_sheet(found.sheet, path)
    concern, usual = found.concern.sentence if found.concern else "", math.nan if found.usual is None else found.usual
    return Encoded(list(found.kept), plan.run.relative(path), concern, usual)


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """An image inside a white square: reduced if it is larger, and else grown by a whole factor, every pixel kept square."""
    factor = side // max(image.size)
    small = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST) if factor else image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (side, side), "white")
    cell.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return cell


def concern_about(base: Base, kept: Sequence[float]) -> Finding | None:
    """What is to be said where the autoencoder loses much of the training images; None where it does not.

    >>> from types import SimpleNamespace
    >>> concern_about(SimpleNamespace(path="elsewhere"), [17.0, 18.0]).what
    "the base's autoencoder loses much of these images (18 dB are kept)"
    """
    mean, known = sum(kept) / len(kept), calibration_of(base)
    if known and mean < known.autoencoder.low:
        what = f"the base's autoencoder {kept_words(mean, known.autoencoder.mean)}: fine detail is lost before any training"
        return Finding("warning", "autoencoder", what, hint=OTHERS)
    if not known and mean < POOR:
        what = f"the base's autoencoder loses much of these images ({mean:.0f} dB are kept)"
        return Finding("warning", "autoencoder", what, hint=FINER)
    return None


# ---------------------------------------------------------------- classes


def find_strange_classes(base: Base, dataset: Dataset, side: int) -> Iterator[Finding]:
    """For each class, what is wrong with it on this base: it was never taught, or the images look like something else.

    `side` is of the images, in pixels. Raises DataError for an image that cannot be read any more.
    """
    eyes: Eyes | None = None
    for number, concept in enumerate(dataset.concepts):
        if not concept.class_name:
            continue
        if unknown := unknown_class(base, concept):
            yield unknown
        elif eyes := eyes or eyes_for(Path(base.path)):
            own = [example for example in dataset.examples if example.concept == number]
            training = square_crops(own, side, SHOWN)
            if training and (other := outside_world(base, eyes, training) or unlike_class(eyes, concept, training)):
                yield other


def unknown_class(base: Base, concept: Concept) -> Finding | None:
    """What is to be said where the base is known never to have met the class; None otherwise."""
    known, word = calibration_of(base), concept.class_name.split()[-1]
    if not known or word.lower() in known.nouns:
        return None
    what = f"{base.name} was never taught what '{word}' is: it knows {', '.join(known.nouns)}"
    return Finding("warning", "unknown-class", what, hint=OTHERS)


def outside_world(base: Base, eyes: Eyes, training: Sequence[Image.Image]) -> Finding | None:
    """What is to be said where images of a thing look like nothing that the base was taught; None where that is unknown."""
    if likeness_to_world(base, eyes, training) >= WORLD:
        return None
    return Finding("warning", "outside-world", f"the training images look like nothing that {base.name} was taught", hint=OTHERS)


def likeness_to_world(base: Base, eyes: Eyes, training: Sequence[Image.Image]) -> float:
    """The mean cosine of square images of a thing to what they look most like of what the base was taught; 1 where unknown."""
    if not (known := calibration_of(base)):
        return 1.0
    texts = eyes.clip.texts([f"a {noun}" for noun in known.nouns])
    return float((eyes.clip.pictures(training) @ texts.T).amax(1).mean())


def unlike_class(eyes: Eyes, concept: Concept, training: Sequence[Image.Image]) -> Finding | None:
    """What is to be said where square training images look clearly more like another thing than like their class, or None."""
    name = concept.class_name
    things = (name, *(noun for noun in NOUNS if noun not in name.lower().split()))
    likeness = (eyes.clip.pictures(training) @ eyes.clip.texts([f"a {thing}" for thing in things]).T).mean(0)
    best = things[int(likeness.argmax())]
    if likeness.max() - likeness[0] <= CLEARLY * likeness.std():
        return None
    what = f"the training images look more like '{best}' than like '{name}'"
    return Finding("warning", "unlike-class", what, hint=f"if that is what they show, say so: --class {best}")


def training_squares(plan: RunPlan, most: int) -> list[Image.Image]:
    """At most so many of the training images, evenly chosen, cropped to squares of the run's side."""
    return square_crops(plan.dataset.examples, plan.side, most)


def square_crops(examples: Sequence[Example], side: int, most: int) -> list[Image.Image]:
    """At most so many images, evenly chosen, cropped to squares of a side in pixels. Raises DataError."""
    return [load_picture(examples[i], (side, side)) for i in spread(len(examples), most)]
