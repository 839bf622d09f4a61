"""Fleets: many recipes, those on one base and with adapters of one shape trained side by side in the same passes.

Each member is a run of its own: what it leaves is what `train` would leave, but for the rounding of sums in another order, and
either goes on with what the other has begun.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import PersonalizeError, RecipeError, check_type
from ..models.model import Base
from ..recipe.fields import Recipe
from .events import Failed, Finished, Shared, Step, Stopped, Warned
from .loop import AMONG_OTHERS, Numbered, again, train, train_plan, train_plans
from .memory.ladder import ComputePlan
from .memory.plan import MemoryPlan, choose_memory_plan, estimate_of
from .preflight import RunPlan, check
from .rundir import Run


def train_fleet(recipes: Sequence[Recipe], *, fresh: bool = False, together: int | None = None) -> Iterator[Numbered]:
    """Train an adapter for each recipe, side by side where they can be: on one base, with adapters of one shape.

    Yields (number of the recipe, event). All are checked before the first is trained. A run that cannot begin, or that fails on
    the way, says so, and the others go on. At most `together` members go through the base at once, and fewer where memory runs
    out. Ctrl-C (or closing the iterator) saves all states; the same call again goes on.
    """
    wanted = 'a list of recipes: p.train_fleet([p.resolve(folder="photos/rex"), p.resolve(folder="photos/tom")])'
    check_type(recipes, (list, tuple), "what is trained", wanted, RecipeError)
    for one in recipes:
        check_type(one, Recipe, "what is trained", wanted, RecipeError)
    with contextlib.ExitStack() as all_locks:
        locks = [all_locks.enter_context(contextlib.ExitStack()) for _ in recipes]
        for i, event in train_companies(recipes, fresh, together, locks):
            yield i, event
            if isinstance(event, Failed | Finished | Stopped):
                locks[i].close()


def train_companies(
    recipes: Sequence[Recipe], fresh: bool, together: int | None, locks: Sequence[contextlib.ExitStack]
) -> Iterator[Numbered]:
    """The same; each run's folder is held until the lock of its number is closed."""
    fleets: dict[str, dict[int, RunPlan]] = {}
    bases: dict[str, Base] = {}
    places: dict[Path, int] = {}

    def claim(i: int, run: Run) -> None:
        if (other := places.setdefault(run.folder.resolve(), i)) != i:
            raise RecipeError(
                f"{run.folder} is the run folder of two recipes", f"{recipes[other].data.folder} and {recipes[i].data.folder}"
            )
        if not recipes[i].choosing.leave_one_out:  # `train` does it
            locks[i].enter_context(run.hold())

    for i, recipe in enumerate(recipes):
        company = company_of(i, recipe)
        try:
            plan = check(recipe, fresh=fresh, base=bases.get(company), claim=functools.partial(claim, i))
        except PersonalizeError as error:
            yield i, Failed(0, str(error))
            continue
        bases[company] = plan.base
        if plan.finished:
            yield from ((i, event) for event in again(plan))
        else:
            fleets.setdefault(company, {})[i] = plan
    several = sum(map(len, fleets.values())) > 1
    for plans in fleets.values():
        if len(plans) == 1 and several:
            i, plan = next(iter(plans.items()))
            yield i, Warned(0, f"{plan.run.folder} is trained alone: {why_alone(plan.recipe)}")
        if len(plans) > 1:
            yield from train_side_by_side(plans, fresh, together)
        else:
            yield from train_alone(*next(iter(plans.items())), fresh)


def company_of(number: int, recipe: Recipe) -> str:
    """What members of one fleet have in common. Dropout draws for a whole batch, and folds are runs before the run: alone."""
    learned = bool(recipe.optim.lr), bool(recipe.optim.text_encoder_lr)
    shape = recipe.adapter.model_dump(exclude={"alpha", "init_word"}), learned, recipe.fitting.model_dump(), recipe.device
    alone = number if recipe.adapter.dropout or recipe.choosing.leave_one_out else None
    return repr((recipe.base, recipe.prediction, recipe.zero_snr, recipe.clip_skip, recipe.vae, shape, alone))


def why_alone(recipe: Recipe) -> str:
    """Why a run that could not be joined by another goes through the base by itself."""
    if recipe.choosing.leave_one_out:
        return "--leave-one-out trains other runs before it"
    return "--dropout draws for a whole batch" if recipe.adapter.dropout else "no other has its base, kind, shape and --memory"


def train_alone(number: int, plan: RunPlan, fresh: bool) -> Iterator[Numbered]:
    """A run that goes with no other."""
    last = 0
    try:
        folds = plan.recipe.choosing.leave_one_out  # runs before the run, which is checked once they are done
        for event in train(plan.recipe, fresh=fresh) if folds else train_plan(plan, fresh=fresh):
            last = event.step if isinstance(event, Step) else last
            yield number, event
    except PersonalizeError as error:
        yield number, Failed(last, str(error))


def train_side_by_side(plans: Mapping[int, RunPlan], fresh: bool, together: int | None) -> Iterator[Numbered]:
    """The members of one fleet, and before them what each takes."""
    number, first = next(iter(plans.items()))

    def at_once(memory: MemoryPlan, size: int) -> int | None:
        return together or affordable(first, memory, size)

    memory = choose_memory_plan(first)
    yield number, memory_of_members(first, memory, len(plans), at_once(memory, len(plans)))
    yield from train_plans(plans, AMONG_OTHERS, fresh=fresh, at_once=at_once)


def memory_of_members(plan: RunPlan, memory: MemoryPlan, size: int, at_once: int | None) -> Shared:
    """What a step of `size` members takes, from the estimate of one: each has its own adapter, and its own rows."""
    one = memory.estimate or estimate_of(plan, memory.compute)
    return Shared(size, min(size, at_once or size), one.weights, one.adapter, one.activations)


def affordable(plan: RunPlan, memory: MemoryPlan, size: int) -> int | None:
    """How many members' batches fit at once, by estimate: a power of two; None where there is no budget to keep to."""
    if memory.budget is None:
        return None
    count = 1
    one = memory.estimate or estimate_of(plan, memory.compute)
    others = (size - 1) * one.adapter  # all adapters are there all the time
    while count < size and peak_of(plan, memory.compute, 2 * count) + others <= memory.budget:
        count *= 2
    return count


def peak_of(plan: RunPlan, compute: ComputePlan, count: int) -> int:
    """Bytes that a step takes with so many members' batches in one, by estimate, and one member's adapter."""
    rows = count * plan.recipe.batch_size
    larger = replace(plan, recipe=plan.recipe.model_copy(update={"batch_size": rows}))
    return estimate_of(larger, replace(compute, micro_batch=rows)).peak
