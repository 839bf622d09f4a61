"""What a batch's loss is: (denoise, inputs, rng) -> one loss per picture [b].

Paper symbols: x_0 clean latents, eps noise, x_t noisy latents. What the network predicts, the noise schedule and the weight of
a timestep are the base's own (families/noise.py); nothing here is chosen by a flag that the base could contradict.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...families.cond import Cond
from ...families.noise import Noise
from ...recipe.fields import Objective

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]  # x_t [b, c, h, w], t [b], conditioning of b captions -> [b, c, h, w]
Rng = Callable[[str], torch.Generator]  # what it is for -> a generator; the same for the same run, step and purpose
Off = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Inputs:
    """A batch as the objective sees it: b pictures, and k <= b rows that the prior holds."""

    mean: Tensor  # [b, c, h, w], of the posterior over x_0; [b + k, c, h, w] with class images
    std: Tensor  # as mean
    cond: Cond  # b rows, or b + k with class images
    class_images: int = 0  # k, how many of the last rows are class images, for prior 'images'
    class_cond: Cond | None = None  # k rows, captions without the trigger for the first rows, for prior 'output'
    class_cond_off: Cond | None = None  # the same without the adapter
    mask: Tensor | None = None  # [b, 1, h, w] in 0..1, 1 where a picture is to be learned; None: everywhere
    pictures: Tensor | None = None  # [b] on the CPU, which examples they are


@dataclass(frozen=True)
class Piece:
    """The i-th of n pieces of a batch: all is drawn for the whole batch, so that the pieces' gradients add up to its own."""

    i: int = 0
    n: int = 1

    def of(self, rows: int) -> slice:
        """This piece's share of so many rows, in order; the first pieces take the odd ones."""
        size, odd = divmod(rows, self.n)
        first = self.i * size + min(self.i, odd)
        return slice(first, first + size + (self.i < odd))


@dataclass(frozen=True)
class Ask:
    """Rows that a loss wants to have predicted."""

    latents: Tensor  # x_t [n, c, h, w]
    t: Tensor  # [n], what the network is told of time
    cond: Cond  # n rows
    off: bool = False  # by the base alone, as a constant


WHOLE = Piece()
Asking = Generator[Ask, Tensor, Tensor]  # predictions [n, c, h, w] go in, and in the end losses [b] come out
Loss = Callable[[Denoise, Inputs, Rng, Piece], Tensor]  # -> [b], or those of a piece's pictures


@dataclass(frozen=True)
class Noised:
    """What the network sees and what it should say."""

    latents: Tensor  # x_t [b, c, h, w]
    t: Tensor  # [b], what it is told of time
    target: Tensor  # [b, c, h, w]
    weight: Tensor  # [b]
    mask: Tensor | None = None  # [b, 1, h, w], weights of places; None: all alike

    def __getitem__(self, rows: slice) -> Noised:
        mask = None if self.mask is None else self.mask[rows]
        return Noised(self.latents[rows], self.t[rows], self.target[rows], self.weight[rows], mask)

    def join(self, other: Noised) -> Noised:
        """The rows of both."""
        names = ("latents", "t", "target", "weight", *(["mask"] if self.mask is not None else []))
        return Noised(**{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names})


def build(objective: Objective, noise: Noise, off: Off = contextlib.nullcontext) -> Loss:
    """The loss that an objective asks for. `off` is the context in which `denoise` predicts without the adapter."""
    asks = asking(objective, noise)

    def loss(denoise: Denoise, inputs: Inputs, rng: Rng, piece: Piece = WHOLE) -> Tensor:
        return answered([asks(inputs, rng, piece)], denoise, off)[0]

    return loss


def answered(losses: Sequence[Asking], denoise: Denoise, off: Off = contextlib.nullcontext) -> list[Tensor]:
    """Losses of one objective and of batches of one shape, brought to their ends side by side: each question of all of them is
    one call of `denoise`, whose rows are theirs in order and in equal shares."""
    ended: list[Tensor] = []
    answers: Sequence[Any] = [None] * len(losses)
    while True:
        asked = []
        for loss, answer in zip(losses, answers, strict=True):
            try:
                asked.append(loss.send(answer))
            except StopIteration as end:
                ended.append(end.value)
        if ended:
            return ended
        latents, t, cond = torch.cat([ask.latents for ask in asked]), torch.cat([ask.t for ask in asked]), joined(asked)
        with contextlib.ExitStack() as without:
            for context in (torch.no_grad(), off()) if asked[0].off else ():
                without.enter_context(context)
            answers = denoise(latents, t, cond).chunk(len(asked))


def joined(asked: Sequence[Ask]) -> Cond:
    """The conditioning of all questions; that of a single one as it is."""
    return Cond.cat([ask.cond for ask in asked]) if len(asked) > 1 else asked[0].cond


