"""`personalize caption`: what it writes, says and refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from captioners import build_classifier, plain_picture
from PIL import Image

from personalize import registry
from personalize.captioning.captioner import Captioner, Manner
from personalize.cli import run
from tools.pocket.world import Scene, render


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two drawings of pocket's world and a picture of no world."""
    (made := tmp_path / "zwx").mkdir()
    for number, (thing, colour) in enumerate((("cat", "red"), ("car", "blue"))):
        render(Scene(thing, colour, "large", "middle", "beach", "ink", 3 + number), 96).save(made / f"{number}.png")
    plain_picture(made / "2.png")
    return made


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_classifier(tmp_path_factory.mktemp("captioners") / "vit", ["long_hair", "cat_(animal)", "grass"])


def answer_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    run(["caption", *words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_newcomer_captions_a_folder_and_trains_on_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["caption", str(folder), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "0.png  zwx, a red cat on the beach, ink drawing" in said.out and "2 captions would be written, 1 unclear" in said.out
    assert "--with names another captioner" in said.err and not list(folder.glob("*.txt"))
    assert run(["caption", str(folder)]) == 0
    assert (folder / "0.txt").read_text() == "zwx, a red cat on the beach, ink drawing\n" and not (folder / "2.txt").exists()
    assert "2 captions written" in capsys.readouterr().out
    assert run(["train", str(folder), "--class", "cat", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "zwx, a red cat on the beach, ink drawing" in said.out and "lack the trigger" not in said.err


def test_what_it_answers_to_a_program(folder: Path, tagger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "1.txt").write_text("by hand\n")
    (folder / "3.png").write_bytes(b"no picture")
    found = answer_of(capsys, str(folder), "--with", str(tagger), "--threshold", "0.6", "--trigger", "rex")
    names = [{"picture": name, "caption": "rex, long hair, cat \\(animal\\)"} for name in ("0.png", "2.png")]
    assert [{key: one[key] for key in ("picture", "caption")} for one in found["captions"]] == names
    assert [Path(one["file"]).name for one in found["captions"]] == ["0.txt", "2.txt"]
    assert found["ok"] and (found["written"], found["kept"], found["unclear"], found["dry_run"]) == (2, 1, 0, False)
    assert [one["picture"] for one in found["left_out"]] == ["3.png"] and found["left_out"][0]["why"].startswith("not a picture")
    assert (folder / "1.txt").read_text() == "by hand\n"
    again = answer_of(capsys, str(folder), "--with", str(tagger))
    assert again["written"] == 0 and again["kept"] == 3
    anew = answer_of(capsys, str(folder), "--with", str(tagger), "--overwrite", "--prefix", "", "--without", "Long Hair,grass")
    assert anew["written"] == 3 and (folder / "1.txt").read_text() == "cat \\(animal\\)\n"
    short = answer_of(capsys, str(folder), "--with", str(tagger), "--overwrite", "--max-words", "2", "--class", "dog",
                      "--prefix", "[trigger] {class}", "--batch-size", "1")  # fmt: skip
    assert {one["caption"] for one in short["captions"]} == {"[trigger] dog, long hair"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{folder}/none"], "no folder"),
        (["{folder}", "--with", "nowhere"], "no captioner called nowhere"),
        (["{folder}", "--with", "{folder}"], "no captioner: no image-to-text model"),
        (["{folder}", "--with", "someone/model"], "HF_HUB_OFFLINE"),
        (["{folder}", "--prefix", "{{triger}}"], "did you mean trigger"),
        (["{folder}", "--prompt", "a photo of"], "takes no --prompt"),
        (["{folder}", "--character-threshold", "0.5"], "takes no --character-threshold"),
        (["{folder}", "--threshold", "2"], "threshold"),
        (["{folder}", "--device", "nope"], "device"),
        (["{folder}", "--trigger", "<lora:x:1>"], "in the trigger"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(
    folder: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["caption", *(word.format(folder=folder) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("personalize: ") and told in line
    assert not list(folder.glob("*.txt"))


def test_nothing_but_damage_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1.png").write_bytes(b"no picture")
    assert run(["caption", str(tmp_path)]) == 2
    assert "none of the 1 pictures" in capsys.readouterr().err


def test_a_row_of_another_package_comes_in_by_the_same_door(folder: Path) -> None:
    def open_mine(place: Path, manner: Manner) -> Any:
        def say(images: Sequence[Image.Image]) -> list[str]:
            return [f"{place.name} {manner.prompt}"] * len(images)

        return say

    (folder.parent / "mine").mkdir()
    table = registry.table("captioners")
    table.add("mine", Captioner("mine", lambda place: place.name == "mine", open_mine, Manner(prompt="what?")))
    try:
        assert run(["caption", str(folder), "--with", str(folder.parent / "mine"), "--prompt", "who?"]) == 0
    finally:
        table.remove("mine")
    assert (folder / "2.txt").read_text() == "zwx, mine who?\n"
