r"""What people type stays what they typed: triggers with brackets, captions and prompts of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.cli import run
from personalize.data.batches import batches
from personalize.data.folder import read_folder
from personalize.data.latents import encode_dataset
from personalize.errors import RecipeError
from personalize.families.notation import plain_text
from personalize.inference.pipeline import draw
from personalize.inference.png import read_record
from personalize.inference.prompts import parse
from personalize.inference.request import Request
from personalize.models.model import Base
from personalize.recipe.fields import Data, Recipe
from personalize.recipe.lines import expand, parse_line
from personalize.recipe.resolve import resolve
from personalize.training.preflight import check

QUICK = ["--steps", "1", "--batch-size", "1", "--rank", "2", "--prior", "none", "--choose", "none", "--sample-steps", "1",
         "--sample-seeds", "0", "--sample-every", "0", "--checkpoint-every", "0"]  # fmt: skip
TRIGGER, CLASS = "katarina_(league)", "girl"
ESCAPED = r"katarina_\(league\) girl"


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return Base.load(tiny_base)


def filled(folder: Path, *captions: str) -> Path:
    """A folder of as many pictures, each with a caption unless it is empty."""
    folder.mkdir(parents=True)
    for i, caption in enumerate(captions):
        Image.new("RGB", (64, 64), (60 * i, 90, 120)).save(folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(caption)
    return folder


def captions(folder: Path, **data: Any) -> list[str]:
    return [example.caption for example in read_folder(Data(folder=folder, **data)).examples]


def test_placeholders_and_brackets_of_the_trigger_mean_the_same_in_captions_and_prompts(tmp_path: Path) -> None:
    written = ("[trigger] the [class] on a mat", "a {trigger}, {small|large}", "katarina_(league) far", ESCAPED, "")
    folder = filled(tmp_path / "10_katarina_(league) girl", *written)
    name = r"katarina_\(league\)"
    expected = [f"{name} the girl on a mat", f"a {name}, {{small|large}}", f"{name} far", ESCAPED, ESCAPED]
    assert captions(folder) == expected and read_folder(Data(folder=folder)).warnings == []
    assert captions(folder, trigger=name)[-1] == ESCAPED  # typed as a prompt has it
    prompts = resolve(flags={"folder": folder, "sample_prompts": ["[trigger] asleep"]}).sampling.sample_prompts
    assert prompts == ("{trigger} asleep",)


def test_a_trigger_with_brackets_is_the_same_tokens_everywhere(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = filled(tmp_path / f"10_{TRIGGER} {CLASS}", "", ""), tmp_path / "run"
    asked = ["--sample-prompts", "{trigger} {class}"]
    assert run(["train", str(folder), "--base", str(tiny_base), "--output", str(out), *QUICK, *asked]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"personalize generate '{ESCAPED}' --adapter" in printed
    (adapter,) = out.glob("*.safetensors")
    said, beside = Adapter.load(adapter).metadata, json.loads(adapter.with_suffix(".json").read_text())
    assert said["modelspec.trigger_phrase"] == r"katarina_\(league\)" and beside["activation text"] == ESCAPED
    assert {read_record(path)["prompt"] for path in (out / "samples").glob("0*.png")} == {ESCAPED}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "katarina_\\(league\\) girl" in page and "&#39;katarina_(league) girl&#39;," in page  # for UIs; for diffusers

    def warnings(prompt: str) -> str:
        drawn = ["--base", str(tiny_base), "-a", str(adapter), "--steps", "1", "-o", str(tmp_path / "drawn")]
        assert run(["generate", prompt, *drawn]) == 0
        return capsys.readouterr().err

    assert warnings(f"a {ESCAPED}") == warnings("a {trigger} {class}") == warnings("a [trigger]") == ""
    assert "listens to 'katarina_\\(league\\)', which no prompt says: brackets" in warnings(f"a {TRIGGER} girl")
    assert {read_record(path)["prompt"] for path in (tmp_path / "drawn").glob("*.png")} == {
        f"a {ESCAPED}", r"a katarina_\(league\)", f"a {TRIGGER} girl"
    }  # fmt: skip


def test_captions_are_read_as_prompts_are(base: Base, tmp_path: Path) -> None:
    text = r"zwx, ganyu \(genshin\), (red collar:1.3)"
    latents = encode_dataset(base, read_folder(Data(folder=filled(tmp_path / "zwx", text))), Recipe())
    assert latents.cond is not None
    assert torch.equal(latents.cond[:1].tokens, base.embed([text], weighted=True).tokens)
    assert not torch.equal(latents.cond[:1].tokens, base.embed([plain_text(text)], weighted=True).tokens)


@pytest.mark.parametrize("learning", [0.0, 1e-4])
def test_choices_in_captions_are_made_at_each_step(base: Base, tmp_path: Path, learning: float) -> None:
    folder = filled(tmp_path / "zwx", "zwx, a {red|blue} mat")
    recipe = Recipe.model_validate({"optim": {"text_encoder_lr": learning}})
    latents = encode_dataset(base, read_folder(Data(folder=folder)), recipe)
    stream = batches(latents, batch_size=1, seed=0)
    found = [next(stream) for _ in range(16)]
    assert {batch.captions[0] for batch in found} == {"zwx, a red mat", "zwx, a blue mat"}
    again = batches(latents, batch_size=1, seed=0, start_step=9)
    assert next(again).captions == found[9].captions
    for batch in found[:4] if not learning else ():
        assert batch.cond is not None and torch.equal(batch.cond.tokens, base.embed(batch.captions, weighted=True).tokens)


def test_what_means_nothing_in_captions_is_told(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "zwx AND a dog", "zwx [cat:dog:0.5]", "zwx, plain")
    assert read_folder(Data(folder=folder)).warnings == [
        "captions are learned with AND, two prompts at once, as words: 0.png",
        "captions are learned with prompt editing, as in [cat:dog:0.5] as words: 1.png",
    ]


# ---------------------------------------------------------------- prompts


def test_prompts_are_drawn_as_they_are_at_each_step(base: Base) -> None:
    cat, dog, late, early, *edited = (  # in pairs: a row's bits depend on its place on some CPUs
        image
        for pair in (["a cat", "a dog"], ["a [cat:dog:4]", "a [cat:dog:0]"], ["a [cat:dog:0.5]"] * 2)
        for image in draw(base, pair, [3, 3], steps=4, size=64)
    )
    assert [late, early] == [cat, dog]
    assert edited[0] != cat and edited[1] != dog
    negative = [draw(base, ["a cat"], [3], steps=2, size=64, negative=text)[0] for text in ("[dog|]", "dog", "")]
    assert negative[0] not in negative[1:]


def test_choices_in_prompts_follow_the_seed() -> None:
    found = {Request.parse("a {red|blue} cat", seed=seed).prompt for seed in range(20)}
    assert found == {"a red cat", "a blue cat"}


@pytest.mark.parametrize("prompt", ["a cat AND a dog", "a __animal__", "a {{cat}}"])
def test_what_would_be_drawn_as_words_is_refused_by_name(prompt: str, tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(RecipeError, match="is not supported, and would be drawn as words"):
        parse(prompt)
    folder = filled(tmp_path / "zwx", "")
    with pytest.raises(RecipeError, match=r"would be drawn as words|can hold"):
        check(resolve(flags={"folder": folder, "base": str(tiny_base), "output": tmp_path / "run", "sample_prompts": [prompt]}))


def test_lines_of_kohya_s_trainer(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# for every epoch\na cat in the snow --n blurry, dark --w 96 --h 64 --d 7 --l 5 --s 2 --ss euler\na dog\n")
    assert (
        run(
            ["generate", "--prompts", str(file), "--base", str(tiny_base), "--steps", "1", "-s", "0,1", "-o", str(tmp_path / "a")]
        )
        == 0
    )
    capsys.readouterr()
    found = {(one["prompt"], one["seed"]): one for one in map(read_record, (tmp_path / "a").glob("*.png"))}
    assert set(found) == {("a cat in the snow", 7), ("a cat in the snow", 8), ("a dog", 0), ("a dog", 1)}
    cat = found["a cat in the snow", 8]
    assert (cat["size"], cat["steps"], cat["guidance"], cat["negative"], cat["sampler"]) == (
        [96, 64],
        2,
        5,
        "blurry, dark",
        "Euler",
    )
    assert expand([f"@{file}", "a fox"]) == [*expand([str(file)]), "a fox"] and len(expand([str(file)])) == 2
    with pytest.raises(RecipeError, match=r"missing\.txt cannot be read"):
        expand(["@missing.txt"])
    for text, said in {
        "a cat --ar 3:2": r"--ar behind .* is not known",
        "a cat --w wide": "must be a number",
        "a cat --s 0": "no sense",
    }.items():
        with pytest.raises(RecipeError, match=said):
            parse_line(text)
    assert parse_line("a cat -- and a dog --").options == {}


def test_sample_prompts_may_lie_in_a_file(tmp_path: Path, tiny_base: Path) -> None:
    file, folder = tmp_path / "prompts.txt", filled(tmp_path / "zwx", "")
    file.write_text("# samples\n{trigger} asleep --n blurry --w 96 --h 64 --d 7 --s 3\na cat\n")
    flags = {"base": str(tiny_base), "output": tmp_path / "run", "folder": folder, "sample_seeds": [4, 6]}
    plan = check(resolve(flags={**flags, "sample_prompts": (str(file),)}))
    assert plan.prompts == ["zwx asleep", "a cat"]
    request = plan.sample_request(0, 1)
    assert (request.prompt, request.negative, request.size, request.seed, request.steps) == (
        "zwx asleep",
        "blurry",
        (96, 64),
        9,
        3,
    )
    assert plan.sample_request(1, 1) == plan.request("a cat", 6) and plan.sample_request(0, 0, steps=1).steps == 1
    with pytest.raises(RecipeError, match="adapters cannot be named"):
        check(resolve(flags={**flags, "sample_prompts": ["a <lora:x:1> cat"]}))


def test_without_an_adapter_nothing_fills_in_a_trigger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "a {trigger} dog", "-o", str(tmp_path)]) == 2
    assert "nothing tells the trigger in 'a {trigger} dog'" in capsys.readouterr().err
