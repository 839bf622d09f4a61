"""Settings -> recipe: what `personalize train` and `personalize.resolve` do with what they were given."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.folder import read_folder
from ..errors import PersonalizeError, RecipeError, check_type
from ..recipe.fields import Data, Recipe
from ..recipe.resolve import presets
from ..recipe.resolve import resolve as resolve_layers
from ..text import plain
from ..training.events import read_events
from .showing import Showing, find_out

if TYPE_CHECKING:
    from ..tuning.rates import RateGroup

Ask = Callable[[Path, Showing], Showing]  # what a person says of a folder, beside what it is taken for


def resolve(
    preset: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    *,
    start: Recipe | None = None,
    **settings: Any,
) -> Recipe:
    """The recipe of a run, exactly as `personalize train` makes it of the same settings.

    Settings are named as in docs/recipe.md, in `flags` or as keywords (`class_`, for `class` is Python's). Without a preset,
    it is the base's: for subjects, or for styles where no class is given and the folder shows no one thing; a warning says so.

    Raises RecipeError for unknown settings (naming the nearest), values out of bounds and contradictions; BaseModelError for a
    base that is none.

    >>> resolve(folder="photos/rex", class_="dog").preset
    'pocket-subject'
    """
    check_type(
        preset, (str, Path, type(None)), "preset", 'a name or path: p.resolve("sd15-style", folder="photos/rex")', RecipeError
    )
    check_type(flags, (Mapping, type(None)), "flags", 'settings by name: p.resolve(flags={"folder": "photos/rex"})', RecipeError)
    check_type(start, (Recipe, type(None)), "start", "another run's recipe", RecipeError)
    if preset is not None and Path(preset).is_dir():
        raise RecipeError(f"{preset} is a folder, and what stands first is a preset", f'p.resolve(folder="{preset}")')
    given = {**(flags or {}), **{name.rstrip("_"): value for name, value in settings.items()}}
    recipe, told = explain(given if preset is None else {**given, "preset": preset}, start=start)
    if told:
        warnings.warn(told, stacklevel=2)
    return recipe


def explain(
    flags: Mapping[str, Any], *, start: Recipe | None = None, needed: bool = True, ask: Ask | None = None
) -> tuple[Recipe, str]:
    """The recipe of some settings, and a line about what the folder was taken for, where that had to be found out.

    Where the base is `needed`, it may be downloaded, and what is wrong with it is an error now. Raises RecipeError, also when
    nothing says where the pictures are.
    """
    given = {name.replace("-", "_"): value for name, value in flags.items() if value not in (None, ())}
    for name in ("folder", "base"):
        check_type(given.get(name, ""), (str, PathLike), name, f'a path: p.resolve({name}="path")', RecipeError)
    given |= {name: str(value) for name in ("base", "vae") if isinstance(value := given.get(name), PathLike)}
    base = str(given.get("base") or (start.base if start else "pocket"))
    prefix = preset_prefix(base, needed and start is None and "preset" not in given)
    showing, told, of_styles = None, "", f"{prefix}-style" if f"{prefix}-style" in presets() else ""
    if start is None and "preset" not in given:
        if given.get("class") == "":  # somebody says so: there is nothing to tell
            showing = Showing(True)
        elif "class" not in given and "folder" in given:
            showing = remembered_showing(given, prefix) or find_out(Path(given["folder"]), base, given.get("trigger"))
            showing = ask(Path(given["folder"]), showing) if ask and showing else showing
            told = f"{plain(str(given['folder']))}: {showing.line(of_styles)}" if showing else ""
        usual = f"{prefix}-{'style' if showing and showing.style else 'subject'}"
        if usual in presets():
            given["preset"] = usual
        if showing and showing.class_name:
            given["class"] = showing.class_name
    recipe = resolve_layers(flags=given, start=start, prefix=prefix)
    if "folder" not in recipe.data.model_fields_set:
        raise RecipeError("where are the pictures?", "personalize train FOLDER")
    return recipe, told


def preset_prefix(base: str, needed: bool = True) -> str:
    """What the names of a base's own presets begin with, whatever the base is called: `sd15`, ...

    Where the base is not `needed`, nothing is downloaded, and "" is the answer for what is no base.
    """
    if base == "pocket":  # whose family is known without opening anything
        return base
    from ..models.model import family_at

    try:
        return family_at(base, download=needed).preset
    except PersonalizeError:
        if needed:
            raise
        return ""


def remembered_showing(given: Mapping[str, Any], prefix: str) -> Showing | None:
    """What the run folder says that it was taken for, so that the same command goes on with the same recipe."""
    folder = Path(given["folder"])
    try:
        trigger = read_folder(Data(folder=folder, trigger=given.get("trigger"), caption="")).trigger
    except PersonalizeError:
        return None
    output = Path(given.get("output") or Path("runs") / trigger)
    for record in reversed(read_events(output / "events.jsonl")):
        if record["event"] == "started" and isinstance(known := record.get("recipe"), dict):
            if known.get("preset") == f"{prefix}-style":
                return Showing(True, why=f"the run in {output} is")
            if known.get("preset") == f"{prefix}-subject" and known.get("class"):
                return Showing(False, str(known["class"]), f"the run in {output} is")
            break
    return None


def layers_at_hand(recipe: Recipe) -> list[RateGroup]:
    """What a recipe trains, layers that learn alike together: from the base's shapes alone.

    Raises RecipeError for a pattern that names no layer, BaseModelError for a base that is not on this machine.
    """
    from ..models.skeleton import skeleton_of
    from ..training.preflight import parts
    from ..tuning.rates import groups_of, rates_of
    from ..tuning.targets import fresh

    base = skeleton_of(recipe.base)
    start = fresh(base, recipe.adapter, parts(recipe, base), recipe.seed)
    return groups_of(base.family, rates_of(base.family, start, recipe.optim, recipe.steps))
