"""A folder of pictures -> examples, each with its caption, and what a person should know about them."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import DataError, RecipeError, check_type
from ..families.notation import escape, foreign, foreign_in_caption, unescape
from ..pictures.files import MARK, SIDECARS, Contents, first_few, is_picture_inside, look_into, printable_name, same_name
from ..pictures.galleries import (
    KOHYA,
    Gallery,
    advice_without_pictures,
    class_folder,
    galleries,
    subfolders_with_pictures,
)
from ..pictures.metadata import FILES, Note, metadata_file, read_metadata
from ..recipe.fields import Data
from ..text import quote
from .buckets import Grid
from .captions import fill, fill_caption, missing_trigger, read_caption, safe_trigger
from .dataset import Concept, Dataset, Example
from .images import Unreadable, probe
from .masks import load_mask, mask_of

FINEST = 20  # balanced concepts differ from exact shares of each picture by less than one in so many
CAPTION_TABLES = {".csv", ".json", ".jsonl", ".parquet", ".tsv"}  # of other programs
OURS = {"personalize.toml", "readme.txt", "license.txt"}
_TAGS = re.compile(r"<\w+:[^<>]*>|(?:^|\s)--\w+|\bBREAK\b")
Template = Callable[[Concept], str]


def read_folder(data: Data) -> Dataset:
    """Open, check and caption every picture of a folder (and those in subfolders that its metadata names).

    A folder without pictures of its own, but with subfolders called `10_name class`, holds a concept in each of them; so does a
    project of kohya's in its `img`. A picture that cannot be read, or whose caption or mask cannot, is left out with a warning.
    Raises DataError when the folder or its metadata are not usable, or when no picture is left; RecipeError for an unknown word
    in the caption's template.
    """
    check_type(data, Data, "what is read", 'the data part of a recipe: p.read_folder(p.resolve(folder="photos").data)', DataError)
    found = galleries(data.folder)
    concepts = concepts_of(data, found)

    def words(template: str) -> Template:
        return lambda concept: fill(template, concept.trigger, concept.class_name)

    dataset = _collect(data.folder, found, concepts, words(data.caption), words(data.caption_prefix), data.alpha_mask)
    examples = _balance_repeats(dataset.examples, concepts) if data.balance else dataset.examples
    warnings = [
        *dataset.warnings,
        *(line for i, one in enumerate(concepts) for line in _captions_without_trigger(one.trigger, examples, i)),
        *foreign_notation(examples),
    ]
    return replace(dataset, examples=examples, warnings=warnings)


def class_images(folder: Path, prompt: str) -> Dataset:
    """A folder of class images for prior preservation: a Dataset like any other, captioned with the class prompt."""
    return replace(_collect(folder, galleries(folder)[:1], (Concept(""),), lambda _: prompt), trigger=prompt)


def regularization(folder: Path, template: str, class_name: str) -> Dataset:
    """A folder of class images that somebody brought: pictures in it, or in subfolders called `1_dog`; theirs is the class then.

    A picture without a caption gets the template. Raises DataError, and RecipeError where the template's class is not known.
    """
    found = galleries(folder)
    names = [one.numbered for one in found if one.name]
    named = [(match[0].partition("_")[2], int(match[1])) for match in names if match]
    concepts = [Concept("", rest, one.name, n) for (rest, n), one in zip(named, found, strict=False)] or [Concept("", class_name)]
    if "{class}" in template and not all(concept.class_name for concept in concepts):
        raise RecipeError(
            "--regularization needs --class, for pictures without a caption", "what is the subject? e.g. --class dog"
        )
    return _collect(folder, found, tuple(concepts), lambda concept: fill(template, "", concept.class_name))


def concepts_of(data: Data, found: Sequence[Gallery]) -> tuple[Concept, ...]:
    """What the galleries of a folder show, as their names tell. A trigger or class that the recipe gives are the first one's."""
    given, class_name = unescape(" ".join((data.trigger or "").split())), data.class_name
    named = [(one.name, match) for one in found if one.name and (match := one.numbered)]
    if not named:
        name = os.path.basename(os.path.abspath(data.folder))
        match = KOHYA.fullmatch(name)  # a single folder out of kohya's layout
        trigger, is_a = (unescape(match[2]), match[3] or "") if match else (safe_trigger(name), "")
        return (Concept(_check_trigger(given or trigger), class_name or is_a),)
    concepts = [Concept(_check_trigger(unescape(match[2])), match[3] or "", name, int(match[1])) for name, match in named]
    first = replace(
        concepts[0], trigger=_check_trigger(given) or concepts[0].trigger, class_name=class_name or concepts[0].class_name
    )
    return (first, *concepts[1:])


