"""Draws what candidates are judged by, and judges them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..inference.sheet import contact_sheet, save_sheet
from ..models.clip import eyes_for
from ..tuning.tunable import Tunable
from .calibration import calibration_of
from .events import Judged
from .evidence import Questions, ask, draw_questions
from .limits import fit_square, likeness_to_world, training_squares
from .preflight import RunPlan
from .signs import MOST_TRAINING, Observer, Signs, observe

COLUMNS, SIDE = 6, 192  # of the sheet; pixels of an image there
UNKNOWN = {name: math.nan for name in ("value", "low", "high", "identity", "fidelity", "leak", "kept")}


@dataclass(frozen=True)
class Examiner:
    """A run's questions, and what their answers are compared with."""

    plan: RunPlan
    questions: Questions
    observer: Observer
    base: list[Image.Image]
    world: float = 1.0  # how much the images of a thing look like what the base was taught

    def judge(self, step: int, strength: float, figures: Any) -> Judged:
        """Draw the questions with what is attached now, and judge the images; they are saved beside the base's."""
        images = draw_questions(self.plan, self.questions.for_adapters)
        signs = round_signs(self.observer.signs(images) | asdict(figures) | {"world": self.world})
        path = self.save(images, step, strength)
        return Judged(step, strength, **self.verdict(signs), signs=signs, path=path)

    def verdict(self, signs: Signs) -> dict[str, float]:
        """What is told of the signs: an estimate where the base is calibrated."""
        calibration = calibration_of(self.plan.base)
        return {name: round(value, 4) for name, value in asdict(calibration.verdict(signs)).items()} if calibration else UNKNOWN

    def save(self, images: Sequence[Image.Image], step: int, strength: float) -> str:
        """A sheet of each question's image by the base, and by the adapter below it."""
        n, few = len(self.questions.called), len(self.questions.few_plain)
        groups = {
            "with the trigger": (self.base[:n], images[:n]),
            "without the trigger": (self.base[:few], images[n : n + few]),
            "other things": (self.base[n:], images[n + few :]),
        }
        path = self.plan.run.folder / "samples" / f"{step:06}-judged-{strength:g}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_sheet(judged_sheet(groups), path)
        return self.plan.run.relative(path)


def round_signs(signs: Signs) -> Signs:
    """As they are written down."""
    return {
        name: [round(one, 4) for one in value] if isinstance(value, list) else round(value, 4) for name, value in signs.items()
    }


def judged_sheet(groups: Mapping[str, tuple[Sequence[Image.Image], Sequence[Image.Image]]]) -> Image.Image:
    """Rows of the base's images above those with the adapter, by what they are asked for."""
    side = min(SIDE, 2 * max(image.width for _, images in groups.values() for image in images))
    rows, cells = [], list[Image.Image]()
    for title, pair in groups.items():
        for first in range(0, len(pair[1]), COLUMNS):
            for head, images in zip(("the base, without the trigger", f"the adapter, {title}"), pair, strict=True):
                some = [fit_square(image, side) for image in images[first : first + COLUMNS]]
                cells += [*some, *[Image.new("RGB", (side, side), "white")] * (COLUMNS - len(some))]
                rows.append(head)
    return contact_sheet(cells, COLUMNS, rows=rows, side=side)


def prepare_examiner(plan: RunPlan, tunable: Tunable) -> Examiner | None:
    """Draw what the base makes of the questions, and look at the training images; None where no CLIP is at hand."""
    eyes = eyes_for(Path(plan.base.path))
    if eyes is None:
        return None
    questions = ask(plan)
    with tunable.off():
        base = draw_questions(plan, questions.for_base)
    training = training_squares(plan, MOST_TRAINING)
    style = not plan.dataset.concepts[0].class_name
    world = 1.0 if style else likeness_to_world(plan.base, eyes, training)
    return Examiner(plan, questions, observe(eyes, questions, training, base, style), base, world)
