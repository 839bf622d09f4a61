"""Commands as jobs: rows of the table `jobs`. A job is what its command does, with the same settings, checks and answer.

Settings are a command's parameters by their names, as JSON has them: {"folder": "photos/rex", "class": "dog", "steps": 300}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..errors import PersonalizeError, RecipeError, nearest
from ..jobs.kind import LONG, QUICK, Draft, Task
from ..jobs.workspace import Workspace
from ..pictures.galleries import check_output
from ..registry import table
from ..text import slug
from .adapters import convert, doctor, output_path, resize, rule_of
from .caption import caption, check_caption
from .checkpoints import bake, extract, interpolate
from .dataset import dataset
from .generate import generate, order_of
from .listening import listen
from .merge import merge
from .messages import answer_in_json, strict
from .train import SettingsCommand, batch, finish, train

Parameters = dict[str, Any]
HERE: Parameters = {"queue": False, "workspace": None, "dry_run": False}  # a job is done where it runs, and wholly


@dataclass(frozen=True)
class CommandKind:
    """A command as a kind of job. `place` proposes a name and where the job writes; `check` is what its command would refuse."""

    command: click.Command
    lane: str
    place: Callable[[Workspace, Parameters], tuple[str, Path]]
    check: Callable[[Parameters], None] = lambda _: None
    again: Callable[[Path], None] = lambda _: None  # what is done before it begins anew
    resident: Callable[[bool], None] = lambda _: None  # keep what was loaded for the next job; or let go of it
    beside: Callable[[Path], Parameters] = lambda _: {}  # settings of what it writes into its folder, unless they are given
    inside: bool = False  # it writes into what it is given, and so only one job at a time does

    def warm(self) -> None:
        """Import what every job of the kind needs, and keep from now on what it loads."""
        self.resident(True)

    def cool(self) -> None:
        """Let go of what was kept."""
        self.resident(False)

    def schema(self) -> dict[str, Any]:
        """What the settings may be, as the JSON schema of an object."""
        from .forms import command_schema

        return command_schema(self.command)

    def draft(self, settings: Mapping[str, Any], workspace: Workspace) -> Draft:
        """Check settings. Raises PersonalizeError."""
        plain: dict[str, Any] = strict(dict(settings))
        given = plain.get("output")
        _, values = parameters(self.command, {"output": str(workspace.adapters / "adapter.safetensors"), **plain})
        values["output"] = Path(given) if given else None
        self.check(values)
        name, folder = self.place(workspace, values)
        return Draft(plain, name, Path(given) if given else folder, is_own=not (given or self.inside))

    def run(self, task: Task) -> dict[str, Any]:
        """Run the command; its answer is the result."""
        self.again(task.folder)
        return run_command(self.command, {**self.beside(task.folder), **task.job.settings, "output": str(task.folder)}, task)

    def keep(self, task: Task) -> dict[str, Any]:
        """An adapter of where the training stands."""
        return run_command(finish, {"folders": [str(task.folder)]}, task)


def parameters(command: click.Command, settings: Mapping[str, Any]) -> tuple[click.Context, Parameters]:
    """A command's context, and its parameters from settings, checked as those of the command line are; those that are left out
    have their defaults. Recipe settings stay as they are: the recipe checks them. Raises RecipeError."""
    name = command.name or ""
    settings = {key.replace("-", "_"): value for key, value in settings.items() if value is not None}
    known = {one.name: one for one in command.get_params(click.Context(command)) if one.expose_value and one.name}
    if unknown := settings.keys() - known.keys() - {"output"}:
        first = min(unknown)
        raise RecipeError(f"{name} has no setting {first!r}", nearest(first, known))
    raw = command.settings() if isinstance(command, SettingsCommand) else set()
    typed = [(one, settings[key]) for key, one in known.items() if key in settings and key not in raw]
    options = [word for one, value in typed if isinstance(one, click.Option) for word in words_of(one, value)]
    arguments = [word for one, value in typed if isinstance(one, click.Argument) for word in map(str, list_of(value))]
    try:
        context = command.make_context(name, [*options, "--", *arguments])
    except click.ClickException as error:
        raise RecipeError(error.format_message()) from error
    context.params |= {key: value for key, value in settings.items() if key in raw}
    return context, context.params


def settings_of(name: str, words: Sequence[str]) -> dict[str, Any]:
    """What somebody typed behind a command's name, as settings. Raises RecipeError."""
    command = table("jobs")[name].command
    try:
        context = click.Context(command, info_name=name)
        typed, rest, _ = command.make_parser(context).parse_args([*words])
    except click.ClickException as error:
        raise RecipeError(error.format_message()) from error
    if rest:
        raise RecipeError(f"{name} cannot make sense of {rest[0]!r}", f"personalize {name} --help")
    known = {one.name for one in command.get_params(context) if one.expose_value}
    return {
        key: value
        for key, value in typed.items()
        if key in known and isinstance(value, str | bool | list | tuple) and value != ()
    }


