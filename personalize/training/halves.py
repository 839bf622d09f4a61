"""The passes of a step on a small base, in two halves that two processes may take: a fleet's members, or micro-steps.

The gradient is the sum of the halves' sums, whoever computes them: it is the same to the bit in one process and in two. Rows of
one batch are not halved for that: on the embedded base model, half of 6 rows takes two thirds of the time.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..models.model import Base
from ..models.processes import YIELDED, Copy, cores, processes
from ..models.threads import is_small
from .run import ActiveRun
from .step import Losses, Pass, in_order, passes

Gradients = list[Tensor | None]


class Halves(contextlib.ExitStack):
    """How the steps of runs that share a base are computed until the end of the `with` block; see `backward`.

    `close` ends the second process, if there is one; the next step that needs one makes it from what is there then.
    """

    def __init__(self, base: Base, runs: Sequence[ActiveRun]) -> None:
        super().__init__()
        self.base, self.runs = base, {run.number: run for run in runs}
        self.leaves = runs[0].tunable.leaves() if runs else []  # none: no member could begin
        self._copy: Copy | None = None

    def at_once(self, count: int, at_once: int | None) -> int | None:
        """How many of `count` runs go through the base in one pass, where `at_once` may in all processes (None: all)."""
        if count < 2 or cores() < 2 or not is_small(self.base):
            return at_once
        return -(-min(count, at_once or count) // 2)

    def backward(self, active: Sequence[ActiveRun], at_once: int | None) -> Callable[[Iterable[Pass]], list[Losses]]:
        """The function that takes the passes of the next step of some runs. A second process begins with its half at once."""
        some = at_once is not None and at_once < len(active)
        several = some or any(run.learner.pieces > 1 or run.plan.recipe.optim.accumulate > 1 for run in active)
        if not (several and is_small(self.base)):
            return in_order
        if processes(self.base) == 1:
            return self._in_halves
        if self._copy is None:
            self._values, self._gradients = (shared_tensors(self.leaves) for _ in range(2))
            self._copy = self.enter_context(Copy(self._take_second_halves))
            self.callback(setattr, self, "_copy", None)
        torch._foreach_copy_(self._values, [leaf.detach() for leaf in self.leaves])
        self._copy.send(YIELDED, ({run.number: run.done for run in active}, at_once))
        return self._beside_copy

    def _in_halves(self, groups: Iterable[Pass]) -> list[Losses]:
        groups = list(groups)
        losses = in_order(groups[::2])
        mine = take_gradients(self.leaves)
        others = in_order(groups[1::2])
        add_gradients(self.leaves, mine)
        return alternate(losses, others)

    def _beside_copy(self, groups: Iterable[Pass]) -> list[Losses]:
        assert self._copy
        losses = in_order(list(groups)[::2])
        _, (told, there) = self._copy.receive()
        others = [[(number, torch.tensor(loss)) for number, loss in one] for one in told]
        theirs = [one if has else None for one, has in zip(self._gradients, there, strict=True)]
        mine = take_gradients(self.leaves)
        for leaf, gradient in zip(self.leaves, theirs, strict=True):
            leaf.grad = None if gradient is None else gradient.clone()
        add_gradients(self.leaves, mine)
        return alternate(losses, others)

    def _take_second_halves(self, here: Copy) -> None:
        """What the second process does: the other half of each step that it is told of, with the values of then."""
        while True:
            _, (done, at_once) = here.receive()
            with torch.no_grad():
                torch._foreach_copy_([leaf.detach() for leaf in self.leaves], self._values)
            losses = in_order(list(self._passes(done, at_once))[1::2])
            gradients = take_gradients(self.leaves)
            for shared, gradient in zip(self._gradients, gradients, strict=True):
                if gradient is not None:
                    shared.copy_(gradient)
            told = [[(number, loss.tolist()) for number, loss in one] for one in losses]
            here.send(YIELDED, (told, [gradient is not None for gradient in gradients]))

    def _passes(self, done: Mapping[int, int], at_once: int | None) -> Iterable[Pass]:
        """The passes of the step after so many of each run, as the first process has them."""
        active = [self.runs[number] for number in done]
        for run in active:
            if run.done != done[run.number]:
                run.done = done[run.number]
                run.rewind()
        batches = itertools.zip_longest(*[run.next_batches() for run in active])
        for micro_step in batches:
            yield from passes([run.learner for run in active], micro_step, at_once)
        for run in active:
            run.done += 1


def shared_tensors(like: Sequence[nn.Parameter]) -> list[Tensor]:
    """Tensors of the same shapes in memory that copies of this process share with it."""
    memory = mmap.mmap(-1, 4 * sum(one.numel() for one in like))
    parts = torch.frombuffer(memory, dtype=torch.float32).split([one.numel() for one in like])
    return [part.view(one.shape) for part, one in zip(parts, like, strict=True)]


def take_gradients(leaves: Sequence[nn.Parameter]) -> Gradients:
    """The gradients, which are none afterwards."""
    taken: Gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return taken


def add_gradients(leaves: Sequence[nn.Parameter], gradients: Gradients) -> None:
    """Let each leaf's gradient be the sum of this one and its own."""
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else gradient.add_(leaf.grad)


def alternate(first: Sequence[Losses], second: Sequence[Losses]) -> list[Losses]:
    """What belongs to passes 0, 2, ... and 1, 3, ..., in order."""
    pairs = itertools.zip_longest(first, second)
    return [one for pair in pairs for one in pair if one is not None]
