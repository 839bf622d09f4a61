"""Every row of the table of captioners: its models are known by their files, opened without pickles, and say what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from captioners import build_blip, build_classifier, build_git, build_wd
from hub import serving
from PIL import Image

from personalize import registry
from personalize.captioning import pocket
from personalize.captioning.captioner import Captioner, Manner
from personalize.captioning.find import find_captioner
from personalize.errors import BaseModelError, RecipeError
from personalize.models.sources import NAMED
from tools.pocket.proof.captions import values_in
from tools.pocket.world import BACKGROUND_WORDS, COLOURS, OBJECTS, STYLE_WORDS, STYLES, Scene, render

HERE = Manner(device="cpu")
TAGS = [("general", 9), ("red_hair", 0), ("o_o", 0), ("ganyu_(genshin_impact)", 4), ("blue_eyes", 0)]
RED, BLUE = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
SCENE = Scene("cat", "red", "large", "middle", "beach", "ink", 3)


def pocket_folder(_: Path) -> Path:
    return NAMED["pocket"]


def classifier(folder: Path) -> Path:
    return build_classifier(folder, ["long_hair", "o_o", "cat"])


def wd(folder: Path) -> Path:
    """Red hair where it is red, blue eyes where it is blue; the character is half as sure as red."""
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    likely = torch.zeros(3, len(TAGS))
    likely[2, 1], likely[2, 2], likely[2, 3], likely[0, 4] = 1 / 255, 0.5 / 255, 0.8 / 255, 0.9 / 255
    return build_wd(folder, TAGS, likely)


MODELS: dict[str, tuple[Callable[[Path], Path], ...]] = {
    "pocket": (pocket_folder,),
    "tagger": (classifier, wd),
    "image-to-text": (build_blip, build_git),
}
EACH = [(name, build) for name, builds in MODELS.items() for build in builds]


def test_each_row_has_models_in_this_battery() -> None:
    assert list(MODELS) == list(registry.table("captioners"))


@pytest.mark.parametrize(("name", "build"), EACH, ids=lambda one: getattr(one, "__name__", one))
def test_every_row(name: str, build: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = build(tmp_path / "model")
    row, found = find_captioner("pocket" if name == "pocket" else str(folder))
    assert row is registry.table("captioners")[name] and found == folder and isinstance(row, Captioner)
    say = row.open(folder, row.fill(HERE if row.defaults.device else Manner()))
    images = [render(SCENE, 96), RED, BLUE]
    together = say(images)
    assert together == [say([image])[0] for image in images]  # a batch is no other than one by one
    assert any(together) and all(isinstance(text, str) and text == " ".join(text.split()) for text in together)
    if row.defaults.device:
        with pytest.raises(RecipeError, match="device"):
            row.open(folder, row.fill(Manner(device="nope")))
    heeded = {"prompt": "x", "threshold": 0.5, "character_threshold": 0.5, "device": "cpu", "precision": "float32"}
    for option, value in heeded.items():
        given = Manner(**{option: value})  # type: ignore[arg-type]
        if getattr(row.defaults, option) is None:
            with pytest.raises(RecipeError, match=f"takes no --{option.replace('_', '-')}"):
                row.fill(given)
        else:
            assert getattr(row.fill(given), option) == value


# ---------------------------------------------------------------- pocket


def test_pocket_has_the_words_that_its_base_was_taught() -> None:
    assert set(pocket.COLOURS) == set(COLOURS) and set(pocket.THINGS) == set(OBJECTS)
    assert set(pocket.PLACES) == {words[0] for words in BACKGROUND_WORDS.values()}
    assert set(pocket.LOOKS) == {STYLE_WORDS[name][0] for name in STYLES}


def test_pocket_tells_what_is_clear_and_nothing_of_other_worlds() -> None:
    scenes = [
        SCENE,
        Scene("car", "blue", "medium", "middle", "snow", "pixel", 5),
        Scene("flower", "yellow", "large", "middle", "meadow", "watercolour", 7),
    ]
    say = pocket.POCKET.open(NAMED["pocket"], pocket.POCKET.fill(Manner()))
    told = [values_in(text) for text in say([render(scene, 128) for scene in scenes])]
    truth = [{"object": one.object, "colour": one.colour, "background": one.background, "style": one.style} for one in scenes]
    for found, true in zip(told, truth, strict=True):
        assert {key: value for key, value in found.items() if value is not None}.items() <= true.items()
    assert sum(value is not None for found in told for value in found.values()) >= 9  # of 12
    assert say([Image.linear_gradient("L").convert("RGB"), Image.effect_noise((64, 64), 90).convert("RGB"), RED]) == ["", "", ""]
    sure = pocket.POCKET.open(NAMED["pocket"], pocket.POCKET.fill(Manner(threshold=1.0)))
    assert sure([render(SCENE, 128)]) == [""]


# ---------------------------------------------------------------- image to text


@pytest.mark.parametrize("build", [build_blip, build_git])
def test_words_are_those_of_the_model_itself(build: Callable[[Path], Path], tmp_path: Path) -> None:
    from transformers import AutoProcessor, BlipForConditionalGeneration, GitForCausalLM

    folder = build(tmp_path / "model")
    row, _ = find_captioner(str(folder))
    kind = BlipForConditionalGeneration if build is build_blip else GitForCausalLM
    model, processor = kind.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        ids = model.generate(**processor(images=RED, return_tensors="pt"), max_new_tokens=100, do_sample=False)
    (words,) = processor.batch_decode(ids, skip_special_tokens=True)
    said = row.open(folder, row.fill(HERE))([RED, BLUE])
    assert said[0] == " ".join(words.split()) and said[0] != said[1]
    prompted = row.open(folder, row.fill(Manner(device="cpu", prompt="a drawing of")))([RED, BLUE])
    assert prompted != said and all(text.startswith("a drawing of") == (build is build_blip) for text in prompted)


def test_pickles_are_not_opened_and_faults_are_told(tmp_path: Path) -> None:
    folder = build_blip(tmp_path / "model")
    row, _ = find_captioner(str(folder))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        row.open(folder, row.fill(HERE))
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(BaseModelError, match="only pickled weights"):
        row.open(folder, row.fill(HERE))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(BaseModelError, match=r"only pickled weights \(pytorch_model.bin\)"):
        find_captioner(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(BaseModelError, match="no captioner"):
        find_captioner(str(folder))
    with pytest.raises(BaseModelError, match="no captioner called nowhere"):
        find_captioner("nowhere")
    with pytest.raises(BaseModelError, match="a pickle"):
        find_captioner("model.ckpt")


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = build_blip(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    row, _ = find_captioner(str(folder))
    with pytest.raises(BaseModelError, match="cannot be opened"):
        row.open(folder, row.fill(HERE))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- taggers


def test_a_wd_tagger_has_thresholds_and_leaves_ratings_out(tmp_path: Path) -> None:
    folder = wd(tmp_path / "model")
    row, _ = find_captioner(str(folder / "model.onnx"))

    def said(**manner: float) -> list[str]:
        return row.open(folder, row.fill(Manner(device="cpu", **manner)))([RED, BLUE, Image.new("RGB", (60, 20), "red")])

    # of a third of a white square, red is whole and blue two thirds
    assert said() == ["red hair, o_o", "blue eyes", "red hair, blue eyes, o_o"]
    assert said(threshold=0.7) == ["red hair", "blue eyes", "red hair"]
    assert said(character_threshold=0.75)[0] == "ganyu (genshin impact), red hair, o_o"
    (folder / "selected_tags.csv").write_text("tag_id,name,category\n0,cat,0\n")
    with pytest.raises(BaseModelError, match="tells 5 tags apart"):
        said()
    (folder / "selected_tags.csv").write_text("cat\ndog\n")
    with pytest.raises(BaseModelError, match="no table of tags"):
        said()


def test_a_wd_tagger_that_is_broken_is_told(tmp_path: Path) -> None:
    folder = wd(tmp_path / "model")
    (folder / "model.onnx").write_bytes(b"\x08\x08nothing of the kind")
    row, _ = find_captioner(str(folder))
    with pytest.raises(BaseModelError, match="cannot be opened"):
        row.open(folder, row.fill(HERE))


def test_without_onnxruntime_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_wd(tmp_path / "model", TAGS, torch.zeros(3, len(TAGS)))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    row, _ = find_captioner(str(folder))
    with pytest.raises(BaseModelError, match="pip install onnxruntime"):
        row.open(folder, row.fill(HERE))


def test_a_classifier_has_one_label_or_many_as_its_config_says(tmp_path: Path) -> None:
    many, one = (build_classifier(tmp_path / str(flag), ["long_hair", "o_o", "cat"], flag) for flag in (True, False))
    row, _ = find_captioner(str(many))
    assert row.open(many, row.fill(HERE))([RED]) == ["long hair, o_o"]  # sigmoid of 3, 1 and -1
    assert row.open(one, row.fill(HERE))([RED]) == ["long hair"]  # their softmax
    assert row.open(many, row.fill(Manner(device="cpu", threshold=0.2)))([RED]) == ["long hair, o_o, cat"]


# ---------------------------------------------------------------- the hub


FIND = """
import sys
from pathlib import Path
from personalize.captioning.find import captioners_at_hand, find_captioner
from personalize.errors import BaseModelError
try:
    print(find_captioner(sys.argv[1])[1].name)
    print(*captioners_at_hand([Path(sys.argv[2])]))
