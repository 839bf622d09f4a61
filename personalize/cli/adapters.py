"""Commands on adapter files: convert, resize, diff, doctor, show; merge is in merge.py, checkpoints are in checkpoints.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AdapterError, OutputError, RecipeError
from ..text import plain, readable
from .messages import answer, echo, error_record, print_error, print_warning
from .values import PATH, AdapterFile, FileSize

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters.adapter import Adapter
    from ..adapters.contract import Saved
    from ..adapters.doctor.collisions import Collision
    from ..adapters.doctor.prognosis import Prediction
    from ..adapters.ops.report import Report
    from ..adapters.strengths.grammar import Weighting

Files = Sequence[tuple[Path, "Weighting"]]

# ---------------------------------------------------------------- what several commands share

dialect = click.option("--dialect", default="kohya", show_default=True, metavar="kohya|diffusers|peft", help="naming scheme")
dtype = click.option("--dtype", metavar="fp32|fp16|bf16", help="storage [default: that of the first file]")
to = click.option("--output", "-o", type=PATH, required=True, help="the file to write")
base_option = click.option(
    "--base", type=PATH, help="'pocket', a diffusers folder or checkpoint, for what depends on its weights (DoRA, OFT)"
)
lenient = click.option(
    "--allow-unmatched", is_flag=True, help="leave out keys that belong to no known layer, instead of stopping"
)
family_option = click.option(
    "--family", metavar="NAME", help="the model family, where neither layers nor metadata tell: sd1, sdxl, ..."
)
stripped = click.option(
    "--strip-metadata",
    is_flag=True,
    help="leave out what the files say about themselves (captions' tags, recipe, ...), but for the family",
)


def rules(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how many ranks to keep: rows of adapters.ops.resize.RULES."""
    for option in (
        click.option("--max-rank", type=click.IntRange(1), help="never more ranks than this"),
        click.option("--size", type=FileSize(), metavar="SIZE", help="the best ranks for a file of this size, e.g. 20MB"),
        click.option(
            "--error", type=float, metavar="X", help="as few ranks as keep the relative error of dW below this, e.g. 0.01"
        ),
        click.option("--sv-cumulative", type=float, metavar="X", help="this share of the sum of singular values"),
        click.option("--sv-fro", type=float, metavar="X", help="this share of the Frobenius norm"),
        click.option("--sv-ratio", type=float, metavar="X", help="singular values above the largest divided by this"),
        click.option("--rank", type=click.IntRange(1), metavar="N", help="this many ranks"),
    ):
        command = option(command)
    return command


def rule_of(options: Mapping[str, Any], default: tuple[str, float] | None = None) -> tuple[str, float]:
    """The one rule that was given, and its number. Raises RecipeError for none or several."""
    from ..adapters.ops.resize import RULES

    given = [(rule, options[rule]) for rule in RULES if options.get(rule) is not None]
    flags = ", ".join(f"--{rule.replace('_', '-')}" for rule in RULES)
    if len(given) > 1:
        raise RecipeError("two rules for ranks at once", f"choose one of {flags}")
    if not given and default is None:
        raise RecipeError("how many ranks?", f"choose one of {flags}")
    return given[0] if given else default  # type: ignore[return-value]


def open_adapters(files: Files, allow_unmatched: bool) -> list[Adapter]:
    """Adapters, each as much as was asked for, read layer by layer when they are needed."""
    from ..adapters.adapter import Adapter
    from ..adapters.describe import describe

    for path in dict.fromkeys(path for path, _ in files) if allow_unmatched else ():
        if unmatched := describe(path).unmatched:
            print_warning(f"left out of {path}: {len(unmatched)} tensors, {unmatched[0]} ...")
    return [Adapter.open(path, allow_unmatched=allow_unmatched).weighted(weighting) for path, weighting in files]


def as_told(adapter: Adapter, family: str | None, strip_metadata: bool) -> Adapter:
    """The adapter as it is to be written: of the family that was named, and without its metadata if that was asked for."""
    adapter = adapter.strip_metadata() if strip_metadata else adapter
    return adapter.for_family(family) if family else adapter


def output_path(output: Path, *read: Path) -> Path:
    """The file to write. Raises OutputError for a folder's name, for another format's, and for a file that is read."""
    from ..adapters.dialects import file_of
    from ..formats.writer import overwrites, with_ending

    path = with_ending(output)
    if output.is_dir():
        raise OutputError(f"{output} is a folder", "name a file in it")
    if output.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin"):
        raise OutputError(f"{output} would be a pickle", "adapters are written as .safetensors")
    if taken := [one for one in read if overwrites(path, file_of(one))]:
        raise OutputError(f"{path} would overwrite {taken[0]}, which is read", "choose another name")
    return path


