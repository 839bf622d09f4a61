"""How true pocket's captions are: of renders whose scenes are known, of individuals and looks it never saw, of other pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from personalize.captioning.captioner import Manner
from personalize.captioning.pocket import COLOURS, LOOKS, PLACES, POCKET, THINGS
from personalize.data.images import load_whole
from personalize.models.sources import locate

from ..world import BACKGROUND_WORDS, STYLE_WORDS, SUBJECTS, UNSEEN_STYLES, Scene, render, scenes
from .figures import publish, show

HEADS = ("object", "colour", "background", "style")
COLUMNS = ("figure", "told", "of these true", "told falsely")
SIDE = 256  # pixels of a render: larger than what the captioner sees, as people's pictures are


@dataclass(frozen=True)
class Told:
    """How often something was told of a group of pictures, and how often rightly; None where there is no truth."""

    name: str
    told: float
    true: float | None

    def cells(self) -> tuple[str, ...]:
        wrong = None if self.true is None else self.told * (1 - self.true)
        return self.name, show(self.told, "%"), show(self.true, "%"), show(wrong, "%")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("-n", "--pictures", type=int, default=200, help="pictures per group")
    parser.add_argument("--threshold", type=float, default=POCKET.defaults.threshold, help="how likely a phrase must be")
    parser.add_argument("--others", type=Path, help="folder of pictures of no world that pocket knows")


def values_in(caption: str) -> dict[str, str | None]:
    """What a caption tells, in the world's words; None where it does not."""
    words = caption.replace(",", "").split()
    places = {words[0]: name for name, words in BACKGROUND_WORDS.items()}
    looks = {words[0]: name for name, words in STYLE_WORDS.items()}
    return {
        "object": next((word for word in words if word in THINGS), None),
        "colour": next((word for word in words if word in COLOURS), None),
        "background": next((places[phrase] for phrase in PLACES if phrase in caption), None),
        "style": next((looks[phrase] for phrase in LOOKS if phrase in caption), None),
    }


def groups(number: int, seed: int) -> dict[str, list[Scene]]:
    """Scenes that pretraining did not draw: of its combinations, of those held out, with unseen individuals and looks."""
    seen = [scene for _, scene in zip(range(number), scenes(seed + 910_001), strict=False)]
    held_out = [scene for _, scene in zip(range(number), scenes(seed + 910_002, held_out=True), strict=False)]
    names = list(SUBJECTS)
    people = [
        replace(one, subject=(name := names[i % len(names)]), object=SUBJECTS[name].class_name) for i, one in enumerate(seen)
    ]
    looks = [replace(one, style=UNSEEN_STYLES[i % len(UNSEEN_STYLES)]) for i, one in enumerate(seen)]
    return {"seen combinations": seen, "held-out combinations": held_out, "unseen individuals": people, "unseen looks": looks}


def measure(captions: Sequence[str], truth: Sequence[Scene]) -> list[Told]:
    """Figures of a group: how often each thing is told, and is true."""
    rows = []
    for head in HEADS:
        pairs = [(values_in(caption)[head], scene) for caption, scene in zip(captions, truth, strict=True)]
        told = [value == getattr(scene, head) for value, scene in pairs if value is not None]
        known = not (head == "colour" and truth[0].subject)  # an individual has colours of its own
        rows.append(Told(head, len(told) / len(pairs), sum(told) / len(told) if told and known else None))
    empty = sum(not caption for caption in captions) / len(captions)
    return [*rows, Told("nothing at all", empty, None)]


def other_pictures(folder: Path) -> list[Image.Image]:
    """The pictures of a folder, at any depth."""
    return [load_whole(path) for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".png", ".jpg", ".jpeg")]


def main(options: argparse.Namespace) -> None:
    """Render, caption, compare, publish."""
    say = POCKET.open(locate(options.base), POCKET.fill(Manner(threshold=options.threshold)))
    tables, data = {}, {}
    for name, truth in groups(options.pictures, options.seed).items():
        captions = say([render(scene, SIDE) for scene in truth])
        tables[name], data[name] = measure(captions, truth), captions[:12]
    about = {"base": options.base, "pictures": f"{options.pictures} per group, {SIDE} px", "threshold": options.threshold}
    if options.others:
        others = say(other_pictures(options.others))
        tables[f"{len(others)} other pictures"] = [Told("anything", sum(map(bool, others)) / len(others), None)]
    publish(options.to, options.name, "How true pocket's captions are", about, tables, data, COLUMNS)
