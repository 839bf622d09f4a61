"""Figures from a run folder: what they mean, and what is left out where there is no evidence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPModel

from personalize.data.captions import remove_triggers
from personalize.errors import BaseModelError
from personalize.models.clip import Clip
from personalize.reports.metrics import evidence, rows, write_metrics

TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16}
SPECIAL = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}


@pytest.fixture(scope="module")
def clip_base(base_builder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a CLIP beside it, all random weights."""
    folder = base_builder(tmp_path_factory.mktemp("base"))
    torch.manual_seed(0)
    text = TOWER | SPECIAL | {"vocab_size": 514, "max_position_embeddings": 77}
    vision = TOWER | {"image_size": 64, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    return folder


def picture(colour: str, corner: int = 10) -> Image.Image:
    drawn = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(drawn).ellipse((corner, corner, corner + 40, corner + 40), colour)
    return drawn


def run_folder(folder: Path, *, leaky: bool) -> Path:
    """A finished run whose adapter draws red discs when called, and also when not called if it is leaky."""
    (folder / "samples").mkdir(parents=True)
    images = []
    for i in range(3):
        path = folder / f"photo{i}.png"
        picture("red", 8 + i).save(path)
        images.append({"path": str(path), "caption": "zwx cat", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    records = [{"event": "started", "recipe": {"trigger": "zwx"}, "images": images}]
    for step in (0, 5, 10):
        for p, prompt in enumerate(("zwx cat in the snow", "a cat")):
            red = step == 10 and (p == 0 or leaky)
            path = f"samples/{step:06}-p{p}-s0.png"
            picture("red" if red else "blue").save(folder / path)
            records.append({"event": "sample", "step": step, "prompt": prompt, "seed": 0, "path": path, "base": step == 0})
    (folder / "events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_last_pictures_are_compared_with_the_base_and_the_trigger_is_taken_out(tmp_path: Path) -> None:
    found = evidence(run_folder(tmp_path, leaky=False))
    assert [pair.prompt for pair in found.with_trigger] == ["cat in the snow"]
    assert [pair.prompt for pair in found.without_trigger] == ["a cat"]
    pair = found.with_trigger[0]
    assert pair.adapter.getpixel((30, 30)) == (255, 0, 0) and pair.base.getpixel((30, 30)) == (0, 0, 255)
    assert len(found.training) == 3


def test_training_pictures_are_found_from_where_the_run_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "runs", leaky=False)
    diary = folder / "events.jsonl"
    diary.write_text(diary.read_text().replace(str(tmp_path) + "/", ""))
    monkeypatch.chdir(tmp_path)
    assert len(evidence(Path("runs")).training) == 3


def test_several_triggers_are_all_taken_out(tmp_path: Path) -> None:
    diary = run_folder(tmp_path, leaky=False) / "events.jsonl"
    diary.write_text(diary.read_text().replace('"caption": "zwx cat"', '"caption": "a cat", "trigger": "a"', 1))
    found = evidence(tmp_path)
    assert [pair.prompt for pair in found.with_trigger] == ["cat in the snow", "cat"]


def test_likeness_rises_and_an_adapter_that_does_not_leak_changes_nothing_else(clip_base: Path, tmp_path: Path) -> None:
    measured = {row.name: row for row in write_metrics(run_folder(tmp_path, leaky=False), clip_base)}
    likeness = measured["likeness to the training pictures"]
    assert likeness.base < likeness.adapter and likeness.ceiling is not None and likeness.ceiling > 0.9
    assert measured["other pictures stay as they were"].adapter == pytest.approx(1, abs=1e-5)
    leak = measured["leak without the trigger"]
    assert leak.better == "lower" and leak.adapter == pytest.approx(leak.base)
    assert measured["pixels changed without the trigger"].adapter == 0
    obedience = measured["does what the prompt says"]
    assert -1 <= obedience.adapter <= 1 and obedience.ceiling is None  # no picture was made to be as obedient as can be
    told = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert [row["name"] for row in told] == list(measured)
    assert set(told[0]) == {"name", "base", "adapter", "ceiling", "better", "explain"}


def test_a_leak_shows(clip_base: Path, tmp_path: Path) -> None:
    measured = {row.name: row for row in write_metrics(run_folder(tmp_path, leaky=True), clip_base)}
    assert measured["leak without the trigger"].adapter > measured["leak without the trigger"].base
    assert measured["other pictures stay as they were"].adapter < 1
    assert measured["pixels changed without the trigger"].adapter > 0.05


def test_without_a_clip_only_pixels_are_compared(tiny_base: Path, tmp_path: Path) -> None:
    measured = write_metrics(run_folder(tmp_path, leaky=True), tiny_base)
    assert [row.name for row in measured] == ["pixels changed without the trigger"]


def test_training_pictures_that_are_gone_or_changed_are_left_out(clip_base: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, leaky=False)
    (folder / "photo0.png").unlink()
    picture("green").save(folder / "photo1.png")
    assert len(evidence(folder).training) == 1
    (folder / "photo2.png").unlink()
    assert "likeness to the training pictures" not in {row.name for row in rows(evidence(folder), Clip.of(clip_base))}


def test_an_empty_run_has_no_figures(clip_base: Path, tmp_path: Path) -> None:
    assert write_metrics(tmp_path, clip_base) == []


def test_a_broken_clip_is_named(base_builder, tmp_path: Path) -> None:
    folder = base_builder(tmp_path / "base")
    (folder / "clip").mkdir()
    (folder / "clip/config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="clip"):
        Clip.of(folder)


def test_vectors_are_unit_and_long_prompts_are_cut(clip_base: Path) -> None:
    clip = Clip.of(clip_base)
    assert clip is not None
    found = torch.cat([clip.pictures([picture("red").resize((100, 100))]), clip.texts(["a cat " * 100])])
    assert torch.allclose(found.norm(dim=-1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize(
    ("trigger", "prompt", "words", "called"),
    [
        ("zwx", "zwx cat", "cat", True),
        ("zwx", "a red cat, ZWX, drawn", "a red cat, drawn", True),
        ("xiv", "a red cat, xiv style", "a red cat", True),
        ("xiv", "xiv style, a red cat", "a red cat", True),
        ("my rex", "a my rex dog", "a dog", True),
        ("zwx", "zwxy cat", "zwxy cat", False),
        ("", "a cat", "a cat", False),
    ],
)
def test_without_the_trigger(trigger: str, prompt: str, words: str, called: bool) -> None:
    assert remove_triggers(trigger, prompt) == (words, called)
