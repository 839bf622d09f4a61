"""defaults <- adapter (`--from`) <- preset <- flags, and back to files that replay the run."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import RecipeError, nearest
from ..pictures.galleries import count_pictures
from ..text import parse_toml
from .adapter import EMBEDDING, OF_LAYERS, AdapterSpec
from .fields import WITHOUT_CLASS, Recipe
from .lines import expand, with_our_placeholders
from .rule import convert_rates
from .settings import flat, flatten, record, settings

OF_ADAPTERS = {*AdapterSpec.model_fields, *OF_LAYERS, "prior", "dco_beta", "dialect"} - {"kind", "vectors", "init_word"}
PROMPTS = ("sample_prompts", "prior_prompts")  # lists whose lines may be in a file


def resolve(
    preset: str | Path | None = None, flags: Mapping[str, Any] | None = None, *, start: Recipe | None = None, prefix: str = ""
) -> Recipe:
    """The recipe of a run: defaults, then `start` (another run's recipe), then a preset by name or path, then flags.

    A preset's `[pictures.20]` holds settings for folders of 20 pictures or more; the nearest number counts last. `prefix` is what
    the names of the base's own presets begin with, to propose one of them where `preset` is none.

    Raises RecipeError for unknown settings (naming the nearest), values out of bounds and contradictions.

    >>> resolve(flags={"folder": "photos", "rank": 4}).adapter.alpha
    4.0
    """
    flags = dict(flags or {})
    preset = flags.pop("preset", preset)
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if start is not None:
        layers.append(("--from", record(start)))
    if preset is not None:
        folder = flags.get("folder") or (start.data.folder if start and "folder" in start.data.model_fields_set else None)
        layers += load_preset(find_preset(preset, prefix), count_pictures(Path(folder)) if folder else 0)
        layers.append(("", {"preset": str(preset)}))
    layers.append(("", flags))
    return _build(layers)


def load_preset(preset: str | Path, pictures: int = 0) -> list[tuple[str, Mapping[str, Any]]]:
    """A preset's (origin, settings), those for so many pictures behind the others, and all after those of the preset that it
    starts from with `preset = "..."`, if any."""
    layers: list[tuple[str, Mapping[str, Any]]] = []
    following: str | Path | None = preset
    while following is not None:
        path = find_preset(following)
        if any(str(path) == seen for seen, _ in layers):
            raise RecipeError(f"preset {path} starts from itself")
        whole = _read_toml(path)
        by_number = _by_number(whole.pop("pictures", {}), path)
        table = flat(whole, str(path))
        few = [least for least in sorted(by_number) if least <= pictures]
        layers[:0] = [(str(path), table), *((f"{path} [pictures.{n}]", flat(by_number[n], str(path))) for n in few)]
        following = table.pop("preset", None)
        if str(following).endswith(".toml"):
            following = path.parent / str(following)
    return layers


def read_settings(path: Path) -> dict[str, Any]:
    """What a TOML file says, by flat names. Raises RecipeError for unknown settings."""
    return flat(_read_toml(path), str(path))


def _by_number(tables: Any, path: Path) -> dict[int, dict[str, Any]]:
    """The tables [pictures.N] of a preset by N."""
    if not isinstance(tables, dict) or not all(key.isdecimal() and isinstance(table, dict) for key, table in tables.items()):
        raise RecipeError(f"[pictures] in {path} must hold tables by number of pictures", "e.g. [pictures.20]")
    return {int(key): table for key, table in tables.items()}


def presets() -> dict[str, Path]:
    """The presets that came along, by name."""
    here = Path(__file__).parents[1]
    folder = here / "presets" if (here / "presets").is_dir() else here.parent / "presets"  # wheel, or clone
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_preset(preset: str | Path, prefix: str = "") -> Path:
    """A preset's file, by its name or path. Raises RecipeError, which proposes one; of a base's own, where `prefix` tells it."""
    if Path(preset).suffix == ".toml":
        return Path(preset)
    if str(preset) not in presets():
        raise RecipeError(f"unknown preset {str(preset)!r}", f"{similar_preset(str(preset), prefix)}; a path must end in .toml")
    return presets()[str(preset)]


def similar_preset(name: str, prefix: str = "") -> str:
    """A hint that names the preset that was most likely meant: `style` on a base of the family sdxl is `sdxl-style`.

    >>> similar_preset("stlye", "sdxl")
    'did you mean sdxl-style?'
    """
    prefix = next((one for one in {name.partition("-")[0] for name in presets()} if name.startswith(f"{one}-")), prefix)
    own = {one.removeprefix(f"{prefix}-"): one for one in presets() if prefix and one.startswith(f"{prefix}-")}
    purpose = name.lower().rpartition("-")[2]
    if close := difflib.get_close_matches(purpose, own, n=1, cutoff=0.5):
        return f"did you mean {own[close[0]]}?"
    return nearest(name, presets())


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read preset {path}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        raise RecipeError(f"preset {path} is not TOML: {error}") from error


def _build(layers: list[tuple[str, Mapping[str, Any]]]) -> Recipe:
    """Merge layers of flat settings, later ones win, and validate the result once."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    kinds = [layer["kind"] for _, layer in layers if "kind" in layer]
    for origin, layer in layers:
        own = flat(layer, origin)
        if origin and EMBEDDING in kinds[-1:] and own.get("kind") != EMBEDDING:  # what presets say of adapters
            own = {key: value for key, value in own.items() if key not in OF_ADAPTERS}
        values = convert_rates(values, own["optimizer"]) if "optimizer" in own else values
        for key, value in own.items():
            values[key], origins[key] = value, origin
            if key in PROMPTS and isinstance(value, list | tuple) and all(isinstance(prompt, str) for prompt in value):
                values[key] = [with_our_placeholders(prompt) for prompt in expand(list(value))]
    if not values.get("class"):
        given = values.get("sample_prompts")
        if origins.get("sample_prompts") and isinstance(given, list):  # a preset's
            asked = [prompt for prompt in given if "{trigger}" in str(prompt) or "{class}" not in str(prompt)]
            if asked != given:  # what asks for the class alone would ask for nothing
                values["sample_prompts"] = [*asked, WITHOUT_CLASS[-1]]
        values.setdefault("sample_prompts", WITHOUT_CLASS)
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section = settings()[key].section
        (nested.setdefault(section, {}) if section else nested)[key] = value
    try:
        return Recipe.model_validate(nested)
    except ValidationError as error:
        raise _explain(error, origins) from None


_EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "Path": "a path"}


