"""Commands from checkpoints to adapters and back: extract, bake, interpolate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from ..errors import AdapterError
from ..text import quote
from .adapters import (
    Files,
    as_told,
    base_path,
    dialect,
    family_option,
    lenient,
    open_adapters,
    output_path,
    print_written,
    rule_of,
    rules,
    stripped,
    to,
)
from .messages import answer, echo, print_warning
from .values import PATH, AdapterFile


@click.command()
@click.argument("tuned", type=PATH)
@click.argument("base", type=PATH)
@to
@rules
@click.option("--part", "parts", multiple=True, help="unet, text_encoder or text_encoder_2 [default: all]")
@click.option("--target", "targets", multiple=True, default=("*",), help="layers whose path matches, can be repeated")
@click.option("--full", is_flag=True, help="biases and norms too, as they are")
@click.option("--clamp", type=float, metavar="X", help="cut factors off at this quantile of their entries (kohya's tool: 0.99)")
@family_option
@stripped
@dialect
@click.option("--dtype", default="fp16", show_default=True, metavar="fp32|fp16|bf16", help="storage")
def extract(tuned: Path, base: Path, output: Path, **options: Any) -> int:
    """Make an adapter of the difference between the checkpoints TUNED and BASE; of rank 32 unless a rule says otherwise."""
    from ..adapters.ops.extract import extract as difference

    rule, value = rule_of(options, ("rank", 32))
    picked = {name: options[name] for name in ("max_rank", "parts", "targets", "full")}
    output = output_path(output)
    found, report = difference(base_path(tuned), base_path(base), rule, value, clamp_quantile=options["clamp"], **picked)
    found = as_told(found, options["family"], options["strip_metadata"])
    saved = found.save_with_report(output, options["dialect"], dtype=options["dtype"])
    for part in found.parts:
        echo(f"{part:<16}{len(found.part(part).deltas):>6} layers, relative error {report.part(part).error:.2%}")
    answer(parts={part: {"layers": len(found.part(part).deltas), "error": report.part(part).error} for part in found.parts})
    answer(left_out=list(report.left_out))
    misfits = [path for path, norm in report.left_out.items() if norm == math.inf]
    if misfits:
        echo(f"left out: {', '.join(misfits[:3])}{', ...' * (len(misfits) > 3)}: of another shape in the two")
    if others := [path for path in report.left_out if path not in misfits]:
        hint = "" if options["full"] else ", --full keeps biases and norms"
        echo(f"left out: {len(others)} other changed weights ({others[0]}{', ...' * (len(others) > 1)}){hint}")
    print_written(saved, len(found.deltas))
    return 0


@click.command()
@click.argument("base", type=PATH)
@click.argument("files", nargs=-1, required=True, type=AdapterFile(), metavar="FILE[:STRENGTH]...")
@click.option("--output", "-o", type=PATH, required=True, help="the checkpoint or folder to write")
@lenient
@stripped
def bake(base: Path, files: Files, output: Path, allow_unmatched: bool, strip_metadata: bool) -> int:
    """Write a checkpoint: BASE with adapters merged into its weights. BASE itself stays as it is."""
    from ..adapters.fit import MissingPartError, check_parts
    from ..adapters.ops import bake as baking
    from ..families.checkpoint import open_weights
    from ..families.names import PARTS

    into, adapters = open_weights(base_path(base)), open_adapters(files, allow_unmatched)
    for (path, weighting), adapter in zip(files, adapters, strict=True):
        try:
            check_parts(adapter, into.parts, str(base))
        except MissingPartError as error:
            raise AdapterError(
                error.what, f"leave it out: {quote(f'{path}:{weighting.without(set(PARTS) - set(into.parts))}')}"
            ) from None
        if adapter.words:
            print_warning(f"left out: a checkpoint has no room for the word {next(iter(adapter.words))!r} that {path} brings")
    report = baking.bake(into, [(adapter, 1.0) for adapter in adapters], output, strip_metadata=strip_metadata)
    changed = f"{len(report.changes)} weights changed" + f", and {report.copies} of its EMA copy" * bool(report.copies)
    echo(f"{report.path}  {changed}; rounding to the checkpoint's dtype loses {report.error:.2%} of it")
    answer(written=report.path, weights=len(report.changes), copies=report.copies, error_of_rounding=report.error)
    return 0


@click.command()
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@click.option("--alpha", type=float, default=0.5, show_default=True, help="0 is BASE, 1 is TUNED; outside it goes beyond")
@click.option("--output", "-o", type=PATH, required=True, help="the checkpoint or folder to write")
@stripped
def interpolate(base: Path, tuned: Path, alpha: float, output: Path, strip_metadata: bool) -> int:
    """Write a checkpoint between two others (WiSE-FT): often better than both on what the base knew."""
    from ..adapters.ops import bake as baking

    report = baking.interpolate(base_path(base), base_path(tuned), alpha, output, strip_metadata=strip_metadata)
    echo(f"{report.path}  {len(report.changes)} weights" + f", and {report.copies} of its EMA copy" * bool(report.copies))
    answer(written=report.path, weights=len(report.changes), copies=report.copies)
    return 0


COMMANDS: tuple[click.Command, ...] = (extract, bake, interpolate)
