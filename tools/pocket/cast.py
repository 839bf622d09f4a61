"""Another cast for the pocket's world: invented individuals and looks in the places of those that the benchmarks ask about.

What is calibrated on these has never met the benchmarks'. `stage` must come before anything that lists the world's subjects and
styles is imported (`world`, `judge`, `proof`): their tables are made from the dictionaries that it fills.
"""

from __future__ import annotations

import numpy as np

from .art_canvas import RGB
from .art_individuals import invent_individual
from .art_looks import invent_look
from .art_objects import DRAWINGS
from .art_styles import COLOURLESS, UNSEEN, Style
from .art_subjects import SUBJECTS, Subject
from .colours import COLOURS

EACH = 2  # individuals of each class
LOOKS = 18


def stage(seed: int) -> None:
    """Replace the world's subjects and unseen styles by invented ones, the same for the same seed."""
    subjects = {f"{thing} {i + 1}": individual(seed, n, i, thing) for n, thing in enumerate(DRAWINGS) for i in range(EACH)}
    looks = {f"look {i + 1}": look(seed, i) for i in range(LOOKS)}
    SUBJECTS.clear()
    SUBJECTS.update(subjects)
    UNSEEN.clear()
    UNSEEN.update(looks)
    COLOURLESS.clear()
    COLOURLESS.update(name for name, one in looks.items() if not keeps_colours(one))


def individual(seed: int, number: int, turn: int, thing: str) -> Subject:
    """An individual that has something on."""
    rng = np.random.default_rng([seed, number, turn, 91])
    while True:
        colour = str(rng.choice(list(COLOURS)))
        found = invent_individual(rng, thing, colour, COLOURS)
        if found.marks:
            return found


def look(seed: int, number: int) -> Style:
    """A look that nobody takes for the plain style: it has a finish, or other colours."""
    rng = np.random.default_rng([seed, number, 92])
    while True:
        found, _ = invent_look(rng, COLOURS)
        if found.finish or found.grid or not keeps_colours(found):
            return found


def keeps_colours(look: Style) -> bool:
    """Whether most of the named colours are still nearest to themselves."""
    tint = look.thing.tint
    return sum(nearest_colour(tint(colour)) == name for name, colour in COLOURS.items()) >= 7


def nearest_colour(colour: RGB) -> str:
    """The name of the colour that is nearest in RGB."""
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], colour, strict=True)))
