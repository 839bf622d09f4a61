"""A folder of pictures -> examples, each with its caption, and what a person should know about them."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import DataError, RecipeError, check_type
from ..recipe.fields import Data
from .captions import Note, fill, missing_trigger, read_metadata, safe_trigger, sidecar
from .dataset import Concept, Dataset, Example
from .images import Unreadable, is_picture, probe
from .masks import MARK, is_mask, mask_of

KOHYA = re.compile(r"([1-9]\d*)_(\S+)(?:\s+(.+))?")  # 10_zwx dog
FINEST = 20  # balanced concepts differ from exact shares of each picture by less than one in so many


def read_folder(data: Data, *, lenient: bool = False) -> Dataset:
    """Open, check and caption every picture of a folder (and those in subfolders that metadata.jsonl names).

    A folder without pictures of its own, but with subfolders called `10_name class`, holds a concept in each of them.
    A picture that cannot be read is skipped with a warning. Raises DataError when the folder, its captions or masks are not
    usable (`lenient`: masks may be), or when no picture is left; RecipeError for an unknown word in the caption's template.
    """
    check_type(data, Data, "what is read", 'the data part of a recipe: p.read_folder(p.resolve(folder="photos").data)', DataError)
    root = _check_folder(data.folder)
    concepts = _concepts(root, data)

    def words(template: str) -> Callable[[Concept], str]:
        return lambda concept: fill(template, concept.trigger, concept.class_name)

    found = _collect(root, concepts, words(data.caption), words(data.caption_prefix), data.alpha_mask)
    if found.bad_masks and not lenient:
        raise found.bad_masks[0][1]
    examples = _balance_repeats(found.examples, concepts) if data.balance else found.examples
    warnings = [
        *found.warnings,
        *(line for i, one in enumerate(concepts) for line in _captions_without_trigger(one.trigger, examples, i)),
    ]
    return replace(found, examples=examples, warnings=warnings)


def class_images(folder: Path, prompt: str) -> Dataset:
    """A folder of class images for prior preservation: a Dataset like any other, captioned with the class prompt."""
    return replace(_collect(_check_folder(folder), (Concept(""),), lambda _: prompt), trigger=prompt)


def regularization(folder: Path, template: str, class_name: str) -> Dataset:
    """A folder of class images that somebody brought: pictures in it, or in subfolders called `1_dog`; theirs is the class then.

    A picture without a caption gets the template. Raises DataError, and RecipeError where the template's class is not known.
    """
    named = _numbered_folders(_check_folder(folder))
    concepts = [Concept("", rest.partition("_")[2], rest, repeats) for rest, repeats in named] or [Concept("", class_name)]
    if "{class}" in template and not all(concept.class_name for concept in concepts):
        raise RecipeError(
            "--regularization needs --class, for pictures without a caption", "what is the subject? e.g. --class dog"
        )
    return _collect(folder, tuple(concepts), lambda concept: fill(template, "", concept.class_name))


def _concepts(root: Path, data: Data) -> tuple[Concept, ...]:
    """What a folder shows. A trigger or class that the recipe gives are those of the first concept."""
    given, class_name = " ".join((data.trigger or "").split()), data.class_name
    named = [(name, *match.groups()) for name, _ in _numbered_folders(root) if (match := KOHYA.fullmatch(name))]
    if not named:
        name = os.path.basename(os.path.abspath(root))
        match = KOHYA.fullmatch(name)  # a single folder out of kohya's layout
        trigger, is_a = (match[2], match[3] or "") if match else (safe_trigger(name), "")
        return (Concept(given or trigger, class_name or is_a),)
    concepts = [Concept(trigger, is_a or "", name, int(repeats)) for name, repeats, trigger, is_a in named]
    first = replace(concepts[0], trigger=given or concepts[0].trigger, class_name=class_name or concepts[0].class_name)
    return (first, *concepts[1:])


def _numbered_folders(root: Path) -> list[tuple[str, int]]:
    """Subfolders with pictures called `10_something`, and their numbers; none where there are pictures beside them."""
    if any(is_picture(path) and not path.is_dir() and not is_mask(path) for path in _visible(root)):
        return []
    names = sorted(_galleries(root), key=natural)
    return [(name, int(match[1])) for name in names if (match := KOHYA.fullmatch(name))]


def _collect(
    root: Path,
    concepts: tuple[Concept, ...],
    template: Callable[[Concept], str],
    prefix: Callable[[Concept], str] = lambda _: "",
    alpha: bool | None = None,
) -> Dataset:
    """The pictures of all concepts. `alpha` says whether an alpha channel is a mask; None: nothing is, as of class images."""
    examples: list[Example] = []
    skipped: list[tuple[Path, str]] = []
    bad_masks: list[tuple[Path, DataError]] = []
    used: list[Path] = []
    notes = read_metadata(root)
    for number, concept in enumerate(concepts):
        folder = root / concept.folder
        told = {**notes, **(read_metadata(folder) if concept.folder else {})}
        for path in _pictures(folder, told):
            used.append(path)
            note = told.get(path, Note())
            caption = sidecar(path) or note.caption or template(concept)
            try:
                sha256, size = probe(path)
            except Unreadable as error:
                skipped.append((path, str(error)))
                continue
            mask, mask_sha256 = None, ""
            try:
                if alpha is not None:
                    mask, mask_sha256 = mask_of(path, sha256, size, alpha)
            except DataError as error:
                bad_masks.append((path, error))
            repeats = note.repeats or concept.repeats
            caption = f"{prefix(concept)} {caption}".strip()
            examples.append(Example(path, caption, sha256, size, repeats, number, mask, mask_sha256))
    told_skipped = [f"skipped {path.relative_to(root).as_posix()}: {why}" for path, why in skipped]
    if not examples:
        raise DataError(f"none of the {len(used)} pictures in {root} can be read", "; ".join(told_skipped[:3]))
    unused = (*_lonely(root, concepts, used), *_unused_folders(root, used))
    warnings = [*told_skipped, *_twins(examples), *unused]
    return Dataset(tuple(examples), warnings, concepts[0].trigger, concepts, tuple(skipped), unused, tuple(bad_masks))


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


def _check_folder(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"{folder} is a file, not a folder", f"give the folder that holds the pictures, perhaps {folder.parent}")
    raise DataError(f"there is no folder {folder}", "check its spelling; relative paths start at the current folder")


def _pictures(folder: Path, told: Iterable[Path]) -> list[Path]:
    """Picture files right inside the folder, and those in it that metadata.jsonl names, in natural order."""
    named = {path for path in told if path.is_relative_to(folder)}
    found = {*named, *(path for path in _visible(folder) if is_picture(path) and not path.is_dir() and not is_mask(path))}
    if not found:
        raise DataError(f"there are no pictures in {folder}", _instead(folder))
    return sorted(found, key=lambda path: natural(path.relative_to(folder).as_posix()))


def _visible(folder: Path) -> list[Path]:
    """Files and folders that a person put there: not hidden, not the leavings of a Mac's zip, no pipes or devices."""
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX"]
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}", "check its permissions") from error
    return sorted(path for path in paths if path.is_file() or path.is_dir() or path.is_symlink())


