"""Fixtures shared by all tests: a base of pocket's exact structure with random weights, and a folder of pictures."""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("PERSONALIZE_PROCESSES", "1")  # values are the same in more, and other tests want the other cores

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from PIL import Image

if TYPE_CHECKING:
    from personalize.recipe.fields import Recipe

# What is searched for is the same on every machine and every time, however slow it is.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of pocket's exact structure (v-prediction, zero-terminal SNR), random weights."""
    from tiny import build_base  # here and not above: pytest's main process needs no torch

    return build_base(tmp_path_factory.mktemp("tiny_base"))


@pytest.fixture(scope="session")
def narrow_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One level of it in narrow, for tests of how things are trained: a step takes a third of the time."""
    from tiny import build_base

    return build_base(tmp_path_factory.mktemp("narrow_base"), narrow=True)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder named `zwx` with four plain pictures of different sizes and no captions."""
    folder = tmp_path_factory.mktemp("data") / "zwx"
    folder.mkdir()
    for i, size in enumerate([(64, 64), (80, 64), (64, 96), (100, 100)]):
        picture = Image.linear_gradient("L").resize(size).convert("RGB")
        picture.paste((60 * i, 200 - 40 * i, 90), (10, 10 + 4 * i, 40, 40 + 4 * i))
        picture.save(folder / f"{i}.png")
    return folder


@pytest.fixture
def make(narrow_base: Path, pictures: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """The small recipe of the pictures on the narrow base, whose run folder is `run`; flags come over it."""
    from small import small_recipe

    return partial(small_recipe, narrow_base, pictures, output=tmp_path / "run")


@pytest.fixture(scope="session")
def plain_run(narrow_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """What `make()` makes, trained to its end: to be compared with."""
    from small import small_recipe

    from personalize.training.loop import train

    recipe = small_recipe(narrow_base, pictures, output=tmp_path_factory.mktemp("plain") / "run")
    for _ in train(recipe):
        pass
    return recipe


@pytest.fixture
def finished(make: Callable[..., Recipe], plain_run: Recipe) -> Recipe:
    """The same run, to be spoiled: what it left, in a folder of the test's own."""
    recipe, old = make(), plain_run.output
    assert old and recipe.output
    shutil.copytree(old, recipe.output)
    for name in ("recipe.toml", "events.jsonl"):
        text = (old / name).read_text(encoding="utf-8")
        (recipe.output / name).write_text(text.replace(str(old), str(recipe.output)), encoding="utf-8")
    return recipe


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests and their fixtures of any scope never touch the user's cache and workspace; they share some of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSONALIZE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("PERSONALIZE_WORKSPACE", str(tmp_path_factory.getbasetemp() / "workspace"))  # and not their server's
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order; and what lets processes share the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def short_exam() -> Iterator[None]:
    """Checkpoints are asked fewer questions: what is asked does not matter to what is done with the answers."""
    from personalize.training import selection

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PICTURES": 2, "OTHERS": 2, "EVERYDAY": ("a house",), "DRAWN": 1}.items():
            patch.setattr(selection, name, value)
        yield


@pytest.fixture(scope="session")
def base_builder() -> Callable[..., Path]:
    """`build_base`, for tests that need another scheduler or seed."""
    from tiny import build_base

    return build_base
