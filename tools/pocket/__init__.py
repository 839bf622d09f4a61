"""The embedded base's world, how it is trained, and what it is judged by. Its weights lie in the package."""

from personalize.families.configs import NAMED

WEIGHTS = NAMED["pocket"]