def _galleries(folder: Path) -> list[str]:
    """Names of the subfolders that hold pictures."""
    return [sub.name for sub in _visible(folder) if sub.is_dir() and any(map(is_picture, _visible(sub)))]


def _instead(folder: Path) -> str:
    """What to do about a folder without pictures."""
    if galleries := _galleries(folder):
        return f"there are some in its subfolder {_some(galleries)}: give that folder, or call subfolders like '10_name class'"
    if suffixes := sorted({path.suffix.lower() for path in _visible(folder) if path.suffix}):
        return f"it holds {_some(suffixes)}; use PNG, JPEG, WebP or another format that Pillow reads"
    return "put 3 to 20 pictures in it"


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key: numbers by value, letters whatever their case, ties by the exact name.

    >>> sorted(["b10", "B9", "a"], key=natural)
    ['a', 'B9', 'b10']
    """
    plain = unicodedata.normalize("NFC", name).casefold()
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", plain)], name


def _twins(examples: Sequence[Example]) -> list[str]:
    """The same file twice counts double in training, which is rarely meant."""
    first: dict[str, str] = {}
    pairs = [(e.path.name, first.setdefault(e.sha256, e.path.name)) for e in examples]
    return [f"{name} is the same picture as {twin}" for name, twin in pairs if name != twin]


def _lonely(root: Path, concepts: Sequence[Concept], used: Sequence[Path]) -> list[str]:
    """Masks whose picture is not there: most likely a name was mistyped."""
    masks = [path for concept in concepts for path in _visible(root / concept.folder) if is_mask(path)]
    named = {(path.parent, path.stem) for path in used}
    return [f"{path.name} is a mask without a picture" for path in masks if (path.parent, path.stem[: -len(MARK)]) not in named]


def _unused_folders(folder: Path, used: Sequence[Path]) -> list[str]:
    roots = {path.relative_to(folder).parts[0] for path in used}
    unused = [name for name in _galleries(folder) if name not in roots]
    return [f"pictures in the subfolder {_some(unused)} are not used"] if unused else []


def _captions_without_trigger(trigger: str, examples: Sequence[Example], concept: int) -> list[str]:
    own = [example.caption for example in examples if example.concept == concept]
    bare = missing_trigger(trigger, own)
    if not bare:
        return []
    what = f"{len(bare)} of {len(own)} captions lack the trigger '{trigger}', such as '{bare[0]:.60}'"
    return [f"{what}: put it into them, or name with --trigger the word that they use"]


def _some(words: Sequence[str]) -> str:
    """The first few of a list, in words."""
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")
