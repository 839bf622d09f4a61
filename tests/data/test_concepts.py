"""Several concepts, masks and regularization folders: how they are read, and what they change in a run."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import small_recipe

from personalize.adapters.adapter import Adapter
from personalize.adapters.describe import describe
from personalize.data.dataset import Concept, Dataset, Example
from personalize.data.folder import _balance_repeats, read_folder, regularization
from personalize.data.latents import encode_dataset
from personalize.data.masks import load_mask
from personalize.errors import DataError, RecipeError
from personalize.models.model import Base
from personalize.recipe.fields import Data, Recipe
from personalize.reports.metrics import evidence
from personalize.reports.run.read import read_run
from personalize.training.events import Started
from personalize.training.inputs import prepare_data, training_batches
from personalize.training.loop import train
from personalize.training.preflight import check

Make = Callable[..., Recipe]


def filled(folder: Path, *names: str, size: tuple[int, int] = (64, 64)) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        Image.linear_gradient("L").resize(size).rotate(40 * (len(name) + i)).convert("RGB").save(folder / name)
    return folder


def read(folder: Path, **settings: Any) -> Dataset:
    return read_folder(Data(folder=folder, **settings))


def shown(dataset: Dataset) -> list[tuple[str, str, int]]:
    return [(f"{e.path.parent.name}/{e.path.name}", e.caption, e.repeats) for e in dataset.examples]


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    """Two concepts in kohya's layout."""
    return filled(tmp_path / "set", "10_zwx toy cat/a.png", "10_zwx toy cat/b.png", "2_vok/c.png")


# ---------------------------------------------------------------- reading


def test_kohya_folders_are_concepts(kohya: Path) -> None:
    (kohya / "10_zwx toy cat" / "b.caption").write_text("zwx asleep")
    dataset = read(kohya)
    assert dataset.concepts == (Concept("vok", "", "2_vok", 2), Concept("zwx", "toy cat", "10_zwx toy cat", 10))
    assert shown(dataset) == [
        ("2_vok/c.png", "vok", 2),
        ("10_zwx toy cat/a.png", "zwx toy cat", 10),
        ("10_zwx toy cat/b.png", "zwx asleep", 10),
    ]
    assert dataset.trigger == "vok" and dataset.triggers == ("vok", "zwx") and dataset.warnings == []
    named = read(kohya, trigger="rex", **{"class": "dog"})
    assert (named.concepts[0].trigger, named.concepts[0].class_name, named.concepts[1].trigger) == ("rex", "dog", "zwx")


def test_a_single_folder_of_kohya_s_names_its_trigger_and_class(kohya: Path) -> None:
    dataset = read(kohya / "10_zwx toy cat")
    assert dataset.concepts == (Concept("zwx", "toy cat"),)
    assert shown(dataset)[0] == ("10_zwx toy cat/a.png", "zwx toy cat", 1)
    assert read(kohya / "10_zwx toy cat", trigger="rex").triggers == ("rex",)


def test_pictures_beside_subfolders_are_one_concept(kohya: Path) -> None:
    filled(kohya, "own.png")
    dataset = read(kohya)
    assert shown(dataset) == [("set/own.png", "set", 1)]
    assert dataset.warnings == ["pictures in the subfolder 10_zwx toy cat, 2_vok are not used"]


def test_subfolders_without_a_number_are_told(kohya: Path) -> None:
    filled(kohya, "0_none/x.png", "more/y.png")
    assert read(kohya).warnings == ["pictures in the subfolder 0_none, more are not used"]
    nothing = filled(kohya.parent / "nothing", "more/y.png")
    with pytest.raises(DataError, match="subfolder more: give that folder, or call subfolders like '10_name class'"):
        read(nothing)


def test_metadata_may_repeat_pictures_and_lie_in_each_folder(kohya: Path) -> None:
    lines = [{"file_name": "2_vok/c.png", "repeats": 5}, {"file_name": "10_zwx toy cat/a.png", "text": "zwx on a mat"}]
    (kohya / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (kohya / "10_zwx toy cat" / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "text": "zwx far", "repeats": 3}))
    assert [row[1:] for row in shown(read(kohya))] == [("vok", 5), ("zwx on a mat", 10), ("zwx far", 3)]


