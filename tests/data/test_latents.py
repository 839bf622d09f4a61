"""Latents that are computed once, and the batches made of them."""

from __future__ import annotations

import itertools
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import LATENT

from personalize.data import latents as latents_module
from personalize.data.batches import Batch, batch_at, batches, generator, vary_caption
from personalize.data.cache import cache_folder
from personalize.data.dataset import Dataset
from personalize.data.folder import read_folder
from personalize.data.latents import Latents, encode_dataset, load_pixels, on_demand
from personalize.errors import BaseModelError
from personalize.families.cond import Cond
from personalize.models.model import Base
from personalize.recipe.fields import Data, Recipe

RECIPE = Recipe(data=Data(flip=True))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    monkeypatch.setenv("PERSONALIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def loaded(tiny_base: Path) -> Base:
    return Base.load(tiny_base)


@pytest.fixture
def folder(tmp_path: Path, pictures: Path) -> Path:
    """A copy of three of the shared pictures, to be changed at will."""
    (tmp_path / "zwx").mkdir()
    for name in ("0.png", "1.png", "3.png"):
        shutil.copy(pictures / name, tmp_path / "zwx" / name)
    return tmp_path / "zwx"


def read(folder: Path, **settings: str) -> Dataset:
    return read_folder(Data(folder=folder, **settings))


def entries(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*") if path.is_file()}


def recipe(**data: object) -> Recipe:
    return Recipe(data=Data(**data))


def tensors(latents: Latents) -> list[torch.Tensor]:
    """All that a dataset is to the UNet: each picture in its bucket, both ways round, then the captions."""
    sides = (False, True) if latents.mirrored else (False,)
    pictures = [latents.posterior(i, shape, side) for side in sides for i, shape in enumerate(latents.shapes)]
    assert latents.cond is not None
    return [*itertools.chain(*pictures), latents.cond.tokens, latents.cond_index]


def same(a: Latents, b: Latents) -> bool:
    mine, theirs = tensors(a), tensors(b)
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


# ---------------------------------------------------------------- what is cached


def test_latents_are_the_posterior_of_both_sides(loaded: Base, folder: Path) -> None:
    dataset = read(folder)
    latents = encode_dataset(loaded, dataset, RECIPE)
    for mirrored, axes in ((False, ()), (True, (-1,))):
        for i, example in enumerate(dataset.examples):
            pixels = load_pixels(example, latents.shapes[i])[None].flip(axes) / 127.5 - 1
            (mean,), (std,) = loaded.encode(pixels)
            assert mean.shape == std.shape == (16, latents.shapes[i][1] // 8, latents.shapes[i][0] // 8)
            found = latents.posterior(i, latents.shapes[i], mirrored)
            assert torch.equal(found[0], mean) and torch.equal(found[1], std)
    assert latents.cond is not None and torch.equal(latents.cond[:1].tokens, loaded.embed(["zwx"]).tokens)
    assert torch.equal(latents.cond[-1:].tokens, loaded.embed([""]).tokens)
    assert latents.mirrored and not encode_dataset(loaded, dataset, recipe(flip=False)).mirrored


def test_nothing_is_embedded_where_the_text_encoder_trains(loaded: Base, folder: Path) -> None:
    latents = encode_dataset(loaded, read(folder), Recipe.model_validate({"optim": {"text_encoder_lr": 1e-4}}))
    assert latents.cond is None and latents.captions == ["zwx"] * 3
    batch = next(batches(latents, batch_size=2, seed=0))
    assert batch.cond is None and batch.captions == ["zwx"] * 2


def test_a_second_time_is_read_and_equal(loaded: Base, folder: Path, cache: Path) -> None:
    first = encode_dataset(loaded, read(folder), RECIPE)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert len(written) == 2 * 3 + 2 and entries(cache) == {path.name for path in written}
    assert same(first, encode_dataset(loaded, read(folder), RECIPE))
    assert written == {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}


def test_a_picture_encodes_the_same_in_any_company(
    loaded: Base, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together = encode_dataset(loaded, read(folder), RECIPE)
    monkeypatch.setenv("PERSONALIZE_CACHE", str(tmp_path / "another"))
    (folder / "0.png").unlink()
    (folder / "3.png").unlink()
    alone = encode_dataset(loaded, read(folder), RECIPE)
    assert torch.equal(together.posterior(1, (64, 64), True)[0], alone.posterior(0, (64, 64), True)[0])
    assert torch.equal(together.cond.tokens, alone.cond.tokens)


# ---------------------------------------------------------------- what makes a cache stale


def edit_a_picture(folder: Path, base: Base, patch: pytest.MonkeyPatch) -> tuple[Base, Recipe]:
    with Image.open(folder / "0.png") as image:
        image.load()
    image.putpixel((32, 32), (1, 2, 3))
    image.save(folder / "0.png")
    return base, RECIPE


def change_a_caption(folder: Path, base: Base, patch: pytest.MonkeyPatch) -> tuple[Base, Recipe]:
    (folder / "0.txt").write_text("zwx by day")
    return base, RECIPE


def change_the_resolution(folder: Path, base: Base, patch: pytest.MonkeyPatch) -> tuple[Base, Recipe]:
    return base, recipe(flip=True, resolution=32)


def train_the_vae(folder: Path, base: Base, patch: pytest.MonkeyPatch) -> tuple[Base, Recipe]:
    other = Base.load(base.path)
    next(other.vae.parameters()).data[0] += 1e-3
    return other, RECIPE


def rescale_the_vae(folder: Path, base: Base, patch: pytest.MonkeyPatch) -> tuple[Base, Recipe]:
    other = Base.load(base.path)
    other.vae.register_to_config(scaling_factor=0.5)
    return other, RECIPE


def train_the_text_encoder(folder: Path, base: Base, patch: pytest.MonkeyPatch) -> tuple[Base, Recipe]:
    other = Base.load(base.path)
    list(other.texts[0].model.parameters())[-1].data += 1e-3
    return other, RECIPE


def change_the_code(folder: Path, base: Base, patch: pytest.MonkeyPatch) -> tuple[Base, Recipe]:
    patch.setattr(latents_module, "pictures", shutil)  # some other source
    latents_module.code.cache_clear()
    return base, RECIPE


def upgrade_a_library(folder: Path, base: Base, patch: pytest.MonkeyPatch) -> tuple[Base, Recipe]:
    patch.setattr(latents_module, "version", lambda name: "next")
    latents_module.code.cache_clear()
    return base, RECIPE


STALE = [  # change, new entries of (pictures + mirrored, captions)
    (edit_a_picture, 2),
    (change_a_caption, 1),
    (change_the_resolution, 6),
    (train_the_vae, 6),
    (rescale_the_vae, 6),
    (train_the_text_encoder, 2),
    (change_the_code, 8),
    (upgrade_a_library, 8),
]


@pytest.mark.parametrize(("change", "anew"), STALE)
def test_what_matters_is_computed_anew_and_nothing_else(
    loaded: Base,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., tuple[Base, Recipe]],
    anew: int,
) -> None:
    before = encode_dataset(loaded, read(folder), RECIPE)
    old = entries(cache)
    base, changed = change(folder, loaded, monkeypatch)
    after = encode_dataset(base, read(folder), changed)
    monkeypatch.undo()
    latents_module.code.cache_clear()
    assert len(entries(cache) - old) == anew
    if anew < 8:
        assert not same(before, after)


def test_mirrored_pictures_are_entries_of_their_own(loaded: Base, folder: Path, cache: Path) -> None:
    upright = encode_dataset(loaded, read(folder), recipe(flip=False))
    assert len(entries(cache)) == 3 + 2
    both = encode_dataset(loaded, read(folder), recipe(flip=True))
    assert len(entries(cache)) == 6 + 2
    one, other = (both.posterior(1, (64, 64), side)[0] for side in (False, True))
    assert torch.equal(upright.posterior(1, (64, 64), False)[0], one) and not torch.equal(one, other)


def test_names_and_places_do_not_matter(loaded: Base, folder: Path, cache: Path, tmp_path: Path) -> None:
    encode_dataset(loaded, read(folder), RECIPE)
    old = entries(cache)
    base = Base.load(shutil.copytree(loaded.path, tmp_path / "moved"))
    folder.rename(tmp_path / "renamed")
    encode_dataset(base, read(tmp_path / "renamed", trigger="zwx"), RECIPE)
    assert entries(cache) == old


# ---------------------------------------------------------------- a cache that fails


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [truncated, flipped, lambda content: b"", lambda content: b"\xff" * 64])
def test_a_damaged_entry_is_made_anew_with_a_warning(
    loaded: Base, folder: Path, cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    first = encode_dataset(loaded, read(folder), RECIPE)
    victim = max(cache.rglob("*.safetensors"))
    victim.write_bytes(damage(victim.read_bytes()))
    again = encode_dataset(loaded, read(folder), RECIPE)
    assert len(again.warnings) == 1 and str(victim) in again.warnings[0] and same(first, again)
    assert encode_dataset(loaded, read(folder), RECIPE).warnings == []


def test_without_a_writable_cache_things_stay_in_memory(loaded: Base, folder: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    latents = encode_dataset(loaded, read(folder), RECIPE)
    assert latents.posterior(0, (64, 64), True)[0].shape == LATENT
    assert len(latents.warnings) == 1 and str(cache) in latents.warnings[0]


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.setenv("PERSONALIZE_CACHE", "")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/.cache/personalize")


def test_latents_that_are_not_finite_are_refused(tiny_base: Path, folder: Path, cache: Path) -> None:
    base = Base.load(tiny_base)
    next(base.vae.parameters()).data.fill_(torch.nan)
    with pytest.raises(BaseModelError, match=r"not finite for 0\.png"):
        encode_dataset(base, read(folder), RECIPE)
    assert len(entries(cache)) == 2  # captions


def test_small_pictures_are_told(loaded: Base, folder: Path) -> None:
    assert encode_dataset(loaded, read(folder), recipe(resolution=96)).warnings == [
        "2 of 3 pictures are too small for a resolution of 96 and learned at their own size (--upscale enlarges them), "
        "such as 0.png (64 x 64)",
    ]
    assert encode_dataset(loaded, read(folder), recipe(resolution=96, upscale=True)).warnings == [
        "2 of 3 pictures are too small for their shape and get blurred by enlarging, such as 0.png (64 x 64)",
    ]


def test_long_captions_are_read_to_their_end(loaded: Base, folder: Path) -> None:
    (folder / "1.txt").write_text("zwx " * 50 + "red")
    one = encode_dataset(loaded, read(folder), RECIPE)
    (folder / "1.txt").write_text("zwx " * 50 + "blue")
    other = encode_dataset(loaded, read(folder), RECIPE)
    assert one.cond.tokens.shape[1] == 3 * 77  # 151 words of three letters in 75 to a window
    assert torch.equal(one.cond.tokens[0], other.cond.tokens[0]) and not torch.equal(one.cond.tokens[1], other.cond.tokens[1])


def test_shuffled_captions_never_need_more_windows_than_there_are(loaded: Base) -> None:
    caption = ", ".join(["zwx", *(f"{letter * 30}" for letter in "abcdefgh")])
    most = loaded.windows([caption], shuffled=True)
    data = Data(caption_shuffle=True)
    needed = {loaded.windows([vary_caption(caption, data, generator(0, "tags", i))]) for i in range(50)}
    assert max(needed) <= most


# ---------------------------------------------------------------- other shapes, on demand


def test_class_images_take_the_shape_of_the_step_and_are_encoded_when_wanted(loaded: Base, folder: Path, cache: Path) -> None:
    dataset = read(folder)
    latents = on_demand(loaded, dataset, RECIPE)
    assert len(entries(cache)) == 2  # captions
    batch = batch_at(latents, 0, batch_size=2, seed=0, shape=(96, 32))
    assert batch.mean.shape == (2, 16, 4, 12) and batch.shape == (96, 32)
    assert 2 < len(entries(cache)) <= 4
    wanted = loaded.encode(load_pixels(dataset.examples[0], (96, 32))[None] / 127.5 - 1)[0][0]
    assert torch.equal(latents.posterior(0, (96, 32), False)[0], wanted)


# ---------------------------------------------------------------- batches


Counts = list[int]  # repeats of the pictures of each bucket


def made(*buckets: Counts, mirrored: bool = True) -> Latents:
    """Latents whose values tell picture and side: mean = picture + 1000 if mirrored; cond = the caption's row, -1 when empty.

    The shapes are 32 x 16, 32 x 32, 32 x 48, ... pixels; a quarter of that in latents.
    """
    shapes = [(32, 16 * (k + 1)) for k, repeats in enumerate(buckets) for _ in repeats]
    n = len(shapes)

    def posterior(i: int, shape: tuple[int, int], flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.full((4, shape[1] // 8, shape[0] // 8), float(i + 1000 * flip))
        return mean, torch.ones_like(mean)

    cond = Cond(torch.tensor([*range(n), -1]).float()[:, None, None].expand(n + 1, 3, 5))
    captions = [f"caption {i}" for i in range(n)]
    repeats = [count for bucket in buckets for count in bucket]
    rows, variants = {caption: i for i, caption in enumerate([*captions, ""])}, [[caption] for caption in captions]
    return Latents(captions, shapes, shapes, repeats, [None] * n, mirrored, posterior, cond, torch.arange(n), variants, rows, [])


def take(latents: Latents, count: int, start: int = 0, data: Data = Data(), **options: object) -> list[Batch]:  # noqa: B008
    return list(itertools.islice(batches(latents, start_step=start, data=data, **options), count))


def equal(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("mean", "std", "index", "sizes"))
    return tensors and a.captions == b.captions and a.shape == b.shape


BUCKETS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4)
ONE = {"batch_size": st.integers(1, 9), "seed": st.integers(0, 2**64)}


@settings(max_examples=40)
@given(buckets=BUCKETS, **ONE, start=st.integers(0, 10**6))
def test_a_resumed_run_sees_the_same_batches(buckets: list[Counts], batch_size: int, seed: int, start: int) -> None:
    options = {"batch_size": batch_size, "seed": seed, "data": Data(caption_dropout=0.3)}
    unbroken = take(made(*buckets), 5, start, **options)
    resumed = take(made(*buckets), 2, start + 3, **options)
    assert all(map(equal, unbroken[3:], resumed))


@settings(max_examples=40)
@given(buckets=BUCKETS, **ONE, round_=st.integers(0, 5))
def test_every_picture_is_seen_as_often_as_it_is_repeated(buckets: list[Counts], batch_size: int, seed: int, round_: int) -> None:
    latents = made(*buckets)
    steps = sum(map(len, latents.buckets.values()))
    taken = take(latents, steps, round_ * steps, batch_size=batch_size, seed=seed)
    seen = Counter(i for batch in taken for i in batch.index.tolist())
    common = math.gcd(*latents.repeats)
    assert [seen[i] for i in range(len(latents.repeats))] == [batch_size * count // common for count in latents.repeats]


@settings(max_examples=40)
@given(buckets=BUCKETS, **ONE)
def test_turns_are_spread_evenly(buckets: list[Counts], batch_size: int, seed: int) -> None:
    latents = made(*buckets)
    counts = {shape: len(pool) for shape, pool in latents.buckets.items()}
    total, turns = sum(counts.values()), Counter()
    for step, batch in enumerate(take(latents, total, batch_size=batch_size, seed=seed), 1):
        turns[batch.shape] += 1
        assert all(abs(turns[shape] - step * count / total) < len(counts) for shape, count in counts.items())


@settings(max_examples=40)
@given(n=st.integers(1, 7), **ONE)
def test_epochs_of_one_shape_are_permutations(n: int, batch_size: int, seed: int) -> None:
    stream = itertools.chain.from_iterable(b.index.tolist() for b in batches(made([1] * n), batch_size=batch_size, seed=seed))
    for _ in range(5):
        assert sorted(itertools.islice(stream, n)) == list(range(n))


def test_five_pictures_in_five_shapes_fill_batches_of_four() -> None:
    seen = take(made([1], [1], [1], [1], [1]), 5, batch_size=4, seed=0)
    assert sorted(batch.index.tolist() for batch in seen) == [[i] * 4 for i in range(5)]


@settings(max_examples=40)
@given(buckets=BUCKETS, **ONE)
def test_every_row_belongs_to_its_picture(buckets: list[Counts], batch_size: int, seed: int) -> None:
    latents = made(*buckets)
    for batch in take(latents, 3, batch_size=batch_size, seed=seed, data=Data(caption_dropout=0.5)):
        width, height = batch.shape
        assert batch.mean.shape == batch.std.shape == (batch_size, 4, height // 8, width // 8)
        assert batch.sizes.tolist() == [[height, width, 0, 0, height, width]] * batch_size
        for row, i in enumerate(batch.index.tolist()):
            assert latents.shapes[i] == batch.shape
            assert batch.mean[row, 0, 0, 0] % 1000 == i
            assert (batch.captions[row], batch.cond.tokens[row, 0, 0].item()) in [(f"caption {i}", i), ("", -1)]


@settings(max_examples=4)
@given(seed=st.integers(0, 2**32))
def test_flips_and_dropped_captions_have_their_share(seed: int) -> None:
    seen = take(made([1, 1, 1], [1, 1]), 250, batch_size=4, seed=seed, data=Data(caption_dropout=0.2))
    flips = Counter(bool(mean >= 1000) for b in seen for mean in b.mean[:, 0, 0, 0])
    dropped = Counter(caption == "" for b in seen for caption in b.captions)
    assert 400 < flips[True] < 600 and 120 < dropped[True] < 280  # six standard deviations


def test_no_dropout_and_no_flips_unless_asked() -> None:
    seen = take(made([1, 1, 1], mirrored=False), 50, batch_size=4, seed=1)
    assert all(batch.mean.max() < 1000 and "" not in batch.captions for batch in seen)
    dropped = take(made([1, 1, 1]), 5, batch_size=4, seed=1, data=Data(caption_dropout=1.0))
    assert all(caption == "" for batch in dropped for caption in batch.captions)


def test_seeds_and_purposes_have_streams_of_their_own() -> None:
    latents, wanted = made([1] * 4, [1] * 3), ((0, "a"), (1, "a"), (0, "b"))
    streams = [[b.index.tolist() for b in take(latents, 9, batch_size=4, seed=s, purpose=p)] for s, p in wanted]
    assert streams[0] != streams[1] and streams[0] != streams[2] and streams[1] != streams[2]


def test_latents_are_drawn_afresh() -> None:
    batch = take(made([1, 1, 1]), 1, batch_size=4, seed=0)[0].to("cpu")
    drawn = [batch.latents(generator(0, "latents", step)) for step in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == batch.mean.shape and not torch.equal(drawn[0], batch.mean)


# ---------------------------------------------------------------- captions that vary


WORDS = "zwx, a mat, asleep, by night, ink"


@given(st.integers(0, 7), st.integers(0, 1000))
def test_shuffled_captions_keep_their_first_tags_and_lose_none(keep: int, step: int) -> None:
    tags = WORDS.split(", ")
    shuffled = vary_caption(WORDS, Data(caption_shuffle=True, keep_tokens=keep), generator(0, "x", step)).split(", ")
    assert shuffled[:keep] == tags[:keep] and sorted(shuffled) == sorted(tags)


def test_tags_are_shuffled_and_dropped_in_their_share_and_otherwise_left_alone() -> None:
    def seen(**options: Any) -> list[str]:
        return [vary_caption(WORDS, Data(**options), generator(0, "x", step)) for step in range(400)]

    assert len(set(seen(caption_shuffle=True))) == 24
    dropped = seen(tag_dropout=0.25, keep_tokens=2)
    assert all(caption.startswith("zwx, a mat") for caption in dropped)
    lost = sum(tag not in caption for caption in dropped for tag in ("asleep", "by night", "ink"))
    assert 200 < lost < 400  # of 1200, seven standard deviations around 300
    order = [WORDS.split(", ").index(tag) for tag in dropped[0].split(", ")]
    assert order == sorted(order)
    assert set(seen(keep_tokens=2)) == {WORDS}


def test_captions_that_vary_are_read_at_each_step(loaded: Base, folder: Path) -> None:
    for setting in ({"caption_shuffle": True}, {"tag_dropout": 0.5}):
        latents = encode_dataset(loaded, read(folder, caption=WORDS), recipe(**setting))
        assert latents.cond is None
        seen = take(latents, 9, batch_size=2, seed=0, data=Data(**setting))
        assert len({caption for batch in seen for caption in batch.captions}) > 5
        assert all(map(equal_captions, seen[4:], take(latents, 5, 4, batch_size=2, seed=0, data=Data(**setting))))


def equal_captions(a: Batch, b: Batch) -> bool:
    return a.captions == b.captions
