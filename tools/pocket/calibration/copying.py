"""When does an adapter repeat its training images? The sign `repeats` on good runs, on made-up copies, and on runs by heart.

The good side are the runs that the estimate is calibrated on. The copies are training images as an adapter that learned them by
heart would draw them: moved by a few pixels, a little recoloured, half of them mirrored, background included. A run by heart is
trained far too long on one image. The mark (`COPIED` in personalize/training/verdict.py) lies between the two sides.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from personalize.adapters.adapter import Adapter
from personalize.io import write_text
from personalize.models.clip import eyes_for
from personalize.models.model import Base
from personalize.models.sources import locate
from personalize.training.evidence import CALLED, ask, draw_questions
from personalize.training.loop import train
from personalize.training.signs import Observer, observe
from personalize.training.verdict import COPIED
from personalize.tuning.attach import attach

from ..proof.drawing import load_images, load_or_draw

BY_HEART = {"cat 2": 1}  # whose first so many images are learned far too long
STRENGTHS = (1.0, 2.0)  # at which a run by heart is drawn
VARIANT = "by heart"
CHANGES = ((0, 0.0), (1, 0.02), (2, 0.05), (4, 0.1))  # of copies: moved by at most so many pixels, recoloured by such a share
SUBSETS = (None, 3, 1)  # training images that a run is held against: all of them, the first ones


@dataclass(frozen=True)
class Row:
    """The sign of some images with the trigger."""

    side: str  # "good", "copies" or "by heart"
    run: str
    what: str
    images: int  # training images
    repeats: float


def shift_image(image: Image.Image, most: int, rng: np.random.Generator) -> Image.Image:
    """An image moved by at most so many pixels each way; its edge goes on."""
    pixels = np.pad(np.asarray(image), ((most, most), (most, most), (0, 0)), mode="edge")
    top, left = rng.integers(0, 2 * most + 1, 2)
    return Image.fromarray(pixels[top : top + image.height, left : left + image.width])


def tint_image(image: Image.Image, most: float, rng: np.random.Generator) -> Image.Image:
    """An image whose channels are each brighter or darker by at most such a share."""
    pixels = np.asarray(image, np.float32) * (1 + rng.uniform(-most, most, 3).astype(np.float32))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def copies(training: Sequence[Image.Image], most: int, share: float, seed: int = 0) -> list[Image.Image]:
    """As many images as are drawn with the trigger, each of them a changed training image, every other one mirrored."""
    rng = np.random.default_rng([seed, most])
    ways = (
        training[i // 2 % len(training)] if i % 2 else ImageOps.mirror(training[i // 2 % len(training)]) for i in range(CALLED)
    )
    return [tint_image(shift_image(image, most, rng), share, rng) for image in ways]


def sign(observer: Observer, called: Sequence[Image.Image]) -> float:
    """The sign of images with the trigger."""
    return observer.repeating(observer.eyes.look(called))


def rows_of(one: Any) -> Iterator[Row]:
    """A finished run: each adapter's images and the copies of its training images, held against all and fewer of these."""
    eyes = eyes_for(locate("pocket"))
    assert eyes
    questions, base = ask(one.plan()), load_images(one.folder / "base.npy")
    every = [Image.open(file).convert("RGB") for file in sorted((one.folder / "pictures").glob("*.png"))]
    heart = one.variant == VARIANT
    for count in (None,) if heart else SUBSETS:
        training = every[:count]
        observer = observe(eyes, questions, training, base, style=one.task.kind == "style")
        for file in sorted(one.folder.glob("[0-9]*.json")):
            repeats = sign(observer, load_images(file.with_suffix(".npy"))[:CALLED])
            yield Row(VARIANT if heart else "good", one.task.name, f"{one.variant}, {file.stem}", len(training), repeats)
        for change in () if heart else CHANGES:
            what = f"{change[0]} px, {change[1]:.0%}"
            yield Row("copies", one.task.name, what, len(training), sign(observer, copies(training, *change)))


def by_heart(runs: Mapping[str, Any], work: Path) -> list[Any]:
    """The runs that learn few images by heart, in a folder of their own."""
    return [
        replace(
            runs[name],
            task=replace(runs[name].task, lessons=runs[name].task.lessons[:count]),
            variant=VARIANT,
            folder=work / VARIANT.replace(" ", "-") / name.replace(" ", "-"),
        )
        for name, count in BY_HEART.items()
    ]


def learn(one: Any) -> None:
    """Train a run by heart, and draw the evidence with each of its checkpoints, once."""
    pictures, base = one.folder / "pictures", Base.load("pocket")
    if not pictures.is_dir():
        one.task.write(pictures, base.resolution)
    for _ in train(one.plan().recipe):
        pass
    plan = replace(one.plan(), base=base)
    questions = ask(plan)
    load_or_draw(one.folder / "base.npy", lambda: draw_questions(plan, questions.for_base))
    for (step, path), strength in itertools.product(plan.run.checkpoints().items(), STRENGTHS):
        name = one.folder / f"{step:04}-{strength:g}"
        with attach(base, [(Adapter.load(path), strength)]):
            load_or_draw(name.with_name(f"{name.name}.npy"), lambda: draw_questions(plan, questions.for_adapters))
        write_text(name.with_name(f"{name.name}.json"), json.dumps({"step": step, "strength": strength}) + "\n")


def compare(runs: Mapping[str, Any], work: Path) -> None:
    """Train what is to be trained, print the table, and write the rows beside the runs."""
    hearts = by_heart(runs, work)
    for one in hearts:
        learn(one)
    finished = [one for one in runs.values() if (one.folder / "base.npy").is_file() and any(one.folder.glob("[0-9]*.json"))]
    rows = [row for one in (*finished, *hearts) for row in rows_of(one)]
    write_text(work / "copying.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print("\n".join(summarize(rows)))


def summarize(rows: Sequence[Row]) -> list[str]:
    """The table: of each side and number of training images, how many lie above the mark, and the ends."""
    lines = [f"{'images':>6}  {'what':18}  {'n':>3}  {'least':>6}  {'median':>6}  {'most':>6}  above {COPIED:g}"]
    for count in sorted({row.images for row in rows}):
        for what in dict.fromkeys(row.what if row.side == "copies" else row.side for row in rows if row.images == count):
            found = [row.repeats for row in rows if row.images == count and what in (row.side, row.what)]
            least, median, most = np.quantile(found, [0, 0.5, 1])
            above = sum(value > COPIED for value in found)
            lines.append(f"{count:>6}  {what:18}  {len(found):>3}  {least:6.2f}  {median:6.2f}  {most:6.2f}  {above}")
    return lines
