"""A run in progress: what it works with, and where it stands."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..tuning.tunable import Tunable
from .inputs import TrainingData, dropout_seeds, rng_of, training_batches
from .memory.ladder import ComputePlan, pieces
from .memory.pace import Pace
from .memory.plan import MemoryPlan
from .objectives.objective import Inputs, Rng, make_objective
from .optimizers import Optimizer
from .preflight import RunPlan
from .rundir import Commit, State
from .step import Batch, Learner

GOOD = "good "  # begins the names of what an interrupted run would go back to
Seen = tuple[Tensor, Rng]  # which images [b] a micro-step had, and what it drew from


@dataclass
class ActiveRun:
    """A run in progress."""

    plan: RunPlan
    data: TrainingData
    tunable: Tunable
    learner: Learner
    memory: MemoryPlan
    good: State  # of the last checkpoint
    number: int = 0  # of its recipe
    began: float = field(default_factory=time.perf_counter)
    done: int = 0
    failed: list[int] = field(default_factory=list)  # the last steps that were not finite
    cause: str = ""  # why the last of them failed
    probe: int | None = None  # bytes that the probe took
    pace: Pace = field(default_factory=Pace)
    between: bool = True  # samples and files that are due at `done` steps are still to be made
    ended: bool = False
    commit: Commit | None = None  # of the states of all runs that go side by side
    seen: list[Seen] = field(default_factory=list)  # of the step that is being taken
    batches: Iterator[Inputs] = field(init=False)

    def __post_init__(self) -> None:
        self.rewind()

    @property
    def opt(self) -> Optimizer:
        return self.learner.opt

    @property
    def compute(self) -> ComputePlan:
        return self.memory.compute

    @property
    def steps_left(self) -> bool:
        """Whether there are steps to take."""
        return not self.ended and self.done < self.plan.recipe.steps

    def rewind(self) -> None:
        """Be ready for the step after those that are done."""
        self.learner.pieces = pieces(self.compute, self.plan.recipe.batch_size)
        start = self.done * self.plan.recipe.optim.accumulate
        self.batches = training_batches(self.plan, self.data, start, self.tunable.off)

    def next_batches(self) -> Iterator[Batch]:
        """The batches of the next step, one micro-step after the other, as this run's adapter reads their captions."""
        recipe = self.plan.recipe
        self.opt.thaw(self.done)
        self.seen = []
        for micro in range(self.done * recipe.optim.accumulate, (self.done + 1) * recipe.optim.accumulate):
            with self.tunable.computing():
                inputs, rng = next(self.batches), rng_of(recipe, micro)
            assert inputs.pictures is not None
            self.seen.append((inputs.pictures, rng))
            yield inputs, rng, dropout_seeds(recipe, micro)

    def state(self) -> State:
        """Where the run stands now."""
        changes = {"changes": self.plan.history} if self.plan.history else {}
        company = {"commit": self.commit.record(self.plan.run.folder)} if self.commit else {}
        more = {"fit": self.compute.record(), "failed": self.failed, **changes, **company}
        return State(self.done, self.plan.about, self.opt.state(), more)

    def write_state(self, due: bool) -> None:
        """Write the state beside the last one. One that is `due` is what the run goes back to from now on, unless it is spoiled.

        Any other one holds that of the last checkpoint as well: what the run would go back to is the same later.
        """
        state = self.state()
        if due:
            if not all(bool(tensor.isfinite().all()) for tensor in state.tensors.values()):
                return
            self.good = state
        elif self.good.done < self.done:
            state.tensors.update({GOOD + name: tensor for name, tensor in self.good.tensors.items()})
            state.more["good"] = self.good.done
        self.plan.run.write_state(state)

    def write_last_state(self) -> None:
        """Write the state of an interrupted run. After its last step it is there, and another checkpoint may be attached."""
        if self.steps_left or self.good.done < self.done:
            self.write_state(due=False)

    def facts(self) -> dict[str, Any]:
        """How the run fits into memory, for events, the report and the file."""
        expected = self.memory.estimate
        return {
            "words": self.compute.words(self.plan.recipe.batch_size),
            **self.compute.record(),
            "estimate": None if expected is None else {**asdict(expected), "peak": expected.peak},
            "probe": self.probe,
            "budget": self.memory.budget,
            "why": list(self.memory.why),
        }


def start_run(plan: RunPlan, data: TrainingData, tunable: Tunable, memory: MemoryPlan, number: int = 0) -> ActiveRun:
    """A run at its beginning, or where its state left it."""
    recipe = plan.recipe
    scaled = memory.compute.precision == "float16"
    opt = Optimizer(tunable.parameters(), recipe.optim, recipe.steps, scaled=scaled, rates=plan.rates)
    learner = Learner(tunable, make_objective(recipe.objective, plan.base.noise), opt)
    state = plan.state
    if state is None:
        return ActiveRun(plan, data, tunable, learner, memory, State(0, plan.about, opt.state()), number)
    opt.load(state.tensors)
    behind = {name.removeprefix(GOOD): one for name, one in state.tensors.items() if name.startswith(GOOD)}
    good = State(state.more["good"], plan.about, behind) if behind else state
    failed = list(state.more.get("failed", []))
    return ActiveRun(plan, data, tunable, learner, memory, good, number, done=state.done, failed=failed)


def put_states(runs: Sequence[ActiveRun]) -> None:
    """Let the states that runs have written, also before an interruption, take their places: all of them, or none."""
    commit = next((run.commit for run in runs if run.commit), None)
    if commit:
        commit.make()
    for run in runs:
        run.plan.run.put_state()
    if commit:
        commit.clear()


def peak_bytes(device: torch.device) -> int:
    """The most memory that the process has held: of the GPU, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
