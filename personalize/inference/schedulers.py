"""diffusers' schedulers by the names that people know, on the noise of a base."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import diffusers

from ..errors import BaseModelError, RecipeError
from ..recipe.samplers import AUTO, SAMPLERS, name_of, sampler_name

if TYPE_CHECKING:
    from ..models.model import Base

Size = int | tuple[int, int]
Shape = tuple[int, int, int]  # [c, h, w] of latents
DDIM = "DDIMScheduler"  # of a config that names none


def make_sampler(base: Base, steps: int, name: str = AUTO) -> Any:
    """A diffusers scheduler by the name that people know, set to `steps` steps; on auto the one that the base's config names.

    Raises RecipeError for a name that is none, a sampler that cannot draw with this base, or not in so many steps,
    BaseModelError for one that diffusers does not have here.
    """
    name = sampler_of(base, name)
    sampler = scheduler_of(base, name)
    if steps > sampler.config.num_train_timesteps:
        raise RecipeError(f"--steps must be at most {sampler.config.num_train_timesteps} for {base.name}, not {steps}")
    try:
        sampler.set_timesteps(steps)
    except ValueError as error:  # LCM has a limit of its own
        raise RecipeError(f"--sampler {name} does not draw in {steps} steps: {' '.join(str(error).split())}") from error
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(0)  # else it looks for its first timestep, which Karras' steps may have twice
    return uniform(sampler)


def scheduler_of(base: Base, name: str) -> Any:
    """The base's own scheduler as its config says, where that is its name; else the named one, on the base's noise."""
    own, row = name == sampler_of(base), SAMPLERS.get(name)
    if row and not row.sample and base.noise.prediction == "sample":
        raise RecipeError(f"--sampler {name} cannot draw with {base.name}, which predicts pictures", "try Euler or DDIM")
    what = f"the scheduler of {base.name}" if own else f"--sampler {name}"
    kind, config = base.scheduler_config.get("_class_name", DDIM), base.scheduler_config
    if row and not own:
        try:
            kind, config = base.noise.scheduler(row.scheduler, row.options, base.scheduler_config)
        except LookupError as error:
            raise RecipeError(f"--sampler {name} cannot draw with {base.name}, {error.args[0]}", "try Euler") from None
    if not hasattr(diffusers, kind):
        raise BaseModelError(f"{what} is {kind}, which diffusers {diffusers.__version__} does not have")
    try:
        return copy.deepcopy(_fresh(getattr(diffusers, kind).from_config, json.dumps(dict(config))))
    except ImportError as error:  # some need scipy or torchsde
        raise BaseModelError(f"{what}, {kind}, lacks something: {' '.join(str(error).split())}") from error


@functools.lru_cache(64)
def _fresh(create: Callable[[dict[str, Any]], Any], config: str) -> Any:
    """A scheduler as it is made, for copies: DPM2's take a quarter of a second, and every batch needs one."""
    return create(json.loads(config))


def sampler_of(base: Base, name: str = AUTO) -> str:
    """A sampler's name as UIs write it; on auto that of the base's own. Raises RecipeError for an unknown one."""
    if (found := sampler_name(name)) != AUTO:
        return found
    kind = str(base.scheduler_config.get("_class_name", DDIM))
    defaults = inspect.signature(getattr(diffusers, kind, object)).parameters
    config = {key: value.default for key, value in defaults.items()} | dict(base.scheduler_config)
    return name_of(base.noise.native(kind.removesuffix("Scheduler")), config)


def uniform(sampler: Any) -> Any:
    """A scheduler that answers to the names of all others; those of flows lack some."""
    if not hasattr(sampler, "scale_model_input"):
        sampler.scale_model_input = lambda latents, t: latents
    if not hasattr(sampler, "init_noise_sigma"):
        sampler.init_noise_sigma = 1.0
    if not hasattr(sampler, "add_noise") and hasattr(sampler, "scale_noise"):
        sampler.add_noise = lambda latents, noise, t: sampler.scale_noise(latents, t, noise)
    return sampler


def latent_shape(base: Base, size: Size | None) -> Shape:
    """[c, h, w] of the latents of a `size` picture."""
    width, height = (size, size) if isinstance(size, int) else size or (base.resolution, base.resolution)
    factor = base.factor
    for side in (width, height):
        if side < factor or side % factor:
            near = max(factor, round(side / factor) * factor)
            raise RecipeError(f"--size must be a multiple of {factor} for {base.name}, not {side}", f"try {near}")
    return base.channels, height // factor, width // factor
