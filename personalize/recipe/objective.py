"""The section [objective] of the recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..errors import RecipeError
from .one_of import OneOf
from .part import Part, equals, is_off


class Objective(Part):
    """What a batch's loss is."""

    min_snr: float = Field(5.0, ge=0, description="min-SNR gamma (Hang et al. 2023, eq. 4); 0 turns it off")
    mask_outside: float = Field(0.1, ge=0, le=1, description="weight of what a picture's mask leaves out")
    prior: Annotated[str, OneOf("objectives")] = Field(
        "none",
        description="keep what has no trigger as it is: with class images by the base (Ruiz et al. 2022), or with the base's "
        "own output on each caption without the trigger; dco: learn images only as far as the base is worse at them (Lee et al. "
        "2024)",
    )
    dco_beta: float = Field(
        1000.0,
        gt=0,
        exclude_if=equals(1000.0),
        description="how soon --prior dco has learned enough of an image: larger ones stay nearer to the base",
    )
    prior_weight: float = Field(1.0, ge=0, description="weight of the prior-preservation loss")
    prior_share: float = Field(1.0, gt=0, le=1, description="rows of the prior in a step, per picture of yours")
    prior_images: int = Field(24, ge=1, description="number of class images")
    prior_prompts: tuple[str, ...] = Field(
        ("a {class}",),
        description="prompts of the class images, in turn; prior 'output' holds them too, so that other styles can be named",
    )
    weighting: Literal["min-snr", "debiased", "p2"] = Field(
        "min-snr",
        exclude_if=equals("min-snr"),
        description="how timesteps weigh: by --min-snr, debiased (Yu et al. 2023) or P2 (Choi et al. 2022), whatever the base "
        "predicts",
    )
    p2_gamma: float = Field(
        1.0, gt=0, exclude_if=equals(1.0), description="how strongly P2 weighs down timesteps with little noise"
    )
    huber: float = Field(
        0.0,
        ge=0,
        le=1,
        exclude_if=is_off,
        description="error from which on the loss grows evenly, not with its square: pseudo-Huber (Charbonnier et al. 1997), "
        "such as 0.1; 0 turns it off",
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = Field(
        "snr",
        exclude_if=equals("snr"),
        description="how --huber goes with the noise, as kohya's trainer has it: exponential and snr fall to it from 1",
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        exclude_if=is_off,
        description="noise that is the same over a whole picture, for dark and bright ones: such as 0.05",
    )
    pyramid_noise: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=is_off,
        description="multi-resolution noise: the share of the next coarser level, of whose share the one after it counts, and so "
        "on; such as 0.3",
    )
    input_perturbation: float = Field(
        0.0, ge=0, exclude_if=is_off, description="more noise in the input than is to be told: such as 0.1 (Ning et al. 2023)"
    )
    density: Literal["auto", "uniform", "logit-normal", "cubic"] = Field(
        "auto",
        exclude_if=equals("auto"),
        description="how timesteps are drawn: as the base was trained, evenly, most in the middle (Esser et al. 2024) or most "
        "with much noise (Mou et al. 2023)",
    )
    logit_mean: float = Field(0.0, exclude_if=is_off, description="of logit-normal timesteps: above 0 for more noise")
    logit_std: float = Field(
        1.0, gt=0, exclude_if=equals(1.0), description="of logit-normal timesteps: above 1 for less of the middle"
    )
    min_timestep: int = Field(0, ge=0, exclude_if=is_off, description="first timestep that is trained on; 0 is hardly any noise")
    max_timestep: int = Field(
        0, ge=0, exclude_if=is_off, description="timestep behind the last one that is trained on; 0: all that the base has"
    )


# Setting => the setting that it says more about, and the value of that with which it does.
MORE = {
    "dco_beta": ("prior", "dco"),
    "p2_gamma": ("weighting", "p2"),
    "logit_mean": ("density", "logit-normal"),
    "logit_std": ("density", "logit-normal"),
}


def check_objective(objective: Objective) -> None:
    """Raise RecipeError for settings that make no sense together."""
    defaults = {name: field.default for name, field in Objective.model_fields.items()}
    for name, (other, value) in MORE.items():
        if getattr(objective, name) != defaults[name] and getattr(objective, other) != value:
            raise RecipeError(f"{flag(name)} is of {flag(other)} {value}, which is not asked for", f"give {flag(other)} {value}")
    if objective.huber_schedule != defaults["huber_schedule"] and not objective.huber:
        raise RecipeError("--huber-schedule is of --huber, which is not asked for", "give --huber 0.1")
    if objective.weighting != "min-snr" and objective.min_snr not in (0, defaults["min_snr"]):
        what = f"--weighting {objective.weighting} and --min-snr {objective.min_snr:g} exclude each other"
        raise RecipeError(what, "leave one of them out")
    if objective.noise_offset and objective.pyramid_noise:
        raise RecipeError(
            "--noise-offset and --pyramid-noise exclude each other: its coarsest level is one", "leave one of them out"
        )
    if objective.max_timestep and objective.min_timestep >= objective.max_timestep:
        what = f"no timestep is left from --min-timestep {objective.min_timestep} to --max-timestep {objective.max_timestep}"
        raise RecipeError(what, "the second is the one behind the last")


def flag(name: str) -> str:
    """What a setting is called on a command line."""
    return "--" + name.replace("_", "-")
