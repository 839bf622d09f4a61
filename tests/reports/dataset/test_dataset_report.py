"""The report on a dataset: what it finds in a folder, that each suggestion helps, and what it writes."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from personalize.cli import run
from personalize.errors import DataError, RecipeError
from personalize.findings import Finding
from personalize.pictures.galleries import count_pictures
from personalize.recipe.fields import Recipe
from personalize.recipe.resolve import resolve
from personalize.reports import dataset as report
from personalize.reports.dataset.measure import native_resolution, sharpness
from personalize.reports.dataset.rules import similar_groups

FLAGS = {"base": "none", "resolution": 256, "trigger": "zwx"}


def photo(seed: int = 0, size: tuple[int, int] = (256, 256)) -> Image.Image:
    """Colour noise with the spectrum of photographs."""
    rng, (width, height) = np.random.default_rng(seed), size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None, None], np.fft.fftfreq(width)[None, :, None])
    frequency[0, 0] = 1
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width, 3)), axes=(0, 1)) / frequency, axes=(0, 1)).real
    return Image.fromarray(((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four good pictures with captions."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for i in range(4):
        photo(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"zwx, picture number {i}")
    return folder


def looked(folder: Path, **flags: Any) -> list[Finding]:
    return report.find_problems(report.measure_dataset(resolve(flags={**FLAGS, "folder": folder, **flags})))


def marks(found: list[Finding]) -> list[str]:
    return [finding.mark for finding in found]


def test_good_pictures_are_not_complained_about(folder: Path) -> None:
    assert looked(folder) == []


# ---------------------------------------------------------------- each rule, and that its suggestion helps


def break_one(folder: Path) -> None:
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:99])


def copy_one(folder: Path) -> None:
    (folder / "00.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "00.txt").write_text("zwx once more")


def save_one_again(folder: Path) -> None:
    photo(0).resize((300, 300)).save(folder / "again.jpg", quality=60)
    (folder / "again.txt").write_text("zwx once more")


def mirror_one(folder: Path) -> None:
    ImageOps.mirror(photo(0)).resize((300, 300)).save(folder / "again.jpg", quality=60)
    (folder / "again.txt").write_text("zwx once more")


def shrink_one(folder: Path) -> None:
    photo(1).resize((100, 100), Image.Resampling.LANCZOS).save(folder / "1.png")


def shrink_all(folder: Path) -> None:
    for i in range(4):
        photo(i).resize((150, 170), Image.Resampling.LANCZOS).save(folder / f"{i}.png")


def blur_one(folder: Path) -> None:
    photo(2).filter(ImageFilter.GaussianBlur(3)).save(folder / "2.png")


def forget_the_trigger(folder: Path) -> None:
    (folder / "3.txt").write_text("a picture of something")


def use_another_trigger(folder: Path) -> None:
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"a photo of vok on {['mat', 'sofa', 'lawn', 'roof'][i]}")


def stretch_one(folder: Path) -> None:
    photo(3, (300, 500)).save(folder / "3.png")


RULES: list[tuple[str, str, Callable[[Path], None], dict[str, Any]]] = [
    ("unreadable", "mkdir", break_one, {}),
    ("twin", "mkdir", copy_one, {}),
    ("near twin", "mkdir", save_one_again, {}),
    ("mirror twin", "mkdir", mirror_one, {}),
    ("mirror twin", "mkdir", mirror_one, {"flip": False}),
    ("small", "mkdir", shrink_one, {}),
    ("small", "personalize train", shrink_all, {}),
    ("blurred", "mkdir", blur_one, {}),
    ("no trigger", "personalize train", forget_the_trigger, {}),
    ("no trigger", "personalize train", use_another_trigger, {"trigger": None}),
    ("cropped", "personalize train", stretch_one, {"buckets": False}),
    ("cropped", "personalize train", stretch_one, {"bucket_step": 128}),
]


@pytest.mark.parametrize(("mark", "command", "spoil", "given"), RULES, ids=[row[2].__name__ for row in RULES])
def test_what_is_found_and_what_to_do_helps(
    folder: Path, mark: str, command: str, spoil: Callable[[Path], None], given: dict[str, Any]
) -> None:
    spoil(folder)
    flags = {name: value for name, value in {**FLAGS, **given}.items() if value is not None}
    (finding,) = report.find_problems(report.measure_dataset(resolve(flags={**flags, "folder": folder})))
    assert finding.mark == mark and finding.command and finding.hint.startswith(command)
    if command == "mkdir":
        before = {path.name for path in folder.iterdir()}
        subprocess.run(finding.hint, shell=True, check=True)
        assert before - {path.name for path in folder.iterdir()} == {path.name for path in finding.where}
    else:
        flags |= typed(finding.hint, folder)
    assert marks(report.find_problems(report.measure_dataset(resolve(flags={**flags, "folder": folder})))) in ([], ["near twin"])


def typed(command: str, folder: Path) -> dict[str, Any]:
    """The flags of a suggested command that `personalize train` would take."""
    words = shlex.split(command)
    assert words[:3] == ["personalize", "train", str(folder)]
    told, flags = words[3:], {}
    while told:
        name = told.pop(0).removeprefix("--").replace("-", "_")
        flags[name] = told.pop(0) if told and not told[0].startswith("--") else True
    return flags


def test_of_near_twins_the_largest_stays(folder: Path) -> None:
    save_one_again(folder)
    (finding,) = looked(folder)
    assert [path.name for path in finding.where] == ["0.png"]


def test_of_mirror_images_the_largest_stays_and_flip_shows_them_anyway(folder: Path) -> None:
    mirror_one(folder)
    (finding,) = looked(folder)
    assert [path.name for path in finding.where] == ["0.png"]
    assert "nearly the mirror image of another, which --flip shows anyway" in finding.what
    (finding,) = looked(folder, flip=False)
    assert "so that both sides are learned, without --flip too" in finding.what


def test_twins_and_mirror_twins_of_one_picture_are_each_told_once(folder: Path) -> None:
    save_one_again(folder)
    for name, picture in {"left": photo(0), "right": ImageOps.mirror(photo(0))}.items():
        picture.resize((200, 200)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"zwx, {name}")
    found = {finding.mark: {path.name for path in finding.where} for finding in looked(folder) if "twin" in finding.mark}
    assert found == {"near twin": {"0.png", "left.png"}, "mirror twin": {"right.png"}}


def test_without_the_library_near_twins_are_not_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_one_again(folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (finding,) = looked(folder)
    assert finding.hint == "pip install imagehash" and finding.level == "info"


def test_a_plugin_is_named_for_what_needs_one(folder: Path) -> None:
    (folder / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    (finding,) = looked(folder)
    assert (finding.hint, finding.command, finding.level) == ("pip install pillow-heif", True, "error")


def test_captions_that_are_missing_empty_or_the_same(folder: Path) -> None:
    (folder / "0.txt").write_text(" ")
    (folder / "1.txt").unlink()
    for i in (2, 3):
        (folder / f"{i}.txt").write_text("zwx " + "very, " * 40)
    found = {finding.mark or "plain": finding for finding in looked(folder)}
    assert set(found) == {"no caption", "plain", "same caption"}  # and not that the end of long ones is not read: it is
    assert [[path.name for path in finding.where] for finding in found.values()] == [
        ["0.png"],
        ["1.png"],
        ["2.png", "3.png"],
    ]
    assert f"{folder / '0.txt'}" in found["no caption"].hint


def test_folders_and_masks_that_are_not_used_are_told(folder: Path) -> None:
    (folder / "more").mkdir()
    photo(9).save(folder / "more" / "x.png")
    Image.new("L", (8, 8), 255).save(folder / "7-masklabel.png")
    Image.new("L", (8, 8), 255).save(folder / "2-masklabel.png")
    found = looked(folder)
    assert [finding.what.partition(":")[0] for finding in found] == [
        "7-masklabel.png is a mask without a picture",
        "pictures in the subfolder more are not used",
        "1 picture with a mask",
    ]
    assert looked(folder, **typed(found[2].hint, folder))[2].what.startswith(
        "1 picture with a mask: what it leaves out weighs 0:"
    )


def test_masks_that_are_no_use_are_told_and_the_rest_is_looked_at(folder: Path, tmp_path: Path) -> None:
    (folder / "0-masklabel.png").write_bytes(b"no picture")
    Image.new("L", (64, 256), 255).save(folder / "1-masklabel.png")
    photo(2, (600, 256)).save(folder / "2.png")
    aside = Image.new("L", (600, 256), 0)
    aside.paste(255, (0, 0, 9, 9))
    aside.save(folder / "2-masklabel.png")
    stats = report.measure_dataset(resolve(flags={**FLAGS, "folder": folder, "buckets": False}))
    found = [finding for finding in report.find_problems(stats) if finding.mark == "mask"]
    assert [finding.where[0].name for finding in found] == ["0.png", "1.png", "2.png"]
    assert [(finding.level, finding.command) for finding in found] == [("error", False)] * 3
    for finding, what, do in zip(
        found,
        ("not a picture, whatever its name says", "1-masklabel.png is 64 x 256 pixels", "nothing is left of the mask"),
        ("save it as PNG", "draw it over the picture", "crop the picture yourself"),
        strict=True,
    ):
        assert what in finding.what and finding.hint.startswith(do)
    assert [one.example.path.name for one in stats.images] == ["3.png"]  # the others are left out, as in training
    report.write_sheet(stats, found, tmp_path / "sheet.png")


def test_two_pictures_are_few(folder: Path) -> None:
    for i in (2, 3):
        (folder / f"{i}.png").unlink()
    (finding,) = looked(folder)
    assert finding.what == "no more than 2 pictures"


# ---------------------------------------------------------------- measures


@pytest.mark.parametrize("side", [64, 256, 512])
@pytest.mark.parametrize("seed", range(3))
def test_sharpness_tells_sharp_from_blurred_whatever_the_contrast(side: int, seed: int) -> None:
    sharp = ImageOps.autocontrast(photo(seed, (side, side)).convert("L"))
    grey = np.asarray(sharp, float) / 255
    soft = np.asarray(sharp.filter(ImageFilter.GaussianBlur(3)), float) / 255
    measured = sharpness(grey)
    assert measured is not None and measured > 0.2 and (sharpness(soft) or 1) < 0.02
    assert sharpness(0.4 + 0.2 * grey) == pytest.approx(measured)


def test_nothing_is_neither_sharp_nor_blurred() -> None:
    assert sharpness(np.full((9, 9), 0.5)) is None and sharpness(np.eye(2)) is None


BITS = st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=9)


@given(BITS, st.integers(0, 4))
def test_groups_hold_neighbours_and_nothing_near_is_left_out(rows: list[list[bool]], most: int) -> None:
    hashes = [np.array(row) for row in rows]
    groups = similar_groups(hashes, most)
    home = {i: number for number, group in enumerate(groups) for i in group}
    assert len(home) == sum(map(len, groups))
    for i, one in enumerate(hashes):
        near = {j for j, other in enumerate(hashes) if j != i and (one != other).sum() <= most}
        assert bool(near) == (i in home) and all(home[j] == home[i] for j in near)


def test_the_base_s_resolution_is_read_from_its_configs(tiny_base: Path, tmp_path: Path) -> None:
    assert native_resolution(Recipe()) == native_resolution(Recipe(base=str(tiny_base))) == (64, 16, "")
    assert native_resolution(resolve(flags={"base": "nowhere", "resolution": 512})) == (512, 64, "")
    assert native_resolution(Recipe(base=str(bases.single(tmp_path / "a.safetensors", "sd1")))) == (512, 64, "")
    assert native_resolution(Recipe(base=str(bases.single(tmp_path / "b.safetensors", "sdxl")))) == (1024, 32, "")
    with pytest.raises(RecipeError, match=r"--resolution 512"):
        native_resolution(Recipe(base="nowhere"))


def test_a_base_that_was_downloaded_tells_its_resolution(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(hub.COMMIT)
    shutil.copytree(tiny_base, repository / "snapshots" / hub.COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert native_resolution(Recipe(base="someone/tiny")) == (64, 16, "")


def test_of_a_base_on_the_hub_the_resolution_is_assumed_and_nothing_downloaded(
    folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    for i in range(4):
        photo(i, (512, 512)).save(folder / f"{i}.png")
    with hub.serving("someone/tiny", tiny_base) as (address, taken):
        online = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "personalize", "dataset", str(folder), "--trigger", "zwx", "--base", "someone/tiny"]
        told = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | online)
    assert taken == [] and told.stderr == ""
    assert "· someone/tiny is not on this machine: its resolution is taken to be 512, that of SD 1.x, as" in told.stdout
    assert "    say it with --resolution, if it is another\n" in told.stdout
    assert "what someone/tiny can draw of the pictures was not looked at" in told.stdout
    assert "resolution 512, shapes in steps of 64, none enlarged" in told.stdout
    assert [finding.what for finding in looked(folder, base="someone/tiny", resolution=512)] == []


# ---------------------------------------------------------------- the command


def test_the_screen_the_sheet_and_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blur_one(folder)
    photo(5, (200, 512)).save(folder / "<b>tall.png")
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (0, 0, 128, 256))
    mask.save(folder / "0-masklabel.png")
    sheet, page = tmp_path / "out" / "sheet.png", tmp_path / "out" / "page.html"
    flags = ["--base", "none", "--resolution", "256", "--trigger", "zwx", "--class", "cat", "--sheet", str(sheet)]
    assert run(["dataset", str(folder), *flags, "--html", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: 5 pictures (PNG 5), 256 x 256 to 200 x 512 pixels"
    assert lines[1:3] == ["trigger 'zwx', class 'cat'", "resolution 256, shapes in steps of 64, none enlarged"]
    assert "   256 x 256         4  0% (0%)" in lines
    assert any(line.startswith("! 1 picture blurred, as training sees them: 2.png") for line in lines)
    assert len(lines) < 30
    with Image.open(sheet) as drawn:
        assert drawn.width > 900 and len(drawn.getcolors(1 << 20) or []) > 1000
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/webp;base64,") == 5 and "&lt;b&gt;tall.png" in html and "<b>tall" not in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    first = html.split("data:image/webp;base64,")[1].split('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(first))) as seen:
        halves = np.asarray(seen.convert("L"), float).reshape(352, 2, 176).mean((0, 2))
    assert halves[1] < halves[0] / 2  # what a mask leaves out is dark


def test_json_tells_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_one(folder)
    copy_one(folder)
    assert run(["dataset", str(folder), "--resolution", "256", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["path"] for one in told["pictures"]] == ["0.png", "00.png", "1.png", "2.png", "3.png"]
    assert told["unreadable"][0]["path"] == "torn.png" and told["concepts"][0]["trigger"] == "my-pictures"
    assert told["buckets"] == [{"shape": [256, 256], "pictures": 5, "cropped": 0}]
    assert {"twin", "unreadable"} <= {one["mark"] for one in told["findings"]}


def test_nothing_to_look_at_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["dataset", str(tmp_path)]) == 2
    assert re.fullmatch(r"personalize: there are no pictures in .*\n", capsys.readouterr().err)
    with pytest.raises(DataError):
        looked(tmp_path / "gone")


# ---------------------------------------------------------------- advice is tried


def test_commands_repeat_what_was_given_and_train_takes_them(
    folder: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        photo(i, (48, 40)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of {i}")
    Image.new("L", (48, 40), 255).save(folder / "2-masklabel.png")
    given = ["--base", str(tiny_base), "--preset", "pocket-style", "--class", "toy dog", "--no-flip", "--keep-tokens", "2"]
    assert run(["dataset", str(folder), *given]) == 0
    commands = [line.split("$ ")[1] for line in capsys.readouterr().out.splitlines() if "$ personalize train" in line]
    assert len(commands) == 3
    quick = shlex.split("--steps 1 --rank 2 --batch-size 1 --choose none --sample-every 0 --sample-steps 1 --checkpoint-every 0")
    quick += shlex.split("--warmup 0 --prior none --sample-prompts a --sample-seeds 0")
    repeated = ("--class toy dog", "--no-flip", "--keep-tokens 2", "pocket-style")
    for number, command in enumerate(commands):
        words = shlex.split(command)[1:]
        assert [part for part in repeated if part not in " ".join(words)] == []
        assert run([*words, *quick, "--output", str(tmp_path / str(number))]) == 0, command
        capsys.readouterr()


def test_what_is_moved_aside_is_learned_by_nobody(folder: Path) -> None:
    break_one(folder)
    (finding,) = looked(folder)
    subprocess.run(finding.hint, shell=True, check=True)
    assert (folder / "_aside" / "torn.png").is_file() and looked(folder) == []
    assert count_pictures(folder.parent / folder.name) == 4 and count_pictures(folder.parent) == 0


def test_pictures_are_not_moved_where_that_would_harm(folder: Path) -> None:
    for i in range(3):
        photo(i).filter(ImageFilter.GaussianBlur(3)).save(folder / f"{i}.png")
    (finding,) = looked(folder)
    assert finding.mark == "blurred" and not finding.command and finding.hint.startswith("add better ones")
    for i in (0, 1):
        photo(i).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "2.png", "text": "zwx"}))
    (finding,) = looked(folder)
    assert not finding.command and finding.hint == f"take their lines out of {shlex.quote(str(folder / 'metadata.jsonl'))}"


def test_class_images_of_a_project_and_notation_in_captions_are_advised_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    shutil.copytree(folder, project / "img" / "5_zwx dog")
    for i in (7, 8):
        (project / "reg" / "1_dog").mkdir(parents=True, exist_ok=True)
        photo(i).save(project / "reg" / "1_dog" / f"{i}.png")
    (project / "img" / "5_zwx dog" / "0.txt").write_text("zwx AND a [cat:dog:0.5]")
    (project / "img" / "5_zwx dog" / "meta.json").write_text("{}")
    found = looked(project, trigger=None)
    hints = {finding.what.split()[0]: finding for finding in found}
    assert len(found) == 4 and {finding.code for finding in found} == {"unused-files", "foreign-captions"}
    assert hints["not"].hint.startswith("captions are read from NAME.txt")
    command = hints["class"].hint
    assert hints["class"].command and run([*shlex.split(command)[1:], "--base", "pocket", "--dry-run"]) == 0
    assert "2_" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "sign", ["[name]", "<trigger>", "%trigger%", "$trigger", "{trigger_word}", "__trigger__", "<lora:rex:1>"]
)
def test_what_nothing_fills_in_is_told_and_never_proposed_as_the_trigger(folder: Path, sign: str) -> None:
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"a photo of {sign} by day, {i}")
    found = {finding.code: finding for finding in looked(folder, trigger="zwx")}
    assert "foreign-captions" in found
    (other,) = [finding for finding in looked(folder, trigger=None) if finding.code == "without-trigger"]
    assert "trigger_word" not in other.hint and "name" not in shlex.split(other.hint)


@pytest.mark.parametrize("sign", ["[Trigger]", "{TRIGGER}", "{trigger}"])
def test_a_placeholder_is_filled_in_whatever_its_case(folder: Path, sign: str) -> None:
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"a photo of {sign} by day, {i}")
    assert not {finding.code for finding in looked(folder, trigger="zwx")} & {"without-trigger", "foreign-captions"}


def test_a_choice_of_words_is_never_proposed_as_the_trigger(folder: Path) -> None:
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"a {{red|blue}} [morning:evening:0.5] vok, {i}")
    (finding,) = [finding for finding in looked(folder, trigger=None) if finding.code == "without-trigger"]
    assert shlex.split(finding.hint)[-2:] == ["--trigger", "vok"]
