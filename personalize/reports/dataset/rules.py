"""What is wrong or odd about a dataset: a table of rules, each finding with one suggestion of what to hint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...data.buckets import Grid, enlarges, kept_share
from ...data.captions import fill, missing_trigger
from ...data.folder import foreign_notation
from ...families.notation import certain_words
from ...findings import Finding, worst_first
from ...pictures.files import ASIDE
from ...pictures.galleries import class_folder
from ...pictures.metadata import metadata_file
from ...text import command_line, quote, transfer_command
from .measure import DatasetStats, ImageStats, has_imagehash

NEAR = 6  # bits of the hash by which two pictures may differ and still be nearly the same
BLURRED = 0.02  # sharpness of a picture blurred by a Gaussian of three pixels, as training sees it
DULL = 1 / 20  # of the folder's median sharpness
CROPPED = 0.2  # share of a picture that may be cut off without a word
FEW, FEWEST = 1 / 4, 3  # pictures
PACKAGE = "imagehash"
USUAL_PRESET = "pocket-subject"  # which `train` takes when nothing is said
EQUAL_MARKS = ("twin", "near twin", "mirror twin", "unreadable")  # without these pictures nothing is lost
# words that most captions have, and that are nobody's name
PLAIN = {"a", "an", "and", "at", "by", "for", "from", "in", "is", "its", "of", "on", "photo", "picture", "style", "the", "with"}


def find_problems(stats: DatasetStats) -> list[Finding]:
    """All findings, the worst first."""
    return worst_first(finding for rule in RULES for finding in rule(stats))


# ---------------------------------------------------------------- files


def unreadable(stats: DatasetStats) -> Iterator[Finding]:
    """Files that are no images, are damaged, or need a plugin."""
    broken = stats.dataset.skipped
    plugins = {why.rpartition(": ")[2] for _, why in broken if "pip install" in why}
    for plugin in sorted(plugins):
        some = [path for path, why in broken if why.endswith(plugin)]
        yield about_images(
            stats, "error", "unreadable", some, "cannot be read without a plugin", plugin, "unreadable", command=True
        )
    rest = [(path, why) for path, why in broken if why.rpartition(": ")[2] not in plugins]
    if rest:
        finding = move_aside(stats, "error", "unreadable", [path for path, _ in rest], "cannot be read", "unreadable")
        whys = first_few([f"{stats.name(path)}: {why}" for path, why in rest])
        yield replace(finding, what=f"{finding.what.partition(':')[0]}: {whys}")


def bad_masks(stats: DatasetStats) -> Iterator[Finding]:
    """Masks that leave their pictures out of training: each kind of them has its advice."""
    for hint in dict.fromkeys(error.hint for _, error in stats.dataset.bad_masks):
        paths, whys = zip(*((path, error.what) for path, error in stats.dataset.bad_masks if error.hint == hint), strict=True)
        yield Finding(
            "error",
            "bad-masks",
            f"{picture_count(len(paths))} left out for a mask that is of no use: {first_few(whys)}",
            paths,
            hint,
            mark="mask",
        )


def too_few(stats: DatasetStats) -> Iterator[Finding]:
    """Fewer images than a subject needs."""
    if (count := len(stats.images)) < FEWEST:
        what = f"no more than {picture_count(count)}"
        yield Finding("warning", "too-few", what, hint=f"add more: {FEWEST} to 20 that differ in place and pose")


def use_class_images(stats: DatasetStats) -> tuple[object, ...]:
    """The flags that use the class images beside the pictures."""
    return "--prior", "images", "--regularization", class_folder(stats.folder)


def unused_files(stats: DatasetStats) -> Iterator[Finding]:
    """What lies in the folder and is not read, and how it would be."""
    for text in stats.dataset.unused:
        what, _, flags = text.partition(" are used with ")
        if flags:
            yield Finding(
                "info", "unused-files", f"{what} are not used", hint=train_command(stats, *use_class_images(stats)), command=True
            )
        elif text.startswith("not read: "):
            what, _, how = text.partition(" (")
            yield Finding("warning", "unused-files", what, hint=how.removesuffix(")"))
        else:
            lonely = text.endswith("is a mask without a picture")
            others = "move them up, or call all subfolders like '10_name class' and leave no picture beside them"
            yield Finding(
                "warning", "unused-files", text, hint="call it NAME-masklabel.png after its picture NAME" if lonely else others
            )


def foreign_captions(stats: DatasetStats) -> Iterator[Finding]:
    """Captions with notation that means nothing in them."""
    for text in foreign_notation([one.example for one in stats.images]):
        yield Finding("warning", "foreign-captions", text, hint="write words, or {red|blue} for one of them at each step")


# ---------------------------------------------------------------- duplicates


def duplicates(stats: DatasetStats) -> Iterator[Finding]:
    """Files with the same bytes. One with a caption stays, or else the one with the shortest name."""
    extra: list[Path] = []
    for group in groups_of_equal([one.example.sha256 for one in stats.images]):
        same = [stats.images[i].example for i in group]
        extra += [one.path for one in sorted(same, key=lambda one: (not one.caption_file, len(one.path.name)))[1:]]
    if extra:
        yield move_aside(stats, "warning", "duplicates", extra, "stored again under another name, which counts double", "twin")


def near_duplicates(stats: DatasetStats) -> Iterator[Finding]:
    """Pictures that look the same: other sizes, other quality, the next frame of a film. The largest of each group stays."""
    if not has_imagehash():
        yield Finding(
            "info", "near-duplicates", "near-duplicates were not looked for", hint=f"pip install {PACKAGE}", command=True
        )
    elif extra := similar(distinct(stats)):
        yield move_aside(
            stats, "warning", "near-duplicates", [one.example.path for one in extra], "nearly the same as another", "near twin"
        )


def mirror_images(stats: DatasetStats) -> Iterator[Finding]:
    """Pictures that look like the mirror image of another; the largest stays. Near-duplicates are not named again."""
    candidates = distinct(stats)
    known = {one.example.path for one in similar(candidates)}
    if extra := similar([one for one in candidates if one.example.path not in known], mirrored=True):
        shown = "which --flip shows anyway" if stats.recipe.data.flip else "so that both sides are learned, without --flip too"
        paths = [one.example.path for one in extra]
        yield move_aside(stats, "warning", "mirror-images", paths, f"nearly the mirror image of another, {shown}", "mirror twin")


def distinct(stats: DatasetStats) -> list[ImageStats]:
    """The pictures that have a hash, the largest first; the same file is no near-duplicate."""
    images = list({one.example.sha256: one for one in stats.images if one.hash is not None}.values())
    return sorted(images, key=lambda one: -math.prod(one.example.size))


def similar(images: Sequence[ImageStats], mirrored: bool = False) -> list[ImageStats]:
    """All but the first of each group that looks alike, or like each other's mirror image."""
    hashes = [one.hash for one in images if one.hash is not None]
    others = [one.mirrored for one in images if one.mirrored is not None] if mirrored else hashes
    return [images[i] for group in similar_groups(hashes, NEAR, others) for i in group[1:]]


