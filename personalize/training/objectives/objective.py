"""What a batch's loss is: the interface of objectives, and how their questions to the base are answered side by side.

An objective is a row of `registry.table("objectives")`: a class that is made of the recipe's settings and the base's noise
schedule. It draws everything random for a whole batch at once; the loop splits what was drawn by rows where memory is short.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ... import registry
from ...families.cond import Cond
from ...families.noise import Noise
from ...recipe.fields import Objective as Settings

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]  # x_t [b, c, h, w], t [b], conditioning of b captions -> [b, c, h, w]
Rng = Callable[[str], torch.Generator]  # what it is for -> a generator; the same for the same run, step and purpose
Off = Callable[[], contextlib.AbstractContextManager[None]]  # inside, the base predicts without the adapter


@dataclass(frozen=True)
class Needs:
    """What an objective wants beside images and captions."""

    class_images: bool = False  # images of the class, drawn by the base or brought; they are rows of every batch
    class_captions: bool = False  # the captions without the trigger, as the adapter and as the base alone read them
    reference: bool = False  # each image's caption without the trigger, as the base alone reads it
    base_first: bool = False  # its first question, and no later one, is to the base alone: that can be answered ahead of the step


@dataclass(frozen=True)
class Inputs:
    """A batch before anything is drawn: b images, and k <= b rows that the prior holds."""

    mean: Tensor  # [b, c, h, w], of the posterior over x_0; [b + k, c, h, w] with class images
    std: Tensor  # as mean
    cond: Cond  # b rows, or b + k with class images
    class_images: int = 0  # k, how many of the last rows are class images, for prior 'images'
    class_cond: Cond | None = None  # k rows, captions without the trigger for the first rows, for prior 'output'
    class_cond_off: Cond | None = None  # the same without the adapter; for prior 'dco' b rows, of the captions that `cond` reads
    mask: Tensor | None = None  # [b, 1, h, w] in 0..1, 1 where an image is to be learned; None: everywhere
    pictures: Tensor | None = None  # [b] on the CPU, which examples they are


class Rows(Protocol):
    """A batch, or some rows of one, with everything random drawn."""

    @property
    def batch(self) -> int:
        """How many images the whole batch has."""
        ...

    def split(self, n: int) -> Sequence[Any]:
        """The same rows in n pieces, in order; the losses of the pieces have together the gradient of the whole."""
        ...


@dataclass(frozen=True)
class Ask:
    """Rows that a loss wants to have predicted."""

    latents: Tensor  # x_t [n, c, h, w]
    t: Tensor  # [n]
    cond: Cond  # n rows
    off: bool = False  # by the base alone, as a constant


Asking = Generator[Ask, Tensor, Tensor]  # predictions [n, c, h, w] go in, and in the end losses [b] come out


class Objective(Protocol):
    """What a batch's loss is."""

    needs: ClassVar[Needs]

    def draw(self, inputs: Inputs, rng: Rng) -> Any:
        """The batch's Rows: everything random, drawn from `rng` by purpose."""
        ...

    def loss(self, rows: Any) -> Asking:
        """The losses [b] of some rows, as a coroutine: it yields what it wants to have predicted."""
        ...


def make_objective(settings: Settings, noise: Noise) -> Objective:
    """The objective that a recipe names."""
    made: Objective = registry.table("objectives")[settings.prior](settings, noise)
    return made


def needs_of(settings: Settings) -> Needs:
    """What the objective that a recipe names wants to have."""
    needs: Needs = registry.table("objectives")[settings.prior].needs
    return needs


def answer(losses: Sequence[Asking], denoise: Denoise, off: Off = contextlib.nullcontext) -> list[Tensor]:
    """Bring losses of rows of one shape to their ends side by side: [b] each.

    Each question of all of them is one call of `denoise`, whose rows are theirs in order and in equal shares.
    """
    ended: list[Tensor] = []
    answers: Sequence[Any] = [None] * len(losses)
    while True:
        asked = []
        for loss, told in zip(losses, answers, strict=True):
            try:
                asked.append(loss.send(told))
            except StopIteration as end:
                ended.append(end.value)
        if ended:
            return ended
        latents, t, cond = torch.cat([ask.latents for ask in asked]), torch.cat([ask.t for ask in asked]), join_cond(asked)
        with contextlib.ExitStack() as without:
            for context in (torch.no_grad(), off()) if asked[0].off else ():
                without.enter_context(context)
            answers = denoise(latents, t, cond).chunk(len(asked))


def answer_from(kept: Iterator[Tensor], asking: Asking) -> Asking:
    """The same loss, its questions to the base alone answered by what is `kept` for them."""
    told: Any = None
    while True:
        try:
            ask = asking.send(told)
        except StopIteration as end:
            losses: Tensor = end.value
            return losses
        told = next(kept) if ask.off else (yield ask)


def join_cond(asked: Sequence[Ask]) -> Cond:
    """The conditioning of all questions; that of a single one as it is."""
    return Cond.cat([ask.cond for ask in asked]) if len(asked) > 1 else asked[0].cond
