"""What a session keeps between pictures, and what a picture computes once: the same bits, and nothing done twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import adapter_of, everything
from test_session import pictures

from personalize.adapters.adapter import Adapter
from personalize.errors import AdapterError
from personalize.inference import sampling, stacks
from personalize.inference.library import Library
from personalize.inference.pipeline import draw
from personalize.inference.request import Request
from personalize.inference.session import Session
from personalize.models.model import Base
from personalize.recipe.fields import AdapterSpec
from personalize.tuning.attach import attach
from personalize.tuning.placement import place_of

PROMPTS = ["a cat <lora:rex:0.8>", "a cat <lora:rex:0.5>", "a cat <lora:rex:0.8> <lora:ink>", "a cat <lora:rex:0@0,1@1>", "a cat"]


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> Base:
    return Base.load(narrow_base)


@pytest.fixture(scope="module")
def adapters(base: Base) -> dict[str, Adapter]:
    return {"rex": adapter_of(base, 0), "ink": adapter_of(base, 1, rank=3)}


@pytest.fixture
def attached_anew(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stack for each time that one was attached."""
    calls: list[Any] = []

    def counted(base: Base, stack: Any) -> Any:
        calls.append(stack)
        return attach(base, stack)

    monkeypatch.setattr(stacks, "attach", counted)
    return calls


def one(session: Session, prompt: str, **settings: Any) -> bytes:
    return pictures(session.draw([Request.parse(prompt, **{"steps": 2} | settings)]))[0]


def test_a_stack_that_was_drawn_with_is_put_back_and_draws_the_same(
    base: Base, adapters: dict[str, Adapter], attached_anew: list[Any]
) -> None:
    before = everything(base)
    session = Session(base, Library(adapters))
    first = {prompt: one(session, prompt) for prompt in PROMPTS}
    assert len(set(first.values())) == len(PROMPTS) and len(attached_anew) == len(PROMPTS) - 1
    assert {prompt: one(session, prompt) for prompt in reversed(PROMPTS)} == first
    assert len(attached_anew) == len(PROMPTS) - 1
    assert {prompt: one(Session(base, Library(adapters)), prompt) for prompt in PROMPTS} == first
    assert everything(base) == before


def test_a_stack_whose_drawing_was_stopped_draws_the_same_later(base: Base, adapters: dict[str, Adapter]) -> None:
    session = Session(base, Library(adapters))
    events = session.draw([Request.parse(PROMPTS[3], steps=4)])
    next(events)
    session.cancel()
    list(events)
    assert one(session, PROMPTS[3], steps=4) == one(Session(base, Library(adapters)), PROMPTS[3], steps=4)


def test_stacks_that_take_too_much_are_let_go_oldest_first(
    base: Base, adapters: dict[str, Adapter], attached_anew: list[Any]
) -> None:
    session = Session(base, Library(adapters))
    one(session, PROMPTS[0])
    session._stacks.most = session._stacks._kept[next(iter(session._stacks._kept))].nbytes
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[0]):
        one(session, prompt)
    assert len(attached_anew) == 3 and len(session._stacks._kept) == 1


def test_a_base_that_has_changed_meanwhile_is_drawn_with_as_it_is(base: Base, adapters: dict[str, Adapter]) -> None:
    session = Session(base, Library(adapters))
    first = one(session, PROMPTS[0])
    parent, leaf = place_of(base, sorted(adapters["rex"].deltas)[0])
    own = parent.get_submodule(leaf)
    with torch.no_grad():
        own.weight.mul_(2)  # another value in its place
    try:
        assert (changed := one(session, PROMPTS[0])) == one(Session(base, Library(adapters)), PROMPTS[0]) != first
        other = torch.nn.Linear(*own.weight.shape[::-1], bias=own.bias is not None)
        other.load_state_dict(own.state_dict())
        other.requires_grad_(False)
        setattr(parent, leaf, other)  # another layer
        assert one(session, PROMPTS[0]) == changed and parent.get_submodule(leaf) is other
    finally:
        setattr(parent, leaf, own)
        with torch.no_grad():
            own.weight.mul_(0.5)
    assert one(session, PROMPTS[0]) == first


def test_a_kept_stack_does_not_go_onto_a_base_that_carries_another(base: Base, adapters: dict[str, Adapter]) -> None:
    session = Session(base, Library(adapters))
    first = one(session, PROMPTS[0])
    with attach(base, AdapterSpec(rank=1)), pytest.raises(AdapterError, match="already carries"):
        one(session, PROMPTS[0])
    assert one(session, PROMPTS[0]) == first


# ---------------------------------------------------------------- text


@contextlib.contextmanager
def calls_of(base: Base, leaf: str) -> Iterator[list[int]]:
    """How often a layer of this name computed, each time."""
    layer = next(module for path, module in base.unet.named_modules() if path.endswith(leaf))
    counted: list[int] = []
    own = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        counted.append(1)
        return own(x)

    layer.forward = forward
    try:
        yield counted
    finally:
        del layer.forward


def each_time(base: Base) -> contextlib.AbstractContextManager[Callable[[], None]]:
    return contextlib.nullcontext(lambda: None)


def test_text_is_read_once_a_picture_and_the_image_at_every_step(base: Base) -> None:
    for leaf, count in (("attn2.to_k", 1), ("attn2.to_v", 1), ("attn2.to_q", 3), ("attn1.to_k", 3)):
        with calls_of(base, leaf) as calls:
            draw(base, ["a cat"], [0], steps=3)
        assert len(calls) == count, leaf
    assert not any("forward" in vars(module) for module in base.unet.modules())


@pytest.mark.parametrize("prompt", ["a cat", "a [cat:dog:0.5]", PROMPTS[0], PROMPTS[3], "a cat <lora:rex:te=0@0,1@1:unet=1>"])
@pytest.mark.parametrize("sampler", ["auto", "Heun"])
def test_a_picture_is_the_same_where_text_is_read_at_every_step(
    base: Base, adapters: dict[str, Adapter], prompt: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = one(Session(base, Library(adapters)), prompt, steps=4, sampler=sampler)
    monkeypatch.setattr(sampling, "reading_text_once", each_time)
    assert one(Session(base, Library(adapters)), prompt, steps=4, sampler=sampler) == once


def test_what_learns_is_read_anew(base: Base) -> None:
    layer = next(module for path, module in base.unet.named_modules() if path.endswith("attn2.to_k"))
    x = torch.randn(1, 4, layer.weight.shape[1])
    with sampling.reading_text_once(base):
        assert layer(x).grad_fn is None and layer(x) is not layer(x)  # gradients are on
        with torch.no_grad():
            assert layer(x) is layer(x) and layer(x.clone()) is not layer(x)
