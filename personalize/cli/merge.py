"""`personalize merge`: adapters added up into one file, and the same merge repeated."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from ..errors import AdapterError, RecipeError
from ..io import weights_hash
from .adapters import (
    Files,
    as_told,
    base_option,
    dialect,
    dtype,
    family_option,
    lenient,
    open_adapters,
    output_path,
    print_table,
    print_written,
    stripped,
    to,
    without_base,
)
from .messages import answer, echo
from .values import PATH, AdapterFile

RECIPE = "personalize.merge"  # metadata: the arguments that repeat a merge

BEYOND_BYTES = ("rank", "base", "allow_unmatched", "family", "strip_metadata")  # options that need more than ops/concat.py

OPTIONS: dict[str, tuple[Any, str]] = {  # those of methods.OPTIONS
    "density": (float, "share of the entries that is kept"),
    "outliers": (float, "share of the entries, the largest, that is dropped"),
    "epsilon": (float, "how much likelier the largest entries are kept than the smallest"),
    "mean": (bool, "average the adapters that agree, as the paper does, instead of adding them up"),
    "seed": (int, "of the random numbers"),
    "mu": (float, "how strongly the later adapters make room: 0 not at all, inf wholly"),
    "energy": (float, "share of an adapter's squared norm whose directions are its own"),
    "straight": (float, "above this cosine two updates are one direction and are added up"),
}


def method_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that only some methods take."""
    for name, (kind, text) in reversed(OPTIONS.items()):
        flag = f"--{name}/--no-{name}" if kind is bool else f"--{name}"
        command = click.option(flag, name, type=None if kind is bool else kind, default=None, help=text)(command)
    return command


