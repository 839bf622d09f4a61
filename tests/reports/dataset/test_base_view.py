"""What the coach says of the base before training: the findings that `train` tells, images of it, nothing downloaded."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from personalize.cli import cli, run
from personalize.cli.train import resolve_recipe
from personalize.errors import BaseModelError
from personalize.models.model import Base
from personalize.recipe.fields import Data
from personalize.recipe.resolve import resolve
from personalize.reports import dataset as report
from personalize.reports.dataset.base import why_not_here
from personalize.training.events import Encoded, Warned
from personalize.training.loop import train

CATS = Path("sample_data/subject")


def answer_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run(["dataset", *words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_coach_says_what_train_says_and_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    least = {"steps": 1, "rank": 1, "batch_size": 1, "choose": "none", "sample_every": 0, "sample_prompts": ("a",)}
    least |= {"sample_seeds": (0,), "sample_steps": 1, "prior": "none", "checkpoint_every": 0, "output": tmp_path / "run"}
    events = list(train(resolve("pocket-subject", {"folder": CATS, "trigger": "zwx", "class": "spaceship", **least})))
    (shown,) = [event for event in events if isinstance(event, Encoded)]
    warned = [event.text for event in events if isinstance(event, Warned)]

    out = tmp_path / "out" / "sheet.png", tmp_path / "out" / "page.html"
    words = [str(CATS), "--trigger", "zwx", "--class", "spaceship", "--sheet", str(out[0]), "--html", str(out[1])]
    told = answer_of(capsys, *words)
    said = {one["code"]: f"{one['what']}; {one['do']}" for one in told["findings"]}
    assert said["autoencoder"] == shown.concern and [said["unknown-class"]] == warned
    assert told["autoencoder"]["kept"] == pytest.approx(shown.kept, abs=0.02)
    assert told["autoencoder"]["usual"] == pytest.approx(shown.usual) and shown.usual > 30

    beside = Path(told["autoencoder_sheet"])
    assert beside == out[0].with_name("sheet-autoencoder.png")
    with Image.open(beside) as one, Image.open(tmp_path / "run" / shown.path) as other:
        assert one.size == other.size
    page = out[1].read_text(encoding="utf-8")
    assert "What the base can draw" in page and "32 of the drawings" in page and "never taught what &#39;spaceship&#39;" in page


def test_a_class_that_other_pictures_are_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("3_zwx cat", "3_vok umbrella"):
        shutil.copytree(CATS, tmp_path / name)
    told = answer_of(capsys, str(tmp_path))
    (one,) = [one for one in told["findings"] if one["code"] == "unlike-class"]
    assert one["what"].endswith("look more like 'cat' than like 'umbrella'") and "--class cat" in one["do"]
    assert not told["autoencoder_sheet"]


def test_more_words_than_the_noun_are_no_other_thing(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer_of(capsys, str(CATS), "--trigger", "zwx", "--class", "ginger cat")
    assert {one["code"] for one in told["findings"]} == {"autoencoder"}


def test_without_a_concern_one_line_says_how_much_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        Image.new("RGB", (64, 64), ("skyblue", "wheat", "white")[i]).save(tmp_path / f"{i}.png")
    assert run(["dataset", str(tmp_path), "--class", ""]) == 0
    said = capsys.readouterr().out
    assert said.count("the base's autoencoder keeps") == 1 and "fine detail" not in said


# ---------------------------------------------------------------- bases that are not looked at


def test_quick_loads_nothing() -> None:
    code = "import sys; from personalize.cli import run; run(['dataset', 'sample_data/subject', '--class', 'x', '--quick']); "
    told = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], check=True, capture_output=True, text=True
    ).stdout
    assert told.splitlines()[-1] == "False" and "autoencoder" not in told


def test_a_base_of_the_hub_is_not_downloaded_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer_of(capsys, str(CATS), "--class", "cat", "--base", "someone/something")
    (one,) = [one for one in told["findings"] if one["code"] == "base-not-looked-at"]
    assert "someone/something" in one["what"] and "training downloads it" in one["do"] and told["autoencoder"] is None
    assert why_not_here("pocket") is None and why_not_here("nothing") is None


def test_a_base_that_is_none_is_a_finding_and_the_rest_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer_of(capsys, str(CATS), "--class", "cat", "--base", "nothing", "--resolution", "64", "--preset", "pocket-subject")
    (one,) = [one for one in told["findings"] if one["code"] == "base-not-looked-at"]
    assert "no base called nothing" in one["what"] and "pocket" in one["do"] and len(told["pictures"]) == 5


def test_of_a_folder_only_the_autoencoder_is_read(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve("pocket-subject", {"folder": CATS, "base": str(tiny_base)})
    whole, alone = Base.load(tiny_base), Base.autoencoder_of(recipe)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        means = [base.encode(pixels)[0] for base in (whole, alone)]
        assert torch.equal(*means) and torch.equal(whole.decode(means[0]), alone.decode(means[1]))
        pocket = Base.autoencoder_of(resolve("pocket-subject", {"folder": CATS, "base": str(tiny_base), "vae": "pocket"}))
        assert not torch.allclose(pocket.encode(pixels)[0], means[0]) and pocket.denoiser is None
    with pytest.raises(BaseModelError, match="not in the cache"):
        Base.autoencoder_of(recipe.model_copy(update={"vae": "someone/vae"}))


def test_large_pictures_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    from personalize.reports.dataset import base as module

    monkeypatch.setattr(module, "PIXELS", 3 * 64 * 64)
    view = report.look_at_base(report.measure_dataset(resolve("pocket-subject", {"folder": CATS})))
    assert view.reconstruction and len(view.reconstruction.kept) == 3


# ---------------------------------------------------------------- its commands repeat every flag

GIVEN = [
    "--base pocket --vae pocket --preset pocket-subject --mask-outside 0.5 --class 'old cat' --caption 'a {trigger} {class}'",
    "--caption-prefix 'so: {trigger},' --caption-shuffle --keep-tokens 3 --tag-dropout 0.1 --caption-dropout 0.2",
    "--resolution 128 --no-buckets --bucket-step 32 --upscale --no-flip --balance --alpha-mask",
    "--regularization REG --prior images --trigger zwx",
]


def test_its_commands_repeat_every_flag_that_it_takes(tmp_path: Path) -> None:
    words = shlex.split(" ".join(GIVEN).replace("REG", str(tmp_path)))
    dataset = cli.commands["dataset"]
    with dataset.make_context("dataset", [str(CATS), *words]) as context:
        flags = {
            name: value for name, value in context.params.items() if name not in ("sheet_path", "html_path", "quick", "folder")
        }
    own = {field.alias or name for name, field in Data.model_fields.items()} - {"folder"}
    assert own < {name for name, value in flags.items() if value not in (None, ())}, "a flag is not tried"
    recipe, _ = resolve_recipe(CATS, None, {name: value for name, value in flags.items() if name != "json"})
    stats = report.measure_dataset(recipe, {name: value for name, value in flags.items() if value not in (None, ())})
    with cli.commands["train"].make_context("train", [str(CATS), *stats.given_words()]) as context:
        again = {name: value for name, value in context.params.items() if value not in (None, ()) and name in flags}
    assert again == flags
    assert "zwx" not in stats.given_words(without=["--trigger", "vok"])  # what a hint says anew is said once
