"""`personalize train`, `batch`, `finish`, `tell` and `report`: runs, one or many; and how flags become a recipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AdapterError, BaseModelError, DataError, OutputError, PersonalizeError, RecipeError
from ..pictures.files import look_into
from ..pictures.galleries import CLASSES, check_folder, check_output, count_pictures, galleries
from ..registry import table
from ..text import in_ascii, plain
from .messages import answer, echo, print_error, print_warning
from .queueing import enqueue, queue_of, queue_options
from .values import PATH

if TYPE_CHECKING:
    from ..api.showing import Showing
    from ..jobs import Store
    from ..recipe.fields import Recipe
    from ..recipe.settings import Setting

OWN_SETTINGS = "personalize.toml"  # of one folder among many, beside its pictures

# ---------------------------------------------------------------- options from settings


class SettingsCommand(click.Command):
    """A command with an option for each setting of the recipe, listed section by section."""

    def has_option(self, setting: Setting) -> bool:
        """Whether a setting is an option of this command."""
        return setting.name != "folder"

    def settings(self) -> set[str]:
        """The names of the recipe's settings that are options of this command, but for the folder, which is an argument."""
        from ..recipe.settings import settings

        return {one.name for one in settings().values() if one.name != "folder" and self.has_option(one)}

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
            home = settings()[parameter.name].section if parameter.name in self.settings() else ""
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
@queue_options
def train(
    folder: Path | None,
    origin: Path | None,
    dry_run: bool,
    fresh: bool,
    queue: bool | None,
    workspace: Path | None,
    **flags: Any,
) -> int:
    """Train an adapter on the pictures in FOLDER; adapter and report go to runs/TRIGGER.

    Without --preset, that of the base's family is used: for subjects (sd15-subject, ...), or for styles, where there is no
    --class and the folder shows no one thing.

    The same command again resumes a run that was stopped; with more --steps it trains on with one that is finished. --init begins
    with the weights of any adapter.
    """
    recipe, taken_for = resolve_recipe(folder, origin, flags, needed=not dry_run, ask=not dry_run)
    if taken_for:
        echo(f"{'# ' if dry_run else ''}{taken_for}")
    answer(taken_for=taken_for)
    if recipe.output:
        check_output(recipe.data.folder, recipe.output)
    if dry_run:
        return print_recipe(recipe)
    if store := queue_of(queue, workspace):
        return queue_train(store, recipe, {"folder": folder, "origin": origin, "fresh": fresh, **flags}, stay=not queue)
    from .progress import train_one

    return train_one(recipe, fresh=fresh)


def queue_train(store: Store, recipe: Recipe, settings: dict[str, Any], stay: bool) -> int:
    """Leave a training to the server of a workspace, and follow it if this command is to `stay`."""
    from ..data.captions import safe_trigger
    from ..data.folder import read_folder
    from .progress import follow_job

    output = recipe.output or Path("runs") / (recipe.name or safe_trigger(read_folder(recipe.data).trigger))
    if settings["class"] is None and recipe.data.class_name:  # somebody was asked, here
        settings["class"] = recipe.data.class_name
    job = enqueue(store, "train", settings | {"preset": recipe.preset}, output, stay)
    return follow_job(store, job, recipe.model_copy(update={"output": job.folder})) if stay else 0


def resolve_recipe(
    folder: Path | None, origin: Path | None, flags: dict[str, Any], needed: bool = False, ask: bool = False
) -> tuple[Recipe, str]:
    """The recipe of a command line, and a line about what the folder was taken for, if nothing said. Raises RecipeError."""
    from ..api.recipes import explain

    given = flags if folder is None else {**flags, "folder": folder}
    asking = ask_what_is_shown if ask and sys.stdin.isatty() and sys.stdout.isatty() else None
    return explain(given, start=recipe_in(origin) if origin else None, needed=needed, ask=asking)


def ask_what_is_shown(folder: Path, guess: Showing) -> Showing:
    """Ask what the pictures show. Enter takes the guess."""
    from ..api.showing import Showing

    default = "style" if guess.style else guess.class_name or "thing"
    question = f"What do the pictures in {plain(str(folder))} show? A word such as dog; style; thing, if no word fits"
    said = " ".join(click.prompt(question, default=default, err=True).split())
    if said == default:
        return guess
    return Showing(said == "style", "" if said in ("style", "thing") else said, "you said so")