except BaseModelError as error:
    print(error)
"""


def test_of_the_hub_only_what_is_needed_is_downloaded_and_then_found(tmp_path: Path) -> None:
    folder = build_git(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"another form of it")

    def find(name: str, **more: str) -> list[str]:
        env = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", **more}
        done = subprocess.run(
            [sys.executable, "-c", FIND, name, str(folder)], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    with serving("someone/git", folder) as (address, taken):
        (offline,) = find("someone/git", HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
        assert "someone/git is not in the cache, and HF_HUB_OFFLINE is set" in offline and not taken
        (unknown,) = find("someone/else", HF_ENDPOINT=address)
        assert "someone/else cannot be had from the hub" in unknown
        (_, known) = find("someone/git", HF_ENDPOINT=address)
        assert "model.safetensors" in taken and not {"pytorch_model.bin", "evil.py", "onnx/model.onnx"} & set(taken)
        (folder / "model.safetensors").unlink()
    assert known == f"pocket {folder} someone/git"
    assert find("someone/git", HF_HUB_OFFLINE="1")[1] == "pocket someone/git"  # of the cache, without asking


def test_a_hub_id_alone_is_no_reason_to_download() -> None:
    with pytest.raises(BaseModelError, match="not in the cache"):
        find_captioner("someone/git", download=False)
    with pytest.raises(BaseModelError, match="no revision"):
        find_captioner("someone/git", "../../etc")
