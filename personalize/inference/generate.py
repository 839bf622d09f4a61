"""Images on demand: prompts x seeds with a base and adapters, written as PNG files that say how they were made."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.embedding import vectors_of
from ..adapters.strengths.grammar import WHOLE
from ..data.captions import fill_caption, missing_trigger
from ..errors import AdapterError, OutputError, RecipeError
from ..families.notation import choose_by_seed, unescape
from ..families.words import words_pattern
from ..formats.header import short
from ..models.model import device_of
from ..models.precision import dtype_of, precision_of
from ..models.resident import RESIDENT
from ..recipe.fields import Fitting, Recipe
from ..recipe.lines import parse_line
from ..recipe.resolve import from_json, resolve
from ..text import slug
from .events import Event, Notice, Picture, Progress, Saved
from .img2img import fit_start
from .library import Library
from .png import save_picture
from .prompts import Use, check_negative, parse
from .request import Request
from .session import Session
from .sheet import contact_sheet, save_sheet
from .xyplot import Axis, Plot, plots

SOME = 3  # words that are named in one line


def generate(
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Request,
    library: Library,
    *,
    base: Mapping[str, Any] | None = None,
    precision: str = Fitting().precision,
    device: str = "auto",
    batch_size: int | None = None,
    grid: bool = False,
    axes: Sequence[Axis] = (),
    output: Path = Path("pictures"),
) -> Iterator[Event]:
    """Draw every prompt with every seed, as `settings` says; yield progress, notices, and each file as it is written.

    The adapters of `settings` count for every prompt; where a prompt's tags name one, they say how much of it. `base` says what
    to draw with, in the recipe's words (base, vae, clip_skip, prediction, zero_snr); what it leaves out is as it was when the
    first adapter was trained. `precision` is the recipe's too, and depends on the machine only. `output` is a folder, where
    names never clash with what is there, or a .png file for a single image or contact sheet. Contact sheets are written with
    `grid` or `axes`, each behind its images.
    """
    how = resolve(flags={"precision": precision, "device": device})
    device = device_of(how.device)
    dtype = dtype_of(precision_of(how.fitting, torch.device(device)))
    requests = combine(prompts, seeds, settings, library)
    pages, sheets = plots(requests, seeds, axes, library.find), grid or bool(axes)
    check_output(output, sum(len(page.requests) for page in pages), len(pages) if sheets else 0)
    adapters = library.load(use.name for page in pages for request in page.requests for use in request.adapters)
    pages = [replace(page, requests=tuple(fill_placeholders(page.requests, adapters))) for page in pages]
    everything = [request for page in pages for request in page.requests]
    yield from map(Notice, check_adapters(adapters, everything))
    session = Session(
        RESIDENT.open(base_recipe(list(adapters.values()), base or {}), device, dtype), library, batch_size=batch_size
    )
    start = settings.image
    if start and start.picture:  # once for all pages
        start, notice = fit_start(session.base, start, settings.size)
        yield from [Notice(notice)] if notice else []
    for page in pages:
        yield from draw_page(
            session, replace(page, requests=tuple(replace(one, image=start) for one in page.requests)), output, sheets
        )


def combine(prompts: Sequence[str], seeds: Sequence[int], settings: Request, library: Library) -> list[Request]:
    """A request for every prompt with every seed. Raises RecipeError for tags that say nothing and names that are no adapter."""
    made = []
    for prompt in prompts:
        text, options = parse_line(prompt)
        check_negative(options.get("negative", ""))
        first = options.pop("seed", seeds[0])
        for seed in seeds:
            chosen, tags = parse(choose_by_seed(text, own_seed := (first + seed - seeds[0]) % 2**32))
            own = [Use(library.find(name), weighting) for name, weighting in tags]
            uses = (*(use for use in settings.adapters if use.name not in dict(own)), *own)
            made.append(replace(settings, prompt=chosen, seed=own_seed, adapters=uses, **options))
    return made


def fill_placeholders(requests: Sequence[Request], adapters: Mapping[str, Adapter]) -> list[Request]:
    """Requests with {trigger} and {class} filled in from the first adapter of each. Raises RecipeError where none tells them."""
    made = []
    for request in requests:
        texts = request.prompt, request.negative
        if any(fill_caption(text, "", "") != " ".join(text.split()) for text in texts):
            known = [adapters[use.name].metadata for use in request.adapters]
            trigger = next((said for one in known if (said := one.get("modelspec.trigger_phrase"))), "")
            if not trigger:
                raise RecipeError(f"nothing tells the trigger in '{request.prompt:.60}'", "give the adapter: --adapter FILE")
            class_name = next((recipe.data.class_name for recipe in map(recipe_in, known) if recipe), "")
            words = unescape(trigger.split(", ")[0]), class_name
            request = replace(request, prompt=fill_caption(texts[0], *words), negative=fill_caption(texts[1], *words))
        made.append(request)
    return made


def recipe_in(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe that an adapter was trained by; None where there is no readable one."""
    with contextlib.suppress(RecipeError):  # of another version
        return from_json(text) if (text := metadata.get("personalize.recipe")) else None
    return None


