"""`personalize train`, `batch` and `report`: runs, one or many; and how flags become a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AdapterError, DataError, PersonalizeError, RecipeError
from ..pictures.files import look_into
from ..pictures.galleries import check_folder, check_output, count_pictures, galleries
from ..registry import table
from ..text import plain
from .messages import print_warning
from .values import PATH

if TYPE_CHECKING:
    from ..recipe.fields import Recipe
    from ..recipe.settings import Setting

OWN_SETTINGS = "personalize.toml"  # of one folder among many, beside its pictures

# ---------------------------------------------------------------- options from settings


class SettingsCommand(click.Command):
    """A command with an option for each setting of the recipe, listed section by section."""

    def has_option(self, setting: Setting) -> bool:
        """Whether a setting is an option of this command."""
        return setting.name != "folder"

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from ..recipe.settings import settings

        known = {parameter.name for parameter in self.params}
        self.params += [option(one) for one in settings().values() if self.has_option(one) and one.name not in known]
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
    """A setting as an option. Values stay text: the recipe checks them, so bounds and messages have one home."""
    from ..recipe.reference import default_text

    notes = "; ".join(filter(None, [setting.bounds, f"default: {text}" if (text := default_text(setting)) else ""]))
    flag, help_text = setting.flag, setting.help + (f" [{notes}]" if notes else "")
    if setting.type is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", setting.name], default=None, help=help_text)
    metavar = "|".join(setting.choices) or {"int": "N", "float": "X", "Path": "PATH"}.get(setting.type.__name__, "TEXT")
    return click.Option([flag, setting.name], multiple=setting.many, metavar=metavar, help=help_text)


# ---------------------------------------------------------------- train


@click.command(cls=SettingsCommand, short_help="Train an adapter on a folder of pictures.")
@click.argument("folder", type=PATH, required=False)
@click.option("--from", "origin", type=PATH, metavar="ADAPTER", help="repeat the run that made this adapter")
@click.option("--dry-run", is_flag=True, help="print the resolved recipe and what is in the folder, and stop")
@click.option("--fresh", is_flag=True, help="start over instead of resuming what --output already holds")
def train(folder: Path | None, origin: Path | None, dry_run: bool, fresh: bool, **flags: Any) -> int:
    """Train an adapter on the pictures in FOLDER; adapter and report go to runs/TRIGGER.

    Without --preset, the preset for subjects of the base's family is used (pocket-, sd15-, sd21- or sdxl-subject).

    The same command again resumes a run that was stopped.
    """
    recipe = resolve_recipe(folder, origin, flags, needed=not dry_run)
    if dry_run:
        return print_recipe(recipe)
    from .progress import train_one

    return train_one(recipe, fresh=fresh)


def resolve_recipe(folder: Path | None, origin: Path | None, flags: dict[str, Any], needed: bool = False) -> Recipe:
    """The recipe of a command line. Raises RecipeError, also when nothing says where the pictures are.

    Where its base will be `needed`, it may be downloaded, and what is wrong with it is an error now.
    """
    from ..recipe.resolve import presets, resolve

    given = {name: value for name, value in flags.items() if value not in (None, ())}
    if folder is not None:
        given["folder"] = folder
    if origin is None and "preset" not in given and (usual := default_preset(given.get("base", "pocket"), needed)) in presets():
        given["preset"] = usual
    recipe = resolve(flags=given, start=recipe_in(origin) if origin else None)
    if "folder" not in recipe.data.model_fields_set:
        raise RecipeError("where are the pictures?", "personalize train FOLDER")
    return recipe


def default_preset(base: str, needed: bool = True) -> str:
    """The preset for subjects of a base's family, whatever the base is called: `sd15-subject`, ...

    Where the base is not `needed`, nothing is downloaded, and "" is the answer for what is no base.
    """
    prefix = base
    if base != "pocket":  # whose family is known without opening anything
        from ..models.model import family_at

        try:
            prefix = family_at(base, download=needed).preset
        except PersonalizeError:
            if needed:
                raise
            return ""
    return f"{prefix}-subject"


def recipe_in(adapter: Path) -> Recipe:
    """The recipe in an adapter's metadata. Raises AdapterError where there is none."""
    from ..adapters.describe import describe
    from ..recipe.resolve import from_json

    text = describe(adapter).metadata.get("personalize.recipe")
    if text is None:
        raise AdapterError(f"{adapter} does not say how it was made", "only adapters made by personalize can be repeated")
    return from_json(text, str(adapter))


