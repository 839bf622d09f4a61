"""A linear code of 4 x 4 pixel blocks (principal components), and an AutoencoderKL's encoder that computes it exactly.

What an autoencoder's encoder throws away, no decoder brings back. The principal components of blocks are the best that a linear
encoder can keep, they need no training, and 24 of the 48 numbers of a block keep what marks and styles are made of. Larger blocks
keep as much in as many numbers, and a UNet draws them far worse: it has to learn each edge anew for every place in a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

SIDE = 4  # of a block, in pixels
PIXELS = 3 * SIDE * SIDE  # numbers of a block
GROUPS = 8  # of channels that a norm of the autoencoder evens out together
ORDER = (5, 0, 2, 4, 1, 3)  # a block is colour, row (its 2s, 1s), column (2s, 1s); once gathered, a channel is colour, 1s, 1s
BULK, LEVEL, SLOPE = 300.0, 20.0, 0.4  # what drowns a norm's statistics, and what keeps SiLU in its straight part


@dataclass(frozen=True)
class BlockCode:
    """`code = block @ directions + offset`, where a block is `[48]`: channel, row, column."""

    directions: Tensor  # [48, n]
    offset: Tensor  # [n]

    def encode(self, x: Tensor) -> Tensor:
        """Pictures `[b, 3, h, w]` in -1..1 => latents `[b, n, h/4, w/4]`."""
        kernel = self.directions.T.reshape(-1, 3, SIDE, SIDE)
        return F.conv2d(x, kernel, self.offset, stride=SIDE)

    def decode(self, latents: Tensor) -> Tensor:
        """The linear way back: the shortest blocks that have these latents."""
        back = torch.linalg.pinv(self.directions).reshape(-1, 3, SIDE, SIDE)
        return F.conv_transpose2d(latents - self.offset[:, None, None], back, stride=SIDE)


def blocks_of(x: Tensor) -> Tensor:
    """The blocks `[m, 48]` of pictures `[b, 3, h, w]`."""
    return F.unfold(x, SIDE, stride=SIDE).transpose(1, 2).reshape(-1, PIXELS)


def principal(x: Tensor, count: int) -> BlockCode:
    """The `count` directions in which the blocks of pictures differ most; each of length 1, the mean block at 0."""
    blocks = blocks_of(x).double()
    mean = blocks.mean(0)
    directions = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))[1].flip(1)[:, :count]
    return BlockCode(directions.float(), -(mean @ directions).float())


def standardise(code: BlockCode, x: Tensor) -> BlockCode:
    """The code shifted and scaled so that each number has mean 0 and deviation 1 on pictures.

    So a UNet that predicts v has nothing to learn of how large each channel is: the best guess without knowing anything is v = 0.
    """
    latents = code.encode(x)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    return BlockCode(code.directions / deviation, (code.offset - mean) / deviation)


def code_of(vae: AutoencoderKL) -> BlockCode:
    """The code that `write_encoder` wrote."""
    convolution, n = vae.encoder.down_blocks[1].downsamplers[0].conv, vae.config.latent_channels
    folded = convolution.weight.detach()[:n, : PIXELS // 4, :2, :2].reshape(n, *(3, 2, 2, 2, 2))
    order = torch.tensor(ORDER)
    directions = folded.permute(*order.argsort().tolist()).reshape(-1, n)
    return BlockCode(directions.clone(), convolution.bias.detach()[:n].clone())


@torch.no_grad()
def write_encoder(vae: AutoencoderKL, code: BlockCode, deviation: float) -> None:
    """Make a block code the autoencoder's encoder: blocks are gathered by strided convolutions, all else is passed through.

    `deviation` is that of the posterior, alike for all values. The last norm is told by constants that are far larger than the
    latents (BULK), and SiLU is used where it is straight (LEVEL), which is exact to about 0.1 %.

    Raises:
        ValueError: if the code does not fit into the encoder's channels.
    """
    encoder, n = vae.encoder, code.directions.shape[1]
    wide = vae.config.block_out_channels
    room = wide[-1] // GROUPS
    if n % GROUPS or n // GROUPS > room - 5 or n > wide[1] or wide[0] < 3 or wide[1] < PIXELS // 4:
        raise ValueError(f"{n} numbers a block do not fit into channels of {wide}")
    for name, weight in encoder.named_parameters():
        if "norm" not in name:
            weight.zero_()
    _pass(encoder.conv_in, 3)
    first, second, last = encoder.down_blocks
    _gather(first.downsamplers[0].conv, 3)
    _pass(second.resnets[0].conv_shortcut, PIXELS // 4)
    _project(second.downsamplers[0].conv, code)
    places = _place(last.resnets[0].conv_shortcut, n, room)
    norm = encoder.conv_norm_out
    spread = BULK * (4 / room) ** 0.5  # deviation of a group whose mean is nothing
    norm.weight.fill_(SLOPE * spread)
    norm.bias.fill_(LEVEL)
    for channel, place in enumerate(places):
        encoder.conv_out.weight[channel, place, 1, 1] = 1 / SLOPE
    encoder.conv_out.bias[:n] = -LEVEL / SLOPE
    _pass(vae.quant_conv, 2 * n)
    vae.quant_conv.bias.zero_()
    vae.quant_conv.bias[n:] = 2 * log(deviation)


def _pass(convolution: Any, width: int) -> None:
    """The first channels go through as they are."""
    middle = convolution.kernel_size[0] // 2
    convolution.weight.zero_()
    for channel in range(width):
        convolution.weight[channel, channel, middle, middle] = 1.0


def _gather(convolution: Any, width: int) -> None:
    """Each 2 x 2 pixels of `width` channels become one of four times as many: channel, row, column."""
    for channel in range(width):
        for place in range(4):
            convolution.weight[4 * channel + place, channel, place // 2, place % 2] = 1.0


def _project(convolution: Any, code: BlockCode) -> None:
    """The last gathering and the code's directions in one."""
    n = code.directions.shape[1]
    folded = code.directions.reshape(3, 2, 2, 2, 2, n).permute(*ORDER).reshape(n, PIXELS // 4, 2, 2)
    convolution.weight[:n, : PIXELS // 4, :2, :2] = folded
    convolution.bias[:n] = code.offset


def _place(convolution: Any, n: int, room: int) -> list[int]:
    """Spread the code over the groups of the last norm; each group's mean is made nothing and its deviation a constant."""
    share, places = n // GROUPS, []
    for group in range(GROUPS):
        first = group * room
        for k in range(share):
            convolution.weight[first + k, group * share + k, 0, 0] = 1.0
            convolution.weight[first + share, group * share + k, 0, 0] = -1.0
            places.append(first + k)
        for k, sign in enumerate((1, 1, -1, -1)):
            convolution.bias[first + share + 1 + k] = sign * BULK
    return places
