"""Captions of a folder: which pictures get one, in which words, and that training reads just that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from captioners import plain_picture
from PIL import Image

from personalize.captioning.caption import Caption, Skip, Wording, find_work, write_captions
from personalize.data.dataset import Concept
from personalize.data.folder import read_folder
from personalize.errors import BaseModelError, DataError, OutputError, RecipeError
from personalize.families.notation import plain_text
from personalize.recipe.fields import Data

ZWX = Concept("zwx", "dog")
USUAL = Wording()


def sides(images: Sequence[Image.Image]) -> list[str]:
    """A captioner that tells how large images are."""
    return [f"a picture (of {image.width} by {image.height})" for image in images]


def caption(folder: Path, wording: Wording = USUAL, overwrite: bool = False, batch: int = 2) -> list[Caption | Skip]:
    work = find_work(Data(folder=folder), overwrite)
    return list(write_captions(work.todo, sides, wording, batch))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (made := tmp_path / "zwx").mkdir()
    for number in range(3):
        plain_picture(made / f"{number}.png", size=(40 + number, 30))
    return made


def test_what_is_written_is_what_training_reads(folder: Path) -> None:
    events = caption(folder)
    assert [event.path.name for event in events] == ["0.png", "1.png", "2.png"]
    assert (folder / "1.txt").read_text() == "zwx, a picture \\(of 41 by 30\\)\n"
    dataset = read_folder(Data(folder=folder))
    assert [one.caption for one in dataset.examples] == [event.text for event in events if isinstance(event, Caption)]
    assert plain_text(dataset.examples[1].caption) == "zwx, a picture (of 41 by 30)"  # brackets are no weights
    assert not [line for line in dataset.warnings if "trigger" in line]


def test_captions_that_there_are_stay_unless_somebody_says_so(folder: Path) -> None:
    (folder / "0.caption").write_text("by hand\n")
    (folder / "1.png.txt").write_text("  \n")  # says nothing
    (folder / "2.txt").write_bytes(b"\xff\xfe\x00")
    work = find_work(Data(folder=folder))
    assert [one.path.name for one in work.todo] == ["1.png"] and work.kept == 1
    assert [(path.name, "UTF-8" in why and "--overwrite" in why) for path, why in work.left_out] == [("2.png", True)]
    caption(folder)
    assert (folder / "1.png.txt").read_text().startswith("zwx, ") and not (folder / "1.txt").exists()
    assert find_work(Data(folder=folder)).todo == ()
    caption(folder, overwrite=True)
    assert (folder / "0.caption").read_text() == "zwx, a picture \\(of 40 by 30\\)\n" and not (folder / "0.txt").exists()
    assert (folder / "2.txt").read_text().startswith("zwx")
    assert sorted(path.suffix for path in folder.iterdir() if path.suffix != ".png") == [".caption", ".txt", ".txt"]


def test_metadata_counts_as_a_caption_and_names_pictures_deeper_down(folder: Path) -> None:
    (folder / "deep").mkdir()
    plain_picture(folder / "deep" / "0.png", size=(77, 30))
    lines = ['{"file_name": "0.png", "text": "told"}', '{"file_name": "deep/0.png", "repeats": 2}']
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert [event.path.relative_to(folder).as_posix() for event in caption(folder)] == ["1.png", "2.png", "deep/0.png"]
    assert (folder / "deep" / "0.txt").read_text() == "zwx, a picture \\(of 77 by 30\\)\n" and not (folder / "0.txt").exists()
    captions = {one.path.relative_to(folder).as_posix(): one.caption for one in read_folder(Data(folder=folder)).examples}
    assert captions["deep/0.png"] == "zwx, a picture \\(of 77 by 30\\)" and captions["0.png"] == "told"


def test_two_pictures_of_one_name_have_captions_of_their_own(folder: Path) -> None:
    Image.new("RGB", (90, 30)).save(folder / "0.jpg")
    caption(folder)
    assert (folder / "0.png.txt").read_text() != (folder / "0.jpg.txt").read_text()
    captions = [one.caption for one in read_folder(Data(folder=folder)).examples]
    assert len(set(captions)) == 4
    for file in folder.glob("*.txt"):
        file.unlink()
    (folder / "0.txt").write_text("of both")
    work = find_work(Data(folder=folder), overwrite=True)
    assert len(work.todo) == 3 and [why for _, why in work.left_out] == ["its caption is that of 0.jpg: rename one of them"]


def test_each_concept_has_its_own_trigger(tmp_path: Path) -> None:
    for name in ("3_zwx dog", "1_vok"):
        (tmp_path / name).mkdir()
        plain_picture(tmp_path / name / "a.png")
    caption(tmp_path, Wording("a photo of {trigger} {class}"))
    read = {path.parent.name: path.read_text().partition(", ")[0] for path in tmp_path.rglob("*.txt")}
    assert read == {"3_zwx dog": "a photo of zwx dog", "1_vok": "a photo of vok"}


def test_one_picture_that_cannot_be_read_ends_nothing(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"no picture at all")
    events = caption(folder, batch=3)
    assert [type(event) for event in events] == [Skip, Caption, Caption]
    assert isinstance(events[0], Skip) and events[0].why.startswith("not a picture") and not (folder / "1.txt").exists()


def test_what_was_written_stays_where_a_captioner_fails(folder: Path) -> None:
    def fail(images: Sequence[Image.Image]) -> list[str]:
        import torch

        if images[0].width > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sides(images)

    with pytest.raises(BaseModelError, match="too little memory"):
        list(write_captions(find_work(Data(folder=folder)).todo, fail, Wording()))
    assert sorted(path.name for path in folder.glob("*.txt")) == ["0.txt"]
    assert [event.path.name for event in caption(folder)] == ["1.png", "2.png"]  # the same again goes on


def test_what_nothing_is_said_of_gets_no_file(folder: Path) -> None:
    events = list(write_captions(find_work(Data(folder=folder)).todo, lambda images: [""] * len(images), Wording(), 2))
    assert [(event.text, event.file) for event in events if isinstance(event, Caption)] == [("", None)] * 3
    assert not list(folder.glob("*.txt"))


def test_nothing_is_written_where_somebody_only_looks(folder: Path) -> None:
    events = list(write_captions(find_work(Data(folder=folder)).todo, sides, Wording(), 2, write=False))
    assert all(isinstance(event, Caption) and event.text and event.file is None for event in events)
    assert not list(folder.glob("*.txt"))


def test_a_folder_that_is_of_no_use_is_told_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no folder"):
        find_work(Data(folder=folder / "none"))
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        find_work(Data(folder=folder / "empty"))
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK)
    with pytest.raises(OutputError, match="cannot write to"):
        find_work(Data(folder=folder))
    assert len(find_work(Data(folder=folder), write=False).todo) == 3


@pytest.mark.parametrize(
    ("wording", "said", "written"),
    [
        (Wording(), "a red cat", "zwx, a red cat"),
        (Wording(""), "a red cat", "a red cat"),
        (Wording("{trigger} {class},"), "a red cat", "zwx dog, a red cat"),
        (Wording("[trigger]"), "a red cat", "[trigger], a red cat"),
        (Wording("a photo of [trigger] the {class}"), "red", "a photo of [trigger] the dog, red"),
        (Wording("", ("1girl", "Long_Hair")), "1girl, long hair, smile", "smile"),
        (Wording("zwx", ("cat",)), "cat", ""),
        (Wording("", max_words=4), "a red cat, on a big mat", "a red cat"),
        (Wording("", max_words=2), "a red cat on a mat", "a red"),
        (Wording("", max_words=9), "1,000 cats,  on a mat", "1,000 cats, on a mat"),
        (Wording(""), "ganyu (genshin impact), [x], {y}", "ganyu \\(genshin impact\\), \\[x\\], \\{y\\}"),
        (Wording(""), "a\x1b[31m cat\n\x00sits", "a \\[31m cat sits"),
        (Wording("", ("ganyu (genshin impact)",)), "ganyu (genshin impact), smile", "smile"),
    ],
)
def test_words(wording: Wording, said: str, written: str) -> None:
    assert wording.caption(said, ZWX) == written


def test_an_unknown_word_in_the_prefix_is_told() -> None:
    with pytest.raises(RecipeError, match=r"unknown \{triger\}.*did you mean trigger"):
        Wording("{triger}").first(ZWX)
