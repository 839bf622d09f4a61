"""What has changed since a run began: what it may go on with, told and noted, and what it may not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..data.dataset import Example
from ..errors import RecipeError
from ..families.notation import unescape
from ..recipe.fields import Recipe
from .optimizers import factor
from .rundir import Run, State

SHORT = 40  # letters of a caption that are shown
SOME = 5  # changes that are named in one line

Identity = list[str | int]  # of a picture: sha256, caption, repeats, sha256 of its mask


def identity(example: Example) -> Identity:
    """Everything about a picture that decides what is learned from it."""
    return [example.sha256, example.caption, example.repeats, example.mask_sha256]


def changes_since(state: State, now: Mapping[str, Any], recipe: Recipe, run: Run, names: Sequence[str]) -> list[str]:
    """What a run goes on with that it did not begin with, a sentence each. `names` are those of the pictures.

    More or fewer steps than were planned, and other pictures and captions: the steps that were taken count. Captions that differ
    in escapes alone are no others. Raises RecipeError, naming the differences, for what belongs to another run.
    """
    refuse_other_runs(run, state.about, now)
    if recipe.steps < state.done:
        what = f"{run.folder} has taken {state.done} steps, which is more than --steps {recipe.steps}"
        raise RecipeError(
            what, f"give --steps {state.done} or more; its checkpoints can begin other runs: --init FILE --output FOLDER"
        )
    planned = state.about["settings"]["steps"]
    steps = [steps_change(recipe, state.done, planned)] if planned != recipe.steps else []
    before, pictures = (unescape_captions(about["pictures"]) for about in (state.about, now))
    if before == pictures:
        return steps
    told = list(picture_changes(before, pictures, names, names_by_sha(run)))
    return [*steps, *(told or ["the pictures come in another order"])]


def unescape_captions(pictures: Iterable[Identity]) -> list[Identity]:
    """Pictures whose captions are as a run of before had them: no bracket had a backslash."""
    return [[sha, unescape(str(caption)), *rest] for sha, caption, *rest in pictures]


def refuse_other_runs(run: Run, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise RecipeError, naming the differences, if a state belongs to another run than the one that is asked for."""
    old, new = before["settings"], now["settings"]
    wrong = [
        f"--{name.replace('_', '-')} was {old.get(name)}, now {new.get(name)}"
        for name in sorted({*old, *new} - {"steps"})
        if old.get(name) != new.get(name)
    ]
    wrong += ["the weights of the base changed"] if before["weights"] != now["weights"] else []
    if wrong:
        what = f"{run.folder} holds a run that cannot go on like this: {'; '.join(wrong[:SOME])}"
        raise RecipeError(
            what, "set it back, choose another --output (--init FILE begins with its weights), or start over with --fresh"
        )


def steps_change(recipe: Recipe, done: int, planned: int) -> str:
    """That another number of steps was planned, and how the learning rate goes on."""
    what = f"--steps was {planned}, now {recipe.steps}"
    if done == recipe.steps:
        return what
    share = f"at {factor(recipe.optim, done, recipe.steps):.0%} of its peak ({recipe.optim.schedule})"
    return f"{what}: after step {done} the learning rate goes on as in a run of {recipe.steps} steps, {share}"


def picture_changes(
    before: Sequence[Identity], now: Sequence[Identity], names: Sequence[str], old_names: Mapping[str, str]
) -> Iterator[str]:
    """Which pictures, captions, masks and repeats are others. `names` are those of `now`, which class images follow; `old_names`
    go by sha256, if known."""
    left, others = list(before), list[tuple[Identity, str]]()
    for one, name in zip(now, [*names, *["a class image"] * (len(now) - len(names))], strict=True):  # two may be the same
        left.remove(one) if one in left else others.append((one, name))
    pairs = list[tuple[str, Identity, Identity | None]]()
    for one, name in others:
        was = next((old for old in left if old[0] == one[0]), None)
        pairs.append((name, one, was))
        if was:
            left.remove(was)
    fresh = {name for name, _, was in pairs if was is None}
    there = set(names) - fresh  # a class image may have the same bytes as a picture that is there
    lost = [name if (name := old_names.get(str(one[0]), "")) not in there else "a class image" for one in left]
    replaced = fresh & set(lost)
    yield from (picture_change(*pair, pair[0] in replaced) for pair in pairs)
    yield from (f"{name or 'a picture'} is gone" for name in lost if name not in replaced)


def picture_change(name: str, now: Identity, was: Identity | None, replaced: bool) -> str:
    """What is otherwise about a picture."""
    if was is None:
        return f"{name} is another picture" if replaced else f"{name} is new"
    if was[1] != now[1]:
        return f"the caption of {name} was {caption_text(was[1])}, now {caption_text(now[1])}"
    if was[2] != now[2]:
        return f"{name} is repeated {now[2]} times, was {was[2]}"
    return f"the mask of {name} is another"


def caption_text(caption: str | int) -> str:
    """A caption, or its beginning, in quotes."""
    text = str(caption)
    return repr(text if len(text) <= SHORT else text[: SHORT - 1] + "…")


def names_by_sha(run: Run) -> dict[str, str]:
    """Names, below their folder, of the pictures that the run began or went on with, from its diary."""
    names = dict[str, str]()
    for record in run.history():
        if record["event"] == "started":
            folder = PurePath(str((record.get("recipe") or {}).get("folder", "")))
            images = [image for image in record.get("images") or [] if isinstance(image, dict)]
            paths = {str(image.get("sha256")): PurePath(str(image.get("path"))) for image in images}
            below = {sha: path.relative_to(folder) if path.is_relative_to(folder) else path for sha, path in paths.items()}
            names |= {sha: path.as_posix() for sha, path in below.items()}
    return names
