"""The embedded base's world, how it is trained, and what it is judged by. Its weights lie in the package."""

from personalize.models.sources import NAMED

WEIGHTS = NAMED["pocket"]