def _explain(error: ValidationError, origins: Mapping[str, str]) -> RecipeError:
    """Pydantic's first complaint as one line that names the flag, the bound and the value."""
    first = error.errors()[0]
    name = next(str(part) for part in first["loc"] if part in settings())
    setting = settings()[name]
    kind, value = first["type"], first["input"]
    hint = f"set in {origins[name]}" if origins.get(name) else ""
    if kind == "literal_error":
        choices = ", ".join(setting.choices)
        return RecipeError(
            f"{setting.flag} must be one of {choices}, not {value!r}", hint or nearest(str(value), setting.choices)
        )
    if kind.startswith(("greater_than", "less_than")):
        return RecipeError(f"{setting.flag} must be {setting.bounds}, not {value}", hint)
    what = "a list" if kind.startswith("tuple") else _EXPECTED.get(getattr(setting.type, "__name__", ""), first["msg"])
    return RecipeError(f"{setting.flag} must be {what}, not {value!r}", hint)


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as a preset that replays it, each line with its help text."""
    values, section = flatten(recipe), ""
    lines: list[str] = []
    for setting in settings().values():
        if setting.section != section:
            section = setting.section
            lines += ["", f"[{section}]"]
        if setting.name in values and setting.name != "preset":
            lines.append(f"{f'{setting.name} = {_toml(values[setting.name])}':<40}  # {setting.help}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A TOML literal. JSON's are the same for texts, lists, numbers and booleans, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_json(recipe: Recipe) -> str:
    """The recipe for an adapter's metadata: without the preset's name and the output path, which mean nothing elsewhere."""
    return json.dumps({key: value for key, value in record(recipe).items() if key not in ("preset", "output")})


def from_json(text: str, origin: str = "the adapter") -> Recipe:
    """The recipe that `to_json` wrote."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"the recipe in {origin} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe in {origin} is not an object of settings")
    return _build([(origin, values)])