def similar_groups(hashes: Sequence[np.ndarray], most: int, others: Sequence[np.ndarray] = ()) -> list[list[int]]:
    """Groups of hashes [bits] that chains of neighbours connect, at most so many bits apart; single ones are left out.

    With `others`, a neighbour is one whose other hash is near.
    """
    if not hashes:
        return []
    bits, there = (np.stack(some).astype(np.float32) for some in (hashes, others or hashes))
    near = bits @ (1 - there).T + (1 - bits) @ there.T <= most
    group = list(range(len(hashes)))
    for i, j in zip(*np.nonzero(np.triu(near | near.T, 1)), strict=True):
        old, new = max(group[i], group[j]), min(group[i], group[j])
        group = [new if one == old else one for one in group] if old != new else group
    return groups_of_equal(group)


def groups_of_equal(keys: Sequence[object]) -> list[list[int]]:
    """Positions with the same key, where there are several."""
    found: dict[object, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return [group for group in found.values() if len(group) > 1]


# ---------------------------------------------------------------- size and shape


def assumed_resolution(stats: DatasetStats) -> Iterator[Finding]:
    """A base that is not here: all about sizes is a guess."""
    if stats.assumption:
        what = f"{stats.recipe.base} is not on this machine: its resolution is taken to be {stats.grid.side}, {stats.assumption}"
        yield Finding("info", "assumed-resolution", what, hint="say it with --resolution, if it is another")


def too_small(stats: DatasetStats) -> Iterator[Finding]:
    """Pictures that get a smaller shape of their own, or are enlarged."""
    own = [one for one in stats.images if one.shape not in stats.grid.shapes or enlarges(one.example.size, one.shape)]
    if not own:
        return
    paths = [one.example.path for one in own]
    grown = any(enlarges(one.example.size, one.shape) for one in own)
    what = f"too small for a resolution of {stats.grid.side}: {'enlarged, so blurred' if grown else 'learned at their own size'}"
    side = int(min(math.sqrt(math.prod(one.example.size)) for one in own)) // stats.multiple * stats.multiple
    if len(own) <= FEW * len(stats.images) or not side:
        yield move_aside(stats, "warning", "too-small", paths, what, "small")
    else:
        yield about_images(
            stats, "warning", "too-small", paths, what, train_command(stats, "--resolution", side), "small", command=True
        )


def cropped_images(stats: DatasetStats) -> Iterator[Finding]:
    """Pictures that lose much at their edges."""
    cut = [one for one in stats.images if 1 - one.kept > CROPPED]
    if not cut:
        return
    worst = max(1 - one.kept for one in cut)
    paths, what = [one.example.path for one in cut], f"cropped by more than {CROPPED:.0%}, up to {worst:.0%}"
    for flags, layout in finer_grids(stats):
        if all(1 - kept_share(one.example.size, layout.shape_of(one.example.size)) <= CROPPED for one in cut):
            yield about_images(stats, "warning", "cropped", paths, what, train_command(stats, *flags), "cropped", command=True)
            return
    yield about_images(stats, "warning", "cropped", paths, what, "cut them yourself around what matters", "cropped")


def finer_grids(stats: DatasetStats) -> Iterator[tuple[tuple[object, ...], Grid]]:
    """Flags that crop less, and the grids that they give."""
    if not stats.grid.buckets:
        yield ("--buckets",), replace(stats.grid, buckets=True)
    elif stats.grid.step > stats.multiple:
        yield ("--bucket-step", stats.multiple), replace(stats.grid, step=stats.multiple)


def blurred_images(stats: DatasetStats) -> Iterator[Finding]:
    """Pictures without fine detail at the size of training, by themselves or beside the others."""
    known = [one for one in stats.images if one.sharpness is not None]
    limit = max(BLURRED, DULL * float(np.median([one.sharpness for one in known]))) if known else 0
    soft = [one.example.path for one in known if one.sharpness is not None and one.sharpness < limit]
    if soft:
        yield move_aside(stats, "warning", "blurred", soft, "blurred, as training sees them", "blurred")


# ---------------------------------------------------------------- captions and masks


def without_caption(stats: DatasetStats) -> Iterator[Finding]:
    """Pictures for which nobody wrote anything: they get the template, or nothing at all."""
    data, concepts = stats.recipe.data, stats.dataset.concepts
    blank, plain = [], []
    for one in stats.images:
        path, concept = one.example.path, concepts[one.example.concept]
        template = fill(f"{data.caption_prefix} {data.caption}", concept.trigger, concept.class_name)
        if not one.example.caption or (one.example.caption_file and not one.example.written):
            blank.append(path)
        elif one.example.caption == template:
            plain.append(one)
    if blank:
        hint = f"write into {quote(blank[0].with_suffix('.txt'))} what the picture shows"
        yield about_images(stats, "warning", "empty-caption", blank, "with an empty caption", hint, "no caption")
    if plain:
        path = plain[0].example.path.with_suffix(".txt")
        hint = f"write what differs, such as the place, into {quote(path)} and so on: what is told stays changeable"
        paths = [one.example.path for one in plain]
        yield about_images(
            stats, "info", "without-caption", paths, f"without a caption; all are called '{plain[0].example.caption:.60}'", hint
        )


def repeated_captions(stats: DatasetStats) -> Iterator[Finding]:
    """Written captions that say the same about different pictures."""
    written = [one for one in stats.images if one.example.caption_file and one.example.caption]
    for group in groups_of_equal([one.example.caption for one in written]):
        same = [written[i].example for i in group]
        if len({example.sha256 for example in same}) > 1:
            hint = f"tell them apart: add to {quote(same[1].path.with_suffix('.txt'))} what only that picture shows"
            what = f"with the same caption, '{same[0].caption:.60}'"
            yield about_images(stats, "info", "repeated-captions", [example.path for example in same], what, hint, "same caption")


def without_trigger(stats: DatasetStats) -> Iterator[Finding]:
    """Captions that do not have the trigger."""
    for number, concept in enumerate(stats.dataset.concepts):
        own = [one.example for one in stats.images if one.example.concept == number]
        bare = [example.path for example in own if missing_trigger(concept.trigger, [example.caption])]
        if bare:
            what = f"whose caption lacks the trigger '{concept.trigger}'"
            other = "" if stats.recipe.data.trigger else common_word(concept.class_name, [example.caption for example in own])
            hint = train_command(stats, *(("--trigger", other) if other else ("--caption-prefix", "{trigger},")))
            yield about_images(stats, "error", "without-trigger", bare, what, hint, "no trigger", command=True)


def common_word(class_name: str, captions: Sequence[str]) -> str:
    """The first word that all of several captions have, and that is not everybody's: most likely the trigger; "" without one."""
    words = [re.findall(r"\w[\w-]*", certain_words(caption).lower()) for caption in captions]
    plain = {*PLAIN, *class_name.lower().split()}
    shared = [word for word in words[0] if word not in plain and all(word in others for others in words)]
    return shared[0] if shared and len(words) > 1 else ""


def with_mask(stats: DatasetStats) -> Iterator[Finding]:
    """What masks do."""
    masks = [one.example.path for one in stats.images if one.example.mask]
    if masks:
        outside = stats.recipe.objective.mask_outside
        what = f"with a mask: what it leaves out weighs {outside:g}"
        yield about_images(stats, "info", "with-mask", masks, what, train_command(stats, "--mask-outside", 0), command=True)


RULES: tuple[Callable[[DatasetStats], Iterable[Finding]], ...] = (
    unreadable, bad_masks, too_few, without_trigger, duplicates, near_duplicates, mirror_images, assumed_resolution,
    too_small, cropped_images, blurred_images, without_caption, repeated_captions, foreign_captions, unused_files, with_mask,
)  # fmt: skip


# ---------------------------------------------------------------- findings about images


def about_images(
    stats: DatasetStats,
    level: str,
    code: str,
    paths: Sequence[Path],
    what: str,
    hint: str,
    mark: str = "",
    command: bool = False,
) -> Finding:
    """A finding about images, which are named."""
    names = ", ".join(stats.name(path) for path in paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
    return Finding(level, code, f"{picture_count(len(paths))} {what}: {names}", tuple(paths), hint, command, mark)


def picture_count(count: int) -> str:
    return f"{count} picture{'s' if count > 1 else ''}"


def first_few(whys: Sequence[str]) -> str:
    """The first few of many reasons."""
    return "; ".join(whys[:3]) + (" ..." if len(whys) > 3 else "")


def move_aside(stats: DatasetStats, level: str, code: str, paths: Sequence[Path], what: str, mark: str) -> Finding:
    """A finding about pictures that are better moved out of the way: into a folder beside them that nothing reads.

    Where few would be left, or metadata names them, that is no help.
    """
    listed = next((file for path in paths if (file := metadata_file(path.parent) or metadata_file(stats.folder))), None)
    left = len({one.example.sha256 for one in stats.images if one.example.path not in paths})
    if listed:
        return about_images(stats, level, code, paths, what, f"take their lines out of {quote(listed)}", mark)
    if left < min(FEWEST, len(stats.images)) and mark not in EQUAL_MARKS:
        return about_images(stats, level, code, paths, what, "add better ones first: few would be left without them", mark)
    folders = dict.fromkeys(path.parent for path in paths)
    moves = [transfer_command([one for one in paths if one.parent == folder], folder / ASIDE, move=True) for folder in folders]
    return about_images(stats, level, code, paths, what, " && ".join(moves), mark, command=True)


def train_command(stats: DatasetStats, *words: object) -> str:
    """The command that trains with some words more: it repeats the base, preset and settings that were given."""
    return command_line("personalize", "train", stats.folder, *stats.given_words(without=words), *words)
