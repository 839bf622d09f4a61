"""What diffusers' models compute for nothing, left out to the bit.

Layers divide by factors that are 1 in every base here, about a hundred times a step. Each residual block of a UNet activates
the same embedding of the timestep anew.
"""

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


def skip_useless_work(denoiser: Any, vae: Any) -> None:
    """Let a base's models compute the same bits with fewer operations."""
    skip_divisions(denoiser, vae)
    if type(denoiser).__name__ == "UNet2DConditionModel":
        activate_once(denoiser)


def skip_divisions(*models: Any) -> None:
    """Let the layers of diffusers' models divide by nothing where they divide by 1.0: the bits are the same."""
    for module in (module for model in models if isinstance(model, nn.Module) for module in model.modules()):
        for name in FACTORS:
            if getattr(module, name, None) == 1.0:
                setattr(module, name, ONE)


def activate_once(unet: Any) -> None:
    """Let a UNet activate its embedding of the timestep once, instead of in each of its residual blocks."""
    blocks = [
        module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D" and module.time_emb_proj is not None
    ]
    acts = {type(block.nonlinearity) for block in blocks}
    if acts == {nn.SiLU} and unet.time_embed_act is None and not any(block.skip_time_act for block in blocks):
        unet.time_embed_act = nn.SiLU()
        for block in blocks:
            block.skip_time_act = True


def write_divisions(model: nn.Module) -> None:
    """Undo that, for a compiler: it leaves out such divisions by itself, and knows numbers alone."""
    for module in model.modules():
        for name in FACTORS:
            if isinstance(getattr(module, name, None), One):
                setattr(module, name, 1.0)