def _check_trigger(trigger: str) -> str:
    """The trigger. Raises RecipeError for one that no escape makes plain text in a prompt."""
    read = [name for name, _ in foreign(escape(trigger))] + [match[0] for match in _TAGS.finditer(trigger)]
    if read:
        raise RecipeError(f"prompts read {read[0].strip()} in the trigger {trigger!r}", f"--trigger {safe_trigger(trigger)}")
    return trigger


@dataclass
class _Reading:
    """What was read so far of a folder."""

    root: Path
    examples: list[Example] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    bad_masks: list[tuple[Path, DataError]] = field(default_factory=list)
    pictures: set[Path] = field(default_factory=set)  # readable or not
    captions: set[Path] = field(default_factory=set)  # files that belong to them

    @functools.cached_property
    def contents(self) -> Callable[[Path], Contents]:
        """What lies beside a picture; each folder is listed once."""
        return functools.cache(look_into)

    def add(self, path: Path, number: int, concept: Concept, note: Note, template: str, prefix: str, alpha: bool | None) -> None:
        """Read a picture with its caption and mask."""
        self.pictures.add(path)
        beside = self.contents(path.parent)
        file = beside.caption_of(path)
        self.captions |= {file} if file else set()
        try:
            written = read_caption(file) if file else ""
            sha256, size = probe(path)
        except (Unreadable, DataError) as error:
            self.skipped.append((path, str(error)))
            return
        mask, mask_sha256 = None, ""
        try:
            if alpha is not None:
                mask, mask_sha256 = mask_of(path, beside.mask_of(path), sha256, size, alpha)
        except DataError as error:
            self.bad_masks.append((path, error))  # whole, it would teach what its mask is to keep away
            return
        text = written or note.caption
        caption = f"{prefix} {fill_caption(text, concept.trigger, concept.class_name) if text else template}".strip()
        repeats = note.repeats or concept.repeats
        self.examples.append(Example(path, caption, sha256, size, repeats, number, mask, mask_sha256, file, written))


def _collect(
    root: Path,
    found: Sequence[Gallery],
    concepts: tuple[Concept, ...],
    template: Template,
    prefix: Template = lambda _: "",
    alpha: bool | None = None,
) -> Dataset:
    """The pictures of all concepts. `alpha` says whether an alpha channel is a mask; None: nothing is, as of class images."""
    if not found:
        raise DataError(f"there are no pictures in {root}", advice_without_pictures(look_into(root)))
    reading = _Reading(root)
    for number, (concept, gallery) in enumerate(zip(concepts, found, strict=True)):
        for path in gallery.pictures:
            note = gallery.notes.get(path, Note())
            reading.add(path, number, concept, note, template(concept), prefix(concept), alpha)
        reading.skipped += gallery.contents.left_out
    if found[0].name:
        reading.skipped += look_into(root).left_out
    skipped = [f"skipped {_below(root, path)}: {why}" for path, why in reading.skipped]
    skipped += skipped_by_masks(root, reading.bad_masks)
    if not reading.examples:
        raise DataError(f"none of the {len(reading.pictures)} pictures in {root} can be read", "; ".join(skipped[:3]))
    unread = _unread(root, found, reading)
    unused = (*_lonely(found, reading.pictures), *_unused_folders(root, reading.pictures), *unread)
    warnings = [*skipped, *_twins(reading.examples), *unused]
    about = tuple(reading.skipped), unused, tuple(reading.bad_masks)
    return Dataset(tuple(reading.examples), warnings, concepts[0].trigger, concepts, *about)


def skipped_by_masks(root: Path, bad_masks: Iterable[tuple[Path, DataError]]) -> list[str]:
    """What is told of pictures whose mask is of no use."""
    return [f"skipped {_below(root, path)}: {error.what} ({error.hint})" for path, error in bad_masks]


def without_cut_masks(root: Path, dataset: Dataset, places: Grid, factor: int = 1) -> Dataset:
    """A dataset without the pictures of whose mask nothing is left once they are cut, and with a warning for each.

    `factor` is how many pixels make a latent, along a side. Raises DataError when no picture is left.
    """
    lost = dict[Path, DataError]()
    for example in dataset.examples:
        if example.mask:
            try:
                load_mask(example, places.shape_of(example.size), factor)
            except DataError as error:
                lost[example.path] = error
    if not lost:
        return dataset
    kept = tuple(example for example in dataset.examples if example.path not in lost)
    warnings = skipped_by_masks(root, lost.items())
    if not kept:
        raise DataError(f"none of the {len(lost)} pictures in {root} can be used", "; ".join(warnings[:3]))
    bad_masks = (*dataset.bad_masks, *lost.items())
    return replace(dataset, examples=kept, warnings=[*dataset.warnings, *warnings], bad_masks=bad_masks)


