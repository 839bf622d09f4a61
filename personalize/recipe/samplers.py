"""Samplers by the names that people know them by: a row each.

A name is read in any case, with spaces, dashes and underscores or without, and as ComfyUI writes it: `euler_a`, `Euler a` and
`euler_ancestral` are one; so are `dpm++ 2m karras`, `DPM++ 2M Karras` and `dpmpp_2m_karras`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError, nearest

AUTO = "auto"  # the one that the base's own scheduler config names


@dataclass(frozen=True)
class Sampler:
    """A sampler as UIs call it, and what diffusers has of it."""

    name: str
    scheduler: str  # diffusers' class, without `Scheduler`
    options: Mapping[str, Any]  # what tells it from others of its class
    sample: bool = True  # whether it can follow a base that predicts pictures, not noise or velocity

    def names(self, scheduler: str, config: Mapping[str, Any]) -> bool:
        """Whether a scheduler of this class (without `Scheduler`) and whole config is this one."""
        return scheduler == self.scheduler and all(config.get(key) == value for key, value in self.options.items())


EVEN, KARRAS = {"use_karras_sigmas": False}, {"use_karras_sigmas": True}  # Karras et al. 2022, eq. 5
ORDER = {order: {"algorithm_type": "dpmsolver++", "solver_order": order} for order in (2, 3)}
SDE = {order: {"algorithm_type": "sde-dpmsolver++", "solver_order": order} for order in (2, 3)}

SAMPLERS = {
    row.name: row
    for row in (
        Sampler("Euler", "EulerDiscrete", EVEN),
        Sampler("Euler Karras", "EulerDiscrete", KARRAS),
        Sampler("Euler a", "EulerAncestralDiscrete", {}, sample=False),
        Sampler("Heun", "HeunDiscrete", EVEN),
        Sampler("Heun Karras", "HeunDiscrete", KARRAS),
        Sampler("LMS", "LMSDiscrete", EVEN),
        Sampler("LMS Karras", "LMSDiscrete", KARRAS),
        Sampler("DPM2", "KDPM2Discrete", EVEN, sample=False),
        Sampler("DPM2 Karras", "KDPM2Discrete", KARRAS, sample=False),
        Sampler("DPM2 a", "KDPM2AncestralDiscrete", EVEN, sample=False),
        Sampler("DPM2 a Karras", "KDPM2AncestralDiscrete", KARRAS, sample=False),
        Sampler("DPM++ 2M", "DPMSolverMultistep", ORDER[2] | EVEN),
        Sampler("DPM++ 2M Karras", "DPMSolverMultistep", ORDER[2] | KARRAS),
        Sampler("DPM++ 2M SDE", "DPMSolverMultistep", SDE[2] | EVEN),
        Sampler("DPM++ 2M SDE Karras", "DPMSolverMultistep", SDE[2] | KARRAS),
        Sampler("DPM++ 3M SDE", "DPMSolverMultistep", SDE[3] | EVEN),
        Sampler("DPM++ 3M SDE Karras", "DPMSolverMultistep", SDE[3] | KARRAS),
        Sampler("UniPC", "UniPCMultistep", EVEN),
        Sampler("UniPC Karras", "UniPCMultistep", KARRAS),
        Sampler("DEIS", "DEISMultistep", EVEN),
        Sampler("DDIM", "DDIM", {}),
        Sampler("DDPM", "DDPM", {}),
        Sampler("PLMS", "PNDM", {"skip_prk_steps": True}, sample=False),
        Sampler("LCM", "LCM", {}),
    )
}


def plain_spelling(text: str) -> str:
    """A name without what people write differently.

    >>> plain_spelling("DPM++ 2M Karras"), plain_spelling("euler_ancestral")
    ('dpm++2mkarras', 'eulera')
    """
    plain = re.sub(r"[\s_-]+", "", text.lower())
    return plain.replace("dpmpp", "dpm++").replace("ancestral", "a").replace("pndm", "plms")


SPELLED = {plain_spelling(name): name for name in (AUTO, *SAMPLERS)}


def sampler_name(text: Any) -> str:
    """The name of the sampler that is meant, or `auto`. Raises RecipeError for one that is none.

    >>> sampler_name("dpmpp_2m"), sampler_name("EULER A"), sampler_name("auto")
    ('DPM++ 2M', 'Euler a', 'auto')
    """
    if (key := plain_spelling(str(text))) not in SPELLED:
        near = {name.lower(): name for name in SPELLED.values()}
        raise RecipeError(f"unknown sampler {str(text)!r}", nearest(str(text).lower().replace("_", " "), near))
    return SPELLED[key]


def name_of(scheduler: str, config: Mapping[str, Any]) -> str:
    """What UIs call a scheduler of diffusers by its class and whole config; its class where they have no name for it.

    >>> name_of("EulerDiscreteScheduler", {"use_karras_sigmas": True})
    'Euler Karras'
    """
    plain = scheduler.removesuffix("Scheduler")
    return next((row.name for row in SAMPLERS.values() if row.names(plain, config)), plain)
