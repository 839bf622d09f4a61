"""Many adapters, one frozen base: `train_fleet` takes the steps of many recipes in the same passes.

crew.py      the members' factors on the base's layers, each applied to its own rows
running.py   one loop over the steps of all of them
"""

from .crew import Crew, Member
from .running import pass_through, train_fleet

__all__ = ["Crew", "Member", "pass_through", "train_fleet"]
