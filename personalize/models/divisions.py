"""Divisions by one, left out: diffusers' layers divide by factors that are 1 in every base here, about a hundred times a step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

FACTORS = ("output_scale_factor", "rescale_output_factor")  # of residual blocks and of attention


class One:
    """The number one, for whoever divides a tensor by it: the very tensor comes back, without an operation.

    >>> import torch
    >>> x = torch.rand(3)
    >>> x / One() is x
    True
    """

    def __repr__(self) -> str:
        return "1.0"

    def __float__(self) -> float:
        return 1.0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.div:  # what `x / one` calls
            return args[0]
        return func(*(1.0 if isinstance(one, cls) else one for one in args), **(kwargs or {}))


ONE = One()


def skip_divisions(*models: nn.Module | None) -> None:
    """Let the layers of diffusers' models divide by nothing where they divide by 1.0: the bits are the same."""
    for module in (module for model in models if model is not None for module in model.modules()):
        for name in FACTORS:
            if getattr(module, name, None) == 1.0:
                setattr(module, name, ONE)


def write_divisions(model: nn.Module) -> None:
    """Undo that, for a compiler: it leaves out such divisions by itself, and knows numbers alone."""
    for module in model.modules():
        for name in FACTORS:
            if isinstance(getattr(module, name, None), One):
                setattr(module, name, 1.0)
