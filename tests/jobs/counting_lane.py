"""A worker's process that knows the kinds of the tests too, and loads nothing heavy for those that it does not run."""

from __future__ import annotations

import sys

from counting import add_rows

from personalize import registry
from personalize.cli.lane import main

if __name__ == "__main__":
    for name in list(registry.table("jobs")):
        registry.table("jobs").remove(name)
    add_rows()
    sys.exit(main(*sys.argv[1:]))
