"""An adapter file in a few lines for a person, or as JSON for a program. What a file says never reaches a terminal raw."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ...errors import RecipeError
from ...recipe.adapter import EMBEDDING
from ...recipe.resolve import from_json
from ...recipe.settings import flatten
from ...text import command_line, plain, quote, readable
from ..kit.tables import counts

if TYPE_CHECKING:
    from ...adapters.describe import Description

SHOWN = 2000  # letters of a line: commands in it stay whole
# Of the recipe: what one asks first.
RECIPE_SETTINGS = ("base", "steps", "batch_size", "vectors", "init_word", "lr", "text_encoder_lr", "embedding_lr", "seed")


def as_text(found: Description) -> str:
    """Lines of `what  it is`."""
    lines = [f"{found.path}  ({readable(found.bytes)})"]
    lines += [f"  {name:<10}{plain(text, SHOWN)}" for name, text in _rows(found) if text]
    return "\n".join(lines)


def _rows(found: Description) -> Iterator[tuple[str, str]]:
    """Names and texts; an empty text is left out."""
    if found.dialect or found.kind != "unknown":
        names = f"{found.dialect} names" if found.dialect else ""
        yield "what", ", ".join(filter(None, [f"{found.kind} for {found.family}", names, found.dtype]))
    else:
        yield "what", "no adapter; a checkpoint is read by bake, extract and interpolate"
    yield "title", found.title if found.title != found.path.stem else ""
    yield "trigger", found.trigger
    yield "words", ", ".join(f"{word} ({count} vector{'s' * (count > 1)})" for word, count in found.words.items())
    yield "parts", ", ".join(f"{part} ({count} layers)" for part, count in found.parts.items())
    yield "rank", counts(found.ranks, "{:g} ({} layers)", 6)
    yield "alpha", counts(found.alphas, "{:g} ({} layers)", 6)
    tensors = f"{found.tensors} tensor{'s' * (found.tensors > 1)}"
    yield "size", f"{found.parameters:,} parameters in {tensors}" if found.tensors else "nothing inside"
    if heavy := found.heaviest:
        key, size, total = heavy
        hint = f"leave it out: personalize convert {quote(found.path)} --strip-metadata -o NAME.safetensors"
        yield "metadata", f"{readable(total)}, more than the tensors, of which {key} {readable(size)}; {hint}"
    yield "about", found.metadata.get("modelspec.description", "")
    yield from _origin(found)
    if found.unmatched:
        more = f" and {len(found.unmatched) - 3} more" if len(found.unmatched) > 3 else ""
        yield "unmatched", ", ".join(found.unmatched[:3]) + more + ": these would not load"


def _origin(found: Description) -> Iterator[tuple[str, str]]:
    """How it was trained or merged, as far as the file says."""
    if merged := found.metadata.get("personalize.merge"):
        yield "merged", merged
        yield "repeat", command_line("personalize", "merge", "--replay", found.path, "-o", "NAME.safetensors")
    text = found.metadata.get("personalize.recipe")
    if text is None:
        return
    try:
        values = flatten(from_json(text, str(found.path)))
    except RecipeError as error:  # somebody else's recipe, or another version's: still a file worth showing
        yield "recipe", str(error)
        return
    unused = ("lr", "text_encoder_lr") if values["kind"] == EMBEDDING else ()
    shown = [name for name in RECIPE_SETTINGS if name in values and name not in unused]
    yield "recipe", ", ".join(f"{name} {values[name]}" for name in shown)
    yield "repeat", command_line("personalize", "train", "FOLDER", "--from", found.path)


def as_json(found: Description) -> str:
    """Everything, for programs."""
    values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(found).items()}
    return json.dumps(values, default=str, ensure_ascii=True)
