"""A small base computes with one thread, unless somebody says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from personalize.inference.pipeline import draw
from personalize.models import threads
from personalize.models.model import Base
from personalize.models.threads import few_threads
from personalize.training import loop


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> Base:
    return Base.load(narrow_base)


def test_blocks_that_overlap_in_any_order_give_the_threads_back(base: Base) -> None:
    first, second = few_threads(base), few_threads(base)
    first.__enter__()
    assert torch.get_num_threads() == 1
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_num_threads() == 1
    second.__exit__(None, None, None)
    assert torch.get_num_threads() == 3


def test_big_bases_and_what_somebody_says_stay_as_they_are(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, few_threads(base):
        patch.setenv("OMP_NUM_THREADS", "3")
        with few_threads(base):
            assert torch.get_num_threads() == 1  # it is within a block that began before
    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "3")
        with few_threads(base):
            assert torch.get_num_threads() == 3
    monkeypatch.setattr(threads, "SMALL", 1000)
    with few_threads(base):
        assert torch.get_num_threads() == 3


def test_training_and_drawing_use_one(base: Base, make, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    seen: list[int] = []

    def spy(module: object, name: str) -> None:
        kept = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (seen.append(torch.get_num_threads()), kept(*a, **k))[1])

    spy(loop, "gradients")
    spy(loop, "prepare_data")
    for _ in loop.train(make(steps=1, choose="none", sample_every=0, sample_seeds=[])):
        pass
    spy(base, "denoise")
    draw(base, ["a cat"], [0], steps=1)
    assert len(seen) >= 3 and set(seen) == {1} and torch.get_num_threads() == 3
