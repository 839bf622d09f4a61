"""One step's gradients, of one run or of many: forward and backward passes of as many rows as fit into memory.

A pass has rows of one shape: a piece of one run's batch, or pieces of several runs' batches side by side.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tuning.tunable import Tunable
from .objectives.objective import Asking, Inputs, Objective, Rng, answer, answer_from
from .optimizers import Optimizer

Seeds = Callable[[int], int]  # piece -> seed of its dropout
Batch = tuple[Inputs, Rng, Seeds]


@dataclass
class Learner:
    """What takes a step: values that learn, what their loss is, and how they follow its gradient."""

    tunable: Tunable
    objective: Objective
    opt: Optimizer
    pieces: int = 1  # in so many passes a batch is computed
    kept: Iterator[Tensor] | None = None  # what the base alone says of one batch after the other, computed elsewhere


@dataclass(frozen=True)
class Piece:
    """Rows of a learner's batch that are computed at once."""

    learner: Learner
    number: int  # of the learner
    inputs: Inputs  # the whole batch
    rng: Rng
    i: int  # of so many pieces
    n: int
    seed: int  # of its dropout

    @property
    def again(self) -> bool:
        """Whether later pieces go back through the same text encoder's pass."""
        return self.inputs.cond.tokens.requires_grad and self.i < self.n - 1

    @property
    def shape(self) -> Any:
        """Pieces of equal shape ask the same questions, and can be answered side by side."""
        one, held = self.inputs, self.inputs.class_cond
        prior = one.class_images, 0 if held is None else len(held)
        return one.mean.shape, one.cond.tokens.shape, prior, self.i, self.n, type(self.learner.objective)

    def loss(self) -> Asking:
        """Its losses; the whole batch is drawn, and only the coroutine holds it: it is gone before the backward pass."""
        objective = self.learner.objective
        asking = objective.loss(objective.draw(self.inputs, self.rng).split(self.n)[self.i])
        return answer_from(self.learner.kept, asking) if self.learner.kept else asking


Pass = Sequence[Piece]  # what goes through the base at once
Losses = list[tuple[int, Tensor]]  # of a pass: the number of each piece's learner, and the piece's losses [b]


def in_order(groups: Iterable[Pass]) -> list[Losses]:
    """Take passes one after the other; their gradients add up."""
    return [[(piece.number, loss) for piece, loss in zip(group, backward(group), strict=True)] for group in groups]


def gradients(
    learners: Sequence[Learner],
    batches: Sequence[Iterable[Batch]],
    at_once: int | None = None,
    take: Callable[[Iterable[Pass]], list[Losses]] = in_order,
) -> list[Tensor]:
    """Compute the gradients of a step that has some batches of each learner: [losses of all its images..., gradient's norm] each.

    Learners with more than one in common share one base. At most `at_once` of them go through it in one pass (None: all).
    `take` computes the passes. Nothing here waits for the device.
    """
    first = learners[0].tunable
    first.drop_gradients()
    micro_steps = itertools.zip_longest(*batches)
    with first.cast_once():
        losses = take(group for micro_step in micro_steps for group in passes(learners, micro_step, at_once))
    for learner in learners:
        learner.tunable.collect_gradients()
    own = [[loss for group in losses for number, loss in group if number == i] for i in range(len(learners))]
    return [torch.cat([*mine, learner.opt.norm()[None]]) for mine, learner in zip(own, learners, strict=True)]


def passes(learners: Sequence[Learner], batches: Sequence[Batch | None], at_once: int | None) -> Iterator[Pass]:
    """The passes of one batch of each learner (None: it has no more): pieces of one shape that ask the same questions."""
    split = [pieces_of(learners[i], i, batch) for i, batch in enumerate(batches) if batch is not None]
    for pieces in itertools.zip_longest(*split):
        groups: dict[Any, list[Piece]] = collections.defaultdict(list)
        for piece in pieces:
            if piece is not None:
                groups[piece.shape].append(piece)
        for group in groups.values():
            size = at_once or len(group)
            yield from (group[first : first + size] for first in range(0, len(group), size))


def pieces_of(learner: Learner, number: int, batch: Batch) -> list[Piece]:
    """A learner's batch in pieces."""
    inputs, rng, seeds = batch
    return [Piece(learner, number, inputs, rng, i, learner.pieces, seeds(i)) for i in range(learner.pieces)]


def backward(group: Pass) -> list[Tensor]:
    """One pass through the base per question, and one back: the losses [b] of each piece."""
    first, *others = (piece.learner.tunable for piece in group)
    with contextlib.ExitStack() as stack:
        stack.enter_context(first.computing(*others))
        for piece in group:  # checkpointed blocks drop the same again in the backward pass
            stack.enter_context(piece.learner.tunable.dropout(piece.seed))
        losses = answer([piece.loss() for piece in group], first.base.denoise, first.off)
        shares = [
            piece.learner.opt.share(loss, len(piece.inputs.mean) - piece.inputs.class_images)
            for piece, loss in zip(group, losses, strict=True)
        ]
        total = shares[0] if len(shares) == 1 else torch.stack(shares).sum()
        total.backward(retain_graph=any(piece.again for piece in group))
    return [loss.detach() for loss in losses]