def without_base(adapters: Iterable[Adapter], base: Path | None) -> list[Adapter]:
    """The same without what depends on the base, if one is named."""
    find = weights_of(base)
    return [adapter.resolve(find) if find else adapter for adapter in adapters]


def weights_of(base: Path | None) -> Callable[[str], Tensor] | None:
    """How to find a weight of the base; None without one."""
    if base is None:
        return None
    from ..families.checkpoint import open_weights

    return open_weights(base_path(base)).__getitem__


def base_path(base: Path) -> Path:
    """`pocket`, or a path as it is."""
    from ..models.sources import NAMED

    return NAMED.get(str(base), base)


def print_written(saved: Saved, layers: int) -> None:
    """Say what was written."""
    echo(f"{saved.path}  {readable(saved.size)}, {saved.kind}, {layers} layers")
    answer(written=saved.path, bytes=saved.size, kind=saved.kind, layers=layers)


def print_table(report: Report) -> None:
    """Ranks by part, and what a cut of them has lost."""
    lossy = any(line.cut for line in report.lines)
    answer_parts = dict[str, Any]()
    echo(f"{'part':<16}{'layers':>8}{'rank':>20}" + f"{'error':>10}  rank for 1 %" * lossy)
    for name, part in report.rows():
        old, new = value_range(line.old for line in part.lines), value_range(line.new for line in part.lines)
        enough = part.rank_for(0.01) if lossy else None
        loss = f"{part.error:>10.2%}  {'-' if enough is None else enough}" if lossy else ""
        answer_parts[name] = {"layers": len(part.lines), "rank": new, "error": part.error if lossy else 0.0}
        echo(f"{name:<16}{len(part.lines):>8}{old if old == new else f'{old} -> {new}':>20}{loss}")
    answer(parts=answer_parts)


def value_range(values: Iterable[int]) -> str:
    """`8`, or `4..16`."""
    found = sorted(set(values))
    return f"{found[0]}..{found[-1]}" if len(found) > 1 else "".join(map(str, found))


# ---------------------------------------------------------------- convert, resize


@click.command()
@click.argument("file", type=AdapterFile(), metavar="FILE[:STRENGTH]")
@to
@click.option(
    "--to", "kind", type=click.Choice(["lora", "full"]), help="turn other kinds into LoRA, or everything into dW itself"
)
@click.option("--rank", type=click.IntRange(1), help="of what becomes LoRA [default: exact where the kind has factors, else 32]")
@click.option("--words", type=PATH, metavar="FOLDER", help="take the words inside it out, into embeddings of their own")
@base_option
@lenient
@family_option
@stripped
@dialect
@dtype
def convert(file: tuple[Path, Weighting], output: Path, kind: str | None, rank: int | None, base: Path | None, **how: Any) -> int:
    """Write an adapter in another dialect, dtype or kind, or a textual inversion as image UIs read it.

    What the target cannot hold is an error that names it; what precision is lost is printed.
    """
    from ..adapters.describe import TEXTUAL_INVERSION, describe
    from ..adapters.lazy import storage_of
    from ..adapters.ops.convert import convert as to_kind

    output = output_path(output, file[0])
    try:
        (adapter,) = without_base(open_adapters([file], how["allow_unmatched"]), base)
    except AdapterError:
        if describe(file[0]).kind != TEXTUAL_INVERSION:
            raise
        return convert_words(file[0], output, how["dtype"], how["strip_metadata"])
    made, report = to_kind(as_told(adapter, how["family"], how["strip_metadata"]), kind, rank)
    if how["words"]:
        made = take_words_out(made, how["words"])
    saved = made.save_with_report(output, how["dialect"], dtype=how["dtype"] or storage_of(adapter.deltas))
    if report:
        print_table(report)
    print_written(saved, len(made.deltas))
    return 0


@click.command()
@click.argument("file", type=AdapterFile(), metavar="FILE[:STRENGTH]")
@to
@rules
@click.option("--drop", is_flag=True, help="drop layers that the rule leaves nothing of")
@base_option
@lenient
@family_option
@stripped
@dialect
@dtype
def resize(file: tuple[Path, Weighting], output: Path, base: Path | None, **options: Any) -> int:
    """Reduce the rank of an adapter by truncated SVD of dW, the best there is, and print the error."""
    from ..adapters.lazy import storage_of
    from ..adapters.ops import resize as resizing
    from ..adapters.ops.report import Report

    output = output_path(output, file[0])
    (adapter,) = without_base(open_adapters([file], options["allow_unmatched"]), base)
    rule, value = rule_of(options)
    kept = options["dtype"] or storage_of(adapter.deltas)
    adapter = as_told(adapter, options["family"], options["strip_metadata"])
    cut, lines = resizing.on_demand(adapter, rule, value, max_rank=options["max_rank"], dtype=kept, drop=options["drop"])
    saved = cut.save_with_report(output, options["dialect"], dtype=kept)
    print_table(Report(tuple(lines.values())))
    print_written(saved, len(cut.deltas))
    return 0


