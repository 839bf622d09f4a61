"""The `personalize` command: train, generate, show, report; what computes with adapter files is in algebra.py.

Only click is imported here; torch, pydantic and rich come with the command that needs them, so that help is instant.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..errors import AdapterError, PersonalizeError, RecipeError
from ..recipe.samplers import AUTO, SAMPLERS
from ..text import plain
from .adapters import COMMANDS
from .batch import batch
from .dataset import dataset
from .merge import merge
from .values import PATH, Along, Called, Side

if TYPE_CHECKING:
    from ..recipe.fields import Recipe
    from ..recipe.settings import Setting

HELP = ("-h", "--help")


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, 2 for anything said on purpose, 130 after Ctrl-C."""
    with telling_warnings():
        try:
            return cli.main(list(arguments), prog_name="personalize", standalone_mode=False) or 0
        except PersonalizeError as error:
            return fail(str(error))
        except click.ClickException as error:
            return fail(error.format_message())
        except click.Abort:
            click.echo("stopped", err=True)
            return 130


def fail(message: str) -> int:
    """One line on stderr."""
    click.echo(f"personalize: {plain(message)}", err=True)
    return 2


@contextlib.contextmanager
def telling_warnings() -> Iterator[None]:
    """Our own warnings as one line each, without file and line number; those of libraries stay silent."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module=r"personalize\b")
        warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {plain(str(message))}", err=True)
        yield


class Commands(click.Group):
    """Commands that each bring their own -h: click's automatic one stays as the first context that asks would have it."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(click.help_option(*HELP)(cmd), name)


@click.group(cls=Commands, context_settings={"help_option_names": HELP, "max_content_width": 120}, invoke_without_command=True)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """From a handful of pictures to a portable adapter.

    \b
      personalize train photos/rex --class dog
      personalize generate "a rex dog in the snow" --adapter runs/rex/rex.safetensors
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


# ---------------------------------------------------------------- train


class RecipeCommand(click.Command):
    """A command with one option per field of the Recipe, listed section by section."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from ..recipe.settings import settings

        fields = [option(setting) for setting in settings().values() if setting.name != "folder"]
        known = {parameter.name for parameter in self.params}
        self.params += [field for field in fields if field.name not in known]
        return super().get_params(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..recipe.reference import heading
        from ..recipe.settings import settings

        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            home = settings()[parameter.name].section if parameter.name in settings() else ""
            if (entry := parameter.get_help_record(ctx)) and parameter.name != "folder":
                sections.setdefault(home, []).append(entry)
        for section, entries in sections.items():
            with formatter.section(heading(section)):
                formatter.write_dl(entries)


def option(setting: Setting) -> click.Option:
    """A field as an option. Values stay text: the recipe checks them, so bounds and messages have one home."""
    from ..recipe.reference import default_text

    notes = "; ".join(filter(None, [setting.bounds, f"default: {text}" if (text := default_text(setting)) else ""]))
    flag, help_text = setting.flag, setting.help + (f" [{notes}]" if notes else "")
    if setting.type is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", setting.name], default=None, help=help_text)
    shape = "|".join(setting.choices) or {"int": "N", "float": "X", "Path": "PATH"}.get(setting.type.__name__, "TEXT")
    return click.Option([flag, setting.name], multiple=setting.many, metavar=shape, help=help_text)


@cli.command(cls=RecipeCommand, short_help="Learn the pictures in a folder.")
@click.argument("folder", type=PATH, required=False)
@click.option("--from", "origin", type=PATH, metavar="ADAPTER", help="repeat the run that made this adapter")
@click.option("--dry-run", is_flag=True, help="print the resolved recipe and what is in the folder, and stop")
@click.option("--fresh", is_flag=True, help="start over instead of going on with what --output already holds")
def train(folder: Path | None, origin: Path | None, dry_run: bool, fresh: bool, **flags: Any) -> int:
    """Learn the pictures in FOLDER; leave an adapter and a report in runs/TRIGGER.

    Without --preset, the preset for subjects of the base's family is used (pocket-, sd15-, sd21- or sdxl-subject).

    The same command again goes on where it was stopped.
    """
    recipe = resolved(folder, origin, flags, needed=not dry_run)
    if dry_run:
        return preview(recipe)
    from .progress import watch

    return watch(recipe, fresh=fresh)


cli.command(cls=RecipeCommand, short_help="Learn many folders of pictures, an adapter for each.")(batch)


def resolved(folder: Path | None, origin: Path | None, flags: dict[str, Any], needed: bool = False) -> Recipe:
    """The recipe of a command line. Raises RecipeError, also when nothing says where the pictures are.

    Where its base will be `needed`, it may be downloaded, and what is wrong with it is said now.
    """
    from ..recipe.resolve import presets, resolve

    given = {name: value for name, value in flags.items() if value not in (None, ())}
    if folder is not None:
        given["folder"] = folder
    if origin is None and "preset" not in given and (usual := usual_preset(given.get("base", "pocket"), needed)) in presets():
        given["preset"] = usual
    recipe = resolve(flags=given, start=recipe_of(origin) if origin else None)
    if "folder" not in recipe.data.model_fields_set:
        raise RecipeError("where are the pictures?", "personalize train FOLDER")
    return recipe


def usual_preset(base: str, needed: bool = True) -> str:
    """The preset for subjects of a base's family, whatever the base is called: `sd15-subject`, ...

    Where the base is not `needed`, nothing is downloaded, and "" is the answer for what is no base.
    """
    prefix = base
    if base != "pocket":  # which is known without opening anything
        from ..models.model import family_at

        try:
            prefix = family_at(base, download=needed).preset
        except PersonalizeError:
            if needed:
                raise
            return ""
    return f"{prefix}-subject"


def recipe_of(adapter: Path) -> Recipe:
    """The recipe in an adapter's metadata. Raises AdapterError where there is none."""
    from ..adapters.describe import describe
    from ..recipe.resolve import from_json

    text = describe(adapter).metadata.get("personalize.recipe")
    if text is None:
        raise AdapterError(f"{adapter} does not say how it was made", "only adapters made by personalize can be repeated")
    return from_json(text, str(adapter))


def preview(recipe: Recipe) -> int:
    """The recipe as TOML, and the pictures with their captions as comments: stdout is a preset that repeats the run."""
    from ..data.folder import read_folder
    from ..recipe.resolve import to_toml

    dataset = read_folder(recipe.data)
    if recipe.preset:
        click.echo(f"# from preset {recipe.preset}")
    click.echo(to_toml(recipe))
    click.echo(f"# {len(dataset.examples)} pictures in {recipe.data.folder}, trigger {dataset.trigger!r}")
    for example in dataset.examples:
        width, height = example.size
        click.echo(f"#   {plain(example.path.name):<24} {width}x{height:<6} {plain(example.caption)}")
    for warning in dataset.warnings:
        click.echo(f"warning: {plain(warning)}", err=True)
    return 0


# ---------------------------------------------------------------- generate


@cli.command()
@click.argument("prompts", metavar="PROMPT...", nargs=-1)
@click.option("--prompts", "listed", type=PATH, metavar="FILE", help="more prompts, one per line; # begins a comment")
@click.option("--adapter", "-a", "stack", type=Called(), multiple=True, metavar="[NAME=]FILE[:STRENGTH]",
              help="adapter and its strength, can be repeated: A.safetensors:0.8; UNet and text encoder apart: "
                   "A.safetensors:0.8:0.5 (A1111 writes them the other way round) or A.safetensors:unet=0.8:te=0.5; "
                   "by block: A.safetensors:0.8:lbw=OUTD; by step: A.safetensors:0@0,1@0.5 "
                   "or A.safetensors:1:start=5:stop=10")  # fmt: skip
@click.option("--lora-dir", type=PATH, metavar="FOLDER", help="adapters that prompts may name: <lora:NAME:0.8>")
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
@click.option("--xy", "axes", type=Along(), multiple=True, metavar="NAME=VALUES",
              help="also write a sheet along an axis, or two (across, down): strength=0,0.5,1 or seed, steps, guidance, denoise, "
                   "sampler, adapter=none,A,A+B or an adapter's name for its strength: A=0,1,0@0;1@1")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="pictures drawn at once")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="where to draw")
