"""Denoising, while what has no trigger stays as it is: prior preservation by class images, or by the base's own output."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from ...families.cond import Cond
from .denoise import Denoising, NoisyRows, errors
from .objective import Ask, Asking, Inputs, Needs, Rng


class ClassImages(Denoising):
    """DreamBooth's prior preservation (Ruiz et al. 2022, eq. 2): the same loss on class images, their mean added to each."""

    needs: ClassVar[Needs] = Needs(class_images=True)

    def draw(self, inputs: Inputs, rng: Rng) -> NoisyRows:
        x, k = self.add_noise(inputs, rng), inputs.class_images
        b = len(inputs.mean) - k
        own, held = slice(b), slice(b, b + k)
        return NoisyRows(x[own], inputs.cond[own], b, x[held], inputs.cond[held], prior_batch=k)

    def loss(self, rows: NoisyRows) -> Asking:
        assert rows.prior is not None and rows.prior_cond is not None
        both, cond = rows.x.join(rows.prior), Cond.cat([rows.cond, rows.prior_cond])
        return rows.add_prior(errors((yield Ask(both.latents, both.t, cond)), both), self.settings.prior_weight)


class ClassOutput(Denoising):
    """On the caption without the trigger, stay with what the base itself predicts from the same noisy latents."""

    needs: ClassVar[Needs] = Needs(class_captions=True, base_first=True)

    def draw(self, inputs: Inputs, rng: Rng) -> NoisyRows:
        assert inputs.class_cond is not None
        x, k = self.add_noise(inputs, rng), len(inputs.class_cond)
        return NoisyRows(x, inputs.cond, len(inputs.mean), x[:k], inputs.class_cond, inputs.class_cond_off, k)

    def loss(self, rows: NoisyRows) -> Asking:
        assert rows.prior is not None and rows.prior_cond is not None and rows.prior_cond_off is not None
        both, prior = rows.x, rows.prior
        if len(prior):
            kept = yield Ask(prior.latents, prior.t, rows.prior_cond_off, off=True)
            everywhere = None if prior.mask is None else torch.ones_like(prior.mask)
            both = both.join(replace(prior, target=kept, mask=everywhere))
        cond = Cond.cat([rows.cond, rows.prior_cond])
        return rows.add_prior(errors((yield Ask(both.latents, both.t, cond)), both), self.settings.prior_weight)