def draw_page(session: Session, page: Plot, output: Path, sheets: bool) -> Iterator[Event]:
    """Draw and save the images of a page, those with equal settings together; then its contact sheet, where it has one."""
    alone = output.suffix.lower() == ".png"
    settings = [request.settings for request in page.requests]
    order = sorted(range(len(settings)), key=lambda i: settings.index(settings[i]))
    done: dict[int, Image.Image] = {}
    for event in session.draw(page.requests[i] for i in order):
        if isinstance(event, Progress):
            yield replace(event, numbers=tuple(order[number] for number in event.numbers))
        elif isinstance(event, Picture):
            number = order[event.number]
            done[number] = event.image
            if not (alone and sheets):
                name = file_name(event.request, page.labels[number])
                path = output if alone else unused_path(output / f"{name}.png")
                yield Saved(save_picture(event.image, path, event.request), number)
        else:
            yield event
    if sheets:
        sheet = contact_sheet([done[i] for i in sorted(done)], len(page.columns), rows=page.rows, heads=page.columns)
        path = output if alone else unused_path(output / f"{slug(page.requests[0].prompt)}-grid.png")
        yield Saved(save_sheet(sheet, path))


def check_output(output: Path, pictures: int, sheets: int) -> None:
    """Make a folder for the images. Raises RecipeError if they do not fit into `output`, OutputError if there is no place."""
    if output.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise RecipeError(f"{output}: pictures are written as .png, which holds how they were made", "name a .png or a folder")
    alone = output.suffix.lower() == ".png"
    if alone and (sheets or pictures) > 1:
        many = f"{sheets} sheets" if sheets else f"{pictures} pictures"
        raise RecipeError(f"{many} do not fit into {output}", "give a folder as --output" + ("" if sheets else ", or add --grid"))
    make_folder(output.parent if alone else output)


def check_adapters(adapters: Mapping[str, Adapter], requests: Sequence[Request]) -> Iterator[str]:
    """Raise RecipeError for blocks and patterns that an adapter does not have. Yield a warning for each adapter whose trigger
    word, or a word that it brings, is in none of the prompts that it is for: it will hardly show."""
    for name, adapter in adapters.items():
        own = [request for request in requests if name in dict(request.adapters)]
        weightings = [weighting for request in own for use, weighting in request.adapters if use == name]
        for shape in {} if not adapter.deltas else {str(weighting.shape): weighting.shape for weighting in weightings}.values():
            try:
                shape.of(adapter.deltas, adapter.model)
            except AdapterError as error:
                raise RecipeError(f"{name}: {error.what}", error.hint) from error
        trigger = adapter.metadata.get("modelspec.trigger_phrase", "")
        words = [unescape(word) for word in trigger.split(", ")]  # one of each concept
        if trigger and not any(not missing_trigger(word, [request.prompt]) for word in words for request in own):
            bare = any(word.lower() in request.prompt.lower() for word in words for request in own)
            why = ": brackets without a backslash are emphasis" if bare else ""
            yield f"{name} listens to '{trigger}', which no prompt says{why}"
        if not adapter.deltas and any(str(weighting) != str(WHOLE) for weighting in weightings):
            yield f"{name} is a word, which counts as much as the prompt says: ({name}:0.8)"
        if unsaid := [word for word in vectors_of(adapter.words) if not is_said(word, own)]:
            listed = ", ".join(f"'{short(word)}'" for word in unsaid[:SOME]) + " and others" * (len(unsaid) > SOME)
            yield f"{name} brings {listed}, which no prompt says"
    yield from twice_brought(adapters)


def is_said(word: str, requests: Iterable[Request]) -> bool:
    """Whether a word stands in a prompt or a negative prompt."""
    pattern = words_pattern([word])
    return any(pattern.search(unescape(text)) for request in requests for text in (request.prompt, request.negative))


def twice_brought(adapters: Mapping[str, Adapter]) -> Iterator[str]:
    """A warning for each word that two adapters bring: in a prompt for both, it is the first one's."""
    bringers: dict[str, str] = {}
    for name, adapter in adapters.items():
        for word in vectors_of(adapter.words):
            if (first := bringers.setdefault(word, name)) != name:
                yield f"{first} and {name} both bring the word '{short(word)}': where both are used, it is the first one's"


def file_name(request: Request, label: str) -> str:
    """An image's name without its ending: prompt, seed, and where it stands on the axes."""
    return "-".join(filter(None, [slug(request.prompt), f"s{request.seed}", re.sub(r"[^\w.=@+-]+", "-", label)]))


def make_folder(folder: Path) -> None:
    """Make a folder for the images, before anything expensive is done for them. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", "choose another --output") from error


def base_recipe(adapters: Sequence[Adapter], given: Mapping[str, Any]) -> Recipe:
    """The recipe of the first adapter that has a readable one, else the default one, with what is `given` of the base."""
    recipe = Recipe()
    for found in filter(None, (recipe_in(adapter.metadata) for adapter in adapters)):
        recipe = found
        break
    if given.get("base", recipe.base) != recipe.base:
        recipe = Recipe()  # what is known of one base says nothing about another
    return recipe.model_copy(update=dict(given))


def unused_path(path: Path) -> Path:
    """`path`, or the same with -2, -3, ... where that name is taken."""
    free, number = path, 2
    while free.exists():
        free = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return free