@click.option(
    "--output", "-o", type=PATH, default=Path("pictures"), show_default=True, help="folder, or a .png for a single picture"
)
def generate(prompts: tuple[str, ...], listed: Path | None, seeds: tuple[str, ...], count: int | None, **options: Any) -> int:
    """Draw pictures with a base and adapters; <lora:NAME:0.8> in a prompt says how much of one that prompt gets."""
    from ..inference.generate import paint
    from ..inference.prompts import from_file

    wanted = [*prompts, *(from_file(listed) if listed else ())]
    if not wanted:
        raise RecipeError("what should be drawn?", 'personalize generate "a cat", or --prompts FILE')
    how = {name: options.pop(name) for name in ("base", "vae", "clip_skip", "prediction", "zero_snr")}
    given = {name: value for name, value in how.items() if value is not None}
    for path in paint(wanted, numbered(seeds, count), base=given, **options):
        click.echo(path)
    return 0


def numbered(seeds: Sequence[str], count: int | None) -> list[int]:
    """Seeds from `0,1` texts, continued upwards to `count`."""
    pieces = [piece.strip() for text in seeds for piece in text.split(",")] or ["0"]
    for piece in pieces:
        if not (piece.isdecimal() and int(piece) < 2**32):
            raise RecipeError(f"--seeds must be whole numbers from 0 to {2**32 - 1}, not {piece!r}")
    given = [int(piece) for piece in pieces]
    more = max(0, (count or 0) - len(given))
    return (given + [given[-1] + i + 1 for i in range(more)])[:count]


# ---------------------------------------------------------------- show, report, version


@cli.command()
@click.argument("adapters", type=PATH, nargs=-1, required=True)
@click.option("--json", "for_programs", is_flag=True, help="everything, one JSON object per file")
def show(adapters: tuple[Path, ...], for_programs: bool) -> int:
    """Tell what an adapter file is, from its header alone."""
    from ..adapters.describe import describe
    from ..reports.adapter.summary import as_json, as_text

    code = 0
    for path in adapters:
        try:
            click.echo((as_json if for_programs else as_text)(describe(path)))
        except AdapterError as error:
            code = fail(str(error))
    return code


@cli.command()
@click.argument("run_folder", metavar="RUN", type=PATH)
def report(run_folder: Path) -> int:
    """Write the report of a run folder again."""
    from ..reports.run import write_report

    click.echo(write_report(run_folder))
    return 0


@cli.command()
def version() -> int:
    """Print the versions that matter, for a bug report."""
    import platform
    from importlib.metadata import version as installed

    click.echo(f"personalize {__version__}\npython {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "diffusers", "transformers", "peft", "safetensors"):
        click.echo(f"{name} {installed(name)}")
    return 0


for command in (dataset, merge, *COMMANDS):
    cli.add_command(command)
