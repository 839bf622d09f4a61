"""What drawings of pocket's world show, by its own CLIP: offline, and nothing else than that world.

Phrases that the base was taught are compared with an image, each in the sentence of the others, as in the captions that
taught it. What does not win clearly is left out, and of an image that no sentence fits nothing is said. How often that is
right: docs/figures/captions.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BaseModelError
from .captioner import Captioner, Manner, Say

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..models.clip import Clip

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black")
THINGS = ("cat", "dog", "fish", "bird", "car", "house", "tree", "flower", "mushroom", "boat", "cup", "umbrella")
PLACES = ("on the beach", "in the forest", "in the snow", "at night", "in the city", "in the desert", "in a meadow", "in a room")
LOOKS = ("flat illustration", "ink drawing", "pixel art", "pastel drawing", "watercolour")
CLOSE = 10  # things that are looked at again in their place and look
# Cosine of an image and its best sentence: below it, an image is of another world. All of 200 renders of this one lay above,
# all of 28 photographs and figures below.
KNOWN = 0.62
# What naming the look must add to that cosine: of a look that it was never taught, it takes the nearest, which adds less.
GAIN = 0.05


class Reader:
    """Images => sentences. Vectors of texts are kept, since images share most of them."""

    def __init__(self, clip: Clip, threshold: float) -> None:
        self.clip, self.threshold = clip, threshold
        self.scale = float(clip.model.logit_scale.exp())
        self.known: dict[str, Tensor] = {}

    def say(self, images: Sequence[Image.Image]) -> list[str]:
        """A sentence for each image, "" for one that none fits."""
        return [self._sentence(vector) for vector in self.clip.pictures([square(image) for image in images])]

    def _sentence(self, image: Tensor) -> str:
        things = {f"{article(colour)} {thing}": (colour, thing) for colour in COLOURS for thing in THINGS}
        likely = self._shares(image, list(things))
        close = sorted(things, key=lambda phrase: -likely[phrase])[:CLOSE]
        look = best(self._shares(image, LOOKS))
        places = self._shares(image, PLACES, f"{close[0]} {{}}, {look}")
        looks = self._shares(image, LOOKS, f"{close[0]} {best(places)}, {{}}")
        again = self._shares(image, close, f"{{}} {best(places)}, {best(looks)}")
        plain = f"{best(again)} {best(places)}"
        fit, fit_without = (self._vectors([f"{plain}, {best(looks)}", plain]) @ image).tolist()
        if fit < KNOWN:
            return ""
        thing = self._clear_thing({things[phrase]: share for phrase, share in again.items()})
        place, look = (best(shares) if max(shares.values()) >= self.threshold else "" for shares in (places, looks))
        look = look if fit - fit_without >= GAIN else ""
        return ", ".join(filter(None, [" ".join(filter(None, [thing, place])), look]))

    def _clear_thing(self, shares: dict[tuple[str, str], float]) -> str:
        """The thing with its colour, without it where only the thing is clear, or nothing."""
        colour, thing = max(shares, key=lambda pair: shares[pair])
        if shares[colour, thing] >= self.threshold:
            return f"{article(colour)} {thing}"
        alone: dict[str, float] = defaultdict(float)
        for (_, name), share in shares.items():
            alone[name] += share
        name = max(alone, key=lambda one: alone[one])
        return article(name) if alone[name] >= self.threshold else ""

    def _shares(self, image: Tensor, phrases: Sequence[str], around: str = "{}") -> dict[str, float]:
        """How likely each phrase is of an image, against the others, in a sentence `around` it."""
        cosines = self._vectors([around.format(phrase) for phrase in phrases]) @ image
        return dict(zip(phrases, (self.scale * cosines).softmax(0).tolist(), strict=True))

    def _vectors(self, texts: Sequence[str]) -> Tensor:
        import torch

        if new := [text for text in texts if text not in self.known]:
            self.known |= dict(zip(new, self.clip.texts(new), strict=True))
        return torch.stack([self.known[text] for text in texts])


def best(shares: dict[str, float]) -> str:
    """The likeliest phrase."""
    return max(shares, key=lambda phrase: shares[phrase])


def article(word: str) -> str:
    """A word with its article.

    >>> article("orange"), article("cat")
    ('an orange', 'a cat')
    """
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def square(image: Image.Image) -> Image.Image:
    """The centre of an image, as training crops it."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def recognise(folder: Path) -> bool:
    """Whether a folder is a base with a CLIP of its own beside it, which only pocket has."""
    return (folder / "clip" / "config.json").is_file()


def open_pocket(folder: Path, manner: Manner) -> Say:
    """Pocket's CLIP, which computes on the CPU: it is small. Raises BaseModelError."""
    from ..models.clip import Clip

    clip = Clip.of(folder)
    if clip is None:
        raise BaseModelError(f"{folder} has no CLIP", "reinstall")
    assert manner.threshold is not None
    return Reader(clip, manner.threshold).say


POCKET = Captioner("pocket, for drawings of its own world", recognise, open_pocket, Manner(threshold=0.7))
