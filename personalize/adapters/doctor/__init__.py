"""The doctor of adapters: what a file is and whether it is sound, how much several collide, and what a merge would lose.

    checkups = [examine(path) for path in paths]
    collision = collide([Adapter.load(path) for path in paths], [0.8, 0.6])

Nothing is changed and no low-rank dW is multiplied out. `personalize/reports/adapter/doctor.py` shows it: table, JSON, picture.
"""

from ...findings import Finding
from .collisions import Collision, Meeting, collide
from .exam import Checkup, examine
from .measures import Module
from .prognosis import Prediction, Suggestion, predict, suggest

__all__ = [
    "Checkup",
    "Collision",
    "Finding",
    "Meeting",
    "Module",
    "Prediction",
    "Suggestion",
    "collide",
    "examine",
    "predict",
    "suggest",
]
