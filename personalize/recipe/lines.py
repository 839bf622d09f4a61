"""Prompts as files and kohya's trainer write them: one per line, `#` begins a comment, `--w 96 --n blurry` behind a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RecipeError
from .samplers import sampler_name

OPTION = re.compile(r"(?:^|\s)--([A-Za-z][A-Za-z_-]*)(?:=|\s+|$)")
OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {  # kohya's letter => ours, how it is read, an example
    "n": ("negative", str, "blurry"),
    "w": ("width", int, "96"),
    "h": ("height", int, "64"),
    "d": ("seed", int, "7"),
    "s": ("steps", int, "20"),
    "l": ("guidance", float, "5"),
    "ss": ("sampler", sampler_name, "euler_a"),
}


class PromptLine(NamedTuple):
    """A prompt, and what is drawn differently for it: `size`, and the names of OPTIONS but for width and height."""

    text: str
    options: dict[str, Any]


def parse_line(line: str) -> PromptLine:
    """A prompt without the options behind it, and what they say. Raises RecipeError for those that are not known.

    >>> parse_line("a cat in the snow --n blurry, dark --w 96 --h 64 --d 7 --l 5")
    PromptLine(text='a cat in the snow', options={'negative': 'blurry, dark', 'size': (96, 64), 'seed': 7, 'guidance': 5.0})
    """
    text, *rest = OPTION.split(line)
    if not rest:
        return PromptLine(line, {})
    found: dict[str, Any] = {}
    for letter, value in zip(rest[::2], rest[1::2], strict=True):
        if letter not in OPTIONS:
            known = " ".join(f"--{one} {example}" for one, (_, _, example) in OPTIONS.items())
            raise RecipeError(f"--{letter} behind the prompt '{text.strip():.40}' is not known", f"known are {known}")
        name, read, example = OPTIONS[letter]
        try:
            found[name] = read(value.strip())
        except ValueError as error:
            what = f"--{letter} behind the prompt '{text.strip():.40}' must be a number, not {value.strip()!r}"
            raise RecipeError(what, f"such as --{letter} {example}") from error
        if isinstance(found[name], int | float) and not found[name] >= (0 if name in ("seed", "guidance") else 1):
            what = f"--{letter} {value.strip()} behind the prompt '{text.strip():.40}' makes no sense"
            raise RecipeError(what, f"such as --{letter} {example}")
    sides = found.pop("width", None), found.pop("height", None)
    size = {"size": (sides[0] or sides[1], sides[1] or sides[0])} if any(sides) else {}
    order = {name: value for name, value in found.items() if name == "negative"}
    return PromptLine(text.strip(), order | size | found)


def expand(prompts: list[str]) -> list[str]:
    """Prompts, with those that name a file, `@FILE` or a path that ends in .txt, replaced by its lines. Raises RecipeError."""
    files = [file_named(prompt) for prompt in prompts]
    return [line for prompt, path in zip(prompts, files, strict=True) for line in (read_prompts(path) if path else [prompt])]


def with_our_placeholders(template: str) -> str:
    """[trigger] and [class], as ai-toolkit writes them, as {trigger} and {class}."""
    return re.sub(r"(?<!\\)\[(trigger|class)\]", r"{\1}", template, flags=re.IGNORECASE)


def file_named(prompt: str) -> Path | None:
    """The file that a prompt is the name of; words with a space in them are only where there is such a file."""
    text = prompt.strip()
    path = Path(text.removeprefix("@")).expanduser()
    if not (text.startswith("@") or path.suffix.lower() == ".txt") or text == "@":
        return None
    return path if not re.search(r"\s", text) or _is_file(path) else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # longer than any file's name
        return False


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; empty lines and those that begin with # are left out. Raises RecipeError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}", "one prompt per line"
        ) from error
    if not (prompts := [line for line in lines if line and not line.startswith("#")]):
        raise RecipeError(f"there are no prompts in {path}", "one per line; # begins a comment")
    return prompts