def recipe_in(adapter: Path) -> Recipe:
    """The recipe in an adapter's metadata. Raises AdapterError where there is none."""
    from ..adapters.describe import describe
    from ..recipe.resolve import from_json

    metadata = describe(adapter).metadata
    text = metadata.get("personalize.recipe")
    if "personalize.changes" in metadata:
        print_warning(f"{adapter} changed its recipe on the way: the last one alone does not make the same adapter again")
    if text is None:
        raise AdapterError(f"{adapter} does not say how it was made", "only adapters made by personalize can be repeated")
    return from_json(text, str(adapter))


def print_recipe(recipe: Recipe) -> int:
    """The recipe as TOML, and the pictures with their captions as comments: stdout is a preset that repeats the run."""
    from ..data.folder import read_folder
    from ..recipe.resolve import to_toml
    from ..recipe.rule import rule_of
    from ..recipe.settings import flatten

    dataset = read_folder(recipe.data)
    lines = [f"# from preset {recipe.preset}"] if recipe.preset else []
    lines += [to_toml(recipe), f"# {len(dataset.examples)} pictures in {recipe.data.folder}, trigger {dataset.trigger!r}"]
    for example in dataset.examples:
        width, height = example.size
        lines.append(f"#   {plain(example.path.name):<24} {width}x{height:<6} {plain(example.caption)}")
    if recipe.is_layered:
        lines += rate_lines(recipe)
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")  # the file that this goes to is read as UTF-8
    for line in lines:
        echo(line if unicode else in_ascii(line))
    answer(recipe=flatten(recipe), pictures=[{"path": one.path, "caption": one.caption} for one in dataset.examples])
    rows = {recipe.optim.optimizer: rule_of(recipe.optim.optimizer)}
    rows |= {name: table("trackers")[name] for name in recipe.trackers}
    missing = [row.missing_package(name) for name, row in rows.items()]  # each would end the run
    for warning in (*recipe.remarks, *dataset.warnings, *filter(None, missing)):
        print_warning(str(warning))
    return 0


def rate_lines(recipe: Recipe) -> list[str]:
    """How layers learn, as comments below a recipe: where they lie, how many there are, at which rate and after which step."""
    from ..api.recipes import layers_at_hand

    try:
        groups = layers_at_hand(recipe)
    except BaseModelError as error:
        return [f"# which layers learn how fast is known when the base is at hand: {plain(error.what)}"]
    rates = [recipe.optim.lr if not one.layers.startswith("text_encoder") else recipe.optim.text_encoder_lr for one in groups]
    return [
        f"#   {one.layers:<32} {one.count:>4} layers  rate {rate * one.rate.scale:.3g}"
        + (f" after step {one.rate.start}" if one.rate.start else "")
        for one, rate in zip(groups, rates, strict=True)
    ]


# ---------------------------------------------------------------- batch


@click.command(cls=SettingsCommand, short_help="Train an adapter on each of many folders of pictures.")
@click.argument("folders", type=PATH, nargs=-1, required=True)
@click.option("--together", type=click.IntRange(1), metavar="N", help="at most so many at once [default: what fits into memory]")
@click.option(
    "--backend", default="local", show_default=True, metavar="|".join(table("backends")), help="where the runs are trained"
)
@click.option("--dry-run", is_flag=True, help="print what would be trained, and stop")
@click.option("--fresh", is_flag=True, help="start over instead of resuming what is there")
@queue_options
def batch(
    folders: tuple[Path, ...],
    together: int | None,
    backend: str,
    dry_run: bool,
    fresh: bool,
    queue: bool | None,
    workspace: Path | None,
    **flags: Any,
) -> int:
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
        print_error(f"{folder.name}: {message}")
    if dry_run:
        answer(runs=[{"folder": one.data.folder, "run": one.output, "preset": one.preset, "steps": one.steps} for one in recipes])
        for recipe in recipes:
            echo(f"{recipe.data.folder} => {recipe.output}  ({_outline(recipe)})")
        return 2 if wrong else 0
    from .batch import follow_job, train_many

    place = Path(flags["output"] or "runs")
    if store := queue_of(queue, workspace):
        settings = {"folders": folders, "together": together, "backend": backend, "fresh": fresh, **flags}
        job = enqueue(store, "batch", settings, place, stay=not queue)
        return 0 if queue else follow_job(store, job, recipes, place, wrong)
    return train_many(recipes, backend, place=place, fresh=fresh, together=together, refused=wrong)


