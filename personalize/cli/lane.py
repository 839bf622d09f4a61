"""The process of a lane's worker, which the engine starts: `python -m personalize.cli.lane WORKSPACE LANE NAME`."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import PersonalizeError
from ..jobs.worker import work
from .app import prepare_process
from .messages import print_error, warnings_as_lines


def main(place: str, lane: str, name: str) -> int:
    """Run the jobs of a lane. Returns the exit code."""
    prepare_process()
    with warnings_as_lines():
        try:
            return work(Path(place), lane, name)
        except PersonalizeError as error:
            return print_error(error)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
