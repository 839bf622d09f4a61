"""What Python gets: the same recipe and report as the command, errors that say what to pass, values that notebooks show."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import SMALL

import personalize as p
from personalize.api.showing import Showing, find_out, from_captions
from personalize.cli import run
from personalize.recipe.fields import AdapterSpec
from personalize.recipe.settings import flatten
from personalize.training.events import Finished


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> p.Base:
    return p.Base.load(tiny_base)


@pytest.fixture(scope="module")
def rex(base: p.Base) -> p.Adapter:
    return p.attach(base, AdapterSpec(rank=1)).detach()


# ---------------------------------------------------------------- recipes


def test_python_and_the_command_resolve_alike(tiny_base: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base", str(tiny_base), "--class", "dog", "--steps", "7", "--no-flip"]
    assert run(["train", str(pictures), *words, "--dry-run"]) == 0
    theirs = capsys.readouterr().out
    recipe = p.resolve(folder=str(pictures), base=tiny_base, class_="dog", steps=7, flip=False)
    assert recipe.preset == "pocket-subject" and "# from preset pocket-subject" in theirs
    assert f"steps = {recipe.steps}" in theirs and f'class = "{recipe.data.class_name}"' in theirs
    assert f"lr = {recipe.optim.lr}" in theirs and flatten(recipe)["flip"] is False


CAPTIONS = {
    "style": ["a red cat, ink", "a house at night", "two boats", "an old car in the snow"],
    "cat": ["a zwx cat in the snow", "a zwx cat at night", "zwx cat, asleep"],
    "": ["rex in the snow", "rex at night", "rex, asleep"],
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_folder_without_a_class_is_judged_by_its_captions(
    kind: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line says what it was taken for and how to say otherwise; the preset follows, in the check of the folder too."""
    folder = tmp_path / "zwx"
    folder.mkdir()
    for picture, caption in zip(sorted(pictures.iterdir()), CAPTIONS[kind], strict=False):
        (folder / picture.name).write_bytes(picture.read_bytes())
        (folder / f"{picture.stem}.txt").write_text(caption, encoding="utf-8")
    assert run(["train", str(folder), "--dry-run"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert f"taken for {'a ' + kind if kind else 'one thing without a name'}" in first and "--class" in first
    assert second == f"# from preset pocket-{'style' if kind == 'style' else 'subject'}"
    assert run(["dataset", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == first.removeprefix("# ")
    assert run(["train", str(folder), "--dry-run", "--class", "dog"]) == 0
    assert "taken for" not in capsys.readouterr().out
    with pytest.warns(UserWarning, match="taken for"):
        assert (p.resolve(folder=folder).preset == "pocket-style") == (kind == "style")


def test_folders_that_say_it_themselves_are_not_judged(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "10_zwx dog").symlink_to(pictures)
    assert find_out(tmp_path / "10_zwx dog", "pocket") is None and find_out(tmp_path, "pocket") is None
    assert find_out(tmp_path / "nowhere", "pocket") is None  # others complain about it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.resolve("pocket-style", folder=pictures)


def test_few_captions_prove_nothing() -> None:
    assert not from_captions(["a cat", "a house", "a boat"]).style
    assert from_captions([f"a {thing}, xiv style" for thing in ("cat", "house")]).why == "all captions say 'xiv style'"


def test_a_person_is_asked(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from personalize.api.recipes import explain

    for said, preset, class_name in ((Showing(True), "pocket-style", ""), (Showing(False, "dog"), "pocket-subject", "dog")):
        recipe, told = explain({"folder": pictures}, ask=lambda folder, guess, said=said: said)  # type: ignore[misc]
        assert (recipe.preset, recipe.data.class_name) == (preset, class_name) and "taken for" in told


# ---------------------------------------------------------------- mistakes

MISTAKES: dict[str, tuple[Callable[[p.Base, p.Adapter], Any], str]] = {
    "load an adapter": (lambda base, rex: p.Adapter.load(rex), "must be a path"),  # type: ignore[arg-type]
    "load a folder": (lambda base, rex: p.Adapter.load(Path(__file__).parent), "is a folder"),
    "save into a folder": (lambda base, rex: rex.save(Path(__file__).parent), "is a folder"),
    "strength as text": (lambda base, rex: rex * "0.8", "must be a number"),  # type: ignore[operator]
    "add a path": (lambda base, rex: rex + "ink.safetensors", "Adapter.load"),  # type: ignore[operator]
    "subtract a number": (lambda base, rex: rex - 1, "must be an Adapter"),  # type: ignore[operator]
    "describe a value": (lambda base, rex: p.describe(rex), "p.describe"),  # type: ignore[arg-type]
    "load a base": (lambda base, rex: p.Base.load(base), "p.Base.load"),  # type: ignore[arg-type]
    "dtype as text": (lambda base, rex: p.Base.load("pocket", dtype="float16"), "torch.float16"),  # type: ignore[arg-type]
    "no device": (lambda base, rex: p.Base.load("pocket", "gpu"), "choose from auto, cpu"),
    "draw on a name": (lambda base, rex: p.draw("pocket", ["a"], [0]), "p.Base.load"),  # type: ignore[arg-type]
    "one prompt": (lambda base, rex: p.draw(base, "a cat", [0]), 'prompts=["a cat"]'),
    "one seed": (lambda base, rex: p.draw(base, ["a cat"], 0), "seeds=[0]"),  # type: ignore[arg-type]
    "too few seeds": (lambda base, rex: p.draw(base, ["a", "b"], [0]), "one seed per picture"),
    "adapters in a list": (lambda base, rex: p.draw(base, ["a"], [0], adapters=[rex]), "by name"),  # type: ignore[arg-type]
    "adapters by path": (lambda base, rex: p.draw(base, ["a"], [0], adapters={"x": "x"}), "must be an Adapter"),  # type: ignore[dict-item]
    "no steps": (lambda base, rex: p.draw(base, ["a"], [0], steps=0), "at least 1"),
    "size as text": (lambda base, rex: p.draw(base, ["a"], [0], size="64x64"), "size=(96, 64)"),  # type: ignore[arg-type]
    "attach a path": (lambda base, rex: p.attach(base, "rex.safetensors"), "p.attach"),  # type: ignore[arg-type]
    "attach to a name": (lambda base, rex: p.attach("pocket", rex), "p.Base.load"),  # type: ignore[arg-type]
    "train a folder": (lambda base, rex: p.train("photos/rex"), "p.resolve"),  # type: ignore[arg-type]
    "train a table": (lambda base, rex: p.train({"folder": "photos/rex"}), "p.resolve"),  # type: ignore[arg-type]
    "a fleet of one": (lambda base, rex: next(p.train_fleet(p.Recipe())), "a list of recipes"),  # type: ignore[arg-type]
    "settings as a preset": (lambda base, rex: p.resolve({"folder": "photos"}), "p.resolve"),  # type: ignore[arg-type]
    "a base for its name": (lambda base, rex: p.resolve(folder="photos", base=base), "must be a path"),
    "folders": (lambda base, rex: p.resolve(folder=["a", "b"]), "must be a path"),
    "no folder": (lambda base, rex: p.resolve(rank=4), "where are the pictures"),
    "a typo": (lambda base, rex: p.resolve(folder="photos", rnak=4, class_="dog"), "did you mean rank"),
    "read a path": (lambda base, rex: p.read_folder("photos"), "p.read_folder"),  # type: ignore[arg-type]
    "report on a recipe": (lambda base, rex: p.write_report(p.Recipe()), "its folder"),  # type: ignore[arg-type]
    "a setting of a part": (lambda base, rex: p.Recipe(rank=4), "adapter.rank: p.Recipe(adapter=AdapterSpec(rank=...))"),  # type: ignore[call-arg]
    "a typo in a recipe": (lambda base, rex: p.Recipe(rnak=4), "did you mean adapter.rank?"),  # type: ignore[call-arg]
    "a setting of the recipe": (lambda base, rex: AdapterSpec(steps=4), "p.Recipe(steps=...)"),  # type: ignore[call-arg]
    "a typo inside": (lambda base, rex: p.Recipe(adapter={"rnak": 4}), "did you mean adapter.rank?"),  # type: ignore[arg-type]
    "out of bounds": (lambda base, rex: p.Recipe(steps=0), "steps must be greater than or equal to 1, not 0"),
    "of another type": (lambda base, rex: AdapterSpec(rank="many"), "rank must be a valid integer"),  # type: ignore[arg-type]
    "a folder as a recipe": (lambda base, rex: p.Recipe("photos"), "by name"),  # type: ignore[call-arg]
    "change a recipe": (lambda base, rex: setattr(p.Recipe(), "steps", 4), "p.resolve(start=recipe, steps=...)"),
    "a copy with a typo": (lambda base, rex: p.Recipe().model_copy(update={"rank": 4}), "adapter.rank"),
    "a base by its name": (lambda base, rex: p.Base("pocket"), "p.Base.load"),  # type: ignore[call-arg]
    "a missing folder": (lambda base, rex: list(p.train(p.resolve(folder="/no/where", class_="dog"))), "no folder"),
    "resolve a folder": (lambda base, rex: p.resolve(Path(__file__).parent), "p.resolve(folder="),
    "no run": (lambda base, rex: p.Run("runs/nowhere"), "no run folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_natural_mistakes_are_told_in_one_line(mistake: str, base: p.Base, rex: p.Adapter) -> None:
    call, wanted = MISTAKES[mistake]
    with pytest.raises(p.PersonalizeError) as told:
        call(base, rex)
    assert wanted in str(told.value) and "\n" not in str(told.value)


def test_a_part_of_a_recipe_goes_into_resolve_as_it_is() -> None:
    recipe = p.resolve(folder="photos", class_="dog", adapter=AdapterSpec(rank=3))
    assert recipe.adapter.rank == 3 and recipe.adapter.targets == p.resolve(folder="photos", class_="dog").adapter.targets
    assert p.resolve(start=recipe, steps=5).steps == 5 and p.resolve(start=recipe, steps=5).adapter.rank == 3


def test_an_apple_gpu_is_refused_with_the_reason(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", str(pictures), "--class", "dog", "--dry-run"], ["generate", "a cat"]):
        assert run([*words, "--device", "mps"]) == 2
        line = capsys.readouterr().err
        assert "float64" in line and "--device cpu" in line and len(line.splitlines()) == 1
    with pytest.raises(p.PersonalizeError, match="Apple GPU"):
        p.Base.load("pocket", "mps")


# ---------------------------------------------------------------- values


def test_adapters_add_up_and_show_themselves(rex: p.Adapter) -> None:
    assert sum([rex, rex]).deltas.keys() == rex.deltas.keys()  # type: ignore[union-attr]
    named = p.Adapter(rex.deltas, {"modelspec.title": "<b>rex</b>", "modelspec.thumbnail": "javascript:no"})
    html = named._repr_html_()
    assert "&lt;b&gt;rex" in html and "<b>" not in html and "javascript" not in html and "pocket" in html


def test_pictures_show_themselves(base: p.Base) -> None:
    drawn = p.draw(base, ["a cat", "a dog"], [0, 0], steps=1)
    assert isinstance(drawn, list) and (drawn._repr_png_() or b"").startswith(b"\x89PNG")
    assert type(drawn)()._repr_png_() is None


def test_training_writes_the_report_and_says_where_the_files_are(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    settings = {
        **SMALL,
        "steps": 1,
        "checkpoint_every": 0,
        "sample_seeds": [0],
        "sample_steps": 1,
        "sample_prompts": ["a {trigger}"],
    }
    recipe = p.resolve(flags={"folder": pictures, "base": tiny_base, "output": tmp_path / "zwx", **settings})
    training = p.train(recipe)
    assert isinstance(list(training)[-1], Finished)
    made = training.finish()  # nothing is left to do
    assert (made.adapter, made.report) == (tmp_path / "zwx" / "zwx.safetensors", tmp_path / "zwx" / "report.html")
    assert "<html" in made.report.read_text(encoding="utf-8") and made.load().family == "pocket" and made.pictures
    html = made._repr_html_()
    assert "data:image/webp" in html and str(made.adapter) in html and "personalize generate" in html