@pytest.mark.parametrize("repeats", [0, -1, 1.5, "2", True, None])
def test_bad_repeats_name_file_and_line(tmp_path: Path, repeats: object) -> None:
    folder = filled(tmp_path / "zwx", "a.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "repeats": repeats}))
    with pytest.raises(DataError, match=r"metadata\.jsonl line 1: 'repeats' must be a whole number"):
        read(folder)


def test_each_concept_is_held_to_its_own_trigger(kohya: Path) -> None:
    (kohya / "2_vok" / "c.txt").write_text("zwx on a mat")
    (warning,) = read(kohya).warnings
    assert warning.startswith("1 of 1 captions lack the trigger 'vok'")


def test_a_prefix_stands_before_every_caption(kohya: Path) -> None:
    (kohya / "2_vok" / "c.txt").write_text("on a mat")
    captions = [row[1] for row in shown(read(kohya, caption_prefix="photo of {trigger},"))]
    assert captions == ["photo of vok, on a mat", "photo of zwx, zwx toy cat", "photo of zwx, zwx toy cat"]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=4))
def test_balanced_concepts_have_the_same_share_and_keep_their_proportions(concepts: list[list[int]]) -> None:
    examples = [Example(Path(), "", "", (1, 1), repeats, k) for k, some in enumerate(concepts) for repeats in some]
    names = [Concept(str(k)) for k in range(len(concepts))]
    totals = Counter[int]()
    balanced = _balance_repeats(examples, names)
    for example in balanced:
        totals[example.concept] += example.repeats
    assert len(set(totals.values())) == 1
    for before, after in zip(examples, balanced, strict=True):
        exact = before.repeats * totals[before.concept] / sum(concepts[before.concept])
        assert abs(after.repeats - exact) < 1 and after.repeats > 0 and exact >= before.repeats


def test_balance_scales_repeats(kohya: Path) -> None:
    assert [row[2] for row in shown(read(kohya, balance=True))] == [20, 10, 10]


# ---------------------------------------------------------------- masks


