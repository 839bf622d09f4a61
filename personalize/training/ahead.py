"""What the base alone predicts at the coming steps of a run, for the prior: a copy of this process computes it ahead of them.

It depends on images, captions and random numbers of a step, and on nothing that is learned.
"""

from __future__ import annotations

import contextlib

import torch

from ..models.processes import YIELDED, Copy, processes
from .run import ActiveRun


class Ahead(contextlib.ExitStack):
    """Lets a second process answer a run's questions to the base alone, until it is closed or the `with` block ends.

    For a run alone, whose batches go through the base whole, and whose captions are read once: embedding would take longer than
    is gained. Answers are the same to the bit: the copy asks the same base about the same rows.
    """

    def begin(self, run: ActiveRun) -> None:
        """Have the answers of the steps from where the run stands, if it has none yet, computed from now on."""
        learner, recipe = run.learner, run.plan.recipe
        asks = learner.objective.needs.base_first and learner.pieces == 1 and not recipe.reading_steps
        if learner.kept is None and asks and processes(run.plan.base) > 1:
            copy = self.enter_context(Copy(lambda here: send_answers(here, run)))
            kind = run.plan.base.dtype
            learner.kept = (torch.from_numpy(copy.receive()[1]).to(kind) for _ in range(recipe.steps * recipe.optim.accumulate))
            self.callback(setattr, learner, "kept", None)


def send_answers(here: Copy, run: ActiveRun) -> None:
    """Send what the base alone says of each step's rows, from where the run stands to its end; the pipe holds a few."""
    objective = run.learner.objective
    for _ in range(run.done, run.plan.recipe.steps):
        for inputs, rng, _ in run.next_batches():
            asking = objective.loss(objective.draw(inputs, rng))
            ask = next(asking)
            with torch.no_grad(), run.tunable.off():
                here.send(YIELDED, run.plan.base.denoise(ask.latents, ask.t, ask.cond).float().numpy())  # numpy has no bfloat16
        run.done += 1
