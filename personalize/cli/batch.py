"""`personalize batch`: many folders of pictures, an adapter for each, in one go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DataError, PersonalizeError, RecipeError
from ..io import pictures_in
from ..text import plain
from .values import PATH

if TYPE_CHECKING:
    from ..recipe.fields import Recipe

OWN = "personalize.toml"  # settings of one folder, beside its pictures


@click.argument("folders", type=PATH, nargs=-1, required=True)
@click.option("--together", type=click.IntRange(1), metavar="N", help="at most so many at once [default: what fits into memory]")
@click.option("--dry-run", is_flag=True, help="say what would be trained, and stop")
@click.option("--fresh", is_flag=True, help="start over instead of going on with what is there")
def batch(folders: tuple[Path, ...], together: int | None, dry_run: bool, fresh: bool, **flags: Any) -> int:
    """Learn each of FOLDERS, or each folder inside one that has no pictures of its own; leave a run folder for every one.

    All options are those of `train`, for all of them; a folder's own personalize.toml says what is different there, such as its
    class. Adapters of one shape go through the base together. What is done is not done again: the same command goes on.

    --output is the folder that the run folders lie in.
    """
    found = {folder.resolve(): folder for given in folders for folder in with_pictures(given)}
    recipes, wrong = recipes_of(list(found.values()), flags)
    if len(found) == len(wrong) > 1 == len(said := set(wrong.values())):
        raise RecipeError(said.pop())  # of no folder in particular
    for folder, message in wrong.items():
        click.echo(f"{plain(folder.name)}: {plain(message)}", err=True)
    if dry_run:
        for recipe in recipes:
            told = f"{recipe.steps} steps, preset {recipe.preset or '-'}, class {recipe.data.class_name or '-'}"
            click.echo(f"{recipe.data.folder} => {recipe.output}  ({pictures_in(recipe.data.folder)} pictures, {told})")
        return 2 if wrong else 0
    from .progress_many import oversee

    code = oversee(recipes, fresh=fresh, together=together) if recipes else 2
    return code or (2 if wrong else 0)


def with_pictures(folder: Path) -> list[Path]:
    """A folder, if it has pictures, or else those in it that have some. Raises DataError where there are none."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}", "personalize batch FOLDER...")
    inner = [folder] if pictures_in(folder) else sorted(one for one in folder.iterdir() if one.is_dir() and pictures_in(one))
    if not inner:
        raise DataError(f"there are no pictures in {folder}, nor in the folders inside it", "name another folder")
    return inner


def recipes_of(folders: Sequence[Path], flags: dict[str, Any]) -> tuple[list[Recipe], dict[Path, str]]:
    """Every folder's recipe, and what is wrong with those that have none."""
    from ..recipe.resolve import read_settings
    from . import resolved

    runs = Path(flags["output"] or "runs")
    recipes: list[Recipe] = []
    wrong: dict[Path, str] = {}
    for folder in folders:
        try:
            own = read_settings(file) if (file := folder / OWN).is_file() else {}
            if "folder" in own:
                raise RecipeError(f"the folder of pictures is where {file} lies", "leave folder out of it")
            recipes.append(resolved(folder, None, {**flags, "output": runs / folder.resolve().name, **own}, needed=True))
        except PersonalizeError as error:
            wrong[folder] = str(error)
    return recipes, wrong
