"""What lies in a folder of pictures: counting, training and batches have one answer, and one bad item never ends the others."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from personalize.cli import run
from personalize.data.folder import read_folder
from personalize.errors import DataError, RecipeError
from personalize.pictures.files import look_into, printable_name
from personalize.pictures.galleries import count_pictures, galleries
from personalize.recipe.fields import Data
from personalize.recipe.resolve import resolve


def filled(folder: Path, *names: str) -> Path:
    """A folder with a picture of each name, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
        Image.new("RGB", (32, 32), (40 * i % 255, 200, 7 * i)).save(path, kind)
    return folder


def read(folder: Path, **data: Any) -> Any:
    return read_folder(Data(folder=folder, **data))


def in_subfolders(folder: Path) -> None:
    filled(folder, *(f"deep/{i}.png" for i in range(9)))
    lines = [json.dumps({"file_name": f"deep/{i}.png", "text": f"zwx {i}"}) for i in range(9)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def with_leftovers(folder: Path) -> None:
    filled(folder, *(f"{i}.png" for i in range(9)), "lost+found/x.png", "@eaDir/y.png", ".cache/z.png")
    for i in range(9):
        (folder / f"._{i}.png").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
        Image.new("L", (32, 32), 255).save(folder / f"{i}-MaskLabel.PNG")
    (folder / "x.png").mkdir()
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "empty.jpg").touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "linked.png").symlink_to("pipe.png")


