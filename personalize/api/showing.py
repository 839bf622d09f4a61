"""Whether a folder of pictures shows one thing or a style, where nobody has said: from its captions, else its pictures."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..data.folder import read_folder
from ..errors import PersonalizeError
from ..models.sources import NAMED
from ..recipe.fields import Data

ENOUGH = 4  # pictures: of fewer, nothing is concluded
# Mean cosine of pocket's CLIP between the pictures. On 8 unseen things of its world it was 0.68 to 0.77, on 6 unseen styles 0.16,
# 0.38, 0.56, 0.57, 0.64 and 0.81: two styles were missed, and no thing was taken for a style.
UNLIKE = 0.6
# Words that say nothing about what is shown
EMPTY = {
    "a",
    "an",
    "and",
    "at",
    "by",
    "for",
    "from",
    "her",
    "his",
    "in",
    "is",
    "it",
    "its",
    "of",
    "on",
    "or",
    "the",
    "to",
    "with",
}
EMPTY |= {"photo", "picture", "image", "drawing", "painting", "style"}


@dataclass(frozen=True)
class Showing:
    """What a folder shows, and why that is thought. `class_name` is the word for a thing, if it is known."""

    style: bool
    class_name: str = ""
    why: str = ""

    def line(self, style_preset: str = "") -> str:
        """What it is taken for, and how to say otherwise, as one line; `style_preset` is the base's preset for styles, if any.

        >>> Showing(False, "cat", "all captions call it 'zwx cat'").line("sd15-style")
        "taken for a cat, since all captions call it 'zwx cat': --class WORD or --preset sd15-style says otherwise"
        """
        if self.style:
            return f"taken for a style, since {self.why}: --class dog would say that it is one thing, a dog"
        for_styles = f" or --preset {style_preset}" if style_preset else ""
        if self.class_name:
            return f"taken for a {self.class_name}, since {self.why}: --class WORD{for_styles} says otherwise"
        is_style = f", --preset {style_preset} that it is a style" if style_preset else ""
        return f"taken for one thing without a name: --class dog would say that it is a dog{is_style}"


def find_out(folder: Path, base: str, trigger: str | None = None) -> Showing | None:
    """What a folder shows, as far as it can be known; None where its own name or its subfolders' say it, as `10_zwx dog` does.

    None too where the folder cannot be read: that is for others to complain about, and nothing is said of what it shows.
    """
    with contextlib.suppress(PersonalizeError):
        dataset = read_folder(Data(folder=folder, trigger=trigger, caption=""))
        if any(concept.class_name for concept in dataset.concepts) or len(dataset.concepts) > 1:
            return None
        captions = [example.caption for example in dataset.examples]
        if any(captions):
            return from_captions([caption for caption in captions if caption], dataset.trigger)
        return from_pictures([example.path for example in dataset.examples], base)
    return None


def from_captions(captions: Sequence[str], trigger: str = "") -> Showing:
    """A thing if all captions name one, a style if they name different ones.

    >>> from_captions(["a zwx cat on a mat", "a zwx cat at night", "zwx cat, asleep"], "zwx").class_name
    'cat'
    >>> from_captions(["a cup, ink", "a red car at night", "two boats", "a house in the snow"]).style
    True
    """
    words = [re.findall(r"\w[\w-]*", caption.lower()) for caption in captions]
    own = set(re.findall(r"\w[\w-]*", trigger.lower()))
    counts = Counter(word for one in words for word in set(one) - EMPTY - own)
    shared = [word for word, count in counts.items() if count == len(captions)]
    following = {second for one in words for first, second in pairwise(one) if first in own}
    if len(following) == 1 and (name := min(following)) in shared:
        return Showing(False, name, f"all captions call it '{trigger} {name}'")
    looks = set.intersection(*({first for first, second in pairwise(one) if second == "style"} for one in words))
    if looks - EMPTY:
        return Showing(True, why=f"all captions say '{min(looks - EMPTY)} style'")
    most = max(counts.values(), default=0)
    if len(captions) >= ENOUGH and most <= len(captions) / 2:
        return Showing(True, why="the captions name different things")
    return Showing(False)


def from_pictures(paths: Sequence[Path], base: str) -> Showing:
    """A style if the pictures are unlike each other to pocket's CLIP, which knows the things of its own world, and no others.

    On other bases nothing is concluded from pictures.
    """
    if base not in NAMED or len(paths) < ENOUGH:
        return Showing(False)
    likeness = mean_likeness(paths, NAMED[base])
    if likeness is not None and likeness < UNLIKE:
        return Showing(True, why=f"the pictures share no thing (mean likeness {likeness:.2f})")
    return Showing(False)


def mean_likeness(paths: Sequence[Path], base: Path) -> float | None:
    """The mean cosine of the pictures to each other by the base's CLIP; None where it has none."""
    from PIL import Image

    from ..reports.metrics import Clip  # torch, for this question alone

    if (clip := Clip.of(base)) is None:
        return None
    pictures: list[Any] = []
    for path in paths[:24]:
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    vectors, count = clip.pictures(pictures), len(pictures)
    return float(((vectors @ vectors.T).sum() - count) / (count * (count - 1)))