def _balance_repeats(examples: Sequence[Example], concepts: Sequence[Concept]) -> tuple[Example, ...]:
    """Repeats scaled so that every trigger gets the same share; within it, pictures keep theirs to one in FINEST."""
    totals: dict[str, int] = {}
    for example in examples:
        trigger = concepts[example.concept].trigger
        totals[trigger] = totals.get(trigger, 0) + example.repeats
    share = min(math.lcm(*totals.values()), FINEST * max(totals.values()))
    seen = dict.fromkeys(totals, 0)
    balanced = []
    for example in examples:
        trigger = concepts[example.concept].trigger
        before, after = seen[trigger], seen[trigger] + example.repeats
        seen[trigger] = after
        repeats = after * share // totals[trigger] - before * share // totals[trigger]  # their sum is the share, exactly
        balanced.append(replace(example, repeats=repeats))
    return tuple(balanced)


def _below(root: Path, path: Path) -> str:
    return printable_name(path.relative_to(root).as_posix())


def _twins(examples: Sequence[Example]) -> list[str]:
    """The same file twice counts double in training, which is rarely meant."""
    first: dict[str, str] = {}
    pairs = [(e.path.name, first.setdefault(e.sha256, e.path.name)) for e in examples]
    return [f"{name} is the same picture as {twin}" for name, twin in pairs if name != twin]


def _lonely(found: Sequence[Gallery], pictures: set[Path]) -> list[str]:
    """Masks whose picture is not there: most likely a name was mistyped."""
    named = {(path.parent, same_name(path.stem)) for path in pictures}
    masks = [path for gallery in found for path in gallery.contents.masks]
    lonely = [path for path in masks if (path.parent, same_name(path.stem)[: -len(MARK)]) not in named]
    return [f"{path.name} is a mask without a picture" for path in lonely]


def _unused_folders(root: Path, pictures: set[Path]) -> list[str]:
    """Subfolders with pictures of which none is used."""
    parts = {path.relative_to(root).parts[0] for path in pictures}
    unused = [name for name in subfolders_with_pictures(look_into(root)) if name not in parts]
    reg, told = class_folder(root), []
    if reg and reg.name in unused:
        unused.remove(reg.name)
        told = [f"class images in the subfolder {reg.name} are used with --prior images --regularization {quote(reg)}"]
    return [*told, *([f"pictures in the subfolder {first_few(unused)} are not used"] if unused else [])]


def _unread(root: Path, found: Sequence[Gallery], reading: _Reading) -> list[str]:
    """Files that look like captions and that nothing reads; texts that belong to no picture, where one lacks its caption."""
    known = {metadata_file(folder) for folder in {root, *(one.contents.folder for one in found)} if read_metadata(folder)}
    names = []
    for one in found:
        lacks = any(example.path.parent == one.contents.folder and not example.caption_file for example in reading.examples)
        kinds = CAPTION_TABLES | (set(SIDECARS) if lacks and not one.notes else set())
        files = [path for path in one.contents.others if path.suffix.lower() in kinds and path.name.lower() not in OURS]
        names += [_below(root, path) for path in files if path not in known | reading.captions]
    odd = [_below(root, path) for one in found for path in one.contents.others if is_picture_inside(path)]
    told = [f"not read: {first_few(odd)} (pictures by their first bytes: rename them, to .jpg or .png)"] if odd else []
    how = f"captions are read from NAME.txt beside NAME.png, or from {', '.join(FILES)}"
    return [*told, *([f"not read: {first_few(names)} ({how})"] if names else [])]


def foreign_notation(examples: Sequence[Example]) -> list[str]:
    """What other programs read in captions, and what only means something while drawing: learned as words."""
    found: dict[str, list[str]] = {}
    for example in examples:
        for name in foreign_in_caption(example.caption):
            found.setdefault(name, []).append(example.path.name)
    return [f"captions are learned with {name} as words: {first_few(files)}" for name, files in found.items()]


def _captions_without_trigger(trigger: str, examples: Sequence[Example], concept: int) -> list[str]:
    own = [example.caption for example in examples if example.concept == concept]
    bare = missing_trigger(trigger, own)
    if not bare:
        return []
    what = f"{len(bare)} of {len(own)} captions lack the trigger '{trigger}', such as '{bare[0]:.60}'"
    return [f"{what}: put it into them, or name with --trigger the word that they use"]