def asking(objective: Objective, noise: Noise) -> Callable[[Inputs, Rng, Piece], Asking]:
    """The loss that an objective asks for, as a coroutine: it yields what it wants to have predicted, and returns its losses."""
    gamma, weight, outside = objective.min_snr, objective.prior_weight, objective.mask_outside

    def plain(inputs: Inputs, rng: Rng, piece: Piece = WHOLE) -> Asking:
        """Denoising (Ho et al. 2020, eq. 14), min-SNR weighted."""
        x, own = noised(inputs, noise, gamma, rng, outside), piece.of(len(inputs.mean))
        return errors((yield Ask(x.latents[own], x.t[own], inputs.cond[own])), x[own])

    def images(inputs: Inputs, rng: Rng, piece: Piece = WHOLE) -> Asking:
        """DreamBooth's prior preservation (Ruiz et al. 2022, eq. 2): the same loss on class images, their mean added to each."""
        x, k = noised(inputs, noise, gamma, rng, outside), inputs.class_images
        b = len(inputs.mean) - k
        own, held = piece.of(b), shifted(piece.of(k), b)
        rows, cond = x[own].join(x[held]), Cond.cat([inputs.cond[own], inputs.cond[held]])
        return held_back(errors((yield Ask(rows.latents, rows.t, cond)), rows), own, held, b, k, weight)

    def output(inputs: Inputs, rng: Rng, piece: Piece = WHOLE) -> Asking:
        """On the caption without the trigger, stay with what the base itself predicts from the same noisy latents."""
        assert inputs.class_cond is not None and inputs.class_cond_off is not None
        x, b, k = noised(inputs, noise, gamma, rng, outside), len(inputs.mean), len(inputs.class_cond)
        own, held = piece.of(b), piece.of(k)
        rows = x[own]
        if held.stop > held.start:
            kept = yield Ask(x.latents[held], x.t[held], inputs.class_cond_off[held], off=True)
            whole = None if x.mask is None else torch.ones_like(x.mask[held])  # the prior holds everywhere
            rows = rows.join(replace(x[held], target=kept, mask=whole))
        cond = Cond.cat([inputs.cond[own], inputs.class_cond[held]])
        return held_back(errors((yield Ask(rows.latents, rows.t, cond)), rows), own, held, b, k, weight)

    return {"none": plain, "images": images, "output": output}[objective.prior]


def shifted(rows: slice, by: int) -> slice:
    """The same rows, further down."""
    return slice(rows.start + by, rows.stop + by)


def held_back(losses: Tensor, own: slice, held: slice, b: int, k: int, weight: float) -> Tensor:
    """A piece's own losses with its share of the prior's: over all pieces, their sum is that of the whole batch.

    The prior's mean is added to each of b pictures; a piece has but some of the pictures and some of the prior's k rows.
    """
    pictures, kept = own.stop - own.start, held.stop - held.start
    if not kept:
        return losses
    mine, prior = losses.tensor_split([pictures])
    return mine + weight * (kept * b / (k * pictures)) * prior.mean()


def noised(inputs: Inputs, noise: Noise, gamma: float, rng: Rng, outside: float = 0.0) -> Noised:
    """Draw x_0 from its posterior, timesteps and noise; class images take the timesteps of the first pictures.

    What a mask leaves out weighs `outside`; class images have none.
    """
    x0 = inputs.mean + inputs.std * normal(inputs.mean, rng("posterior"))
    eps = normal(inputs.mean, rng("noise"))
    t = timesteps(len(x0) - inputs.class_images, noise, rng).to(x0.device)
    t = torch.cat([t, t[: inputs.class_images]])
    mask = None if inputs.mask is None else unmasked(inputs.mask + outside * (1 - inputs.mask), inputs.class_images)
    return Noised(noise.add(x0, eps, t), noise.time(t), noise.target(x0, eps, t), noise.weight(t, gamma), mask)


def unmasked(mask: Tensor | None, rows: int) -> Tensor | None:
    """A mask [b, 1, h, w] with so many more rows, all ones."""
    return None if mask is None else torch.cat([mask, torch.ones_like(mask[:1]).expand(rows, -1, -1, -1)])


def timesteps(b: int, noise: Noise, rng: Rng) -> Tensor:
    """[b] timesteps, as the base's noise draws them."""
    return noise.draw_t(b, rng("timesteps"))


def errors(predicted: Tensor, x: Noised) -> Tensor:
    """Weighted mean squared error of each picture [b], in fp32; over its mask, so that small ones count as much as large ones."""
    squared = (predicted.float() - x.target.float()).square()
    if x.mask is None:
        return x.weight * squared.mean(dim=(1, 2, 3))
    return x.weight * (squared.mean(dim=1, keepdim=True) * x.mask).sum(dim=(1, 2, 3)) / x.mask.sum(dim=(1, 2, 3))


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of a tensor's shape, drawn on the CPU so that it is the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like.device)
