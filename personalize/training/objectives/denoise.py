"""Denoising: predict what was added to noisy latents, at random timesteps.

Paper symbols: x_0 clean latents, eps noise, x_t noisy latents. What the network predicts and the noise schedule are the base's
own (families/noise.py); which noise and timesteps are drawn, and how they weigh, are the recipe's (draws.py, weights.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...families.cond import Cond
from ...families.noise import Noise
from ...recipe.fields import Objective as Settings
from .draws import draw_input_noise, draw_noise, normal, timesteps
from .objective import Ask, Asking, Inputs, Needs, Rng
from .weights import bends, powers, weights


@dataclass(frozen=True)
class Noised:
    """What the network sees and what it should say."""

    latents: Tensor  # x_t [b, c, h, w]
    t: Tensor  # [b]
    target: Tensor  # [b, c, h, w]
    weight: Tensor  # [b]
    mask: Tensor | None = None  # [b, 1, h, w], weights of places; None: all alike
    bend: Tensor | None = None  # [b], from which error on the loss grows evenly; None: it is squared

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, rows: slice) -> Noised:
        return Noised(**{name: getattr(self, name)[rows] for name in self._there()})

    def join(self, other: Noised) -> Noised:
        """The rows of both."""
        return Noised(**{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in self._there()})

    def _there(self) -> list[str]:
        """The names of what is not None."""
        return [one.name for one in fields(self) if getattr(self, one.name) is not None]


@dataclass(frozen=True)
class NoisyRows:
    """Images of a batch with their noise, and rows that its prior holds; all of them, or a piece."""

    x: Noised
    cond: Cond  # as many rows
    batch: int  # images of the whole batch
    prior: Noised | None = None
    prior_cond: Cond | None = None
    prior_cond_off: Cond | None = None  # as the base alone reads the captions
    prior_batch: int = 0  # rows of the whole batch that the prior holds

    def split(self, n: int) -> list[NoisyRows]:
        """The same rows in n pieces, in order; the first pieces take the odd ones."""
        return [self] if n == 1 else [self._piece(i, n) for i in range(n)]

    def _piece(self, i: int, n: int) -> NoisyRows:
        own, held = share_of(self.batch, i, n), share_of(self.prior_batch, i, n)
        own_rows = replace(self, x=self.x[own], cond=self.cond[own])
        if self.prior is None or self.prior_cond is None:
            return own_rows
        off = None if self.prior_cond_off is None else self.prior_cond_off[held]
        return replace(own_rows, prior=self.prior[held], prior_cond=self.prior_cond[held], prior_cond_off=off)

    def add_prior(self, losses: Tensor, weight: float) -> Tensor:
        """The images' losses [b'] of [b' + k'], with these rows' share of the prior's mean on each.

        Over all pieces the sum is that of the whole batch: there, the prior's mean is added to each of b images; a piece has
        but some of the images and some of the prior's k rows.
        """
        images, held = len(self.x), 0 if self.prior is None else len(self.prior)
        if not held:
            return losses
        own, prior = losses.tensor_split([images])
        return own + weight * (held * self.batch / (self.prior_batch * images)) * prior.mean()


def share_of(rows: int, i: int, n: int) -> slice:
    """The i-th of n shares of so many rows, in order; the first shares take the odd ones.

    >>> [share_of(5, i, 2) for i in range(2)]
    [slice(0, 3, None), slice(3, 5, None)]
    """
    size, odd = divmod(rows, n)
    first = i * size + min(i, odd)
    return slice(first, first + size + (i < odd))


class Denoising:
    """Denoising (Ho et al. 2020, eq. 14), min-SNR weighted."""

    needs: ClassVar[Needs] = Needs()

    def __init__(self, settings: Settings, noise: Noise) -> None:
        self.settings, self.noise = settings, noise

    def draw(self, inputs: Inputs, rng: Rng) -> NoisyRows:
        return NoisyRows(self.add_noise(inputs, rng), inputs.cond, len(inputs.mean))

    def add_noise(self, inputs: Inputs, rng: Rng) -> Noised:
        """Every row of a batch, class images too, with its noise."""
        return add_noise(inputs, self.noise, self.settings, rng)

    def loss(self, rows: NoisyRows) -> Asking:
        return errors((yield Ask(rows.x.latents, rows.x.t, rows.cond)), rows.x)


def add_noise(inputs: Inputs, noise: Noise, settings: Settings, rng: Rng) -> Noised:
    """Draw x_0 from its posterior, timesteps and noise; class images take the timesteps of the first images.

    Class images have no mask.
    """
    x0 = inputs.mean + inputs.std * normal(inputs.mean, rng("posterior"))
    eps = draw_noise(inputs.mean, settings, rng)
    t = timesteps(len(x0) - inputs.class_images, noise, rng, settings).to(x0.device)
    t = torch.cat([t, t[: inputs.class_images]])
    outside, weight = settings.mask_outside, weights(noise, t, settings)
    mask = None if inputs.mask is None else extend_mask(inputs.mask + outside * (1 - inputs.mask), inputs.class_images)
    x_t = noise.add(x0, draw_input_noise(eps, settings, rng), t)
    return Noised(x_t, noise.time(t), noise.target(x0, eps, t), weight, mask, bends(noise, t, settings))


def extend_mask(mask: Tensor | None, rows: int) -> Tensor | None:
    """A mask [b, 1, h, w] with so many more rows, all ones."""
    return None if mask is None else torch.cat([mask, torch.ones_like(mask[:1]).expand(rows, -1, -1, -1)])


def errors(predicted: Tensor, x: Noised) -> Tensor:
    """Weighted mean squared error of each image [b], in fp32; over its mask, so that small ones count as much as large ones.

    With a bend, the errors' pseudo-Huber loss in place of their squares.
    """
    squared = powers(predicted.float() - x.target.float(), x.bend)
    if x.mask is None:
        return x.weight * squared.mean(dim=(1, 2, 3))
    return x.weight * (squared.mean(dim=1, keepdim=True) * x.mask).sum(dim=(1, 2, 3)) / x.mask.sum(dim=(1, 2, 3))
