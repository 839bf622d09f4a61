"""What a survey shows that a person should know: a table of rules, each finding with one suggestion of what to do."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...data.buckets import Grid, enlarges, kept
from ...data.captions import fill, lacking, sidecar, sidecar_of
from .looking import Look, Survey, can_hash

NEAR = 6  # bits of the hash by which two pictures may differ and still be nearly the same
BLURRED = 0.02  # sharpness of a picture blurred by a Gaussian of three pixels, as training sees it
DULL = 1 / 20  # of the folder's median sharpness
CROPPED = 0.2  # share of a picture that may be cut off without a word
FEW, FEWEST = 1 / 4, 3  # pictures
WINDOW = 75  # tokens that CLIP's text encoder reads; a word is one at least
PACKAGE = "imagehash"
# words that most captions have, and that are nobody's name
PLAIN = {"a", "an", "and", "at", "by", "for", "from", "in", "is", "its", "of", "on", "photo", "picture", "style", "the", "with"}


@dataclass(frozen=True)
class Finding:
    """Something to know: how bad it is, what and in which pictures, a mark for the sheet, and ONE command or thing to do."""

    level: str  # "bad": costs pictures or quality; "warning": may do; "note"
    what: str
    do: str
    pictures: tuple[Path, ...] = ()
    mark: str = ""
    command: bool = False  # whether `do` can be typed as it is


def find(survey: Survey) -> list[Finding]:
    """All findings, the worst first."""
    found = [finding for rule in RULES for finding in rule(survey)]
    return sorted(found, key=lambda finding: ("bad", "warning", "note").index(finding.level))


# ---------------------------------------------------------------- files


def unreadable(survey: Survey) -> Iterator[Finding]:
    broken = survey.dataset.skipped
    plugins = {why.rpartition(": ")[2] for _, why in broken if "pip install" in why}
    for plugin in sorted(plugins):
        some = [path for path, why in broken if why.endswith(plugin)]
        yield _of(survey, "bad", some, "cannot be read without a plugin", plugin, "unreadable", command=True)
    rest = [(path, why) for path, why in broken if why.rpartition(": ")[2] not in plugins]
    if rest:
        finding = _aside(survey, "bad", [path for path, _ in rest], "cannot be read", "unreadable")
        whys = _some([f"{survey.name(path)}: {why}" for path, why in rest])
        yield replace(finding, what=f"{finding.what.partition(':')[0]}: {whys}")


def spoiled(survey: Survey) -> Iterator[Finding]:
    """Masks at which training stops: each kind of them has its advice."""
    for do in dict.fromkeys(error.hint for _, error in survey.spoiled):
        paths, whys = zip(*((path, error.what) for path, error in survey.spoiled if error.hint == do), strict=True)
        yield Finding("bad", f"{_counted(len(paths))} with a mask that is of no use: {_some(whys)}", do, paths, "mask")


def few(survey: Survey) -> Iterator[Finding]:
    if (count := len(survey.looks)) < FEWEST:
        what = f"no more than {_counted(count)}"
        yield Finding("warning", what, f"add more: {FEWEST} to 20 that differ in place and pose")


def unused(survey: Survey) -> Iterator[Finding]:
    for text in survey.dataset.unused:
        lonely = text.endswith("is a mask without a picture")
        others = "move them up, or call all subfolders like '10_name class' and leave no picture beside them"
        yield Finding("warning", text, "call it NAME-masklabel.png after its picture NAME" if lonely else others)


# ---------------------------------------------------------------- the same again


def twins(survey: Survey) -> Iterator[Finding]:
    """Files with the same bytes. One with a caption stays, or else the one with the shortest name."""
    extra: list[Path] = []
    for group in _groups([one.example.sha256 for one in survey.looks]):
        paths = sorted((survey.looks[i].example.path for i in group), key=lambda path: (not sidecar_of(path), len(path.name)))
        extra += paths[1:]
    if extra:
        yield _aside(survey, "warning", extra, "stored again under another name, which counts double", "twin")


def near_twins(survey: Survey) -> Iterator[Finding]:
    """Pictures that look the same: other sizes, other quality, the next frame of a film. The largest of each group stays."""
    if not can_hash():
        yield Finding("note", "near-duplicates were not looked for", f"pip install {PACKAGE}", command=True)
    elif extra := _alike_in(_distinct(survey)):
        yield _aside(survey, "warning", [one.example.path for one in extra], "nearly the same as another", "near twin")


def mirrored(survey: Survey) -> Iterator[Finding]:
    """Pictures that look like the mirror image of another; the largest stays. Those that are twins anyway are not told again."""
    distinct = _distinct(survey)
    told = {one.example.path for one in _alike_in(distinct)}
    if extra := _alike_in([one for one in distinct if one.example.path not in told], mirrored=True):
        shown = "which --flip shows anyway" if survey.recipe.data.flip else "so that both sides are learned, without --flip too"
        paths = [one.example.path for one in extra]
        yield _aside(survey, "warning", paths, f"nearly the mirror image of another, {shown}", "mirror twin")


def _distinct(survey: Survey) -> list[Look]:
    """The pictures that have a hash, the largest first; the same file is no near-duplicate."""
    looks = list({one.example.sha256: one for one in survey.looks if one.hash is not None}.values())
    return sorted(looks, key=lambda one: -math.prod(one.example.size))


def _alike_in(looks: Sequence[Look], mirrored: bool = False) -> list[Look]:
    """All but the first of each group that looks alike, or like each other's mirror image."""
    hashes = [one.hash for one in looks if one.hash is not None]
    others = [one.mirrored for one in looks if one.mirrored is not None] if mirrored else hashes
    return [looks[i] for group in alike(hashes, NEAR, others) for i in group[1:]]