def _outline(recipe: Recipe) -> str:
    """A run in a few words: pictures, steps, preset, and the class that it or its folder's name gives."""
    from ..data.folder import concepts_of

    classes = dict.fromkeys(one.class_name for one in concepts_of(recipe.data, galleries(recipe.data.folder)) if one.class_name)
    named = f"class {', '.join(classes) or '-'}"
    return f"{count_pictures(recipe.data.folder)} pictures, {recipe.steps} steps, preset {recipe.preset or '-'}, {named}"


def picture_folders(folder: Path) -> list[Path]:
    """A folder, if it has pictures, or else those in it that have some; also those that cannot be read, whose recipe says why.

    Raises DataError where there are none.
    """
    if galleries(folder):
        return [folder]
    contents = look_into(folder)
    hidden = [path for path, _ in contents.left_out if path.is_dir()]
    inner = sorted([*hidden, *(one for one in contents.folders if _may_hold_pictures(one))])
    if (classes := [one for one in inner if one.name.lower() in CLASSES]) and len(classes) < len(inner):
        inner = [one for one in inner if one not in classes]
        names = ", ".join(plain(str(one)) for one in classes)
        print_warning(f"{names}: taken for class images and left out; name the folder itself to train it")
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
            recipe, taken_for = resolve_recipe(folder, None, given, needed=True)
            check_output(folder, recipe.output or runs)
            if (other := places.setdefault((recipe.output or runs).absolute(), folder)) != folder:
                hint = f"write output = ... into {folder / OWN_SETTINGS}"
                raise RecipeError(f"{folder} and {other} have one name, and so one run folder, {recipe.output}", hint)
            recipes.append(recipe)
            if taken_for:
                echo(taken_for)
        except PersonalizeError as error:
            wrong[folder] = str(error)
    return recipes, wrong


# ---------------------------------------------------------------- runs that there are


@click.command()
@click.argument("folders", metavar="RUN...", type=PATH, nargs=-1, required=True)
def finish(folders: tuple[Path, ...]) -> int:
    """Make adapter, sample pictures, scores and report of where each RUN stands, without further steps.

    RUN is a run folder that was stopped, or a folder of such. The command that trained it still goes on with it afterwards.
    """
    runs = [run for folder in folders for run in run_folders(folder)]
    recipes = [recipe_of_run(run) for run in runs]
    if len(recipes) == 1:
        from .progress import train_one

        return train_one(recipes[0])
    from .batch import train_many

    return train_many(recipes, "local", place=runs[0].parent)


def run_folders(folder: Path) -> list[Path]:
    """A folder that a run has kept its state in, or else those in it. Raises OutputError where there are none."""
    from ..training.rundir import Run

    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [one for one in (folder, *inner) if Run(one, "").state.is_file()]
    if not found:
        raise OutputError(f"there is no run in {folder} that has kept its state", "give the folder that personalize train wrote")
    return found[:1] if found[0] == folder else found


def recipe_of_run(folder: Path) -> Recipe:
    """The recipe of a run with as many steps as it has taken. Raises OutputError for one without."""
    from ..recipe.resolve import read_settings, resolve
    from ..training.rundir import Run

    state = Run(folder, "").load_state()
    if state is None or not state.done:
        raise OutputError(f"the run in {folder} has taken no step", "personalize train makes some")
    here = {"output": folder, "steps": state.done, "leave_one_out": 0}  # no further trainings either
    return resolve(flags={**read_settings(folder / "recipe.toml"), **here})


@click.command()
@click.argument("run_folder", metavar="RUN", type=PATH)
@click.argument("word", metavar="sample|save|stop")
def tell(run_folder: Path, word: str) -> int:
    """Ask a run that goes on in RUN to draw its sample pictures now, to save a checkpoint, or to stop."""
    from ..training.control import WORDS
    from ..training.control import tell as leave_word

    leave_word(run_folder, word)
    echo(f"{run_folder} will, after the step that it is taking: {WORDS[word]}")
    answer(run=run_folder, word=word)
    return 0


@click.command()
@click.argument("run_folder", metavar="RUN", type=PATH)
def report(run_folder: Path) -> int:
    """Write the report of a run folder again."""
    from ..lock import is_held
    from ..reports.run import write_report

    path = write_report(run_folder, live=is_held(run_folder))
    echo(path)
    answer(report=path)
    return 0
