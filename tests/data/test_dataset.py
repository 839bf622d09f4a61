"""Folders of pictures as people have them, and batches as training needs them."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from personalize.data.buckets import Grid, Shape, assign, buckets, centre, frame, grid, kept_share
from personalize.data.captions import fill, safe_trigger
from personalize.data.dataset import Dataset, Example
from personalize.data.folder import class_images, read_folder
from personalize.data.images import Unreadable, load_picture, load_whole, probe
from personalize.data.latents import load_pixels
from personalize.errors import DataError, RecipeError
from personalize.pictures.files import formats, natural
from personalize.recipe.fields import Data


def picture(size: tuple[int, int] = (24, 16), seed: int = 0) -> Image.Image:
    """A smooth RGB picture without symmetries."""
    draw = random.Random(seed)
    return Image.frombytes("RGB", (3, 2), draw.randbytes(18)).resize(size, Image.Resampling.BILINEAR)


def filled(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        picture(seed=i).save(folder / name)
    return folder


def read(folder: Path, **settings: str) -> Dataset:
    return read_folder(Data(folder=folder, **settings))


def pixels(path: Path, side: int = 16) -> torch.Tensor:
    sha256, size = probe(path)
    return load_pixels(Example(path, "", sha256, size), side).int()


def names(dataset: Dataset) -> list[str]:
    return [example.path.name for example in dataset.examples]


def captions(dataset: Dataset) -> dict[str, str]:
    return {example.path.name: example.caption for example in dataset.examples}


# ---------------------------------------------------------------- one picture


GREY_AND_WHITE = [  # mode, suffix, what to save: the left half 100, the right half white or transparent
    ("L", ".png", {}),
    ("LA", ".png", {}),
    ("RGB", ".webp", {"lossless": True}),
    ("RGB", ".bmp", {}),
    ("RGBA", ".png", {}),
    ("RGBA", ".webp", {"lossless": True}),
    ("RGBA", ".tiff", {}),
    ("P", ".gif", {}),
    ("P", ".png", {"transparency": 255}),
    ("L", ".png", {"transparency": 255}),
    ("CMYK", ".tiff", {}),
    ("CMYK", ".jpg", {"quality": 100}),
    ("YCbCr", ".jpg", {"quality": 100}),
    ("I;16", ".png", {}),
    ("I;16", ".tiff", {}),
    ("I", ".tiff", {}),
    ("F", ".tiff", {}),
]


@pytest.mark.parametrize(("mode", "suffix", "options"), GREY_AND_WHITE)
def test_every_mode_becomes_rgb_over_white(tmp_path: Path, mode: str, suffix: str, options: dict) -> None:
    grey = Image.new("L", (32, 16), 255)
    grey.paste(100, (0, 0, 16, 16))
    if mode in ("LA", "RGBA"):
        image = grey.convert(mode)
        image.putalpha(grey.point(lambda value: 0 if value == 255 else 255))
    elif mode == "I;16":
        image = Image.frombytes("I;16", grey.size, b"".join((v * 257).to_bytes(2, "little") for v in grey.tobytes()))
    elif mode == "CMYK":
        image = grey.convert("RGB").convert("CMYK")
    else:
        image = grey.convert("P") if mode == "P" else grey.convert("RGB").convert(mode) if mode == "YCbCr" else grey.convert(mode)
    path = tmp_path / f"x{suffix}"
    image.save(path, **options)
    got = pixels(path)
    assert got.shape == (3, 16, 16)
    assert (got[..., :6] - 100).abs().max() <= 3 and (got[..., 10:] - 255).abs().max() <= 3


def test_one_bit_pictures(tmp_path: Path) -> None:
    Image.new("1", (20, 20), 1).save(tmp_path / "x.png")
    assert (pixels(tmp_path / "x.png") == 255).all()


STORED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the Transpose that stores an upright picture that way


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = picture((48, 32))
    upright.save(tmp_path / "upright.png")
    stored = upright.transpose(Image.Transpose(STORED[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"stored{suffix}"
    stored.save(path, exif=exif, **({".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})))
    assert probe(path)[1] == (48, 32)
    assert (pixels(path) - pixels(tmp_path / "upright.png")).abs().max() <= (4 if suffix == ".jpg" else 1)


def test_the_centre_is_kept(tmp_path: Path) -> None:
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    wide.rotate(90, expand=True).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        inside = pixels(tmp_path / name, 8)[:, 2:-2, 2:-2]
        assert (inside - torch.tensor([0, 0, 255])[:, None, None]).abs().max() <= 3


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    for suffix in (".gif", ".webp", ".png", ".tiff"):
        frames[0].save(tmp_path / f"x{suffix}", save_all=True, append_images=frames[1:])
        assert pixels(tmp_path / f"x{suffix}").float().mean((1, 2)).sub(torch.tensor([255.0, 0, 0])).abs().max() < 3, suffix


def test_a_large_jpeg_decodes_small_and_looks_the_same(tmp_path: Path) -> None:
    picture((1600, 1200)).save(tmp_path / "big.jpg", quality=95)
    picture((1600, 1200)).save(tmp_path / "big.png")
    assert (pixels(tmp_path / "big.jpg", 32) - pixels(tmp_path / "big.png", 32)).abs().max() <= 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16", "L"])
def test_a_large_picture_is_averaged_in_strips_and_looks_the_same(tmp_path: Path, mode: str) -> None:
    image = picture((907, 1311)).convert("L").convert("RGB" if mode == "P" else "L" if mode == "I;16" else mode)
    if mode == "RGBA":
        image.putalpha(picture(image.size, seed=1).convert("L"))
    image = Image.fromarray(np.array(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "large.png")
    got, whole = pixels(tmp_path / "large.png", 8), pixels(tmp_path / "large.png", 301)  # only the first is so much smaller
    least = torch.nn.functional.interpolate(whole[None].float(), (8, 8), mode="bicubic", antialias=True)[0]
    assert (got - least).abs().max() <= 4


def test_a_picture_that_changes_meanwhile_is_not_used(tmp_path: Path) -> None:
    example = read(filled(tmp_path / "zwx", "a.png")).examples[0]
    picture(seed=9).save(example.path)
    with pytest.raises(DataError, match=r"a\.png: changed while"):
        load_pixels(example, 16)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["png", "jpeg", "gif", "tiff", "webp", "bmp"]), st.data())
def test_damage_is_unreadable_or_harmless(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    picture().save(path, kind)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert pixels(path).shape == (3, 16, 16)
    except Unreadable as error:
        assert str(error)


# ---------------------------------------------------------------- a folder


def test_formats_suffixes_hidden_files_and_order(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "b10.PNG", "b9.JPG", "B1.webp", "été.bmp", "猫.gif", ".hidden.png", "__MACOSX/b9.png")
    (folder / "._b9.JPG").write_bytes(b"Mac")
    (folder / "notes.md").write_text("not a picture")
    (folder / "folder.png").mkdir()
    dataset = read(folder)
    assert names(dataset) == ["B1.webp", "b9.JPG", "b10.PNG", "été.bmp", "猫.gif"]
    assert dataset.warnings == [] and dataset.trigger == "zwx"
    assert dataset == read(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Pillow 13 will forget some of them
def test_all_formats_that_pillow_writes_and_reads_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "zwx"
    folder.mkdir()
    readable = {s: kind for s, kind in Image.registered_extensions().items() if kind in formats() and kind in Image.SAVE}
    for suffix, kind in readable.items():
        if kind not in {"HDF5", "BUFR", "GRIB", "FITS", "WMF"}:
            picture((32, 32)).convert({"MSP": "1", "XBM": "1", "BLP": "P"}.get(kind, "RGB")).save(folder / f"x{suffix}")
    dataset = read(folder)
    assert len(dataset.examples) == len(list(folder.iterdir())) > 30


@given(st.lists(st.text(max_size=8), max_size=8), st.randoms())
def test_natural_order_is_total(some: list[str], rng: random.Random) -> None:
    shuffled = rng.sample(some, len(some))
    assert sorted(some, key=natural) == sorted(shuffled, key=natural)


def test_one_bad_picture_is_skipped_by_name(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "good.png")
    (folder / "text.png").write_text("I am only a text file, but a long one. " * 20)
    (folder / "empty.jpg").touch()
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    (folder / "renamed.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "drawing.svg").write_text("<svg/>")
    dataset = read(folder)
    assert names(dataset) == ["good.png"]
    told = {line.split(":")[0]: line for line in dataset.warnings}
    assert set(told) == {f"skipped {path.name}" for path in folder.iterdir()} - {"skipped good.png"}
    assert "not a picture" in told["skipped text.png"] and "export it as PNG" in told["skipped drawing.svg"]
    assert "pillow-heif" in told["skipped phone.heic"] and "pillow-heif" in told["skipped renamed.jpg"]
    assert "empty" in told["skipped empty.jpg"] and "No such file" in told["skipped gone.png"]


@pytest.mark.parametrize("side", [40, 50])  # Pillow warns above its limit and refuses above twice its limit
def test_a_decompression_bomb_is_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    folder = filled(tmp_path / "zwx", "good.png")
    picture((side, side)).save(folder / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read(folder).warnings == ["skipped huge.png: more than 1,000 pixels: make it smaller first"]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    empty, nested = filled(tmp_path / "empty"), filled(tmp_path / "nested", "sub/a.png")
    broken, other = filled(tmp_path / "broken"), filled(tmp_path / "other")
    (broken / "a.png").write_text("text")
    (other / "clip.mp4").touch()
    cases = [
        (tmp_path / "missing", "there is no folder .*missing"),
        (nested / "sub" / "a.png", "is a file, not a folder .*perhaps .*sub"),
        (empty, r"no pictures in .*\(put 3 to 20"),
        (nested, r"no pictures in .*subfolder sub: give"),
        (other, r"it holds \.mp4; use PNG"),
        (broken, r"none of the 1 pictures .*a\.png: not a picture"),
    ]
    for folder, said in cases:
        with pytest.raises(DataError, match=said):
            read(folder)


def test_twins_and_unused_subfolders_are_told(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "more/b.png")
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    assert read(folder).warnings == ["copy.png is the same picture as a.png", "pictures in the subfolder more are not used"]


# ---------------------------------------------------------------- captions


def test_captions_from_sidecars_metadata_and_template(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.PNG", "c.png", "d.png", "e.png", "deep/f.png")
    (folder / "a.txt").write_bytes("\ufeffzwx  sitting\r\non a mat\n".encode())
    (folder / "b.TXT").write_text("zwx, été", encoding="utf-8")
    (folder / "c.txt").write_text(" \n")
    lines = [
        {"file_name": "b.PNG", "text": "loses to the sidecar"},
        {"file_name": "d.png", "text": "ZWX asleep"},
        {"file_name": "./deep/f.png", "caption": "zwx far away", "text": "a zwx of its own"},
        {"file_name": "e.png", "text": None},
    ]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    dataset = read(folder, **{"class": "toy  dog", "caption": "a {class} {trigger}"})
    assert captions(dataset) == {
        "a.png": "zwx sitting on a mat",
        "b.PNG": "zwx, été",
        "c.png": "a toy dog zwx",
        "d.png": "ZWX asleep",
        "e.png": "a toy dog zwx",
        "f.png": "a zwx of its own",
    }
    assert dataset.warnings == []


def test_metadata_finds_names_however_their_accents_are_stored(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", unicodedata.normalize("NFD", "été.png"))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": unicodedata.normalize("NFC", "été.png"), "text": "zwx"}))
    assert len(read(folder).examples) == 1


BAD_LINES = [
    ("not json", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('["a.png"]', "no file_name"),
    ('{"text": "zwx"}', "no file_name"),
    ('{"file_name": 1, "text": "zwx"}', "no file_name"),
    ('{"file_name": "gone.png", "text": "zwx"}', r"no file gone\.png"),
    ('{"file_name": "../outside.png", "text": "zwx"}', r"no file \.\./outside\.png in the folder"),
    ('{"file_name": "b.png", "prompt": "zwx"}', "no caption .*found file_name, prompt"),
    ('{"file_name": "b.png", "text": ["zwx"]}', "'text' is not text"),
    ('{"file_name": "a.png", "text": "again"}', r"a\.png already has a caption"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES)
def test_bad_metadata_names_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    filled(tmp_path, "outside.png")
    folder = filled(tmp_path / "zwx", "a.png", "b.png")
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "zwx"}}\n\n{line}\n')
    with pytest.raises(DataError, match=rf"metadata\.jsonl line 3: {said}"):
        read(folder)


def test_captions_that_are_not_utf8(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png")
    (folder / "a.txt").write_bytes("zwx".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        read(folder)


def test_captions_without_the_trigger_are_counted(tmp_path: Path) -> None:
    folder = filled(tmp_path / "cat", "a.png", "b.png", "c.png")
    (folder / "a.txt").write_text("a category of its own")
    (folder / "b.txt").write_text("the Cat, asleep")
    (warning,) = read(folder).warnings
    assert warning.startswith("1 of 3 captions lack the trigger 'cat', such as 'a category of its own'")
    assert len(read(folder, trigger="zwx").warnings) == 1
    assert captions(read(folder, trigger=" my  word "))["c.png"] == "my word"


def test_class_images_are_a_dataset_too(tmp_path: Path) -> None:
    folder = filled(tmp_path / "class", "0000.png", "0001.png")
    dataset = class_images(folder, "a {plain} dog")
    assert set(captions(dataset).values()) == {"a {plain} dog"} and dataset.warnings == []


def test_fill_refuses_unknown_words() -> None:
    assert fill("{trigger} {class}", "zwx") == "zwx"
    with pytest.raises(RecipeError, match="did you mean trigger"):
        fill("{trigge}", "zwx")


SAFE = {
    "My Cat (photos)!": "my-cat-photos",
    "../../etc/passwd": "etc-passwd",
    "Été_2024": "été-2024",
    "हिन्दी": "हिन्दी",
    "🐱": "subject",
    "": "subject",
    "CON": "con-subject",
    "..": "subject",
}


@pytest.mark.parametrize(("name", "trigger"), SAFE.items())
def test_safe_trigger(name: str, trigger: str) -> None:
    assert safe_trigger(name) == trigger


@given(st.text())
def test_safe_triggers_are_words_and_file_names(name: str) -> None:
    trigger = safe_trigger(name)
    assert 0 < len(trigger.encode()) < 200 and trigger == Path(trigger).name
    assert not set(trigger) & set("/\\.:*?\"<>| {},()'\0") and trigger.strip("-") == trigger
    assert safe_trigger(trigger) == trigger
    assert fill("{trigger}", trigger) == trigger


# ---------------------------------------------------------------- buckets

SIDES = st.sampled_from([(64, 16), (96, 16), (256, 64), (512, 64), (1024, 64), (1024, 32), (40, 16)])
LENGTH = st.integers(1, 5000)


@given(SIDES)
def test_buckets_have_about_one_area_and_come_in_steps(chosen: tuple[int, int]) -> None:
    side, step = chosen
    shapes = buckets(side, step)
    assert (side, side) in shapes and {(h, w) for w, h in shapes} == set(shapes)
    for width, height in set(shapes) - {(side, side)}:
        assert width % step == height % step == 0 and max(width, height) <= 4 * min(width, height)
        assert width * height <= side * side < (width + step) * (height + step)


@given(SIDES, LENGTH, LENGTH, st.booleans())
def test_every_picture_has_a_shape_and_none_is_enlarged_unasked(
    chosen: tuple[int, int], width: int, height: int, upscale: bool
) -> None:
    side, step = chosen
    shape = Grid(side, step, upscale=upscale).shape_of((width, height))
    assert shape in buckets(side, step) or not (upscale or (shape[0] % step or shape[1] % step))
    assert upscale or (shape[0] <= max(step, width) and shape[1] <= max(step, height))
    assert shape[0] * shape[1] <= max(side * side, 2 * side * step)
    best = assign((width, height), buckets(side, step))
    assert kept_share((width, height), best) == max(kept_share((width, height), other) for other in buckets(side, step))
    assert Grid(side, step).shape_of((height, width)) == Grid(side, step).shape_of((width, height))[::-1]


@given(LENGTH, LENGTH, LENGTH, LENGTH)
def test_a_cut_has_the_shape_and_lies_in_the_middle(width: int, height: int, wide: int, high: int) -> None:
    left, top, right, bottom = centre((width, height), (wide, high))
    assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
    assert (right - left) * high == pytest.approx((bottom - top) * wide)
    assert left == pytest.approx(width - right, abs=1e-6) and top == pytest.approx(height - bottom, abs=1e-6)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
    told = frame((width, height), (wide, high))
    scale = max(wide / width, high / height)
    assert told == pytest.approx((height, width, top * scale, left * scale, high, wide), abs=1e-6)


def test_the_base_s_own_step_is_a_quarter_of_the_side_or_64() -> None:
    asked = {(512, 64): 64, (1024, 32): 64, (64, 16): 16, (128, 16): 32, (96, 16): 16, (768, 64): 64}
    assert {where: grid(Data(), *where).step for where in asked} == asked
    assert grid(Data(bucket_step=32), 1024, 32).step == 32 and grid(Data(resolution=256), 1024, 32).side == 256
    with pytest.raises(RecipeError, match=r"--bucket-step must be a multiple of 32 .* not 40 \(try 32\)"):
        grid(Data(bucket_step=40), 1024, 32)


def test_without_buckets_all_are_squares() -> None:
    assert Grid(64, 16, buckets=False).shape_of((30, 200)) == (64, 64)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_is_cut_to_its_shape_upright(tmp_path: Path, orientation: int) -> None:
    upright = picture((96, 48))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(Image.Transpose(STORED[orientation])) if orientation > 1 else upright
    for suffix, most in ((".png", 0), (".jpg", 8)):
        stored.save(tmp_path / f"x{suffix}", exif=exif, **({"quality": 100, "subsampling": 0} if most else {}))
        sha256, size = probe(tmp_path / f"x{suffix}")
        got = load_pixels(Example(tmp_path / f"x{suffix}", "", sha256, size), (64, 48))
        wanted = np.asarray(upright)[:, 16:80]
        assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= most


# ---------------------------------------------------------------- what a pixel means


GREEN = (30, 160, 60)


def rgb_profile(red: tuple[float, ...], green: tuple[float, ...], blue: tuple[float, ...], gamma: float = 2.2) -> bytes:
    """A matrix profile of ICC's version 2: the XYZ (D50) of its primaries, and one gamma."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    colours = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, b"wtpt": (0.9642, 1, 0.8249)}
    tags = {key: b"XYZ \0\0\0\0" + b"".join(map(number, value)) for key, value in colours.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), struct.pack(">4s4xIHxx", b"curv", 1, round(gamma * 256)))
    text = b"wide\0"
    tags[b"desc"] = struct.pack(">4s4xI", b"desc", len(text)) + text + b"\0" * (78 + -(len(text) + 90) % 4)
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for key, value in tags.items():
        table, body = table + key + struct.pack(">II", at + len(body), len(value)), body + value
    head = struct.pack(">I4xI12sI", at + len(body), 0x02100000, b"mntrRGB XYZ ", 0).ljust(36, b"\0") + b"acsp"
    return head.ljust(68, b"\0") + number(0.9642) + number(1) + number(0.8249) + b"\0" * 48 + table + body


