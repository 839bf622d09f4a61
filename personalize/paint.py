"""Pictures on demand: prompts x seeds with a base and a stack of adapters, written as PNG files that say how they were made."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import sample
from .adapters import Adapter
from .adapters.dialects import file_of
from .adapters.weighting import Weighting
from .attach import attach
from .base import Base, device_of
from .errors import OutputError, RecipeError
from .files import weights_hash
from .recipe import Recipe, from_json

if TYPE_CHECKING:
    from PIL import Image

Stack = Sequence[tuple[Path, Weighting]]  # adapter files, and how much of each


def paint(
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    stack: Stack = (),
    negative: str = "",
    steps: int = sample.DEFAULTS.sample_steps,
    guidance: float = sample.DEFAULTS.guidance,
    size: tuple[int, int] | None = None,
    base: str | None = None,
    grid: bool = False,
    device: str = "auto",
    output: Path = Path("pictures"),
) -> Iterator[Path]:
    """Draw every prompt with every seed and yield each file as it is written, the grid last.

    `output` is a folder, where names never clash with what is there, or a .png file for a single picture or the grid.
    """
    device, single = device_of(device), output.suffix.lower() == ".png"
    if output.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise RecipeError(f"{output}: pictures are written as .png, which holds how they were made", "name a .png or a folder")
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    if single and len(jobs) > 1 and not grid:
        raise RecipeError(f"{len(jobs)} pictures do not fit into {output}", "give a folder as --output, or add --grid")
    make_room(output.parent if single else output)
    adapters = [Adapter.load(path) for path, _ in stack]
    tell_triggers(adapters, stack, prompts)
    model = Base.load(base or trained_on(adapters), device=device)
    used = tuple(stacked(path, weighting) for path, weighting in stack)
    drawn: list[Image.Image] = []
    with attach(model, [(adapter.weighted(much), 1.0) for adapter, (_, much) in zip(adapters, stack, strict=True)]):
        how: dict[str, Any] = {"steps": steps, "guidance": guidance, "negative": negative}
        pictures = sample.drawing(model, [p for p, _ in jobs], [s for _, s in jobs], size=size, **how)
        for (prompt, seed), picture in zip(jobs, pictures, strict=True):
            drawn.append(picture)
            if not (single and grid):
                path = output if single else free(output / f"{slug(prompt)}-s{seed}.png")
                about = sample.settings_of(model, used, prompt=prompt, seed=seed, size=picture.size, **how)
                yield sample.save_picture(picture, path, about)
    if grid:
        sheet = sample.grid(drawn, len(seeds), rows=prompts, heads=[f"seed {seed}" for seed in seeds])
        path = output if single else free(output / f"{slug(prompts[0])}-grid.png")
        yield sample.save_sheet(sheet, path)


def make_room(folder: Path) -> None:
    """Make a folder for the pictures, before anything expensive is done for them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", "choose another --output") from error


def trained_on(adapters: Sequence[Adapter]) -> str:
    """The base that the first adapter with a readable recipe was trained on, else the default one."""
    for text in filter(None, (adapter.metadata.get("personalize.recipe") for adapter in adapters)):
        with contextlib.suppress(RecipeError):  # of another version
            return from_json(text).base
    return str(Recipe.model_fields["base"].default)


def tell_triggers(adapters: Sequence[Adapter], stack: Stack, prompts: Sequence[str]) -> None:
    """Warn about adapters whose trigger word stands in none of the prompts: they will hardly show."""
    for adapter, (path, _) in zip(adapters, stack, strict=True):
        trigger = adapter.metadata.get("modelspec.trigger_phrase", "")
        words = trigger.lower().split(", ")  # one of each concept
        if trigger and not any(word in prompt.lower() for word in words for prompt in prompts):
            warnings.warn(f"{path.name} listens to {trigger!r}, which no prompt says", stacklevel=2)


def stacked(path: Path, weighting: Weighting) -> sample.Stacked:
    """An adapter as it goes into a picture's metadata; its hash is the one that UIs show: of the file without its header."""
    unet, text = weighting.parts["unet"], weighting.parts["text_encoder"]
    return sample.Stacked(path.stem, unet, text, weights_hash(file_of(path)), weighting.inside)


def slug(prompt: str) -> str:
    """A prompt as the beginning of a file name.

    >>> slug("A Zwx cat, in the snow!")
    'a-zwx-cat-in-the-snow'
    """
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"


def free(path: Path) -> Path:
    """`path`, or the same with -2, -3, ... where that name is taken."""
    taken, number = path, 2
    while taken.exists():
        taken = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return taken