def convert_words(path: Path, output: Path, dtype: str | None, strip_metadata: bool) -> int:
    """Write a textual inversion of any spelling as UIs read it: `emb_params`, or `clip_l` and `clip_g`."""
    from ..adapters.describe import describe
    from ..adapters.embedding import Embedding

    word = Embedding.load(path)
    word = replace(word, metadata={}) if strip_metadata else word
    saved = word.save(output, dtype or describe(path).dtype or "fp32")
    echo(f"{saved}  {word.tokens} vectors: a prompt calls it {saved.stem}")
    answer(path=saved, vectors=word.tokens)
    return 0


def take_words_out(adapter: Adapter, folder: Path) -> Adapter:
    """Write the words that an adapter brings as embeddings of their own; returns it without them."""
    from ..adapters.embedding import Embedding

    if not adapter.words:
        raise AdapterError("it brings no words", "leave --words out")
    for path, word in Embedding.from_words(adapter.words, folder):
        echo(f"{word.save(path)}  {word.tokens} vectors: a prompt calls it {path.stem}")
    return replace(adapter, words={})


# ---------------------------------------------------------------- diff, doctor


@click.command()
@click.argument("one", type=AdapterFile())
@click.argument("other", type=AdapterFile())
@base_option
@lenient
def diff(one: tuple[Path, Weighting], other: tuple[Path, Weighting], base: Path | None, allow_unmatched: bool) -> int:
    """Compare two adapters by their dW, whatever their kinds, ranks and dialects."""
    from ..adapters.ops.compare import compare

    a, b = without_base(open_adapters([one, other], allow_unmatched), base)
    rows = compare(a, b)
    answer(rows=[vars(row) for row in rows])
    echo(f"{'':<28}{'|A|':>11}{'|B|':>11}{'|A-B|':>11}{'apart':>9}{'cosine':>9}")
    for row in rows:
        cosine = "-" if row.cosine is None else f"{row.cosine:.3f}"
        numbers = f"{row.a:>11.4g}{row.b:>11.4g}{row.difference:>11.4g}{row.relative_difference:>9.2%}{cosine:>9}"
        echo(f"{plain(row.name)[:27]:<28}{numbers}")
    return 0


@click.command()
@click.argument("files", nargs=-1, required=True, type=AdapterFile(), metavar="FILE[:STRENGTH]...")
@click.option("--picture", type=PATH, metavar="FILE.png", help="strengths, cosines and overlaps by block, as a heat map")
@base_option
@lenient
def doctor(files: Files, picture: Path | None, base: Path | None, allow_unmatched: bool) -> int:
    """Examine adapters: faults, strength by block, overlap of pairs, block weights that help, and what a merge would lose."""
    from ..adapters.doctor.collisions import collide
    from ..adapters.doctor.exam import examine
    from ..adapters.doctor.prognosis import predict
    from ..reports.adapter import doctor as report
    from ..reports.adapter.heatmap import heat_map

    if picture and (picture.suffix.lower() != ".png" or picture.is_dir()):
        raise OutputError(f"--picture writes a .png, not {picture}", "e.g. doctor.png")

    find = weights_of(base)
    checkups = [examine(path, find) for path, _ in files]
    collision: Collision | None = None
    predictions: Sequence[Prediction] = ()
    if len(files) > 1 and all(found.loads for found in checkups):
        adapters = open_adapters(files, allow_unmatched)
        ones = [1.0] * len(files)
        collision = collide(adapters, ones, base=find)
        predictions = predict([adapter.resolve(find) if find else adapter for adapter in adapters], ones)
    echo(report.table(checkups, collision, predictions))
    answer(**json.loads(report.as_json(checkups, collision, predictions)), picture=picture)
    if picture:
        from ..inference.sheet import save_sheet

        save_sheet(heat_map(checkups, collision), picture)
        echo(picture)
    return 0


@click.command()
@click.argument("adapters", type=PATH, nargs=-1, required=True)
def show(adapters: tuple[Path, ...]) -> int:
    """Describe an adapter file from its header alone: kind, family, rank, trigger and how it was made."""
    from ..adapters.describe import describe
    from ..reports.adapter.summary import as_json, as_text

    code, records = 0, list[dict[str, Any]]()
    for path in adapters:
        try:
            found = describe(path)
            echo(as_text(found))
            records.append(json.loads(as_json(found)) | {"error": None})
        except AdapterError as error:
            code = print_error(error)
            records.append({"path": str(path), "error": error_record(error)})
    answer(**(records[0] if len(records) == 1 and not code else {}), files=records)
    return code


COMMANDS: tuple[click.Command, ...] = (convert, resize, diff, doctor, show)