def list_methods(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """The table of methods, and nothing else."""
    if not wanted:
        return
    from ..adapters.ops.methods import METHODS

    answer(methods={name: {"what": row.what, "paper": row.paper, "options": dict(row.options)} for name, row in METHODS.items()})
    for name, row in METHODS.items():
        paper = f" (arXiv {row.paper})" if row.paper else ""
        takes = f" [{', '.join(f'--{option} {value}' for option, value in row.options.items())}]" if row.options else ""
        echo(f"{name:<14}{row.what}{paper}{takes}")
    ctx.exit(0)


@click.command()
@click.argument("files", nargs=-1, type=AdapterFile(), metavar="FILE[:STRENGTH]...")
@to
@click.option("--method", default="concat", show_default=True, help="see `personalize merge --list`")
@click.option("--rank", type=click.IntRange(1), help="at most this many ranks per layer")
@method_options
@base_option
@lenient
@family_option
@stripped
@dialect
@dtype
@click.option("--replay", type=PATH, metavar="FILE", help="repeat the merge that made this file")
@click.option("--list", is_flag=True, expose_value=False, is_eager=True, callback=list_methods, help="list the methods and stop")
@click.pass_context
def merge(ctx: click.Context, files: Files, output: Path, replay: Path | None, **options: Any) -> int:
    """Add adapters up into one file, exactly: A.safetensors:0.7 B.safetensors:-0.3.

    Strengths can be given by part, block and pattern: A.safetensors:0.8:0.5, A.safetensors:lbw=OUTD, A.safetensors:*attn2*=0.5.
    """
    if replay:
        files, options = merge_of(ctx, replay, output)
    if not files:
        raise RecipeError("which adapters?", "personalize merge A.safetensors:0.7 B.safetensors:-0.3 -o C.safetensors")
    output = output_path(output, *(path for path, _ in files))
    with ThreadPoolExecutor() as threads:  # the inputs are hashed while headers are read and torch is loaded
        hashes = [threads.submit(weights_sha256, path) for path, _ in files]
        return write_merge(files, output, options, lambda: [future.result() for future in hashes])


def write_merge(files: Files, output: Path, options: dict[str, Any], hashes: Callable[[], list[str]]) -> int:
    """Write the merge of some files, and print what it cost."""
    from ..adapters.ops.concat import NeedsDeltas

    unusual = any(options[name] for name in BEYOND_BYTES) or any(options[name] is not None for name in OPTIONS)
    with contextlib.suppress(NeedsDeltas):
        if options["method"] == "concat" and not unusual:
            return write_bytes(files, output, options, hashes)
    return write_deltas(files, output, options, hashes)


def write_bytes(files: Files, output: Path, options: dict[str, Any], hashes: Callable[[], list[str]]) -> int:
    """The merge of plain files as bytes, without torch. Raises NeedsDeltas where that is not enough."""
    from ..adapters.ops.concat import stack
    from ..adapters.ops.report import Report

    whole = stack(files, options["dtype"])
    metadata = merge_metadata(files, options, [source.reading.metadata for source in whole.sources], hashes())
    saved = whole.save(output, options["dialect"], metadata)
    print_table(Report(tuple(whole.lines())))
    print_written(saved, len(whole.shapes))
    return 0


def write_deltas(files: Files, output: Path, options: dict[str, Any], hashes: Callable[[], list[str]]) -> int:
    """The merge by any method, of files of any kind."""
    from ..adapters.lazy import storage_of
    from ..adapters.ops import merge as merging
    from ..adapters.ops.report import Report

    chosen = {name: options[name] for name in OPTIONS if options[name] is not None}
    adapters = without_base(open_adapters(files, options["allow_unmatched"]), options["base"])
    whole, lines = merging.on_demand(adapters, [1.0] * len(adapters), options["method"], options["rank"], **chosen)
    whole = as_told(whole, options["family"], options["strip_metadata"])
    metadata = merge_metadata(files, options, [adapter.metadata for adapter in adapters], hashes())
    dtype = options["dtype"] or storage_of(adapters[0].deltas)
    saved = whole.save_with_report(output, options["dialect"], metadata, dtype)
    print_table(Report(tuple(lines.values())))
    print_written(saved, len(whole.deltas))
    return 0


def merge_metadata(
    files: Files, options: Mapping[str, Any], each: Iterable[Mapping[str, str]], hashes: Iterable[str]
) -> dict[str, str]:
    """What a merge says about itself; `each` is what its files say."""
    if options["strip_metadata"]:
        return {}
    metadata = {RECIPE: merge_arguments(files, options), "modelspec.merged_from": ", ".join(path.stem for path, _ in files)}
    metadata["personalize.merge_hashes"] = json.dumps(list(hashes))
    if triggers := [trigger for one in each if (trigger := one.get("modelspec.trigger_phrase"))]:
        metadata["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(triggers))
    return metadata


def merge_arguments(files: Files, options: Mapping[str, Any]) -> str:
    """A merge as the words that repeat it."""
    words = [f"{path}:{weighting}" for path, weighting in files] + ["--method", options["method"]]
    words += ["--allow-unmatched"] * options["allow_unmatched"]
    for name in ("rank", "base", "family", *OPTIONS):
        if (value := options[name]) is not None:
            words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return shlex.join(words)


def weights_sha256(path: Path) -> str:
    """The hash of an adapter's weights, also of a folder of peft's."""
    from ..adapters.dialects import file_of

    return weights_hash(file_of(path))


def merge_of(ctx: click.Context, made: Path, output: Path) -> tuple[Files, dict[str, Any]]:
    """The files and options that made a merged file. Raises AdapterError if it does not say, or if a file has changed since."""
    from ..adapters.describe import describe

    metadata = describe(made).metadata
    if RECIPE not in metadata:
        raise AdapterError(f"{made} does not say how it was merged", "only files merged by personalize can be repeated")
    words = [*shlex.split(metadata[RECIPE]), "--output", str(output)]
    try:
        parsed = merge.make_context("merge", words, parent=ctx.parent).params
    except AdapterError as error:
        raise AdapterError(
            f"{made} was merged from files that are not here: {error.what}", "go to the folder it was made in"
        ) from None
    files, options = parsed["files"], {**parsed, "dialect": ctx.params["dialect"], "dtype": ctx.params["dtype"]}
    for (path, _), known in zip(files, json.loads(metadata.get("personalize.merge_hashes", "[]")), strict=False):
        if weights_sha256(path) != known:
            raise AdapterError(f"{path} is not the file that {made} was merged from", "its contents have changed")
    return files, options
