"""Direct Consistency Optimization: learn the images as far as that is better than the base, and no further."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ...families.cond import Cond
from ...families.noise import Noise
from ...recipe.fields import Objective as Settings
from .denoise import Noised, add_noise, errors, share_of
from .objective import Ask, Asking, Inputs, Needs, Rng


@dataclass(frozen=True)
class ReferredRows:
    """Noisy images of a batch, each with what the base alone reads for it; all of them, or a piece."""

    x: Noised
    cond: Cond  # c, as many rows
    reference: Cond  # c', as many rows: the captions without the trigger, as the base alone reads them
    batch: int  # images of the whole batch

    def split(self, n: int) -> Sequence[ReferredRows]:
        """The same rows in n pieces, in order; the first pieces take the odd ones."""
        shares = [share_of(self.batch, i, n) for i in range(n)]
        pieces = [ReferredRows(self.x[own], self.cond[own], self.reference[own], self.batch) for own in shares]
        return [self] if n == 1 else pieces


class Consistency:
    """Direct Consistency Optimization (Lee et al. 2024, https://arxiv.org/abs/2402.12004): -log sigmoid(-beta (e - e')), where e
    is the error of each image and e' that of the base alone, which reads the caption without the trigger."""

    needs: ClassVar[Needs] = Needs(reference=True, base_first=True)

    def __init__(self, settings: Settings, noise: Noise) -> None:
        self.settings, self.noise = settings, noise

    def draw(self, inputs: Inputs, rng: Rng) -> ReferredRows:
        assert inputs.class_cond_off is not None
        noised = add_noise(inputs, self.noise, self.settings, rng)
        return ReferredRows(noised, inputs.cond, inputs.class_cond_off, len(inputs.mean))

    def loss(self, rows: ReferredRows) -> Asking:
        x = rows.x
        held = errors((yield Ask(x.latents, x.t, rows.reference, off=True)), x)
        return consistency(errors((yield Ask(x.latents, x.t, rows.cond)), x), held, self.settings.dco_beta)


def consistency(own: Tensor, held: Tensor, beta: float) -> Tensor:
    """The losses [b] of images by their own errors [b] and those of the base alone [b], both weighted.

    The paper's -log sigmoid(-beta (own - held)) times 2 / beta, which pulls as denoising does where both are equal, and ever
    more so for smaller beta; and shifted by what does not depend on `own`, so that its value is the error there as well.
    A timestep's weight stands inside the sigmoid, as in the derivation (Wallace et al. 2023, arXiv 2311.12908, eq. 14).
    """
    return held + 2 / beta * (F.softplus(beta * (own - held)) - math.log(2))
