"""Latents that are computed once, and the batches made of them."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from personalize.base import Base, Cond
from personalize.data import Batch, Dataset, Latents, batches, cached, generator, load_pixels, read_folder
from personalize.data import latents as latents_module
from personalize.data.store import cache_folder
from personalize.errors import BaseModelError
from personalize.recipe import Data, Recipe

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


def same(a: Latents, b: Latents) -> bool:
    return torch.equal(a.cond.tokens, b.cond.tokens) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("mean", "std", "cond_index")
    )


# ---------------------------------------------------------------- what is cached


def test_latents_are_the_posterior_of_both_sides(loaded: Base, folder: Path) -> None:
    dataset = read(folder)
    latents = cached(loaded, dataset, RECIPE)
    assert latents.mean.shape == latents.std.shape == (2, 3, 16, 8, 8)
    for side, axes in ((0, ()), (1, (-1,))):
        for i, example in enumerate(dataset.examples):
            pixels = load_pixels(example, 64)[None].flip(axes) / 127.5 - 1
            mean, std = loaded.encode(pixels)
            assert torch.equal(latents.mean[side, i], mean[0]) and torch.equal(latents.std[side, i], std[0])
    assert latents.cond is not None and torch.equal(latents.cond[:1].tokens, loaded.embed(["zwx"]).tokens)
    assert torch.equal(latents.cond[-1:].tokens, loaded.embed([""]).tokens)
    assert cached(loaded, dataset, recipe(flip=False)).mean.shape == (1, 3, 16, 8, 8)


def test_nothing_is_embedded_where_the_text_encoder_trains(loaded: Base, folder: Path) -> None:
    latents = cached(loaded, read(folder), Recipe.model_validate({"optim": {"text_encoder_lr": 1e-4}}))
    assert latents.cond is None and latents.captions == ["zwx"] * 3
    batch = next(batches(latents, batch_size=2, seed=0))
    assert batch.cond is None and batch.captions == ["zwx"] * 2


def test_a_second_time_is_read_and_equal(loaded: Base, folder: Path, cache: Path) -> None:
    first = cached(loaded, read(folder), RECIPE)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert len(written) == 2 * 3 + 2 and entries(cache) == {path.name for path in written}
    assert same(first, cached(loaded, read(folder), RECIPE))
    assert written == {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}


def test_a_picture_encodes_the_same_in_any_company(
    loaded: Base, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together = cached(loaded, read(folder), RECIPE)
    monkeypatch.setenv("PERSONALIZE_CACHE", str(tmp_path / "another"))
    (folder / "0.png").unlink()
    (folder / "3.png").unlink()
    alone = cached(loaded, read(folder), RECIPE)
    assert torch.equal(together.mean[:, 1:2], alone.mean) and torch.equal(together.cond.tokens, alone.cond.tokens)


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
    before = cached(loaded, read(folder), RECIPE)
    old = entries(cache)
    base, changed = change(folder, loaded, monkeypatch)
    after = cached(base, read(folder), changed)
    monkeypatch.undo()
    latents_module.code.cache_clear()
    assert len(entries(cache) - old) == anew
    if anew < 8:
        assert not (after.mean.shape == before.mean.shape and same(before, after))


def test_mirrored_pictures_are_entries_of_their_own(loaded: Base, folder: Path, cache: Path) -> None:
    upright = cached(loaded, read(folder), recipe(flip=False))
    assert len(entries(cache)) == 3 + 2
    both = cached(loaded, read(folder), recipe(flip=True))
    assert len(entries(cache)) == 6 + 2
    assert torch.equal(upright.mean[0], both.mean[0]) and not torch.equal(both.mean[0], both.mean[1])


def test_names_and_places_do_not_matter(loaded: Base, folder: Path, cache: Path, tmp_path: Path) -> None:
    cached(loaded, read(folder), RECIPE)
    old = entries(cache)
    base = Base.load(shutil.copytree(loaded.path, tmp_path / "moved"))
    folder.rename(tmp_path / "renamed")
    cached(base, read(tmp_path / "renamed", trigger="zwx"), RECIPE)
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
    first = cached(loaded, read(folder), RECIPE)
    victim = max(cache.rglob("*.safetensors"))
    victim.write_bytes(damage(victim.read_bytes()))
    again = cached(loaded, read(folder), RECIPE)
    assert len(again.warnings) == 1 and str(victim) in again.warnings[0] and same(first, again)
    assert cached(loaded, read(folder), RECIPE).warnings == []


def test_without_a_writable_cache_things_stay_in_memory(loaded: Base, folder: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    latents = cached(loaded, read(folder), RECIPE)
    assert latents.mean.shape == (2, 3, 16, 8, 8)
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
        cached(base, read(folder), RECIPE)
    assert not entries(cache)


def test_small_pictures_are_told(loaded: Base, folder: Path) -> None:
    latents = cached(loaded, read(folder), recipe(resolution=96))
    assert latents.warnings == [
        "2 of 3 pictures are smaller than 96 pixels and get blurred by enlarging, such as 0.png (64 x 64)"
    ]


def test_long_captions_are_read_to_their_end(loaded: Base, folder: Path) -> None:
    (folder / "1.txt").write_text("zwx " * 50 + "red")
    one = cached(loaded, read(folder), RECIPE)
    (folder / "1.txt").write_text("zwx " * 50 + "blue")
    other = cached(loaded, read(folder), RECIPE)
    assert one.cond.tokens.shape[1] == 3 * 77  # 151 words of three letters in 75 to a window
    assert torch.equal(one.cond.tokens[0], other.cond.tokens[0]) and not torch.equal(one.cond.tokens[1], other.cond.tokens[1])


# ---------------------------------------------------------------- batches


def made(n: int, sides: int = 2) -> Latents:
    """Latents whose values tell side and picture: mean = 10 * side + picture; cond = the caption's row, -1 when empty."""
    mean = (10 * torch.arange(sides)[:, None] + torch.arange(n)).float()[:, :, None, None, None].expand(sides, n, 4, 2, 2)
    cond = Cond(torch.tensor([*range(n), -1]).float()[:, None, None].expand(n + 1, 3, 5))
    return Latents(mean, torch.ones_like(mean), [f"caption {i}" for i in range(n)], cond, torch.arange(n), [])


