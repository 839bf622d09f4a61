"""`personalize batch`: many folders, an adapter for each, whatever is wrong with some of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from personalize.adapters.describe import describe
from personalize.cli import run
from personalize.lock import hold
from personalize.recipe.resolve import from_json


@pytest.fixture
def photos(pictures: Path, tmp_path: Path) -> Path:
    """Three folders of pictures, one of them with settings of its own, and one without a picture that can be read."""
    for name in ("rex", "tom", "vase"):
        shutil.copytree(pictures, tmp_path / "photos" / name)
    (tmp_path / "photos" / "vase" / "personalize.toml").write_text('class = "vase"\ntrigger = "vzx"\nlr = 2e-3\n')
    (tmp_path / "photos" / "broken").mkdir()
    (tmp_path / "photos" / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "photos" / "empty").mkdir()
    return tmp_path / "photos"


def command(photos: Path, narrow_base: Path, *more: str) -> list[str]:
    small = ["--steps", "2", "--batch-size", "1", "--rank", "2", "--sample-prompts", "{trigger}", "--sample-steps", "1"]
    small += ["--sample-seeds", "0", "--sample-every", "0", "--checkpoint-every", "0"]
    where = [
        "--base",
        str(narrow_base),
        "--output",
        str(photos.parent / "runs"),
        "--preset",
        "pocket-subject",
        "--choose",
        "none",
    ]
    return ["batch", str(photos), "--class", "dog", *where, *small, *more]


def test_every_folder_gets_its_adapter_and_the_broken_one_is_told(
    photos: Path, narrow_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(photos, narrow_base)) == 2
    told, runs = capsys.readouterr().out, photos.parent / "runs"
    assert "broken: failed: none of the 1 pictures" in told and "3 of 4 adapters are there; 1 failed: broken" in told
    for name, trigger, class_name in (("rex", "rex", "dog"), ("tom", "tom", "dog"), ("vase", "vzx", "vase")):
        recipe = from_json(describe(runs / name / f"{trigger}.safetensors").metadata["personalize.recipe"])
        assert (recipe.data.trigger, recipe.data.class_name, recipe.steps) == (trigger, class_name, 2)
        assert recipe.optim.lr == (2e-3 if name == "vase" else 4e-3)  # the folder's own, and the preset's
        assert (runs / name / "report.html").is_file()
    with Image.open(runs / "batch.png") as sheet:
        assert sheet.height > 3 * 128 and sheet.width > 3 * 128  # a row for each: learned from, base, adapter
    written = json.loads((runs / "summary.json").read_text(encoding="utf-8"))
    summary, (fleet,) = {one["name"]: one for one in written["runs"]}, written["fleets"]
    assert fleet["members"] == fleet["at_once"] == 3 and fleet["peak"] > fleet["base"] > fleet["adapter"] > 0
    assert "3 members at once: " in told.split("rex: done")[0] and " for the base, " in told and " for each member; " in told
    assert {name: one["state"] for name, one in summary.items()} == {name: "done" for name in ("rex", "tom", "vase")} | {
        "broken": "failed"
    }
    assert summary["vase"]["adapter"] == str(runs / "vase" / "vzx.safetensors") and "none of the 1" in summary["broken"]["error"]
    assert all(f"  {name} " in told for name in summary)  # every folder is named at the end
    shutil.rmtree(photos / "broken")
    assert run(command(photos, narrow_base)) == 0
    assert capsys.readouterr().out.count("done before") == 3


def test_a_dry_run_says_what_would_be_trained(photos: Path, narrow_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(photos, narrow_base, "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" => ")[0] for line in lines] == [str(photos / name) for name in ("broken", "rex", "tom", "vase")]
    assert "class vase" in lines[-1] and not (photos.parent / "runs").exists()


def test_a_folder_of_pictures_is_one_of_them(photos: Path, narrow_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(photos, narrow_base, "--dry-run")
    assert run([*words[:1], str(photos / "rex"), f"{photos}/rex/", *words[2:]]) == 0  # named twice
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("toml", "told"),
    [("rank = = 3", "vase: preset {file} is not TOML"), ("rnak = 3", "rnak"), ("folder = 'x'", "vase: the folder of pictures")],
)
def test_wrong_settings_of_a_folder_are_told_and_the_others_go_on(
    photos: Path, narrow_base: Path, capsys: pytest.CaptureFixture[str], toml: str, told: str
) -> None:
    file = photos / "vase" / "personalize.toml"
    file.write_text(toml)
    assert run(command(photos, narrow_base, "--dry-run")) == 2
    out, err = capsys.readouterr()
    assert told.format(file=file) in err and len(out.splitlines()) == 3


def test_what_is_wrong_for_all_is_told_once(photos: Path, narrow_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command(photos, narrow_base), "--preset", "nope"]) == 2
    assert capsys.readouterr().err.count("unknown preset 'nope'") == 1


def test_a_second_batch_in_the_same_folder_is_told(photos: Path, narrow_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(photos.parent / "runs", ""):
        assert run(command(photos, narrow_base)) == 2
    assert "runs is in use: by process" in capsys.readouterr().err


def test_nothing_to_train_is_an_error(photos: Path, narrow_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(photos, narrow_base)
    for folder, told in ((photos / "empty", "there are no pictures in"), (photos / "nowhere", "there is no folder")):
        assert run([*words[:1], str(folder), *words[2:]]) == 2
        assert told in capsys.readouterr().err


def test_batches_go_on_and_count_what_is_there(photos: Path, narrow_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(photos / "broken")
    shutil.rmtree(photos / "vase")
    assert run(command(photos, narrow_base)) == 0
    capsys.readouterr()
    assert run([*command(photos, narrow_base), "--rank", "3"]) == 2  # another run
    told = capsys.readouterr().out
    assert "2 of 2 adapters are there, 2 of them from before; 2 failed: rex, tom" in told and "--rank was 2, now 3" in told
    assert run([*command(photos, narrow_base), "--steps", "3"]) == 0
    told = capsys.readouterr().out
    assert told.count(" 3 steps") == 2 and "2 of 2 adapters are there\n" in told
