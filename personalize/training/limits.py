"""What the base can draw of the training images, before anything is learned.

An adapter changes what the denoiser wants; all of it passes through the autoencoder. What is lost when the training images are
encoded and decoded, no adapter can draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..data.dataset import Example
from ..data.images import load_picture
from ..data.latents import Latents, load_pixels
from ..inference.sampling import to_images
from ..inference.sheet import contact_sheet, save_sheet
from ..models.clip import eyes_for
from ..models.model import Base
from ..text import spread
from .calibration import calibration_of
from .events import Encoded
from .preflight import RunPlan
from .signs import NOUNS

SHOWN = 6  # images
POOR = 20.0  # dB: below it, everybody sees that something is missing
OTHERS = "a base such as SD 1.5 or SDXL draws more (--base FOLDER or FILE)"


@torch.no_grad()
def reconstruct(base: Base, latents: Latents, examples: Sequence[Example], number: int) -> tuple[Image.Image, Image.Image, float]:
    """An image as the base sees it, what its autoencoder makes of it, and the peak signal-to-noise ratio in dB."""
    shape = latents.shapes[number]
    pixels = load_pixels(examples[number], shape)[None]
    mean, _ = latents.posterior(number, shape, False)
    decoded = base.decode(mean[None].to(base.device, base.dtype)).float().cpu()
    error = float((decoded - (pixels.float() / 127.5 - 1)).square().mean())
    image = Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())
    return image, to_images(decoded)[0], 10 * math.log10(4 / error) if error else 99.0


def show_reconstruction(plan: RunPlan, latents: Latents) -> Encoded:
    """Save some training images above what the autoencoder makes of them, and tell how much it keeps."""
    examples = plan.dataset.examples
    found = [reconstruct(plan.base, latents, examples, i) for i in spread(len(examples), SHOWN)]
    side = min(192, 2 * max(image.width for image, _, _ in found))
    cells = [fit_square(image, side) for image, _, _ in found] + [fit_square(image, side) for _, image, _ in found]
    path = plan.run.folder / "samples" / "autoencoder.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_sheet(
        contact_sheet(cells, len(found), rows=("training images", "as the base's autoencoder gives them back"), side=side), path
    )
    kept = [round(ratio, 2) for _, _, ratio in found]
    return Encoded(kept, plan.run.relative(path), concern_about(plan.base, kept))


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """An image inside a white square: reduced if it is larger, and else grown by a whole factor, every pixel kept square."""
    factor = side // max(image.size)
    small = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST) if factor else image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (side, side), "white")
    cell.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return cell


def concern_about(base: Base, kept: Sequence[float]) -> str:
    """One sentence where the autoencoder loses much of the training images; empty where it does not.

    >>> from types import SimpleNamespace
    >>> concern_about(SimpleNamespace(path="elsewhere"), [17.0, 18.0])[:49]
    "the base's autoencoder loses much of these images"
    """
    mean, known = sum(kept) / len(kept), calibration_of(base)
    if known and mean < known.autoencoder.low:
        own = f"{mean:.0f} dB of these images, and {known.autoencoder.mean:.0f} of the drawings that it was made for"
        return f"the base's autoencoder keeps {own}: fine detail is lost before any training; {OTHERS}"
    if not known and mean < POOR:
        return f"the base's autoencoder loses much of these images ({mean:.0f} dB are kept); {OTHERS}"
    return ""


def unknown_class(plan: RunPlan) -> str:
    """One sentence where the base is known never to have met the class; empty otherwise."""
    known = calibration_of(plan.base)
    words = [word for one in plan.dataset.concepts for word in one.class_name.split()[-1:]]
    strange = [word for word in dict.fromkeys(words) if known and word.lower() not in known.nouns]
    if not known or not strange:
        return ""
    return f"{plan.base.name} was never taught what '{strange[0]}' is: it knows {', '.join(known.nouns)}; {OTHERS}"


def training_squares(plan: RunPlan, most: int) -> list[Image.Image]:
    """At most so many of the training images, evenly chosen, cropped to squares of the run's side."""
    examples = [plan.dataset.examples[i] for i in spread(len(plan.dataset.examples), most)]
    return [load_picture(example, (plan.side, plan.side)) for example in examples]


def unlike_class(plan: RunPlan) -> str:
    """One sentence where the training images look more like another thing than like their class.

    Nothing is said where no CLIP is at hand, or where there is no class.
    """
    name = plan.dataset.concepts[0].class_name
    eyes = eyes_for(Path(plan.base.path)) if name else None
    if eyes is None:
        return ""
    training = eyes.clip.pictures(training_squares(plan, SHOWN))
    things = tuple(dict.fromkeys((name, *NOUNS)))
    likeness = (training @ eyes.clip.texts([f"a {thing}" for thing in things]).T).mean(0)
    best = things[int(likeness.argmax())]
    return "" if best == name else f"the training images look more like '{best}' than like '{name}': is --class right?"