def take(n: int, count: int, start: int = 0, **options: object) -> list[Batch]:
    return list(itertools.islice(batches(made(n), start_step=start, **options), count))


def equal(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("mean", "std", "index"))
    return tensors and a.captions == b.captions


SIZES = {"n": st.integers(1, 7), "batch_size": st.integers(1, 9), "seed": st.integers(0, 2**64)}


@given(**SIZES, start=st.integers(0, 10**6))
def test_a_resumed_run_sees_the_same_batches(n: int, batch_size: int, seed: int, start: int) -> None:
    options = {"batch_size": batch_size, "seed": seed, "caption_dropout": 0.3}
    unbroken = take(n, 5, start, **options)
    resumed = take(n, 2, start + 3, **options)
    assert all(map(equal, unbroken[3:], resumed))


@given(**SIZES)
def test_epochs_are_permutations(n: int, batch_size: int, seed: int) -> None:
    stream = itertools.chain.from_iterable(b.index.tolist() for b in batches(made(n), batch_size=batch_size, seed=seed))
    for _ in range(5):
        assert sorted(itertools.islice(stream, n)) == list(range(n))


@given(**SIZES)
def test_every_row_belongs_to_its_picture(n: int, batch_size: int, seed: int) -> None:
    for batch in take(n, 3, batch_size=batch_size, seed=seed, caption_dropout=0.5):
        assert batch.mean.shape == batch.std.shape == (batch_size, 4, 2, 2)
        for row, i in enumerate(batch.index.tolist()):
            assert batch.mean[row, 0, 0, 0] % 10 == i
            assert (batch.captions[row], batch.cond.tokens[row, 0, 0].item()) in [(f"caption {i}", i), ("", -1)]


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_flips_and_dropped_captions_have_their_share(seed: int) -> None:
    seen = take(5, 250, batch_size=4, seed=seed, caption_dropout=0.2)
    flips = Counter(bool(mean >= 10) for b in seen for mean in b.mean[:, 0, 0, 0])
    dropped = Counter(caption == "" for b in seen for caption in b.captions)
    assert 400 < flips[True] < 600 and 120 < dropped[True] < 280  # six standard deviations


def test_no_dropout_and_no_flips_unless_asked() -> None:
    seen = list(itertools.islice(batches(made(3, sides=1), batch_size=4, seed=1), 50))
    assert all(batch.mean.max() < 10 and "" not in batch.captions for batch in seen)
    assert all(caption == "" for batch in take(3, 5, batch_size=4, seed=1, caption_dropout=1.0) for caption in batch.captions)


def test_seeds_and_purposes_have_streams_of_their_own() -> None:
    streams = [[b.index.tolist() for b in take(7, 9, batch_size=4, seed=s, purpose=p)] for s, p in ((0, "a"), (1, "a"), (0, "b"))]
    assert streams[0] != streams[1] and streams[0] != streams[2] and streams[1] != streams[2]


def test_latents_are_drawn_afresh() -> None:
    batch = take(3, 1, batch_size=4, seed=0)[0].to("cpu")
    drawn = [batch.latents(generator(0, "latents", step)) for step in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == batch.mean.shape and not torch.equal(drawn[0], batch.mean)
