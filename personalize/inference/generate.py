"""Pictures on demand: prompts x seeds with a base and adapters, written as PNG files that say how they were made."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.dialects import file_of
from ..data.images import load_whole
from ..errors import AdapterError, OutputError, RecipeError
from ..io import weights_hash
from ..models.model import Base, device_of
from ..models.precision import dtype_of, precision_of
from ..recipe.fields import Fitting, Recipe
from ..recipe.resolve import from_json, resolve
from ..recipe.samplers import named
from . import sampling as sample
from .img2img import DENOISE, fitted
from .library import Named, Shelf, shelve
from .pipeline import Job, drawn
from .prompts import Use, parse, untagged
from .xyplot import Axis, Sheet, sheets

if TYPE_CHECKING:
    from PIL import Image


def paint(
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    stack: Sequence[Named] = (),
    lora_dir: Path | None = None,
    negative: str = "",
    steps: int = sample.DEFAULTS.sample_steps,
    guidance: float = sample.DEFAULTS.guidance,
    sampler: str = sample.DEFAULTS.sampler,
    size: tuple[int, int] | None = None,
    image: Path | None = None,
    denoise: float = DENOISE,
    base: Mapping[str, Any] | None = None,
    precision: str = Fitting().precision,
    grid: bool = False,
    axes: Sequence[Axis] = (),
    batch_size: int = 8,
    device: str = "auto",
    output: Path = Path("pictures"),
) -> Iterator[Path]:
    """Draw every prompt with every seed and yield each file as it is written, the sheets last.

    `base` says what to draw with, in the recipe's words (base, vae, clip_skip, prediction, zero_snr); what it leaves out is as it
    was when the first adapter was trained. `precision` is the recipe's too, and depends on the machine only. The adapters of
    `stack` count for every prompt; where its tags name one, they say how much of it. `output` is a folder, where names never
    clash with what is there, or a .png file for a single picture or sheet.
    """
    device, alone = device_of(device), output.suffix.lower() == ".png"
    fitting = resolve(flags={"precision": precision}).fitting
    dtype = dtype_of(precision_of(fitting, torch.device(device)))
    everywhere, shelf = shelve(stack, lora_dir)
    meant = read(prompts, everywhere, shelf)
    how = (untagged(negative), steps, guidance, denoise, named(sampler))
    jobs = [Job(text, seed, uses, *how) for text, uses in meant for seed in seeds]
    pages, wanted = sheets(jobs, seeds, axes, shelf.find), grid or bool(axes)
    check_output(output, sum(len(page.jobs) for page in pages), len(pages) if wanted else 0)
    beginning = load_whole(image) if image else None
    adapters = shelf.load(dict.fromkeys(use.name for page in pages for job in page.jobs for use in job.uses))
    check_uses(adapters, pages)
    model = Base.of(trained_on(list(adapters.values()), base or {}), device, dtype)
    beginning = beginning and fitted(model, beginning, size)  # once, and told once
    hashes = {name: weights_hash(file_of(shelf.files[name])) for name in adapters}
    for page in pages:
        done: dict[int, Image.Image] = {}
        order = sorted(range(len(page.jobs)), key=lambda i: [job.how for job in page.jobs].index(page.jobs[i].how))
        pictures = drawn(model, [page.jobs[i] for i in order], adapters, size=size, image=beginning, batch_size=batch_size)
        for i, picture in zip(order, pictures, strict=True):
            done[i] = picture
            if not (alone and wanted):
                job = page.jobs[i]
                path = output if alone else free(output / f"{file_name(job, page.labels[i])}.png")
                yield sample.save_picture(picture, path, told(model, job, hashes, picture.size, image))
        if wanted:
            sheet = sample.grid([done[i] for i in sorted(done)], len(page.heads), rows=page.rows, heads=page.heads)
            path = output if alone else free(output / f"{slug(page.jobs[0].prompt)}-grid.png")
            yield sample.save_sheet(sheet, path)


def read(prompts: Sequence[str], everywhere: Sequence[Use], shelf: Shelf) -> Iterator[tuple[str, tuple[Use, ...]]]:
    """Each prompt's text and adapters: those of every prompt, but for what its own tags say."""
    for prompt in prompts:
        text, tags = parse(prompt)
        own = [Use(shelf.find(name), weighting) for name, weighting in tags]
        yield text, (*(use for use in everywhere if use.name not in dict(own)), *own)


def check_output(output: Path, pictures: int, pages: int) -> None:
    """Make a folder for the pictures. Raises RecipeError if they do not fit into `output`, OutputError if there is no place."""
    if output.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise RecipeError(f"{output}: pictures are written as .png, which holds how they were made", "name a .png or a folder")
    alone = output.suffix.lower() == ".png"
    if alone and (pages or pictures) > 1:
        many = f"{pages} sheets" if pages else f"{pictures} pictures"
        raise RecipeError(f"{many} do not fit into {output}", "give a folder as --output" + ("" if pages else ", or add --grid"))
    make_room(output.parent if alone else output)


def check_uses(adapters: Mapping[str, Adapter], pages: Sequence[Sheet]) -> None:
    """Raise RecipeError for blocks and patterns that an adapter does not have. Warn about adapters whose trigger word stands in
    none of the prompts that they are for: they will hardly show."""
    jobs = [job for page in pages for job in page.jobs]
    for name, adapter in adapters.items():
        mine = [job for job in jobs if name in dict(job.uses)]
        for text in {
            str(weighting.shape): weighting.shape for job in mine for use, weighting in job.uses if use == name
        }.values():
            try:
                text.of(adapter.deltas, adapter.model)
            except AdapterError as error:
                raise RecipeError(f"{name}: {error.what}", error.hint) from error
        trigger = adapter.metadata.get("modelspec.trigger_phrase", "")
        words = trigger.lower().split(", ")  # one of each concept
        if trigger and not any(word in job.prompt.lower() for word in words for job in mine):
            warnings.warn(f"{name} listens to {trigger!r}, which no prompt says", stacklevel=2)


def told(base: Base, job: Job, hashes: Mapping[str, str], size: tuple[int, int], image: Path | None) -> sample.Parameters:
    """What a picture says of itself; an adapter's hash is the one that UIs show: of its file without the header."""
    used = [sample.Stacked(name, weighting, hashes[name]) for name, weighting in job.uses]
    how: dict[str, Any] = {"steps": job.steps, "guidance": job.guidance, "negative": job.negative, "sampler": job.sampler}
    begun: dict[str, Any] = {"image": image.name, "denoise": job.denoise} if image else {}
    return sample.settings_of(base, used, prompt=job.prompt, seed=job.seed, size=size, **how, **begun)


def file_name(job: Job, label: str) -> str:
    """A picture's name without its ending: prompt, seed, and where it stands on the axes."""
    return "-".join(filter(None, [slug(job.prompt), f"s{job.seed}", re.sub(r"[^\w.=@+-]+", "-", label)]))


def make_room(folder: Path) -> None:
    """Make a folder for the pictures, before anything expensive is done for them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", "choose another --output") from error


def trained_on(adapters: Sequence[Adapter], given: Mapping[str, Any]) -> Recipe:
    """The recipe of the first adapter that has a readable one, else the default one, with what is `given` of the base."""
    recipe = Recipe()
    for text in filter(None, (adapter.metadata.get("personalize.recipe") for adapter in adapters)):
        with contextlib.suppress(RecipeError):  # of another version
            recipe = from_json(text)
            break
    if given.get("base", recipe.base) != recipe.base:
        recipe = Recipe()  # what is known of one base says nothing about another
    return recipe.model_copy(update=dict(given))


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