def alike(hashes: Sequence[np.ndarray], most: int, others: Sequence[np.ndarray] = ()) -> list[list[int]]:
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
    return _groups(group)


def _groups(keys: Sequence[object]) -> list[list[int]]:
    """Positions with the same key, where there are several."""
    found: dict[object, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return [group for group in found.values() if len(group) > 1]


# ---------------------------------------------------------------- size and shape


def assumed(survey: Survey) -> Iterator[Finding]:
    """A base that is not here: all about sizes is a guess."""
    if survey.assumed:
        what = f"{survey.recipe.base} is not on this machine: its resolution is taken to be {survey.grid.side}, {survey.assumed}"
        yield Finding("note", what, "say it with --resolution, if it is another")


def small(survey: Survey) -> Iterator[Finding]:
    """Pictures that get a smaller shape of their own, or are enlarged."""
    own = [one for one in survey.looks if one.shape not in survey.grid.shapes or enlarges(one.example.size, one.shape)]
    if not own:
        return
    paths = [one.example.path for one in own]
    grown = any(enlarges(one.example.size, one.shape) for one in own)
    what = f"too small for a resolution of {survey.grid.side}: {'enlarged, so blurred' if grown else 'learned at their own size'}"
    side = int(min(math.sqrt(math.prod(one.example.size)) for one in own)) // survey.multiple * survey.multiple
    if len(own) <= FEW * len(survey.looks) or not side:
        yield _aside(survey, "warning", paths, what, "small")
    else:
        yield _of(survey, "warning", paths, what, _train(survey, f"--resolution {side}"), "small", command=True)


def cropped(survey: Survey) -> Iterator[Finding]:
    """Pictures that lose much at their edges."""
    cut = [one for one in survey.looks if 1 - one.kept > CROPPED]
    if not cut:
        return
    worst = max(1 - one.kept for one in cut)
    paths, what = [one.example.path for one in cut], f"cropped by more than {CROPPED:.0%}, up to {worst:.0%}"
    for flags, places in _finer(survey):
        if all(1 - kept(one.example.size, places.shape_of(one.example.size)) <= CROPPED for one in cut):
            yield _of(survey, "warning", paths, what, _train(survey, flags), "cropped", command=True)
            return
    yield _of(survey, "warning", paths, what, "cut them yourself around what matters", "cropped")


def _finer(survey: Survey) -> Iterator[tuple[str, Grid]]:
    """Flags that crop less, and the grids that they give."""
    if not survey.grid.buckets:
        yield "--buckets", replace(survey.grid, buckets=True)
    elif survey.grid.step > survey.multiple:
        yield f"--bucket-step {survey.multiple}", replace(survey.grid, step=survey.multiple)


def blurred(survey: Survey) -> Iterator[Finding]:
    """Pictures without fine detail at the size of training, by themselves or beside the others."""
    known = [one for one in survey.looks if one.sharpness is not None]
    limit = max(BLURRED, DULL * float(np.median([one.sharpness for one in known]))) if known else 0
    soft = [one.example.path for one in known if one.sharpness is not None and one.sharpness < limit]
    if soft:
        yield _aside(survey, "warning", soft, "blurred, as training sees them", "blurred")


# ---------------------------------------------------------------- captions and masks


def uncaptioned(survey: Survey) -> Iterator[Finding]:
    """Pictures for which nobody wrote anything: they get the template, or nothing at all."""
    data, concepts = survey.recipe.data, survey.dataset.concepts
    blank, plain = [], []
    for one in survey.looks:
        path, concept = one.example.path, concepts[one.example.concept]
        template = fill(f"{data.caption_prefix} {data.caption}", concept.trigger, concept.class_name)
        if not one.example.caption or (sidecar_of(path) and not sidecar(path)):
            blank.append(path)
        elif one.example.caption == template:
            plain.append(one)
    if blank:
        do = f"write into {shlex.quote(str(blank[0].with_suffix('.txt')))} what the picture shows"
        yield _of(survey, "warning", blank, "with an empty caption", do, "no caption")
    if plain:
        path = plain[0].example.path.with_suffix(".txt")
        do = f"write what differs, such as the place, into {shlex.quote(str(path))} and so on: what is told stays changeable"
        paths = [one.example.path for one in plain]
        yield _of(survey, "note", paths, f"without a caption; all are called '{plain[0].example.caption:.60}'", do)


def repeated(survey: Survey) -> Iterator[Finding]:
    """Written captions that say the same about different pictures."""
    written = [one for one in survey.looks if sidecar_of(one.example.path) and one.example.caption]
    for group in _groups([one.example.caption for one in written]):
        same = [written[i].example for i in group]
        if len({example.sha256 for example in same}) > 1:
            do = f"tell them apart: add to {shlex.quote(str(same[1].path.with_suffix('.txt')))} what only that picture shows"
            what = f"with the same caption, '{same[0].caption:.60}'"
            yield _of(survey, "note", [example.path for example in same], what, do, "same caption")


def untriggered(survey: Survey) -> Iterator[Finding]:
    for number, concept in enumerate(survey.dataset.concepts):
        own = [one.example for one in survey.looks if one.example.concept == number]
        bare = [example.path for example in own if lacking(concept.trigger, [example.caption])]
        if bare:
            what = f"whose caption lacks the trigger '{concept.trigger}'"
            other = "" if survey.recipe.data.trigger else _common(concept.class_name, [example.caption for example in own])
            flag = f"--trigger {shlex.quote(other)}" if other else f"--caption-prefix {shlex.quote('{trigger},')}"
            do = _train(survey, flag)
            yield _of(survey, "bad", bare, what, do, "no trigger", command=True)


def _common(class_name: str, captions: Sequence[str]) -> str:
    """The first word that all of several captions have, and that is not everybody's: most likely the trigger; "" without one."""
    words = [re.findall(r"\w[\w-]*", caption.lower()) for caption in captions]
    plain = {*PLAIN, *class_name.lower().split()}
    shared = [word for word in words[0] if word not in plain and all(word in others for others in words)]
    return shared[0] if shared and len(words) > 1 else ""


def overlong(survey: Survey) -> Iterator[Finding]:
    """Captions with more words and signs than CLIP has places for."""
    long = [one.example for one in survey.looks if _words(one.example.caption) > WINDOW]
    if long:
        longest = max(long, key=lambda example: _words(example.caption))
        what = f"with a caption of more than {WINDOW} words and signs, the end of which is not read"
        do = f"shorten {shlex.quote(str(sidecar_of(longest.path) or longest.path.with_suffix('.txt')))} to some 50 words"
        yield _of(survey, "warning", [example.path for example in long], what, do, "long caption")


def _words(caption: str) -> int:
    """Words and signs: a lower bound of tokens."""
    spaced = "".join(letter if letter.isalnum() else f" {letter} " for letter in caption)
    return len(spaced.split())


def masked(survey: Survey) -> Iterator[Finding]:
    masks = [one.example.path for one in survey.looks if one.example.mask]
    if masks:
        outside = survey.recipe.objective.mask_outside
        what = f"with a mask: what it leaves out weighs {outside:g}"
        yield _of(survey, "note", masks, what, _train(survey, "--mask-outside 0"), command=True)


RULES: tuple[Callable[[Survey], Iterable[Finding]], ...] = (
    unreadable, spoiled, few, untriggered, twins, near_twins, mirrored, assumed, small, cropped, blurred, overlong,
    uncaptioned, repeated, unused, masked,
)  # fmt: skip


# ---------------------------------------------------------------- how they are put


def _of(survey: Survey, level: str, paths: Sequence[Path], what: str, do: str, mark: str = "", command: bool = False) -> Finding:
    """A finding about pictures, which are named."""
    names = ", ".join(survey.name(path) for path in paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
    return Finding(level, f"{_counted(len(paths))} {what}: {names}", do, tuple(paths), mark, command)


def _counted(count: int) -> str:
    return f"{count} picture{'s' if count > 1 else ''}"


def _some(whys: Sequence[str]) -> str:
    """The first few of many reasons."""
    return "; ".join(whys[:3]) + (" ..." if len(whys) > 3 else "")


def _aside(survey: Survey, level: str, paths: Sequence[Path], what: str, mark: str) -> Finding:
    """A finding about pictures that are better moved out of the folder."""
    folder = survey.folder.absolute()
    place = shlex.quote(str(folder.with_name(f"{folder.name}-aside")))
    files = " ".join(shlex.quote(str(path)) for path in paths)
    return _of(survey, level, paths, what, f"mkdir -p {place} && mv -n {files} {place}", mark, command=True)


def _train(survey: Survey, flags: str) -> str:
    """The command that trains with some flags more."""
    data = survey.recipe.data
    words = [f"--trigger {shlex.quote(data.trigger)}" if data.trigger else ""]
    words += [f"--class {shlex.quote(data.class_name)}" if data.class_name else ""]
    return " ".join(filter(None, [f"personalize train {shlex.quote(str(survey.folder))}", *words, flags]))
