"""The benchmarks' command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from personalize.errors import PersonalizeError
from personalize.recipe.fields import Recipe
from personalize.recipe.samplers import AUTO

from . import base, captions, choice, peer, personalization, reconstruction, settings, verdict
from .figures import FIGURES

BENCHMARKS = {
    "base": base,
    "personalization": personalization,
    "choice": choice,
    "peer": peer,
    "settings": settings,
    "verdict": verdict,
    "captions": captions,
    "reconstruction": reconstruction,
}


def shared_options() -> argparse.ArgumentParser:
    """Options of all benchmarks. Each gets its own, for a default that one sets would be that of all."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--base", default="pocket", help="'pocket' or a diffusers folder, e.g. an intermediate checkpoint")
    parent.add_argument("--guidance", type=float, default=Recipe().sampling.guidance, help="classifier-free guidance")
    parent.add_argument("--sampler", default=AUTO, help="by its name in UIs (default: the base's own)")
    parent.add_argument("--sampler-steps", type=int, default=20, help="denoising steps of every picture")
    parent.add_argument("--seed", type=int, default=0, help="of scenes, prompts and noise")
    parent.add_argument("--to", type=Path, default=FIGURES, help="folder for the tables and the contact sheet")
    parent.add_argument("--name", help="of the tables' files (default: the benchmark's)")
    return parent


def parser() -> argparse.ArgumentParser:
    """All benchmarks' options; their defaults are those of the published figures."""
    whole = argparse.ArgumentParser(prog="python -m tools.pocket.proof")
    commands = whole.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        module.add_options(commands.add_parser(name, parents=[shared_options()], description=module.__doc__))
    return whole


def main() -> int:
    """Run one benchmark; exit code 2 for anything said on purpose."""
    options = parser().parse_args()
    options.name = options.name or options.benchmark
    try:
        BENCHMARKS[options.benchmark].main(options)
    except PersonalizeError as error:
        print(f"proof: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
