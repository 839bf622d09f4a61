"""The pocket's autoencoder: 8 times smaller each way, 16 channels, standardised latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .pool import shuffled_batches, write_rows
from .running import Plan, run

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    block_out_channels=(16, 32, 64, 128),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=1.0,
)
NOISE = 0.05  # deviation added to latents while the decoder is trained on
KL = 2e-4  # per latent value, in nats: enough to keep neighbours in latent space alike


def pixels(pictures: np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 `[n, h, w, 3]` as float `[n, 3, h, w]` in -1..1."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring pixels, across and down."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def difference(y: Tensor, x: Tensor) -> Tensor:
    """L1 on pixels and on slopes, which keeps edges crisp."""
    return F.l1_loss(y, x) + sum(F.l1_loss(a, b) for a, b in zip(slopes(y), slopes(x), strict=True))


def reconstruction(vae: AutoencoderKL, x: Tensor, generator: torch.Generator) -> Tensor:
    """How far a picture is from its reconstruction, and the KL term (Kingma & Welling 2014)."""
    posterior = vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator, device=x.device)
    y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return difference(y, x) + KL * kl


@torch.no_grad()
def standardise(vae: AutoencoderKL, x: Tensor) -> None:
    """Shift and scale each latent channel to mean 0 and deviation 1, inside the 1x1 convolutions around the latent."""
    mean = vae.encode(x).latent_dist.mean
    centre, spread = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    n = len(centre)
    inner, outer = vae.quant_conv, vae.post_quant_conv
    inner.weight[:n] /= spread[:, None, None, None]
    inner.bias[:n] = (inner.bias[:n] - centre) / spread
    inner.bias[n:] -= 2 * spread.log()  # log variance follows the scale
    outer.bias += outer.weight[:, :, 0, 0] @ centre
    outer.weight *= spread[None, :, None, None]


def build() -> AutoencoderKL:
    """An autoencoder with random weights, almost without noise at first: the decoder has something to read."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG)
    vae.quant_conv.bias.data[CONFIG["latent_channels"] :] = -6.0
    return vae


def train(folder: Path, vae: AutoencoderKL, pictures: np.ndarray, plan: Plan, device: str, bf16: bool) -> AutoencoderKL:
    """Train on a pool, resumably, and return the averaged, standardised autoencoder."""
    vae = vae.to(device)

    def batches(start: int) -> Iterator[Tensor]:
        return (pixels(pictures[i], device) for i in shuffled_batches(len(pictures), plan.batch, 1, start))

    def loss_of(x: Tensor, step: int) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return reconstruction(vae, x, torch.Generator(device).manual_seed(step))

    def picture(weights: dict[str, Tensor], step: int) -> None:
        with torch.no_grad():
            seen = pixels(pictures[:16], device)
            shown = torch.func.functional_call(vae, weights, (seen,)).sample
        rows = torch.cat([torch.cat(list(t), -1) for t in (seen[:8], shown[:8], seen[8:], shown[8:])], -2)
        save_picture(rows, folder / f"sample-{step:06d}.png")

    vae.load_state_dict(run(folder, vae, plan, batches, loss_of, picture))
    if plan.steps:  # a finished one keeps the latents that a UNet has learned
        standardise(vae, pixels(pictures[:: max(1, len(pictures) // 1024)][:1024], device))
    return vae.eval()


class Decoder(nn.Module):
    """The half of an autoencoder behind the latents, alone, so that it can be trained on while they stay as they are."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Latents `[n, 16, h/8, w/8]` to pictures `[n, 3, h, w]`."""
        return self.decoder(self.post_quant_conv(latents))


def sharpen(
    folder: Path, vae: AutoencoderKL, latents: np.ndarray, pictures: np.ndarray, plan: Plan, device: str, bf16: bool
) -> AutoencoderKL:
    """Train the decoder on with fixed latents `[n, 2, 16, h/8, w/8]`, a little noised, as a UNet's are never exact."""
    decoder = Decoder(vae.to(device))

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i in shuffled_batches(len(pictures), plan.batch, 4, start):
            yield torch.from_numpy(latents[i]).to(device).float(), pixels(pictures[i], device)

    def loss_of(batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        (mean, std), x = batch[0].unbind(1), batch[1]
        noise = torch.randn(mean.shape, generator=torch.Generator(device).manual_seed(step), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            y = decoder(mean + (std.square() + NOISE**2).sqrt() * noise).float()
        return difference(y, x)

    decoder.load_state_dict(run(folder, decoder, plan, batches, loss_of))
    return vae.eval()


def save_picture(x: Tensor, file: Path, zoom: int = 2) -> None:
    """Write `[3, h, w]` in -1..1 as a PNG, enlarged."""
    array = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file)


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pictures: np.ndarray, file: Path, device: str) -> None:
    """Posterior mean and deviation of every picture, fp16 `[n, 2, 16, h/8, w/8]`, written once."""

    def encode(rows: slice) -> np.ndarray:
        posterior = vae.encode(pixels(pictures[rows], device)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1).half().cpu().numpy()

    write_rows(file, len(pictures), encode)
