"""Pictures: each depends on its own prompt and seed, PNGs carry their parameters, grids read well."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personalize.adapters.strengths.grammar import WHOLE, read
from personalize.errors import OutputError, RecipeError
from personalize.inference import schedulers
from personalize.inference.pipeline import draw
from personalize.inference.png import read_record, save_picture
from personalize.inference.prompts import Use, parse
from personalize.inference.request import InitImage, Request
from personalize.inference.sheet import contact_sheet, enlarge
from personalize.models.model import Base


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return Base.load(str(tiny_base))


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=int)


def test_a_picture_is_the_same_alone_and_in_any_batch(base: Base) -> None:
    prompts, seeds = ["a red cat", "a blue house in the snow", "a cat"], [3, 4, 3]
    together = draw(base, prompts, seeds, steps=3)
    alone = [draw(base, [prompt], [seed], steps=3)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    chunked = draw(base, prompts, seeds, steps=3, batch_size=2)
    for one, two, three in zip(together, alone, chunked, strict=True):
        assert abs(levels(one) - levels(two)).max() <= 1
        assert abs(levels(one) - levels(three)).max() <= 1


def test_seed_prompt_guidance_and_negative_matter(base: Base) -> None:
    first = draw(base, ["a cat"], [0], steps=2)[0]
    others = {
        "seed": draw(base, ["a cat"], [1], steps=2),
        "prompt": draw(base, ["a house"], [0], steps=2),
        "steps": draw(base, ["a cat"], [0], steps=3),
        "guidance": draw(base, ["a cat"], [0], steps=2, guidance=9.0),
        "negative": draw(base, ["a cat"], [0], steps=2, negative="a dog", guidance=9.0),
        "plain": draw(base, ["a cat"], [0], steps=2, guidance=1.0),
    }
    assert first.size == (64, 64) and first.mode == "RGB"
    for name, (other,) in others.items():
        assert (levels(first) != levels(other)).any(), name


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_the_sampler_is_the_one_the_base_names(base: Base, name: str) -> None:
    config = {key: base.scheduler_config[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
    other = dataclasses.replace(base, scheduler_config=config | {"_class_name": name})
    assert type(schedulers.make_sampler(other, 4)).__name__ == name
    one, two = draw(other, ["a cat", "a dog"], [0, 1], steps=4), draw(other, ["a dog"], [1], steps=4)
    assert abs(levels(one[1]) - levels(two[0])).max() <= 1


def test_zero_terminal_snr_starts_at_pure_noise(base: Base) -> None:
    sampler = schedulers.make_sampler(base, 5)
    assert int(sampler.timesteps[0]) == 999
    assert float(sampler.alphas_cumprod[-1]) == 0
    assert sampler.config.prediction_type == "v_prediction"


def test_other_sizes(base: Base) -> None:
    assert draw(base, ["a cat"], [0], steps=1, size=(96, 48))[0].size == (96, 48)
    with pytest.raises(RecipeError, match=r"--size must be a multiple of 8 .* not 50 \(try 48\)"):
        draw(base, ["a cat"], [0], steps=1, size=50)
    with pytest.raises(RecipeError, match="--steps must be at most 1000"):
        draw(base, ["a cat"], [0], steps=1001)


def test_long_prompts_are_read_to_their_end(base: Base) -> None:
    ends = [draw(base, ["zebra " * 80 + end], [0], steps=1)[0].tobytes() for end in ("red", "blue")]
    assert ends[0] != ends[1]


def test_training_mode_is_left_as_it_was(base: Base) -> None:
    base.unet.mid_block.train()
    draw(base, ["a cat"], [0], steps=1)
    assert base.unet.mid_block.training and not base.unet.conv_in.training
    base.unet.eval()


def request(**changes: object) -> Request:
    values = {
        "prompt": "a zwx cat",
        "seed": 7,
        "steps": 20,
        "guidance": 4.0,
        "size": (64, 64),
        "sampler": "DDIM",
        "model": "pocket",
    }
    return Request(**(values | changes))  # type: ignore[arg-type]


def test_png_carries_its_parameters_as_uis_write_them(tmp_path: Path) -> None:
    used, hashes = (Use("zwx", read(["0.8", "0.5", "stop=0.5"])), Use("ink", WHOLE)), {"zwx": "ab" * 32}
    cat = InitImage(None, "cat.png")
    about = request(negative="blurry — ünscharf", adapters=used, hashes=hashes, image=cat, denoise=0.6)
    path = save_picture(Image.new("RGB", (64, 64)), tmp_path / "a.png", about)
    with Image.open(path) as picture:
        text = picture.info["parameters"].splitlines()
    assert text[0] == "a zwx cat <lora:zwx:0.5:0.8:stop=0.5> <lora:ink:1>"
    assert parse(text[0]) == ("a zwx cat", used)
    assert text[1] == "Negative prompt: blurry — ünscharf"
    start = "Steps: 20, Sampler: DDIM, CFG scale: 4, Seed: 7, Size: 64x64, Model: pocket, Denoising strength: 0.6, Lora hashes: "
    assert text[2].startswith(start)
    assert '"zwx: abababababab", Version: personalize ' in text[2]
    record = read_record(path)
    assert record["seed"] == 7 and record["adapters"][0]["strength"] == "0.8:0.5:stop=0.5" and record["image"] == "cat.png"


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    with pytest.raises(OutputError, match="cannot write"):
        save_picture(Image.new("RGB", (8, 8)), in_the_way / "a.png", request())
    assert in_the_way.read_text() == "not a folder"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def pieces() -> Callable[[int, int], list[Image.Image]]:
    return lambda count, side: [Image.new("RGB", (side, side), (40 * i % 255, 90, 160)) for i in range(count)]


def test_small_pictures_grow_by_whole_factors() -> None:
    assert enlarge(Image.new("RGB", (64, 64))).size == (192, 192)
    assert enlarge(Image.new("RGB", (50, 40)), 192).size == (200, 160)
    assert enlarge(Image.new("RGB", (512, 512))).size == (512, 512)


def test_grid_places_every_picture(pieces: Callable[[int, int], list[Image.Image]]) -> None:
    sheet = contact_sheet(pieces(5, 64), 3, rows=["a very long prompt " * 20, "second"], heads=["seed 0", "seed 1", "seed 2"])
    assert sheet.width == 8 + 3 * 200
    colours = {colour for _, colour in sheet.getcolors(1 << 16) or []}
    assert {(40 * i, 90, 160) for i in range(5)} <= colours
    assert contact_sheet(pieces(1, 512), 1).size == (528, 528)