WIDE = rgb_profile((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))  # Adobe RGB's


def in_wide_colours(image: Image.Image) -> Image.Image:
    """The numbers that mean the same colours there."""
    return ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(WIDE))) or image


def as_it_is_seen(path: Path, box: Shape = (64, 64)) -> np.ndarray:
    """RGB [3] in the middle, as training sees it."""
    (example,) = read(path.parent).examples
    return np.asarray(load_picture(example, box))[box[1] // 2, box[0] // 2]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("side", [64, 1200])  # whole, and averaged in strips
def test_colours_are_brought_to_srgb(tmp_path: Path, mode: str, side: int) -> None:
    wide = in_wide_colours(Image.new("RGB", (side, side), GREEN))
    assert np.abs(np.asarray(wide)[0, 0] - np.array(GREEN)).max() > 30
    path = filled(tmp_path / "zwx") / "a.png"
    stored = wide.quantize(4) if mode == "P" else wide.convert(mode)
    stored.save(path, icc_profile=WIDE)
    assert np.abs(as_it_is_seen(path) - np.array(GREEN)).max() <= 4
    assert np.abs(np.asarray(load_whole(path))[0, 0] - np.array(GREEN)).max() <= 4
    wide.save(path, icc_profile=b"no profile")  # as browsers do without one
    assert np.array_equal(as_it_is_seen(path), np.asarray(wide)[0, 0])
    wide.save(path, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert np.array_equal(as_it_is_seen(path), np.asarray(wide)[0, 0])


def test_what_is_transparent_stays_so_in_other_colours(tmp_path: Path) -> None:
    path = filled(tmp_path / "zwx") / "a.png"
    Image.new("RGBA", (64, 64), (*GREEN, 0)).save(path, icc_profile=WIDE)
    assert as_it_is_seen(path).tolist() == [255, 255, 255]


def test_lab_and_gamma_and_deep_greys(tmp_path: Path) -> None:
    path = filled(tmp_path / "zwx") / "a.tif"
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    image = ImageCms.applyTransform(Image.new("RGB", (64, 64), GREEN), lab)
    assert image is not None
    image.save(path)
    assert np.abs(as_it_is_seen(path) - np.array(GREEN)).max() <= 4
    path.unlink()
    path = path.with_suffix(".png")
    linear = Image.fromarray(np.full((64, 64), round(255 * 0.5**2.2), np.uint8))
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", struct.pack(">I", 100_000))
    linear.save(path, pnginfo=gamma)
    assert np.abs(as_it_is_seen(path) - 127.5).max() <= 3
    Image.fromarray(np.full((64, 64), 0x8000, np.uint16)).save(path)
    assert as_it_is_seen(path).tolist() == [128] * 3


def cmyk_profile(inks: dict[int, tuple[float, float, float]]) -> bytes:
    """An output profile of ICC's version 2 for CMYK: the Lab of full inks by number of the ink; mixtures are linear in between,
    and never darker than black."""
    paper, corners = np.array([100.0, 0, 0]), list[np.ndarray]()
    for corner in itertools.product((0, 1), repeat=4):
        steps = [np.array(inks[i]) - paper for i, full in enumerate(corner) if full]
        corners.append(np.clip(paper + sum(steps), [0, -127, -127], [100, 127, 127]))
    table = b"".join(struct.pack(">3H", round(light * 652.8), *(round((c + 128) * 256) for c in ab)) for light, *ab in corners)
    straight = struct.pack(">2H", 0, 65535)
    identity = b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    lut = b"mft2" + struct.pack(">4x4B", 4, 3, 2, 0) + identity + struct.pack(">2H", 2, 2) + 4 * straight + table + 3 * straight
    text = b"inks\0"
    description = struct.pack(">4s4xI", b"desc", len(text)) + text + b"\0" * (78 + -(len(text) + 90) % 4)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", round(0.9642 * 65536), 65536, round(0.8249 * 65536))
    tags = {b"desc": description, b"wtpt": white, b"A2B0": lut}
    at, entries, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for key, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        entries, body = entries + key + struct.pack(">II", at + len(body), len(value)), body + value
    head = struct.pack(">I4xI12sI", at + len(body), 0x02100000, b"prtrCMYKLab ", 0).ljust(36, b"\0") + b"acsp"
    return head.ljust(68, b"\0") + white[8:] + b"\0" * 48 + entries + body


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
@pytest.mark.parametrize("side", [64, 1200])  # whole, and averaged in strips
def test_inks_are_what_their_profile_says(tmp_path: Path, suffix: str, side: int) -> None:
    """A press whose first ink is a red and not a cyan: without its profile, the picture would be cyan."""
    profile = cmyk_profile({0: (53.2, 80.1, 67.2), 1: (60, 90, -60), 2: (97, -20, 90), 3: (5, 0, 0)})
    path = filled(tmp_path / "zwx") / f"a{suffix}"
    for inks, seen in (((255, 0, 0, 0), (255, 0, 0)), ((0, 0, 0, 0), (255, 255, 255)), ((128, 0, 0, 0), None)):
        Image.new("CMYK", (side, side), inks).save(path, icc_profile=profile)
        got = as_it_is_seen(path)
        assert np.abs(np.asarray(load_whole(path))[0, 0].astype(int) - got).max() <= 3
        if seen:
            assert np.abs(got - np.array(seen)).max() <= 12, got
        else:
            assert got[0] > 220 and 90 < got[1] < 220, got  # half of the red
    Image.new("CMYK", (side, side), (255, 0, 0, 0)).save(path)
    assert np.abs(as_it_is_seen(path) - np.array([0, 255, 255])).max() <= 3  # nothing tells which inks
    Image.new("CMYK", (side, side), (255, 0, 0, 0)).save(path, icc_profile=WIDE)  # of other colours than the picture
    assert np.abs(as_it_is_seen(path) - np.array([0, 255, 255])).max() <= 3


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        ((0.5, 1.0), 128),
        ((0.5, 1.2), 128),  # what sharpening leaves
        ((0.5, 8.0), 128),  # a light
        ((0.5, math.nan), 128),
        ((0.5, math.inf), 128),
        ((0.5, -3.0), 128),
        ((128.0, 255.0), 128),
        ((32768.0, 65535.0), 128),
        ((0.0, 0.0), 0),
    ],
)
def test_float_tiffs_are_as_bright_as_they_are_meant(tmp_path: Path, values: tuple[float, float], grey: int) -> None:
    pixels = np.full((64, 64), values[0], np.float32)
    pixels[:4, :4] = values[1]
    path = filled(tmp_path / "zwx") / "a.tif"
    Image.fromarray(pixels).save(path)
    assert np.abs(as_it_is_seen(path).astype(int) - grey).max() <= 1
    assert np.abs(np.asarray(load_whole(path))[40, 40].astype(int) - grey).max() <= 1


def test_a_float_tiff_in_colours_is_left_out_and_told(tmp_path: Path) -> None:
    """Pillow reads no such file."""
    tags = {256: 2, 257: 2, 258: 32, 259: 1, 262: 2, 273: 134, 277: 3, 278: 2, 279: 48, 339: 3}
    entries = b"".join(struct.pack("<2H2I", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    folder = filled(tmp_path / "zwx", "b.png")
    (folder / "a.tif").write_bytes(data.ljust(134, b"\0") + np.full(12, 0.5, np.float32).tobytes())
    dataset = read(folder)
    assert [example.path.name for example in dataset.examples] == ["b.png"]
    assert dataset.warnings[0].startswith("skipped a.tif: ") and "save it as PNG" in dataset.warnings[0]


def test_long_texts_beside_the_pixels_are_no_damage(tmp_path: Path) -> None:
    path = filled(tmp_path / "zwx") / "a.png"
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 3_000_000, zip=True)
    texts.add_itxt("parameters", "y" * 2_000_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture((64, 32)).save(path, pnginfo=texts, exif=exif)
    (example,) = read(path.parent).examples
    assert example.size == (32, 64)