def white(size: tuple[int, int], *box: int) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def test_masks_are_found_and_are_no_pictures(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.jpg", "b.png")
    white((32, 32), 0, 0, 8, 16).save(folder / "a-masklabel.png")
    white((64, 64), 0, 0, 8, 16).save(folder / "lonely-masklabel.png")
    dataset = read(folder)
    assert [(e.path.name, e.mask and e.mask.name) for e in dataset.examples] == [("a.jpg", "a-masklabel.png"), ("b.png", None)]
    assert dataset.warnings == ["lonely-masklabel.png is a mask without a picture"]
    latents = load_mask(dataset.examples[0], (64, 64), 8)
    assert latents.shape == (8, 8) and np.abs(latents[:4, :2] - 1).max() < 0.1 and latents[5:].max() < 0.1


def test_a_mask_is_cut_like_its_picture_and_averaged(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", size=(128, 64))
    white((128, 64), 60, 0, 128, 64).save(folder / "a-masklabel.png")
    got = load_mask(read(folder).examples[0], (64, 64), 8)
    assert np.allclose(got[:, :3], 0) and np.allclose(got[:, 4:], 1) and np.allclose(got[:, 3], 0.5, atol=0.02)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_masks_are_stored_in_many_ways(tmp_path: Path, mode: str) -> None:
    folder, mask = filled(tmp_path / "zwx", "a.png"), white((64, 64), 0, 0, 64, 32)
    if mode in ("RGBA", "LA"):
        stored = Image.new(mode, mask.size, "white")
        stored.putalpha(mask)  # white on nothing
    else:
        stored = Image.fromarray(np.asarray(mask, np.uint16) * 257) if mode == "I;16" else mask.convert(mode)
    stored.save(folder / "a-masklabel.png")
    got = load_mask(read(folder).examples[0], (64, 64), 8)
    assert (got[:4] == 1).all() and (got[4:] == 0).all()


def test_the_alpha_channel_is_a_mask_if_asked(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.png", "c.png")
    for name in "ac":
        with Image.open(folder / f"{name}.png") as image:
            image.putalpha(white((64, 64), 0, 0, 64, 32))
            image.save(folder / f"{name}.png")
    white((64, 64), 32, 0, 64, 64).save(folder / "c-masklabel.png")
    assert [e.mask for e in read(folder).examples[:2]] == [None, None]
    a, b, c = read(folder, alpha_mask=True).examples
    assert a.mask == a.path and b.mask is None and c.mask == folder / "c-masklabel.png"
    got = load_mask(a, (64, 64), 8)
    assert (got[:4] == 1).all() and (got[4:] == 0).all()


def bad_masks() -> dict[str, tuple[Callable[[Path], object], str]]:
    return {
        "black": (lambda path: white((64, 64), 0, 0, 0, 0).save(path), r"a-masklabel\.png is all black"),
        "torn": (lambda path: path.write_bytes(b"no picture"), r"a-masklabel\.png: not a picture"),
        "other proportions": (lambda path: white((64, 32), 0, 0, 9, 9).save(path), "is 64 x 32 pixels and its picture 64 x 64"),
    }


@pytest.mark.parametrize("case", bad_masks())
def test_a_picture_with_a_mask_of_no_use_is_left_out_and_told(tmp_path: Path, case: str) -> None:
    """Whole, it would teach what its mask is to keep away."""
    folder = filled(tmp_path / "zwx", "a.png", "b.png")
    write, said = bad_masks()[case]
    write(folder / "a-masklabel.png")
    dataset = read(folder)
    assert [example.path.name for example in dataset.examples] == ["b.png"]
    (told,) = dataset.warnings
    assert told.startswith("skipped a.png: ") and re.search(said, told) and dataset.bad_masks[0][1].hint in told
    (folder / "b.png").unlink()
    with pytest.raises(DataError, match=said):
        read(folder)  # nothing is left


def test_a_run_goes_on_without_pictures_whose_mask_is_of_no_use(make: Make, tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.png", size=(300, 64))
    filled(folder, "c.png")
    (folder / "a-masklabel.png").write_bytes(b"torn")
    white((300, 64), 0, 0, 9, 64).save(folder / "b-masklabel.png")  # nothing of it is left in the square
    started = next(event for event in train(make(folder, buckets=False)) if isinstance(event, Started))
    assert [Path(image["path"]).name for image in started.images] == ["c.png"]
    told = [warning for warning in started.warnings if warning.startswith("skipped")]
    assert [warning.partition(":")[0] for warning in told] == ["skipped a.png", "skipped b.png"]
    (folder / "c.png").unlink()
    with pytest.raises(DataError, match=r"nothing is left of the mask|none of the"):
        list(train(make(folder, buckets=False, output=tmp_path / "none")))


def test_a_picture_that_is_all_transparent_is_named(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png")
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(folder / "a.png")
    with pytest.raises(DataError, match=r"a\.png is transparent everywhere"):
        read(folder, alpha_mask=True)


def test_a_mask_outside_the_crop_is_named(tmp_path: Path, narrow_base: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", size=(300, 64))
    white((300, 64), 0, 0, 9, 64).save(folder / "a-masklabel.png")
    with pytest.raises(DataError, match=r"nothing is left of the mask .*a-masklabel\.png where its picture is cut to 64 x 64"):
        encode_dataset(Base.load(narrow_base), read(folder), Recipe(data=Data(buckets=False)))


# ---------------------------------------------------------------- regularization


def test_regularization_folders(tmp_path: Path) -> None:
    plain = filled(tmp_path / "reg", "a.png", "b.png", size=(64, 96))
    (plain / "a.txt").write_text("a black dog")
    assert [e.caption for e in regularization(plain, "a {class}", "dog").examples] == ["a black dog", "a dog"]
    with pytest.raises(RecipeError, match="needs --class"):
        regularization(plain, "a {class}", "")
    numbered = filled(tmp_path / "numbered", "1_dog/a.png", "3_golden retriever/b.png")
    assert shown(regularization(numbered, "a {class}", "")) == [
        ("1_dog/a.png", "a dog", 1),
        ("3_golden retriever/b.png", "a golden retriever", 3),
    ]


# ---------------------------------------------------------------- in a run


@pytest.fixture
def make(narrow_base: Path, tmp_path: Path) -> Make:
    """2 steps of a folder's pictures, whose classes are for the folder to say."""
    quiet = {"output": tmp_path / "run", "steps": 2, "checkpoint_every": 0, "min_snr": 0, "class": ""}
    return lambda folder, **flags: small_recipe(narrow_base, folder, **{**quiet, **flags})


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    list(train(recipe))
    assert recipe.output
    adapter = Adapter.load(next(recipe.output.glob("*.safetensors")))
    return {path: delta.delta() for path, delta in adapter.deltas.items()}


def differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(a[path], b[path]) for path in a)


def test_two_concepts_are_drawn_told_and_told_apart(make: Make, kohya: Path) -> None:
    prompts = ["{trigger} {class}", "{trigger} in the snow", "a {class}"]
    recipe = make(kohya, sample_prompts=prompts, prior="output", prior_prompts=["a {class}", "a house"])
    job = check(recipe)
    assert job.recipe.name == "vok" and job.prompts == ["vok", "vok in the snow", "a", "zwx toy cat"]
    assert job.class_prompts == ["a house", "a toy cat"]
    assert job.class_captions == ["", "toy cat", "toy cat", "a house", "a toy cat"]
    list(train(recipe))
    assert recipe.output
    found = evidence(recipe.output)
    assert {pair.prompt for pair in found.with_trigger} == {"", "in the snow", "toy cat"} and len(found.without_trigger) == 1
    assert read_run(recipe.output).triggers == ("vok", "zwx")
    said = describe(recipe.output / "vok.safetensors").metadata
    assert said["modelspec.trigger_phrase"] == "vok, zwx"
    assert json.loads(said["ss_dataset_dirs"]) == {
        "2_vok": {"n_repeats": 2, "img_count": 1},
        "10_zwx toy cat": {"n_repeats": 10, "img_count": 2},
    }
    assert json.loads(said["ss_tag_frequency"]) == {"2_vok": {"vok": 1}, "10_zwx toy cat": {"zwx toy cat": 2}}
    assert said["ss_num_train_images"] == "22"
    assert json.loads((recipe.output / "vok.json").read_text())["activation text"] == "vok, zwx toy cat"


def test_metadata_tells_the_buckets(make: Make, tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.png", size=(64, 64))
    filled(folder, "c.png", size=(200, 100))
    (folder / "a.txt").write_text("zwx, A mat, asleep")
    recipe = make(folder, steps=1, caption_shuffle=True, upscale=True)
    list(train(recipe))
    assert recipe.output
    said = describe(recipe.output / "zwx.safetensors").metadata
    assert said["ss_enable_bucket"] == "True" and said["ss_bucket_no_upscale"] == "False"
    info = json.loads(said["ss_bucket_info"])
    assert info["buckets"] == {"0": {"resolution": [64, 64], "count": 2}, "1": {"resolution": [80, 48], "count": 1}}
    assert info["mean_img_ar_error"] == pytest.approx((2 - 80 / 48) / 3)
    assert json.loads(said["ss_tag_frequency"])["zwx"] == {"zwx": 2 + 1, "a mat": 1, "asleep": 1}
    assert (said["ss_shuffle_caption"], said["ss_keep_tokens"]) == ("True", "1")


def test_balance_changes_what_is_seen(make: Make, kohya: Path, tmp_path: Path) -> None:
    assert differ(weights(make(kohya)), weights(make(kohya, balance=True, output=tmp_path / "balanced")))


def test_masks_change_what_is_learned_as_far_as_they_weigh(make: Make, tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.png")
    plain = weights(make(folder))
    white((64, 64), 0, 0, 24, 40).save(folder / "a-masklabel.png")
    masked = weights(make(folder, output=tmp_path / "masked"))
    alone = weights(make(folder, output=tmp_path / "alone", mask_outside=0))
    everywhere = weights(make(folder, output=tmp_path / "everywhere", mask_outside=1))
    assert differ(plain, masked) and differ(masked, alone)
    assert all(torch.allclose(plain[path], everywhere[path], atol=1e-5) for path in plain)


def test_alpha_masks_change_what_is_learned(make: Make, tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png")
    Image.merge("RGBA", [*Image.open(folder / "a.png").split(), white((64, 64), 0, 0, 24, 40)]).save(folder / "a.png")
    assert differ(weights(make(folder)), weights(make(folder, output=tmp_path / "alpha", alpha_mask=True)))


@pytest.mark.parametrize("prior", ["none", "output", "images"])
def test_masks_follow_their_pictures_into_the_batch(make: Make, tmp_path: Path, prior: str) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.png")
    white((64, 64), 0, 0, 16, 64).save(folder / "a-masklabel.png")
    job = check(make(folder, prior=prior, prior_images=1, **{"class": "cat"}))
    for inputs in islice(training_batches(job, prepare_data(job), 0), 6):
        assert inputs.mask is not None and inputs.mask.shape == (2, 1, 8, 8)
        shares = sorted(inputs.mask.mean(dim=(1, 2, 3)).tolist())
        assert shares == [0.25, 1.0]
        (narrow,) = (mask[0] for mask in inputs.mask if mask.mean() < 1)
        assert narrow[:, :2].min() == 1 or narrow[:, -2:].min() == 1  # mirrored with its picture


def test_regularization_pictures_are_the_class_images_in_the_step_s_shape(make: Make, tmp_path: Path, kohya: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", size=(64, 96))
    filled(folder, "b.png", size=(160, 80))
    classes = filled(tmp_path / "reg", "1_cat/a.png", "1_cat/b.png", size=(100, 90))
    recipe = make(folder, prior="images", regularization=classes)
    job = check(recipe)
    seen = list(islice(training_batches(job, prepare_data(job), 0), 4))
    assert {tuple(inputs.mean.shape) for inputs in seen} == {(4, 16, 10, 6), (4, 16, 6, 10)}
    assert all(inputs.class_images == 2 for inputs in seen)
    told = weights(recipe)
    assert recipe.output and not (recipe.output / "class_images").exists()
    said = describe(recipe.output / "zwx.safetensors").metadata
    assert json.loads(said["ss_reg_dataset_dirs"]) == {"1_cat": {"n_repeats": 1, "img_count": 2}}
    filled(classes, "1_cat/longer name.png")
    assert differ(told, weights(recipe.model_copy(update={"output": tmp_path / "more"})))


def test_class_images_have_no_masks_and_whole_captions(make: Make, tmp_path: Path) -> None:
    folder, classes = filled(tmp_path / "zwx", "a.png"), filled(tmp_path / "cat", "x.png", "y.png", size=(64, 96))
    white((64, 96), 0, 0, 8, 8).save(classes / "x-masklabel.png")
    for name in "xy":
        (classes / f"{name}.txt").write_text("a cat, by day, at night, asleep")
    recipe = make(folder, prior="images", regularization=classes, caption_shuffle=True, keep_tokens=0, **{"class": "cat"})
    job = check(recipe)
    with torch.no_grad():
        whole = job.base.embed(["a cat, by day, at night, asleep"])
    for inputs in islice(training_batches(job, prepare_data(job), 0), 5):
        assert inputs.mask is None and all(torch.equal(cond, whole.tokens[0]) for cond in inputs.cond.tokens[2:])


def test_what_is_odd_about_class_images_is_told(make: Make, tmp_path: Path) -> None:
    folder, classes = filled(tmp_path / "zwx", "a.png"), filled(tmp_path / "cat", "x.png")
    (classes / "torn.png").write_bytes(b"torn")
    events = train(make(folder, prior="images", regularization=classes, **{"class": "cat"}))
    warnings = next(events).warnings
    events.close()
    assert [line for line in warnings if line.startswith("skipped torn.png")]


def test_a_run_with_everything_goes_on_where_it_was_stopped(make: Make, tmp_path: Path, kohya: Path) -> None:
    for i, size in enumerate([(64, 64), (64, 120), (150, 70), (40, 40), (200, 50)]):
        filled(kohya, f"2_vok/shape{i}.png", size=size)
        (kohya / "2_vok" / f"shape{i}.txt").write_text("vok, by day, asleep, far away")
    white((64, 64), 0, 0, 24, 40).save(kohya / "2_vok" / "shape0-masklabel.png")
    classes = filled(tmp_path / "reg", "1_cat/a.png", "1_cat/b.png", size=(100, 90))
    flags = {"steps": 6, "batch_size": 4, "balance": True, "caption_shuffle": True, "tag_dropout": 0.2, "caption_dropout": 0.1}
    recipe = make(kohya, prior="images", prior_share=0.5, regularization=classes, **flags)
    unbroken = weights(recipe)
    again = recipe.model_copy(update={"output": tmp_path / "again"})
    events = train(again)
    assert len(next(events).shapes) == 5
    for _ in range(3):
        next(events)
    events.close()
    resumed = weights(again)
    assert all(torch.equal(unbroken[path], resumed[path]) for path in unbroken)


def test_a_run_that_goes_on_with_other_masks_or_class_images_says_so(make: Make, tmp_path: Path) -> None:
    folder, classes = filled(tmp_path / "zwx", "a.png"), filled(tmp_path / "cat", "x.png")
    white((64, 64), 0, 0, 32, 32).save(folder / "a-masklabel.png")
    recipe = make(folder, prior="images", regularization=classes, **{"class": "cat"})
    events = train(recipe)
    next(events)
    events.close()
    moved = recipe.data.model_copy(update={"regularization": shutil.copytree(classes, tmp_path / "moved")})
    assert check(recipe.model_copy(update={"data": moved})).state
    for path in (folder / "a-masklabel.png", classes / "x.png"):
        before = path.read_bytes()
        white((64, 64), 0, 0, 40, 40).save(path)
        change = {"a-masklabel.png": "the mask of a.png is another", "x.png": "a class image is another picture"}[path.name]
        assert check(recipe).changes == (change,)
        path.write_bytes(before)


def test_regularization_is_for_prior_images_only(make: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--regularization holds class images for --prior images"):
        make(tmp_path, regularization=tmp_path)
