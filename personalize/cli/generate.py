"""`personalize generate`: pictures from prompts, with a base model and adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import click

from ..errors import RecipeError
from ..recipe.samplers import AUTO, SAMPLERS
from .listening import report
from .messages import answer, echo, print_warning
from .values import PATH, Axis, NamedAdapter, Side

BASE = ("base", "vae", "clip_skip", "prediction", "zero_snr")  # options that say what to draw with, in the recipe's words
REQUEST = ("negative", "steps", "guidance", "sampler", "size", "denoise")  # options that are a request's own


@click.command()
@click.argument("prompts", metavar="PROMPT...", nargs=-1)
@click.option("--prompts", "listed", type=PATH, metavar="FILE",
              help="more prompts, one per line; # begins a comment; behind each may stand what is its own, as kohya's trainer "
                   "writes it: --w 96 --h 64 --d SEED --s STEPS --l GUIDANCE --n NEGATIVE --ss SAMPLER")  # fmt: skip
@click.option("--adapter", "-a", "stack", type=NamedAdapter(), multiple=True, metavar="[NAME=]FILE[:STRENGTH]",
              help="adapter or textual inversion, and its strength, can be repeated: A.safetensors:0.8; UNet and text encoder "
                   "apart: "
                   "A.safetensors:0.8:0.5 (A1111 writes them the other way round) or A.safetensors:unet=0.8:te=0.5; "
                   "by block: A.safetensors:0.8:lbw=OUTD; by step: A.safetensors:0@0,1@0.5 "
                   "or A.safetensors:1:start=5:stop=10")  # fmt: skip
@click.option("--lora-dir", type=PATH, metavar="FOLDER", help="adapters that prompts may name: <lora:NAME:0.8>")
@click.option("--embedding-dir", type=PATH, metavar="FOLDER", help="textual inversions, which prompts call by their files' names")
@click.option("--negative", "-n", default="", help="what should not be there")
@click.option(
    "--seeds", "--seed", "-s", "seeds", multiple=True, help="seed of each picture, e.g. 0,1,2; can be repeated [default: 0]"
)
@click.option("--count", "-c", type=click.IntRange(1), help="pictures per prompt: seeds go up from the last one given")
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="denoising steps")
@click.option("--guidance", "-g", type=click.FloatRange(0), default=3.0, show_default=True, help="classifier-free guidance")
@click.option("--sampler", default=AUTO, show_default=True, metavar="NAME",
              help=f"{', '.join(SAMPLERS)}, in any case; auto: the one that the base's own config names")  # fmt: skip
@click.option("--size", type=Side(), help="side or WIDTHxHEIGHT in pixels [default: the image's, or the base's own]")
@click.option("--image", "-i", type=PATH, metavar="FILE", help="picture to begin with")
@click.option("--mask", type=PATH, metavar="FILE", help="where --image is drawn anew: white, or see-through; the rest is kept")
@click.option("--denoise", type=click.FloatRange(0, 1), default=0.75, show_default=True, help="how much of --image is drawn anew")
@click.option("--base", help="'pocket', a diffusers folder, a .safetensors checkpoint or a hub id [default: what the adapter was "
                            "trained on, read in the same way]")  # fmt: skip
@click.option("--vae", help="another VAE than the base's: a folder or a .safetensors file")
@click.option("--clip-skip", type=click.IntRange(1, 12), help="text-encoder layer that is read, from the last")
@click.option("--prediction", type=click.Choice(["auto", "epsilon", "v_prediction", "sample"]), help="what the base predicts")
@click.option("--zero-snr", type=click.Choice(["auto", "yes", "no"]), help="whether its noise ends without any signal")
@click.option("--precision", default="auto", show_default=True, metavar="auto|float32|bfloat16|float16",
              help="of the base's weights and of computing (auto: bfloat16 on a GPU that has it)")  # fmt: skip
@click.option("--grid", is_flag=True, help="also write one sheet: a row per prompt, a column per seed")
@click.option("--xy", "axes", type=Axis(), multiple=True, metavar="NAME=VALUES",
              help="also write a sheet along an axis, or two (across, down): strength=0,0.5,1 or seed, steps, guidance, denoise, "
                   "sampler, adapter=none,A,A+B or an adapter's name for its strength: A=0,1,0@0;1@1")  # fmt: skip
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    show_default="8; 4 on a small base, whose batches CPU cores share",
    help="pictures drawn at once",
)
@click.option("--device", metavar="auto|cpu|cuda", default="auto", show_default=True, help="where to draw")
@click.option(
    "--output", "-o", type=PATH, default=Path("pictures"), show_default=True, help="folder, or a .png for a single picture"
)
def generate(prompts: tuple[str, ...], listed: Path | None, seeds: tuple[str, ...], count: int | None, **options: Any) -> int:
    """Draw pictures with a base model and adapters.

    <lora:NAME:0.8> in a prompt uses an adapter for that prompt alone, or at another strength.
    """
    from ..inference.events import Notice, Progress, Saved
    from ..inference.generate import generate as draw_files
    from .view import SILENCE

    order = order_of(prompts, listed, seeds, count, **options)
    pictures, spoke, whole = list[dict[str, Any]](), time.monotonic(), order.pop("whole")
    report({}, 0, whole, "loading")
    for event in draw_files(**order):
        if isinstance(event, Notice):
            print_warning(event.text)
        elif isinstance(event, Progress):
            doing = f"drawing, step {event.step} of {event.steps}"
            report({}, sum(one["number"] is not None for one in pictures), whole, doing)
            if time.monotonic() - spoke >= SILENCE:
                echo(f"... {doing}", err=True)
                spoke = time.monotonic()
        elif isinstance(event, Saved):
            spoke = time.monotonic()
            echo(event.path)
            pictures.append({"path": event.path, "number": event.number})
            done = sum(one["number"] is not None for one in pictures)
            report({"event": "picture", "path": str(event.path), "number": event.number}, done, whole, "drawing")
            answer(pictures=pictures)
    return 0


def order_of(
    prompts: Sequence[str], listed: Path | None, seeds: Sequence[str], count: int | None, **options: Any
) -> dict[str, Any]:
    """What the command asks of `inference.generate`, and how many pictures that are as `whole`. Raises RecipeError for prompts,
    seeds and samplers that are none, AdapterError and DataError for files."""
    from ..inference.library import Library
    from ..inference.request import InitImage, Request
    from ..recipe.lines import expand, read_prompts

    wanted = [*expand(list(prompts)), *(read_prompts(listed) if listed else ())]
    if not wanted:
        raise RecipeError("what should be drawn?", 'personalize generate "a cat", or --prompts FILE')
    base = {name: value for name in BASE if (value := options.pop(name)) is not None}
    library = Library(folder=options.pop("lora_dir"), embeddings=options.pop("embedding_dir"))
    image = InitImage.open(options.pop("image"), options.pop("mask"))
    settings = {name: options.pop(name) for name in REQUEST} | {"image": image}
    request, own_seeds = Request.parse("", adapters=library.add(options.pop("stack")), **settings), seed_list(seeds, count)
    whole = len(wanted) * len(own_seeds) * prod(len(axis.values) for axis in options["axes"])
    return {
        "prompts": wanted,
        "seeds": own_seeds,
        "settings": request,
        "library": library,
        "base": base,
        "whole": whole,
        **options,
    }


def seed_list(seeds: Sequence[str], count: int | None) -> list[int]:
    """Seeds from `0,1` texts, continued upwards to `count`."""
    pieces = [piece.strip() for text in seeds for piece in text.split(",")] or ["0"]
    for piece in pieces:
        if not (piece.isdecimal() and int(piece) < 2**32):
            raise RecipeError(f"--seeds must be whole numbers from 0 to {2**32 - 1}, not {piece!r}")
    given = [int(piece) for piece in pieces]
    more = max(0, (count or 0) - len(given))
    return (given + [given[-1] + i + 1 for i in range(more)])[:count]
