"""The pocket's autoencoder: 4 times smaller each way, 24 channels. Its encoder is a linear code of blocks; its decoder learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from .blocks import SIDE, code_of, principal, standardise, write_encoder
from .pool import shuffled_batches, write_rows
from .running import Plan, run, team

LATENT = 24  # channels
CONFIG = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=LATENT,
    block_out_channels=(32, 64, 96),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=1.0,
)
NOISE = 0.05  # deviation added to latents while the decoder learns, as a UNet's are never exact
POSTERIOR = 0.01  # deviation that the encoder tells of its latents
SHAPES = ((8, 8), (6, 10), (10, 6), (7, 9), (9, 7), (5, 13), (13, 5), (12, 12))  # of training's crops, in eighths of a picture


def pixels(pictures: np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 `[n, h, w, 3]` as float `[n, 3, h, w]` in -1..1."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def difference(y: Tensor, x: Tensor) -> Tensor:
    """The root of the mean square of each picture, then their mean: L1 learns textures later, a plain square smooth ones only."""
    return (y - x).square().mean((1, 2, 3)).add(1e-8).sqrt().mean()


def build(pictures: np.ndarray, textures: np.ndarray) -> AutoencoderKL:
    """An autoencoder whose encoder is the linear code of these pictures, and whose decoder has random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG)
    some = [pixels(rows[:: max(1, len(rows) // 4000)][:4000]) for rows in (pictures, textures)]
    write_encoder(vae, standardise(principal(torch.cat(some), LATENT), some[0]), POSTERIOR)
    return vae


class Decoder(nn.Module):
    """The half of an autoencoder behind the latents, alone."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Latents `[n, 24, h/4, w/4]` to pictures `[n, 3, h, w]`."""
        return self.decoder(self.post_quant_conv(latents))


def crops(pool: np.ndarray, rows: np.ndarray, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Pictures of a pool `[n, *shape, 3]`: whole ones, or crops of four laid side by side."""
    side = pool.shape[1]
    if shape == (side, side):
        return pool[rows]
    height, width = shape
    taken = np.sort(rng.integers(len(pool), size=(len(rows), 4)), axis=None)
    four = pool[taken].reshape(len(rows), 2, 2, side, side, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 2 * side, 2 * side, 3)
    tops, lefts = (rng.integers(0, 2 * side - length + 1, len(rows)) for length in shape)
    return np.stack([one[y : y + height, x : x + width] for one, y, x in zip(four, tops, lefts, strict=True)])


Redraw = Callable[[Tensor, torch.Generator], Tensor]


def train(
    folder: Path,
    vae: AutoencoderKL,
    pools: tuple[np.ndarray, np.ndarray],
    plan: Plan,
    device: str,
    bf16: bool,
    redraw: Redraw | None = None,
) -> AutoencoderKL:
    """Train the decoder on pools of pictures and textures, resumably, and return the averaged autoencoder.

    Of five crops, three are of pictures; every third batch has another shape. With `redraw`, every second batch of whole pictures
    has their latents `[n, c, h, w]` as a UNet draws them. In a team, each process takes its part of a batch.
    """
    vae, (rank, count) = vae.to(device), team()
    decoder, code, side = Decoder(vae), code_of(vae), pools[0].shape[1]

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        shares = (plan.batch * 3 // 5, plan.batch - plan.batch * 3 // 5)
        streams = [shuffled_batches(len(pool), share, 1, start) for pool, share in zip(pools, shares, strict=True)]
        for step, rows in enumerate(zip(*streams, strict=True), start):
            rng = np.random.default_rng([step, 8])
            eighths = SHAPES[int(rng.integers(1, len(SHAPES)))] if step % 3 == 2 and side % (8 * SIDE) == 0 else SHAPES[0]
            shape = (eighths[0] * side // 8, eighths[1] * side // 8)
            drawn = np.concatenate([crops(pool, some, rng, shape) for pool, some in zip(pools, rows, strict=True)])
            x, generator = pixels(drawn[rank::count], device), torch.Generator().manual_seed(step * count + rank)
            exact = code.encode(x)
            latents = exact + NOISE * torch.randn(exact.shape, generator=generator).to(device)
            if redraw and eighths == SHAPES[0] and step % 2:
                mine = len(range(rank, shares[0], count))  # pictures come before textures
                latents[:mine] = redraw(exact[:mine], generator)
            yield latents, x

    def loss_of(batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            y = decoder(batch[0]).float()
        return difference(y, batch[1])

    def picture(weights: dict[str, Tensor], step: int) -> None:
        with torch.no_grad():
            seen = torch.cat([pixels(pool[:8], device) for pool in pools])
            shown = torch.func.functional_call(decoder, weights, (code.encode(seen),))
        rows = torch.cat([torch.cat(list(t), -1) for t in (seen[:8], shown[:8], seen[8:], shown[8:])], -2)
        save_picture(rows, folder / f"sample-{step:06d}.png")

    decoder.load_state_dict(run(folder, decoder, plan, batches, loss_of, picture))
    return vae.eval()


def save_picture(x: Tensor, file: Path, zoom: int = 2) -> None:
    """Write `[3, h, w]` in -1..1 as a PNG, enlarged."""
    array = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file)


@torch.no_grad()
def visibility(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """How much a small change of each latent channel shows in decoded pictures, `[c, 1, 1]`, of mean 1.

    Channels have the same deviation, and very different parts in a picture: what nobody sees is not worth a UNet's few weights.
    """
    shown, still = [], vae.decode(latents).sample
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel] += 0.3
        shown.append((vae.decode(moved).sample - still).square().mean().sqrt())
    return (torch.stack(shown) / torch.stack(shown).mean())[:, None, None]


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pictures: np.ndarray, file: Path, device: str) -> None:
    """The latents of every picture, fp16 `[n, 24, h/4, w/4]`, written once."""

    def encode(rows: slice) -> np.ndarray:
        return vae.encode(pixels(pictures[rows], device)).latent_dist.mean.half().cpu().numpy()

    write_rows(file, len(pictures), encode)