def words_of(option: click.Option, value: Any) -> list[str]:
    """An option with a value as it is typed."""
    if option.is_flag:
        return [option.opts[0]] if value else option.secondary_opts[:1]
    return [f"{max(option.opts, key=len)}={one}" for one in (list_of(value) if option.multiple else [value])]


def list_of(value: Any) -> list[Any]:
    """A list, also of a single value."""
    return list(value) if isinstance(value, list | tuple) else [value]


def recipe_settings() -> set[str]:
    """The names of all settings of a recipe, but for the folder, which is an argument."""
    from ..recipe.settings import settings

    return set(settings()) - {"folder"}


def run_command(command: click.Command, settings: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Run a command as a job, and return its answer. Raises PersonalizeError, and KeyboardInterrupt where it was stopped."""
    context, values = parameters(command, settings)
    name = command.name or ""
    assert command.callback
    with listen(task.report), answer_in_json(name) as (found, _):
        code = context.invoke(command.callback, **{key: HERE.get(key, value) for key, value in values.items()}) or 0
    if code == 130:
        raise KeyboardInterrupt
    result: dict[str, Any] = strict(found.values) | {"warnings": found.warnings}
    if code:
        error = found.error or {"what": f"{name} ended with exit code {code}", "hint": "its log says why"}
        raise PersonalizeError(error["what"], error["hint"])
    return result


# ---------------------------------------------------------------- the rows


def place_of_run(workspace: Workspace, values: Parameters) -> tuple[str, Path]:
    """runs/TRIGGER, as the command has it. Raises what the recipe and the folder of pictures raise."""
    from ..data.folder import read_folder
    from .train import resolve_recipe

    flags = {key: value for key, value in values.items() if key in recipe_settings()}
    recipe, _ = resolve_recipe(values["folder"], values["origin"], flags)
    check_base(recipe.base)
    if recipe.output:
        check_output(recipe.data.folder, recipe.output)
    trigger = read_folder(recipe.data).trigger
    return recipe.name or trigger, workspace.runs / (slug(trigger) or "run")


def check_base(base: str) -> None:
    """Raise BaseModelError for what is no base on this machine; one of the hub may be downloaded when its job begins."""
    from ..models.sources import is_hub_id, locate

    if not is_hub_id(base):
        locate(base, download=False)


def check_batch(values: Parameters) -> None:
    """Raise what is wrong with all of the folders: a batch does those that it can."""
    from ..data.folder import read_folder
    from .train import picture_folders, resolve_recipe

    flags, errors = {key: value for key, value in values.items() if key in recipe_settings()}, list[PersonalizeError]()
    folders = [folder for given in values["folders"] for folder in picture_folders(given)]
    for folder in folders:
        try:
            recipe, _ = resolve_recipe(folder, None, flags)
            check_base(recipe.base)
            read_folder(recipe.data)
        except PersonalizeError as error:
            errors.append(error)
    if len(errors) == len(folders):
        raise errors[0]


def check_merge(values: Parameters) -> None:
    if not (values["files"] or values["replay"]):
        raise RecipeError("which adapters?", "personalize merge A.safetensors:0.7 B.safetensors:-0.3 -o C.safetensors")
    check_files(values)


def check_files(values: Parameters) -> None:
    """Raise what is wrong with the name of what is to be written."""
    read = values.get("files") or ([values["file"]] if "file" in values else [])
    if values["output"]:
        output_path(values["output"], *(path for path, _ in read))


def check_resize(values: Parameters) -> None:
    check_files(values)
    rule_of(values)


def check_drawing(values: Parameters) -> None:
    if values["output"]:
        raise RecipeError("a job draws into a folder of its own", "leave output out")
    order_of(**values)


def place_of_batch(workspace: Workspace, values: Parameters) -> tuple[str, Path]:
    names = [Path(folder).resolve().name for folder in values["folders"]]
    return ", ".join(names), workspace.runs / (slug(names[0]) + ("-and-others" if len(names) > 1 else ""))


def place_of_file(workspace: Workspace, values: Parameters) -> tuple[str, Path]:
    files = values.get("files") or [values["file"]]
    name = "+".join(Path(path).stem for path, _ in files)
    return name, workspace.adapters / f"{slug(name) or 'adapter'}.safetensors"


def place_of_pictures(workspace: Workspace, values: Parameters) -> tuple[str, Path]:
    prompt = (values["prompts"] or ("pictures",))[0]
    return prompt, workspace.outputs / (slug(prompt) or "pictures")


def place_of_checkpoint(workspace: Workspace, values: Parameters) -> tuple[str, Path]:
    name = f"{Path(values['base']).stem}-baked" if "files" in values else f"{Path(values['tuned']).stem}-between"
    return name, workspace.adapters / f"{slug(name)}.safetensors"


def place_of_extract(workspace: Workspace, values: Parameters) -> tuple[str, Path]:
    name = Path(values["tuned"]).stem
    return name, workspace.adapters / f"{slug(name)}-extracted.safetensors"


def place_of_dataset(workspace: Workspace, values: Parameters) -> tuple[str, Path]:
    name = Path(values["folder"]).resolve().name
    return name, workspace.outputs / f"dataset-{slug(name)}"


def place_of_captions(workspace: Workspace, values: Parameters) -> tuple[str, Path]:
    folder = Path(values["folder"]).resolve()
    return folder.name, folder


def place_of_doctor(workspace: Workspace, values: Parameters) -> tuple[str, Path]:
    name = "+".join(Path(path).stem for path, _ in values["files"])
    return name, workspace.outputs / f"doctor-{slug(name)}"


def heat_map_in(folder: Path) -> Parameters:
    """The picture of an examination."""
    folder.mkdir(parents=True, exist_ok=True)
    return {"picture": str(folder / "doctor.png")}


def remove_pictures(folder: Path) -> None:
    """What an attempt that was killed has drawn is drawn anew; the folder is the job's own."""
    for path in folder.glob("*.png"):
        path.unlink(missing_ok=True)


def keep_base(keep: bool) -> None:
    """Keep the base that was drawn with, or let go of it."""
    from ..inference import generate  # with all that drawing needs
    from ..models.resident import RESIDENT

    assert generate
    RESIDENT.keeps = True
    if not keep:
        RESIDENT.forget()


TRAIN = CommandKind(train, LONG, place_of_run)
BATCH = CommandKind(batch, LONG, place_of_batch, check_batch)
EXTRACT = CommandKind(extract, LONG, place_of_extract, check_files)
BAKE = CommandKind(bake, LONG, place_of_checkpoint)
INTERPOLATE = CommandKind(interpolate, LONG, place_of_checkpoint)
GENERATE = CommandKind(generate, QUICK, place_of_pictures, check_drawing, again=remove_pictures, resident=keep_base)
DATASET = CommandKind(dataset, QUICK, place_of_dataset)
CAPTION = CommandKind(caption, QUICK, place_of_captions, check_caption, inside=True)
MERGE = CommandKind(merge, QUICK, place_of_file, check_merge)
RESIZE = CommandKind(resize, QUICK, place_of_file, check_resize)
CONVERT = CommandKind(convert, QUICK, place_of_file, check_files)
DOCTOR = CommandKind(doctor, QUICK, place_of_doctor, beside=heat_map_in)
