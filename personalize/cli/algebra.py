"""Commands that compute with adapter files: merge, convert, resize, extract, bake, interpolate, diff, doctor."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AdapterError, RecipeError
from ..words import plain, readable
from .values import PATH, Bytes, Strengthened

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters import Adapter
    from ..adapters.doctor import Collision, Prediction
    from ..adapters.resizing import Report
    from ..adapters.weighting import Weighting

RECIPE = "personalize.merge"  # metadata: the arguments that repeat a merge
Files = Sequence[tuple[Path, "Weighting"]]

# ---------------------------------------------------------------- what several commands share

dialect = click.option("--dialect", default="kohya", show_default=True, metavar="kohya|diffusers|peft", help="naming scheme")
dtype = click.option("--dtype", metavar="fp32|fp16|bf16", help="storage [default: that of the first file]")
to = click.option("--output", "-o", type=PATH, required=True, help="the file to write")
base_option = click.option(
    "--base", type=PATH, help="diffusers folder or checkpoint, for what depends on its weights (DoRA, OFT)"
)
as_json = click.option("--json", "for_programs", is_flag=True, help="for programs")


def rules(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how many ranks to keep: rows of resizing.RULES."""
    for option in (
        click.option("--max-rank", type=click.IntRange(1), help="never more ranks than this"),
        click.option("--size", type=Bytes(), metavar="SIZE", help="the best ranks for a file of this size, e.g. 20MB"),
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
    from ..adapters.resizing import RULES

    given = [(rule, options[rule]) for rule in RULES if options.get(rule) is not None]
    flags = ", ".join(f"--{rule.replace('_', '-')}" for rule in RULES)
    if len(given) > 1:
        raise RecipeError("two rules for ranks at once", f"choose one of {flags}")
    if not given and default is None:
        raise RecipeError("how many ranks?", f"choose one of {flags}")
    return given[0] if given else default  # type: ignore[return-value]


def loaded(files: Files) -> list[Adapter]:
    """Adapters, each as much as was asked for."""
    from ..adapters import Adapter

    return [Adapter.load(path).weighted(weighting) for path, weighting in files]


def resolved(adapters: Iterable[Adapter], base: Path | None) -> list[Adapter]:
    """The same without what depends on the base, if one is named."""
    find = weights_of(base)
    return [adapter.resolve(find) if find else adapter for adapter in adapters]


def weights_of(base: Path | None) -> Callable[[str], Tensor] | None:
    """How to find a weight of the base; None without one."""
    if base is None:
        return None
    from ..adapters.checkpoints import open_weights

    return open_weights(located(base)).__getitem__


def located(base: Path) -> Path:
    """`pocket`, or a path as it is."""
    from ..base import NAMED

    return NAMED.get(str(base), base)


def stored_as(path: Path) -> str:
    """The storage dtype of a file, as `--dtype` names it; fp32 for what cannot be written."""
    from ..adapters import describe

    found = describe(path).dtype.split(", ")[0]
    return found if found in ("fp16", "bf16") else "fp32"


def written(path: Path, adapter: Adapter) -> None:
    """Say what was written."""
    from ..adapters import describe

    click.echo(f"{path}  {readable(path.stat().st_size)}, {describe(path).kind}, {len(adapter.deltas)} layers")


def table(report: Report) -> None:
    """Ranks by part, and what a cut of them has lost."""
    lossy = any(line.cut for line in report.lines)
    click.echo(f"{'part':<16}{'layers':>8}{'rank':>20}" + f"{'error':>10}  rank for 1 %" * lossy)
    for name, part in report.rows():
        old, new = span(line.old for line in part.lines), span(line.new for line in part.lines)
        enough = part.rank_for(0.01) if lossy else None
        told = f"{part.error:>10.2%}  {'-' if enough is None else enough}" if lossy else ""
        click.echo(f"{name:<16}{len(part.lines):>8}{old if old == new else f'{old} -> {new}':>20}{told}")


def span(values: Iterable[int]) -> str:
    """`8`, or `4..16`."""
    found = sorted(set(values))
    return f"{found[0]}..{found[-1]}" if len(found) > 1 else "".join(map(str, found))


# ---------------------------------------------------------------- merge

OPTIONS: dict[str, tuple[Any, str]] = {  # those of merging.OPTIONS
    "density": (float, "share of the entries that is kept"),
    "outliers": (float, "share of the entries, the largest, that is dropped"),
    "epsilon": (float, "how much likelier the largest entries are kept than the smallest"),
    "mean": (bool, "average the adapters that agree instead of adding them up"),
    "seed": (int, "of the random numbers"),
    "mu": (float, "how strongly the later adapters make room: 0 not at all, inf wholly"),
    "energy": (float, "share of an adapter's squared norm whose directions are its own"),
    "straight": (float, "above this cosine two updates are one direction and are added up"),
}


def tuned(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that only some methods take."""
    for name, (kind, text) in reversed(OPTIONS.items()):
        flag = f"--{name}/--no-{name}" if kind is bool else f"--{name}"
        command = click.option(flag, name, type=None if kind is bool else kind, default=None, help=text)(command)
    return command


def list_methods(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """The table of methods, and nothing else."""
    if not wanted:
        return
    from ..adapters.merging import METHODS

    for name, row in METHODS.items():
        paper = f" (arXiv {row.paper})" if row.paper else ""
        takes = f" [{', '.join(f'--{option} {value}' for option, value in row.options.items())}]" if row.options else ""
        click.echo(f"{name:<14}{row.what}{paper}{takes}")
    ctx.exit(0)


@click.command()
@click.argument("files", nargs=-1, type=Strengthened(), metavar="FILE[:STRENGTH]...")
@to
@click.option("--method", default="concat", show_default=True, help="see `personalize merge --list`")
@click.option("--rank", type=click.IntRange(1), help="at most this many ranks per layer")
@tuned
@base_option
@dialect
@dtype
@click.option("--replay", type=PATH, metavar="FILE", help="repeat the merge that made this file")
@click.option("--list", is_flag=True, expose_value=False, is_eager=True, callback=list_methods, help="list the methods and stop")
@click.pass_context
def merge(ctx: click.Context, files: Files, output: Path, replay: Path | None, **options: Any) -> int:
    """Add adapters up into one file, exactly: A.safetensors:0.7 B.safetensors:-0.3.

    Strengths can be told by part, block and pattern: A.safetensors:0.8:0.5, A.safetensors:lbw=OUTD, A.safetensors:*attn2*=0.5.
    """
    if replay:
        files, options = again(ctx, replay, output)
    if not files:
        raise RecipeError("which adapters?", "personalize merge A.safetensors:0.7 B.safetensors:-0.3 -o C.safetensors")
    from ..adapters.merging import merge_with_report

    chosen = {name: options[name] for name in OPTIONS if options[name] is not None}
    adapters = resolved(loaded(files), options["base"])
    merged, report = merge_with_report(adapters, [1.0] * len(adapters), options["method"], options["rank"], **chosen)
    said = {RECIPE: arguments(files, options), "modelspec.merged_from": ", ".join(path.stem for path, _ in files)}
    said["personalize.merge_hashes"] = json.dumps([content(path) for path, _ in files])
    path = merged.save(output, options["dialect"], said, options["dtype"] or stored_as(files[0][0]))
    table(report)
    written(path, merged)
    return 0


def arguments(files: Files, options: Mapping[str, Any]) -> str:
    """A merge as the words that repeat it."""
    words = [f"{path}:{weighting}" for path, weighting in files] + ["--method", options["method"]]
    for name in ("rank", "base", *OPTIONS):
        if (value := options[name]) is not None:
            words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return shlex.join(words)


def again(ctx: click.Context, made: Path, output: Path) -> tuple[Files, dict[str, Any]]:
    """The files and options that made a merged file. Raises AdapterError if it tells none, or if a file has changed since."""
    from ..adapters import describe

    metadata = describe(made).metadata
    if RECIPE not in metadata:
        raise AdapterError(f"{made} does not say how it was merged", "only files merged by personalize can be repeated")
    parsed = merge.make_context("merge", [*shlex.split(metadata[RECIPE]), "--output", str(output)], parent=ctx.parent).params
    files, options = parsed["files"], {**parsed, "dialect": ctx.params["dialect"], "dtype": ctx.params["dtype"]}
    for (path, _), known in zip(files, json.loads(metadata.get("personalize.merge_hashes", "[]")), strict=False):
        if content(path) != known:
            raise AdapterError(f"{path} is not the file that {made} was merged from", "its contents have changed")
    return files, options


def content(path: Path) -> str:
    """sha256 of what stands behind a file's header: the weights."""
    import hashlib

    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- convert, resize


@click.command()
@click.argument("file", type=Strengthened(), metavar="FILE[:STRENGTH]")
@to
@click.option(
    "--to", "kind", type=click.Choice(["lora", "full"]), help="turn other kinds into LoRA, or everything into dW itself"
)
@click.option("--rank", type=click.IntRange(1), help="of what becomes LoRA [default: exact where the kind has factors, else 32]")
@base_option
@dialect
@dtype
def convert(file: tuple[Path, Weighting], output: Path, kind: str | None, rank: int | None, base: Path | None, **how: Any) -> int:
    """Write an adapter in another dialect, dtype or kind. What cannot be held is refused by name; what is lost is told."""
    from ..adapters.converting import converted

    path, _ = file
    (adapter,) = resolved(loaded([file]), base)
    made, report = converted(adapter, kind, rank)
    target = made.save(output, how["dialect"], dtype=how["dtype"] or stored_as(path))
    if report:
        table(report)
    written(target, made)
    return 0


@click.command()
@click.argument("file", type=Strengthened(), metavar="FILE[:STRENGTH]")
@to
@rules
@click.option("--drop", is_flag=True, help="drop layers that the rule leaves nothing of")
@base_option
@dialect
@dtype
def resize(file: tuple[Path, Weighting], output: Path, base: Path | None, **options: Any) -> int:
    """Cut an adapter down to fewer ranks, exactly by the truncated SVD of dW, and tell what it cost."""
    from ..adapters import resizing

    (adapter,) = resolved(loaded([file]), base)
    rule, value = rule_of(options)
    kept = options["dtype"] or stored_as(file[0])
    cut, report = resizing.resize(adapter, rule, value, max_rank=options["max_rank"], dtype=kept, drop=options["drop"])
    path = cut.save(output, options["dialect"], dtype=kept)
    table(report)
    written(path, cut)
    return 0


# ---------------------------------------------------------------- extract, bake, interpolate


@click.command()
@click.argument("tuned", type=PATH)
@click.argument("base", type=PATH)
@to
@rules
@click.option("--part", "parts", multiple=True, help="unet, text_encoder or text_encoder_2 [default: all]")
@click.option("--target", "targets", multiple=True, default=("*",), help="layers whose path matches, can be repeated")
@click.option("--full", is_flag=True, help="biases and norms too, as they are")
@click.option("--clamp", type=float, metavar="X", help="cut factors off at this quantile of their entries (kohya's tool: 0.99)")
@dialect
@click.option("--dtype", default="fp16", show_default=True, metavar="fp32|fp16|bf16", help="storage")
def extract(tuned: Path, base: Path, output: Path, **options: Any) -> int:
    """Make an adapter of what the checkpoint TUNED learned beyond BASE."""
    from ..adapters import surgery

    rule, value = rule_of(options, ("rank", 32))
    picked = {name: options[name] for name in ("max_rank", "parts", "targets", "full")}
    found, report = surgery.extract(located(tuned), located(base), rule, value, clamp_quantile=options["clamp"], **picked)
    path = found.save(output, options["dialect"], dtype=options["dtype"])
    for part in found.parts:
        click.echo(f"{part:<16}{len(found.part(part).deltas):>6} layers, relative error {report.part(part).error:.2%}")
    if report.left_out:
        click.echo(f"left out: {len(report.left_out)} changed biases, norms and tables")
    written(path, found)
    return 0


@click.command()
@click.argument("base", type=PATH)
@click.argument("files", nargs=-1, required=True, type=Strengthened(), metavar="FILE[:STRENGTH]...")
@click.option("--output", "-o", type=PATH, required=True, help="the checkpoint or folder to write")
def bake(base: Path, files: Files, output: Path) -> int:
    """Write the checkpoint BASE with adapters in its weights. BASE stays as it is: keep it, to go back."""
    from ..adapters import surgery

    report = surgery.bake(located(base), [(adapter, 1.0) for adapter in loaded(files)], output)
    click.echo(
        f"{output}  {len(report.changes)} weights changed; rounding to the checkpoint's dtype loses {report.error:.2%} of it"
    )
    return 0


@click.command()
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@click.option("--alpha", type=float, default=0.5, show_default=True, help="0 is BASE, 1 is TUNED; outside it goes beyond")
@click.option("--output", "-o", type=PATH, required=True, help="the checkpoint or folder to write")
def interpolate(base: Path, tuned: Path, alpha: float, output: Path) -> int:
    """Write a checkpoint between two others (WiSE-FT): often better than both on what the base knew."""
    from ..adapters import surgery

    report = surgery.interpolate(located(base), located(tuned), alpha, output)
    click.echo(f"{output}  {len(report.changes)} weights")
    return 0


# ---------------------------------------------------------------- diff, doctor


@click.command()
@click.argument("one", type=Strengthened())
@click.argument("other", type=Strengthened())
@base_option
@as_json
def diff(one: tuple[Path, Weighting], other: tuple[Path, Weighting], base: Path | None, for_programs: bool) -> int:
    """Tell how far apart two adapters are as updates, whatever their kinds, ranks and dialects."""
    from ..adapters.comparing import compared

    a, b = resolved(loaded([one, other]), base)
    rows = compared(a, b)
    if for_programs:
        click.echo(json.dumps([vars(row) for row in rows]))
        return 0
    click.echo(f"{'':<28}{'|A|':>11}{'|B|':>11}{'|A-B|':>11}{'apart':>9}{'cosine':>9}")
    for row in rows:
        cosine = "-" if row.cosine is None else f"{row.cosine:.3f}"
        numbers = f"{row.a:>11.4g}{row.b:>11.4g}{row.difference:>11.4g}{row.apart:>9.2%}{cosine:>9}"
        click.echo(f"{plain(row.name)[:27]:<28}{numbers}")
    return 0


@click.command()
@click.argument("files", nargs=-1, required=True, type=Strengthened(), metavar="FILE[:STRENGTH]...")
@click.option("--picture", type=PATH, metavar="FILE.png", help="strengths, cosines and overlaps by block, as a heat map")
@base_option
@as_json
def doctor(files: Files, picture: Path | None, base: Path | None, for_programs: bool) -> int:
    """Tell what adapters are, what ails them, how much they collide, which block weights help, and what a merge would lose."""
    from .. import checkup
    from ..adapters.doctor import collide, examine, predict

    find = weights_of(base)
    checkups = [examine(path, find) for path, _ in files]
    collision: Collision | None = None
    predictions: Sequence[Prediction] = ()
    if len(files) > 1 and all(found.loads for found in checkups):
        adapters = loaded(files)
        ones = [1.0] * len(files)
        collision = collide(adapters, ones, base=find)
        predictions = predict([adapter.resolve(find) if find else adapter for adapter in adapters], ones)
    click.echo((checkup.as_json if for_programs else checkup.table)(checkups, collision, predictions))
    if picture:
        from ..sample import save_sheet

        save_sheet(checkup.heat_map(checkups, collision), picture)
        click.echo(picture, err=for_programs)
    return 0


COMMANDS: tuple[click.Command, ...] = (merge, convert, resize, extract, bake, interpolate, diff, doctor)
