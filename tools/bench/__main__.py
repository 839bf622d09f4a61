"""The benchmarks' command line."""

from __future__ import annotations

import argparse
import sys

from personalize.errors import PersonalizeError

from . import algebra, fleet, fuzz, ladder, memory, quick, session, step, svd, throughput

BENCHMARKS = {
    "algebra": algebra,
    "fleet": fleet,
    "fuzz": fuzz,
    "ladder": ladder,
    "memory": memory,
    "quick": quick,
    "session": session,
    "step": step,
    "svd": svd,
    "throughput": throughput,
}


def parser() -> argparse.ArgumentParser:
    """All benchmarks' options; their defaults are those of the published figures."""
    whole = argparse.ArgumentParser(prog="python -m tools.bench")
    commands = whole.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        module.add_options(commands.add_parser(name, description=module.__doc__))
    return whole


def main() -> int:
    """Run one benchmark; exit code 2 for anything said on purpose."""
    options = parser().parse_args()
    try:
        BENCHMARKS[options.benchmark].main(options)
    except PersonalizeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
