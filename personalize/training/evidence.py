"""Images that show what an adapter does: with its trigger in new scenes, without it, and of unrelated things.

All candidates draw the same prompts from the same seeds, and so does the base once: what differs is what the adapter does.
The prompts are plain English that any base understands, and none of them is read from the training images' captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from ..data.captions import fill, remove_triggers
from ..inference.sampling import denoise, eval_mode, to_images
from ..models.processes import share
from .preflight import RunPlan

SCENES = ("in the snow", "at night", "on the beach", "in the city", "in the forest", "in a room", "in the desert", "in a meadow")
PLAIN_LOOK = "plain illustration"  # what an image is where the prompt names no look
LOOKS = ("", "ink drawing", "", "watercolour", "", "pixel art", "", "pastel drawing")
THINGS = ("red car", "blue house", "yellow flower", "black cat", "white boat", "green bird", "purple umbrella", "brown dog")
CALLED, PLAIN, UNRELATED = 12, 6, 6  # images of each kind
STEPS = 8  # of the sampler
BATCH = 12  # images at a time


@dataclass(frozen=True)
class Question:
    """A prompt with its seed, and what an image of it should show."""

    prompt: str
    seed: int
    thing: str
    scene: str
    look: str  # empty where that is for the adapter to say


@dataclass(frozen=True)
class Questions:
    """What is drawn by every candidate. `called` and `plain` differ in the trigger alone."""

    called: tuple[Question, ...]  # with the trigger, in scenes and looks that are named
    plain: tuple[Question, ...]  # the same without the trigger
    unrelated: tuple[Question, ...]  # of other things

    @property
    def few_plain(self) -> tuple[Question, ...]:
        """The plain ones that candidates draw, too."""
        return self.plain[:PLAIN]

    @property
    def for_adapters(self) -> tuple[Question, ...]:
        """What every candidate draws."""
        return (*self.called, *self.few_plain, *self.unrelated)

    @property
    def for_base(self) -> tuple[Question, ...]:
        """What the base draws to compare with."""
        return (*self.plain, *self.unrelated)


def ask(plan: RunPlan) -> Questions:
    """The questions of a run, about its first concept: a class is put into scenes, a style onto things in scenes."""
    concept = plan.dataset.concepts[0]
    phrase = fill(plan.recipe.data.caption, concept.trigger, concept.class_name)
    called = [about_class(phrase, concept.class_name, i) if concept.class_name else about_style(phrase, i) for i in range(CALLED)]
    plain = [replace(one, prompt=remove_triggers([concept.trigger], one.prompt)[0]) for one in called]
    others = [thing for thing in THINGS if not concept.class_name or concept.class_name not in thing.split()]
    unrelated = [
        question(f"a {others[i % len(others)]}", others[i % len(others)], i + 3, LOOKS[(2 * i + 1) % len(LOOKS)], 100 + i)
        for i in range(UNRELATED)
    ]
    return Questions(tuple(called), tuple(plain), tuple(unrelated))


def about_class(phrase: str, name: str, i: int) -> Question:
    """The subject in the i-th scene, in the i-th look."""
    article = "" if phrase.startswith(("a ", "an ", "the ")) else "a "
    return question(f"{article}{phrase}", name, i, LOOKS[i % len(LOOKS)], i)


def about_style(phrase: str, i: int) -> Question:
    """The i-th thing in a scene, in the style."""
    thing = THINGS[i % len(THINGS)]
    one = question(f"a {thing}", thing, i + i // len(THINGS), phrase, i)
    return replace(one, look="")


def question(what: str, thing: str, scene: int, look: str, seed: int) -> Question:
    """A prompt of parts."""
    where = SCENES[scene % len(SCENES)]
    return Question(f"{what} {where}" + (f", {look}" if look else ""), seed, thing.split()[-1], where, look or PLAIN_LOOK)


def draw_questions(plan: RunPlan, questions: Sequence[Question]) -> list[Image.Image]:
    """The images of questions with what is attached now."""
    how = plan.recipe.sampling.how | {"steps": STEPS}
    requests = [plan.request(one.prompt, one.seed, **how) for one in questions]
    batches = [requests[first : first + BATCH] for first in range(0, len(requests), BATCH)]
    with torch.no_grad(), eval_mode(plan.base):
        return list(share(plan.base, lambda batch: to_images(plan.base.decode(denoise(plan.base, batch))), batches))
