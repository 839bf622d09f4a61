"""How a run fits into memory: what it will take, what gives way first, and what was chosen.

choice.py     Fit, and the declared ladder of what gives way, rung by rung
memory.py     a count of the bytes that tensors hold while code runs, on real tensors or on their shapes alone
stepping.py   one step's gradients, in as many pieces as fit
estimate.py   a whole step, a sample and a save on shapes alone: no weights, no hardware
placing.py    a Fit done to a base
pace.py       whether a run became suddenly slow
"""

from .choice import LADDER, Fit, Rung, down, first, pieces, precision_of
from .estimate import Configs, Estimate, Load, estimate
from .memory import Count, counting
from .pace import Pace
from .placing import dtype_of, lacking, place
from .stepping import Seeds, gradients

__all__ = [
    "LADDER",
    "Configs",
    "Count",
    "Estimate",
    "Fit",
    "Load",
    "Pace",
    "Rung",
    "Seeds",
    "counting",
    "down",
    "dtype_of",
    "estimate",
    "first",
    "gradients",
    "lacking",
    "pieces",
    "place",
    "precision_of",
]