def beside_an_adapter(folder: Path) -> None:
    filled(folder, *(f"{i}.png" for i in range(9)), "rex.png")
    (folder / "rex.safetensors").touch()  # whose preview the last one is


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "as browsers save them": lambda folder: filled(folder, *(f"{i}.jfif" for i in range(9))),
    "endings of all kinds": lambda folder: filled(folder, *(f"x{i}.{end}" for i, end in enumerate(
        ("JPE", "png", "BMP", "tga", "ppm", "webp", "jp2", "TIFF", "dib")))),
    "kohya's folders": lambda folder: filled(folder, *(f"5_zwx cat/{i}.png" for i in "abcde"), *(f"1_v/{i}.png" for i in "abcd")),
    "kohya's project": lambda folder: filled(folder, *(f"img/5_zwx cat/{i}.png" for i in range(9)), "reg/1_cat/a.png"),
    "metadata": in_subfolders,
    "leftovers": with_leftovers,
    "beside an adapter": beside_an_adapter,
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counting_training_presets_and_batches_have_one_answer(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos" / "zwx"
    LAYOUTS[layout](folder)
    assert count_pictures(folder) == len(read(folder).examples) == 9
    assert resolve(preset="sd15-subject", flags={"folder": folder}).steps == 1000  # of [pictures.8]
    assert run(["batch", str(tmp_path / "photos"), "--base", "pocket", "--class", "cat", "--dry-run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "(9 pictures" in line


def test_files_belong_together_however_their_names_are_stored(tmp_path: Path) -> None:
    apart = unicodedata.normalize("NFD", "été")
    folder = filled(tmp_path / "zwx", f"{apart}.png", "B.PNG", "c.jpeg", "d.png")
    for name, text in {"ÉTÉ.Txt": "zwx one", "b.TXT": "zwx two", "c.jpeg.txt": "zwx three", "D.caption": "zwx four"}.items():
        (folder / name).write_text(text)
    Image.new("L", (32, 32), 255).save(folder / f"{apart.upper()}-MASKLABEL.PNG")
    dataset = read(folder)
    assert [example.caption for example in dataset.examples] == ["zwx two", "zwx three", "zwx four", "zwx one"]
    assert dataset.warnings == [] and [bool(example.mask) for example in dataset.examples] == [False, False, False, True]
    (folder / "b.txt").write_text("zwx, as it is written")  # before one that is only the same
    filled(folder, "b.png")
    assert {example.path.name: example.caption for example in read(folder).examples}["b.png"] == "zwx, as it is written"


def test_what_cannot_be_used_is_told_and_left_out(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.png")
    (folder / "b.txt").write_bytes("zwx été".encode("latin-1"))
    odd = os.path.join(os.fsencode(folder), "ポチ.png".encode("shift_jis"))
    Image.new("RGB", (32, 32)).save(folder / "x.png")
    os.rename(folder / "x.png", odd)
    (folder / "gone.png").symlink_to("nowhere.png")
    dataset = read(folder)
    assert [example.path.name for example in dataset.examples] == ["a.png"]
    told = sorted(printable_name(line) for line in dataset.warnings)
    assert len(told) == 3 and "its name is no UTF-8 text: rename it" in told[0]
    assert "b.txt is not UTF-8 text (save it as UTF-8)" in told[1] and "gone.png: cannot be opened: No such file" in told[2]


def test_names_as_long_as_a_disk_takes_them_are_learned(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", f"{'very long ' * 24}{'x' * 11}.png")
    assert [len(os.fsencode(path.name)) for path in folder.iterdir()] == [255]
    assert len(read(folder).examples) == count_pictures(folder) == 1


def test_a_folder_that_may_not_be_listed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "lost+found/x.png", "private/y.png")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "private" and access(path, mode))
    assert read(folder).warnings == ["skipped private: cannot be opened: Permission denied"]
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listing(path / ("missing" if path.name == "private" else "")))
    with pytest.raises(DataError, match=r"cannot list .*private"):
        look_into(folder / "private")


def test_a_folder_of_a_batch_that_may_not_be_listed_never_ends_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = filled(tmp_path / "photos", "rex/a.png", "private/a.png")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "private" and access(path, mode))
    assert run(["batch", str(photos), "--class", "cat", "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert "rex" in out and "private: cannot list" in err and "Permission denied" in err


def test_one_folder_of_a_batch_never_ends_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = filled(tmp_path / "photos", "rex/a.png", "tom/a.png", "ann/a.png")
    (photos / "ann" / "metadata.jsonl").write_text("no JSON")
    os.mkdir(os.path.join(os.fsencode(photos), b"\xe9t\xe9"))
    (photos / "run").mkdir()
    for name in ("run.png", "run.safetensors"):
        (photos / "run" / name).write_bytes((photos / "rex" / "a.png").read_bytes())
    assert run(["batch", str(photos), "--class", "cat", "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert [line.split(" => ")[0] for line in out.splitlines()] == [str(photos / "rex"), str(photos / "tom")]
    assert len(err.splitlines()) == 2 and "not JSON" in err and "no UTF-8 text (rename it)" in err


# ---------------------------------------------------------------- captions in one file


def test_metadata_csv(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "deep/b.png")
    (folder / "metadata.csv").write_text(
        '\ufefffile_name,text,repeats\na.png,"zwx, on a\nmat",3\ndeep\\b.png,zwx far,\n', encoding="utf-8"
    )
    assert [(e.caption, e.repeats) for e in read(folder).examples] == [("zwx, on a mat", 3), ("zwx far", 1)]
    (folder / "metadata.csv").write_text("name,text\na.png,zwx\n")
    with pytest.raises(DataError, match=r"metadata\.csv line 2: no file_name .*file_name,text"):
        read(folder)


@pytest.mark.parametrize("between", ["\t", "|", ": ", ", ", " "])
def test_captions_txt(tmp_path: Path, between: str) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b-c.png")
    (folder / "captions.txt").write_text(f"a.png{between}zwx, on a mat: asleep\n\nB-C.PNG{between}zwx far\n")
    assert [example.caption for example in read(folder).examples] == ["zwx, on a mat: asleep", "zwx far"]
    assert read(folder).warnings == []


def test_captions_that_nothing_reads_are_told(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.png")
    (folder / "b.txt").write_text("zwx asleep")
    for name in ("captions.txt", "meta_cap.json", "a_caption.txt", "personalize.toml", "notes.md"):
        (folder / name).write_text("zwx of some other kind")
    (warning,) = read(folder).warnings
    assert warning.startswith("not read: a_caption.txt, captions.txt, meta_cap.json (captions are read from NAME.txt")


def test_pictures_whose_names_say_nothing_are_told_and_browsers_names_are_read(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.png", "c.png")
    for name, other in (("b.png", "b.pjpeg"), ("c.png", "c.jpg_large")):
        Image.open(folder / name).convert("RGB").save(folder / other, format="JPEG")
        (folder / name).unlink()
    dataset = read(folder)
    assert [example.path.name for example in dataset.examples] == ["a.png", "b.pjpeg"]
    assert dataset.warnings == ["not read: c.jpg_large (pictures by their first bytes: rename them, to .jpg or .png)"]


@pytest.mark.parametrize("trigger", ["<lora:rex:1>", "a AND b", "rex --w 96", "rex BREAK tom"])
def test_a_trigger_that_no_prompt_can_say_is_refused_with_one_that_can(tmp_path: Path, trigger: str) -> None:
    folder = filled(tmp_path / "zwx", "a.png")
    with pytest.raises(RecipeError, match=r"in the trigger .* \(--trigger (?P<word>[\w-]+)\)") as refused:
        read(folder, trigger=trigger)
    word = str(refused.value).rpartition("--trigger ")[2].rstrip(")")
    assert read(folder, trigger=word).trigger == word


def test_a_batch_leaves_out_class_images_unless_they_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = filled(tmp_path / "photos", "rex/a.png", "reg/1_zwx cat/b.png")
    assert run(["batch", str(photos), "--class", "cat", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "rex" in out and "reg" not in out and f"{photos / 'reg'}: taken for class images" in err
    assert run(["batch", str(photos / "reg"), "--dry-run"]) == 0
    assert "(1 pictures, 350 steps, preset pocket-subject, class cat)" in capsys.readouterr().out


def test_a_batch_among_its_folders_is_no_subject_of_the_next_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = filled(tmp_path / "photos", "rex/a.png", "runs/batch.png")
    (photos / "runs" / "summary.json").write_text("{}")
    assert run(["batch", str(photos), "--class", "cat", "--output", str(photos / "runs"), "--dry-run"]) == 0
    assert [line.split(" => ")[0] for line in capsys.readouterr().out.splitlines()] == [str(photos / "rex")]


def test_an_output_among_the_pictures_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(filled(tmp_path / "zwx", "a.png"))
    monkeypatch.setattr("personalize.cli.progress.train_one", lambda *a, **b: pytest.fail("training began"))
    assert run(["train", folder, "--class", "cat", "--output", folder]) == 2
    assert "would lie among the pictures" in capsys.readouterr().err


def test_a_project_of_kohya_s_is_read_and_its_class_images_are_told(tmp_path: Path) -> None:
    project = filled(tmp_path / "project", "img/10_zwx cat/a.png", "reg/1_cat/b.png", "log/l.png")
    (gallery,) = galleries(project)
    dataset = read(project)
    assert gallery.name == dataset.concepts[0].folder == "img/10_zwx cat" and dataset.examples[0].repeats == 10
    assert dataset.warnings == [
        f"class images in the subfolder reg are used with --prior images --regularization {project / 'reg'}",
        "pictures in the subfolder log are not used",
    ]
    assert read(project / "img").trigger == dataset.trigger == "zwx"
