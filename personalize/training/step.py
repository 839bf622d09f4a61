"""One step's gradients: forward and backward, in as many pieces as fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..tuning.attach import Attached
from .objectives.denoise import Denoise, Inputs, Loss, Piece, Rng
from .optimizers import Optimizer

Seeds = Callable[[int], int]  # piece -> seed of its dropout


def gradients(
    denoise: Denoise, loss: Loss, attached: Attached, opt: Optimizer, n: int, batches: Iterable[tuple[Inputs, Rng, Seeds]]
) -> Tensor:
    """Add up the gradients of some batches, each in `n` pieces: [losses of all pictures..., the gradient's norm].

    Nothing here waits for the device.
    """
    told: list[Tensor] = []
    with attached.lowered():
        for inputs, rng, seeds in batches:
            for i in range(n):
                again = inputs.cond.tokens.requires_grad and i < n - 1  # all pieces go back through the text encoder's pass
                with attached.dropping(seeds(i)):  # checkpointed blocks drop the same again in the backward pass
                    losses = loss(denoise, inputs, rng, Piece(i, n))  # [b], one per picture
                    opt.backward(losses, of=len(inputs.mean) - inputs.class_images, again=again)
                told.append(losses.detach())
    return torch.cat([*told, opt.norm()[None]])
