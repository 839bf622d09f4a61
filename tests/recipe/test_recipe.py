"""The recipe: layers, names, bounds, contradictions, and files that replay it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from personalize.errors import RecipeError
from personalize.recipe.fields import Recipe
from personalize.recipe.resolve import from_json, presets, resolve, to_json, to_toml
from personalize.recipe.settings import flat, flatten, settings


def test_later_layers_win(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text('rank = 4\nsteps = 7\n[optim]\nlr = 0.5\n[data]\nclass = "dog"\n')
    recipe = resolve(preset, {"steps": "9", "flip": False})
    assert (recipe.adapter.rank, recipe.steps, recipe.optim.lr, recipe.data.class_name) == (4, 9, 0.5, "dog")
    assert recipe.batch_size == Recipe().batch_size and not recipe.data.flip
    assert recipe.preset == str(preset)


def test_presets_may_start_from_others(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("rank = 4\nsteps = 7\n")
    (tmp_path / "b.toml").write_text('preset = "a.toml"\nsteps = 8\n')
    recipe = resolve(tmp_path / "b.toml")
    assert (recipe.adapter.rank, recipe.steps) == (4, 8)
    (tmp_path / "a.toml").write_text('preset = "b.toml"\n')
    with pytest.raises(RecipeError, match="starts from itself"):
        resolve(tmp_path / "b.toml")


def test_a_run_can_start_from_another_recipe() -> None:
    start = resolve(flags={"rank": 3, "steps": 5})
    assert resolve(flags={"steps": 6}, start=start).adapter.rank == 3


def test_preset_may_come_as_a_flag() -> None:
    name = next(iter(presets()))
    assert resolve(flags={"preset": name}) == resolve(name)


def test_alpha_follows_rank() -> None:
    assert resolve(flags={"rank": 32}).adapter.alpha == 32
    assert resolve(flags={"rank": 32, "alpha": 8}).adapter.alpha == 8


def test_lists_may_be_written_with_commas() -> None:
    recipe = resolve(flags={"targets": ["attention,conv", "unet.mid*"], "sample_seeds": "3, 4", "sample_prompts": ["a, b"]})
    assert recipe.adapter.targets == ("attention", "conv", "unet.mid*")
    assert recipe.sampling.sample_seeds == (3, 4)
    assert recipe.sampling.sample_prompts == ("a, b",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rnak": 1}, r"unknown setting 'rnak' \(did you mean rank\?\)"),
        ({"class_name": "dog"}, r"unknown setting 'class_name' \(did you mean class\?\)"),
        ({"optim": {"rank": 3}}, r"unknown setting 'rank' \(it belongs to \[adapter\]\)"),
        ({"rank": 0}, "--rank must be 1 to 1024, not 0"),
        ({"rank": "many"}, "--rank must be a whole number, not 'many'"),
        ({"rank": 2.5}, "--rank must be a whole number, not 2.5"),
        ({"steps": -1}, "--steps must be at least 1, not -1"),
        ({"dropout": 1}, "--dropout must be at least 0 and less than 1, not 1"),
        ({"alpha": 0}, "--alpha must be more than 0, not 0"),
        ({"lr": "nan"}, "--lr must be a number, not 'nan'|--lr must be at least 0"),
        ({"lr": "inf"}, "--lr must be a number, not 'inf'"),
        ({"flip": "perhaps"}, "--flip must be true or false, not 'perhaps'"),
        ({"dialect": "kohja"}, r"--dialect must be one of kohya, diffusers, peft, not 'kohja' \(did you mean kohya\?\)"),
        ({"seed": 2**32}, "--seed must be 0 to 4294967295, not 4294967296"),
        ({"sample_seeds": [-1]}, "--sample-seeds must be 0 to 4294967295, not -1"),
        ({"sample_prompts": 3}, "--sample-prompts must be a list, not 3"),
        ({"lr": 0}, "nothing would be trained: --lr and --text-encoder-lr are both 0"),
        ({"prior": "images"}, "--prior images needs --class"),
        ({"caption": "a {clas}"}, r"--caption can hold {trigger} and {class}, not {clas}"),
        ({"sample_prompts": ["{x}"]}, "--sample-prompts can hold"),
        ({"name": "../x"}, "--name must be a plain file name"),
        ({"preset": "pocket-subjet"}, r"unknown preset 'pocket-subjet' \(did you mean pocket-subject\?"),
        ({"preset": "/nowhere/x.toml"}, "cannot read preset /nowhere/x.toml: No such file"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        resolve(flags=flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak = 3", "unknown setting 'rnak' in {path}"),
        ("rank = 0", r"--rank must be 1 to 1024, not 0 \(set in {path}\)"),
        ("rank = = 3", "preset {path} is not TOML"),
        ("[optim]\nrank = 3", r"unknown setting 'rank' in {path} \(it belongs to \[adapter\]\)"),
        ("[rank]\nx = 3", "--rank must be a whole number"),
    ],
)
def test_mistakes_in_a_preset_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message.format(path=path)):
        resolve(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not TOML"):
        resolve(path)


ODD = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="{}"), max_size=20)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "class": ODD,
            "trigger": ODD,
            "sample_prompts": st.lists(ODD, max_size=3),
            "lr": st.floats(1e-12, 1e3),
            "rank": st.integers(1, 64),
            "flip": st.booleans(),
            "folder": st.just('pictures of "rex"\\'),
            "output": st.just("C:\\runs"),
        },
    )
)
def test_files_replay_the_recipe(tmp_path_factory: pytest.TempPathFactory, flags: dict[str, Any]) -> None:
    recipe = resolve(flags=flags)
    text = to_toml(recipe)
    assert flat(tomllib.loads(text)) == flatten(recipe)
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(text, encoding="utf-8", newline="")
    assert resolve(path).model_copy(update={"preset": None}) == recipe
    assert from_json(to_json(recipe)) == recipe.model_copy(update={"output": None})


@pytest.mark.parametrize("text", ["{", "[]", '{"rnak": 1}', '{"rank": -1}'])
def test_a_recipe_from_elsewhere_may_be_broken(text: str) -> None:
    with pytest.raises(RecipeError):
        from_json(text)


def test_recipes_do_not_change() -> None:
    with pytest.raises(RecipeError, match="cannot be changed"):
        Recipe().steps = 3  # type: ignore[misc]


def test_names_are_unique_and_documented() -> None:
    fields = [getattr(Recipe(), name) for name in Recipe.model_fields]
    leaves = sum(len(type(value).model_fields) if isinstance(value, BaseModel) else 1 for value in fields)
    assert len(settings()) == leaves
    for setting in settings().values():
        assert setting.help and not setting.help.endswith("."), setting.name


@pytest.mark.parametrize("name", presets())
def test_every_preset_resolves_and_says_why(name: str) -> None:
    recipe = resolve(name)
    bases = {"pocket": "pocket", "sd15": "v1-5", "sd21": "2-1", "sdxl": "xl-base"}
    assert bases[name.split("-")[0]] in recipe.base
    assert presets()[name].read_text(encoding="utf-8").startswith("#")
    assert "why" in presets()[name].read_text(encoding="utf-8").lower()


def test_settings_follow_the_number_of_pictures(tmp_path: Path) -> None:
    preset, child, folder = tmp_path / "p.toml", tmp_path / "child.toml", tmp_path / "zwx"
    preset.write_text("steps = 1\nrank = 4\n[pictures.10]\nsteps = 10\n[pictures.2]\nsteps = 2\nrank = 8\n")
    child.write_text('preset = "p.toml"\nrank = 5\n')
    home = folder / "5_zwx cat"
    home.mkdir(parents=True)
    told = []
    for count in range(12):
        recipes = [resolve(path, {"folder": folder}) for path in (preset, child)]
        told.append([(recipe.steps, recipe.adapter.rank) for recipe in recipes])
        for name in (f"{count}.PNG", f"{count}-masklabel.png", f"{count}.txt"):
            (home / name).write_text("something")
    assert told == [[(1, 4), (1, 5)]] * 2 + [[(2, 8), (2, 5)]] * 8 + [[(10, 8), (10, 5)]] * 2
    (folder / "own.png").write_text("something")  # the numbered folder beside it is not learned, and so does not count
    assert resolve(preset, {"folder": folder}).steps == 1
    assert resolve(preset, {"folder": folder, "steps": 7}).steps == 7
    assert resolve(preset).steps == 1
    preset.write_text("[pictures]\nsteps = 3\n")
    with pytest.raises(RecipeError, match=r"\[pictures\] in .* must hold tables"):
        resolve(preset)


def test_one_sample_prompt_goes_without_the_trigger() -> None:
    for name in [None, *presets()]:
        prompts = resolve(name).sampling.sample_prompts
        assert any("{trigger}" not in prompt for prompt in prompts), name


def test_a_preset_without_class_asks_for_nothing_empty() -> None:
    prompts = resolve("pocket-subject", {"folder": "photos"}).sampling.sample_prompts
    assert len(prompts) > 1 and all("{trigger}" in prompt or "{class}" not in prompt for prompt in prompts)