def print_recipe(recipe: Recipe) -> int:
    """The recipe as TOML, and the pictures with their captions as comments: stdout is a preset that repeats the run."""
    from ..data.folder import read_folder
    from ..recipe.resolve import to_toml

    dataset = read_folder(recipe.data)
    if recipe.output:
        check_output(recipe.data.folder, recipe.output)
    if recipe.preset:
        click.echo(f"# from preset {recipe.preset}")
    click.echo(to_toml(recipe))
    click.echo(f"# {len(dataset.examples)} pictures in {recipe.data.folder}, trigger {dataset.trigger!r}")
    for example in dataset.examples:
        width, height = example.size
        click.echo(f"#   {plain(example.path.name):<24} {width}x{height:<6} {plain(example.caption)}")
    for warning in (*recipe.remarks, *dataset.warnings):
        print_warning(warning)
    return 0


# ---------------------------------------------------------------- batch


@click.command(cls=SettingsCommand, short_help="Train an adapter on each of many folders of pictures.")
@click.argument("folders", type=PATH, nargs=-1, required=True)
@click.option("--together", type=click.IntRange(1), metavar="N", help="at most so many at once [default: what fits into memory]")
@click.option(
    "--backend", default="local", show_default=True, metavar="|".join(table("backends")), help="where the runs are trained"
)
@click.option("--dry-run", is_flag=True, help="print what would be trained, and stop")
@click.option("--fresh", is_flag=True, help="start over instead of resuming what is there")
def batch(folders: tuple[Path, ...], together: int | None, backend: str, dry_run: bool, fresh: bool, **flags: Any) -> int:
    """Train an adapter on each of FOLDERS, or on each folder inside one that has no pictures of its own.

    All options are those of `train` and hold for all folders; a folder's own personalize.toml says what is different there, such
    as its class. Adapters of one shape go through the base together. The same command again resumes, and skips finished runs.

    --output is the folder for the run folders.
    """
    table("backends").check(backend)
    found = {folder.resolve(): folder for given in folders for folder in picture_folders(given)}
    recipes, wrong = resolve_recipes(list(found.values()), flags)
    if len(found) == len(wrong) > 1 == len(messages := set(wrong.values())):
        raise RecipeError(messages.pop())  # of no folder in particular
    for folder, message in wrong.items():
        click.echo(f"{plain(folder.name)}: {plain(message)}", err=True)
    if dry_run:
        for recipe in recipes:
            settings = f"{recipe.steps} steps, preset {recipe.preset or '-'}, class {recipe.data.class_name or '-'}"
            click.echo(f"{recipe.data.folder} => {recipe.output}  ({count_pictures(recipe.data.folder)} pictures, {settings})")
        return 2 if wrong else 0
    from .progress import train_many

    code = train_many(recipes, backend, fresh=fresh, together=together) if recipes else 2
    return code or (2 if wrong else 0)


def picture_folders(folder: Path) -> list[Path]:
    """A folder, if it has pictures, or else those in it that have some; also those that cannot be read, whose recipe says why.

    Raises DataError where there are none.
    """
    if galleries(folder):
        return [folder]
    contents = look_into(folder)
    hidden = [path for path, _ in contents.left_out if path.is_dir()]
    inner = sorted([*hidden, *(one for one in contents.folders if _may_hold_pictures(one))])
    if not inner:
        raise DataError(f"there are no pictures in {folder}, nor in the folders inside it", "name another folder")
    return inner


def _may_hold_pictures(folder: Path) -> bool:
    """Whether a folder has pictures, or cannot be read."""
    try:
        return bool(galleries(folder))
    except DataError:
        return True


def resolve_recipes(folders: Sequence[Path], flags: dict[str, Any]) -> tuple[list[Recipe], dict[Path, str]]:
    """Every folder's recipe, and an error message for each folder that has none."""
    from ..recipe.resolve import read_settings

    runs = Path(flags["output"] or "runs")
    recipes: list[Recipe] = []
    places: dict[Path, Path] = {}
    wrong: dict[Path, str] = {}
    for folder in folders:
        try:
            check_folder(folder)
            own = read_settings(file) if (file := folder / OWN_SETTINGS).is_file() else {}
            if "folder" in own:
                raise RecipeError(f"the folder of pictures is where {file} lies", "leave folder out of it")
            given = {**flags, "output": runs / folder.resolve().name, **own}
            recipe = resolve_recipe(folder, None, given, needed=True)
            check_output(folder, recipe.output or runs)
            if (other := places.setdefault((recipe.output or runs).absolute(), folder)) != folder:
                hint = f"write output = ... into {folder / OWN_SETTINGS}"
                raise RecipeError(f"{folder} and {other} have one name, and so one run folder, {recipe.output}", hint)
            recipes.append(recipe)
        except PersonalizeError as error:
            wrong[folder] = str(error)
    return recipes, wrong


# ---------------------------------------------------------------- report


@click.command()
@click.argument("run_folder", metavar="RUN", type=PATH)
def report(run_folder: Path) -> int:
    """Write the report of a run folder again."""
    from ..reports.run import write_report

    click.echo(write_report(run_folder))
    return 0
