"""An image is drawn anew where a mask says so, and keeps its very pixels elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slow import every
from test_pipeline import photo

from personalize.cli.app import run
from personalize.errors import DataError, RecipeError
from personalize.inference.pipeline import draw
from personalize.inference.png import read_record
from personalize.inference.request import InitImage
from personalize.models.model import Base
from personalize.recipe.samplers import SAMPLERS

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
LEFT = (0, 0, 24, 64)  # of 64 x 64: what is drawn anew


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> Base:
    return Base.load(narrow_base)


def painted(box: tuple[int, int, int, int] = LEFT, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A mask that is white in a box."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def see_through(box: tuple[int, int, int, int] = LEFT) -> Image.Image:
    """A picture with a hole."""
    picture = photo().convert("RGBA").resize((64, 64))
    picture.paste((0, 0, 0, 0), box)
    return picture


@pytest.fixture
def files(tmp_path: Path) -> Callable[[Image.Image], tuple[Path, Path]]:
    """A 64 x 64 photo's file, and that of a mask."""

    def save(mask: Image.Image) -> tuple[Path, Path]:
        photo().resize((64, 64)).save(tmp_path / "photo.png")
        mask.save(tmp_path / "mask.png")
        return tmp_path / "photo.png", tmp_path / "mask.png"

    return save


Files = Callable[[Image.Image], tuple[Path, Path]]


@pytest.mark.parametrize("sampler", every(3, SAMPLERS))
def test_what_is_black_stays_to_the_byte_and_white_is_img2img(base: Base, files: Files, sampler: str) -> None:
    image, mask = files(painted())
    asked = {"steps": 4, "sampler": sampler, "denoise": 0.75}
    before = np.asarray(Image.open(image).convert("RGB"))
    (plain,), (drawn,) = (draw(base, ["a cat"], [1], image=image, **asked, **more) for more in ({}, {"mask": mask}))
    after = np.asarray(drawn)
    assert np.array_equal(after[:, 24:], before[:, 24:]) and not np.array_equal(after[:, :22], before[:, :22])
    image, mask = files(painted((0, 0, 64, 64)))
    assert draw(base, ["a cat"], [1], image=image, mask=mask, **asked)[0].tobytes() == plain.tobytes()


def test_what_is_kept_is_seen_by_what_is_drawn(base: Base, files: Files) -> None:
    """It is the same noise and prompt: only what lies beside the hole differs."""
    image, mask = files(painted())
    asked = {"steps": 4, "mask": mask, "denoise": 1.0}
    one = draw(base, ["a cat"], [1], image=image, **asked)[0]
    Image.new("RGB", (64, 64), "orange").save(image)
    other = draw(base, ["a cat"], [1], image=image, **asked)[0]
    hole = [np.asarray(picture.crop((0, 0, 20, 64))) for picture in (one, other)]
    assert not np.array_equal(*hole)


def test_a_hole_and_white_are_the_same_mask(files: Files) -> None:
    masks = [InitImage.open(*files(mask)) for mask in (painted(), see_through(), painted().convert("RGB"))]
    assert all(one and one.mask and one.mask.tobytes() == painted().tobytes() for one in masks)
    opaque = Image.merge("RGBA", [*painted().convert("RGB").split(), Image.new("L", (64, 64), 255)])
    read = InitImage.open(*files(opaque))
    assert read and read.mask and read.mask.tobytes() == painted().tobytes()  # no hole: what is white counts


@pytest.mark.parametrize(
    "mask, what", [(painted(size=(32, 64)), "32x64 pixels, the picture 64x64"), (Image.new("L", (64, 64)), "black everywhere")]
)
def test_masks_of_no_use_are_refused(files: Files, mask: Image.Image, what: str) -> None:
    with pytest.raises(DataError, match=what):
        InitImage.open(*files(mask))


def test_a_mask_alone_or_none_is_told_in_a_line(narrow_base: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    image, mask = files(painted())
    with pytest.raises(RecipeError, match="no picture"):
        InitImage.open(None, mask)
    words = ["generate", "a cat", "--base", str(narrow_base), "--steps", "1"]
    for more in (["--mask", str(mask)], ["--image", str(image), "--mask", str(image.with_name("none.png"))]):
        assert run([*words, *more]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said and ("--image FILE" in said or "none.png" in said)


def test_the_command_fits_the_mask_as_the_picture_and_says_so_in_the_file(narrow_base: Path, tmp_path: Path) -> None:
    photo().resize((100, 70)).save(tmp_path / "photo.png")
    painted((0, 0, 50, 70), (100, 70)).save(tmp_path / "mask.png")
    words = ["generate", "a cat", "--base", str(narrow_base), "--steps", "2", "--size", "80x48", "--denoise", "1"]
    words += ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png"), "--output", str(tmp_path / "a.png")]
    assert run(words) == 0
    record = read_record(tmp_path / "a.png")
    assert record["masked"] and record["size"] == [80, 48]
    plain = [*words[:-1], str(tmp_path / "b.png")]
    plain[plain.index("--denoise") + 1] = "0"
    assert run(plain[: plain.index("--mask")] + plain[plain.index("--output") :]) == 0
    after, kept = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert after.shape == kept.shape and not np.array_equal(after[:, :30], kept[:, :30])
