"""The command: another cast takes the stage before anything that lists the world's subjects is imported."""

import sys

from ..cast import stage

if __name__ == "__main__":
    stage(seed=16)
    from .runs import main

    sys.exit(main())
