"""The pocket's autoencoder: its encoder is a linear code, exactly; its decoder learns from crops of any shape, resumably."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tools.pocket import autoencoder
from tools.pocket.art_textures import draw_texture
from tools.pocket.blocks import PIXELS, BlockCode, code_of, principal, write_encoder
from tools.pocket.running import Plan

PICTURES = np.stack([draw_texture(np.random.default_rng(seed), 64) for seed in range(24)])
SMALL = autoencoder.CONFIG | {"latent_channels": 24, "block_out_channels": (16, 32, 64)}  # 3 of 8 channels a group


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return autoencoder.build(PICTURES[:12], PICTURES[12:])


@torch.no_grad()
def mean_of(vae: AutoencoderKL, x: Tensor) -> Tensor:
    return vae.encode(x).latent_dist.mean


@pytest.mark.parametrize("shape", [(64, 64), (40, 104), (16, 8)])
def test_the_encoder_is_the_code_at_any_shape_and_stored_in_halves(vae: AutoencoderKL, shape: tuple[int, int]) -> None:
    x, code = torch.rand(3, 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1, code_of(vae)
    latents = code.encode(x)
    assert latents.shape == (3, autoencoder.LATENT, shape[0] // 4, shape[1] // 4)
    assert float((mean_of(vae, x) - latents).square().mean().sqrt()) < 3e-3 * float(latents.std())
    with torch.no_grad():
        assert torch.allclose(vae.encode(x).latent_dist.std, torch.tensor(autoencoder.POSTERIOR), rtol=1e-4)
    halves = AutoencoderKL.from_config(vae.config)
    halves.load_state_dict({name: t.half().float() for name, t in vae.state_dict().items()})
    assert float((mean_of(halves, x) - latents).square().mean().sqrt()) < 1e-2 * float(latents.std())


def test_a_code_of_all_directions_loses_nothing_and_one_of_some_the_least() -> None:
    x = autoencoder.pixels(PICTURES)
    whole = principal(x, PIXELS)
    assert torch.allclose(whole.decode(whole.encode(x)), x, atol=1e-3)

    def lost(code: BlockCode) -> float:
        return float((code.decode(code.encode(x)) - x).square().mean())

    losses = [lost(principal(x, count)) for count in (4, 12, 24)]
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0
    other = principal(autoencoder.pixels(255 - PICTURES[:, ::-1, ::2].repeat(2, 2)), 12)
    assert lost(principal(x, 12)) < lost(other)


def test_a_code_is_read_back_from_the_encoder_and_fits_or_is_refused() -> None:
    torch.manual_seed(0)
    small = AutoencoderKL(**SMALL)
    code = principal(autoencoder.pixels(PICTURES), 24)
    write_encoder(small, code, 0.02)
    back = code_of(small)
    assert torch.equal(back.directions, code.directions) and torch.equal(back.offset, code.offset)
    x = autoencoder.pixels(PICTURES[:2])
    assert float((mean_of(small, x) - code.encode(x)).abs().max()) < 0.1
    with pytest.raises(ValueError, match="32 numbers a block do not fit"):
        write_encoder(AutoencoderKL(**SMALL), principal(x, 32), 0.02)


def test_latents_are_standard_and_told_apart_by_what_they_show(vae: AutoencoderKL) -> None:
    latents = code_of(vae).encode(autoencoder.pixels(PICTURES[:12]))
    assert float(latents.mean((0, 2, 3)).abs().max()) < 1e-3 and torch.allclose(
        latents.std((0, 2, 3)), torch.ones(autoencoder.LATENT), atol=1e-3
    )
    shows = autoencoder.visibility(vae, latents[:2])
    assert shows.shape == (autoencoder.LATENT, 1, 1) and float(shows.mean()) == pytest.approx(1)
    blind = AutoencoderKL.from_config(vae.config)
    blind.load_state_dict(vae.state_dict())
    with torch.no_grad():
        blind.post_quant_conv.weight[:, 5] = 0  # nothing of this channel is seen
        blind.post_quant_conv.weight[:, 6] *= 30
    seen = autoencoder.visibility(blind, latents[:2])[:, 0, 0]
    assert float(seen[5]) == 0 and int(seen.argmax()) == 6


def test_crops_have_the_shape_they_are_asked_for_and_show_the_pool() -> None:
    rng, rows = np.random.default_rng(0), np.arange(6)
    assert np.array_equal(autoencoder.crops(PICTURES, rows, rng, (64, 64)), PICTURES[:6])
    cut = autoencoder.crops(PICTURES, rows, rng, (40, 104))
    assert cut.shape == (6, 40, 104, 3) and cut.dtype == np.uint8
    colours = {tuple(pixel) for pixel in PICTURES.reshape(-1, 3)}
    assert all(tuple(pixel) in colours for pixel in cut.reshape(-1, 3)[::97])


def test_the_decoder_alone_learns_and_a_kill_changes_nothing(
    vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(4, batch=5, lr=2e-3, warmup=1, ema=0.5, muon=False, save_every=2, log_every=2)

    def trained(folder: Path) -> dict[str, Tensor]:
        fresh = AutoencoderKL.from_config(vae.config)
        fresh.load_state_dict(vae.state_dict())
        return autoencoder.train(folder, fresh, (PICTURES[:12], PICTURES[12:]), plan, "cpu", False).state_dict()

    whole = trained(tmp_path / "whole")
    cut = autoencoder.crops

    def killed(pool: np.ndarray, rows: np.ndarray, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        if shape != (64, 64):  # the third batch
            raise KeyboardInterrupt
        return cut(pool, rows, rng, shape)

    monkeypatch.setattr(autoencoder, "crops", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken")
    monkeypatch.undo()
    resumed = trained(tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    before = vae.state_dict()
    learned = {name for name in whole if not torch.equal(whole[name], before[name])}
    assert learned and all(name.startswith(("decoder.", "post_quant_conv.")) for name in learned)
    assert (tmp_path / "whole/sample-000004.png").is_file()


def test_the_decoder_learns_from_pictures_that_a_unet_drew_and_from_textures_as_they_are(
    vae: AutoencoderKL, tmp_path: Path
) -> None:
    plan, asked = Plan(6, batch=5, lr=1e-5, warmup=1, muon=False), []

    def trained(folder: str, redraw: autoencoder.Redraw | None) -> dict[str, Tensor]:
        fresh = AutoencoderKL.from_config(vae.config)
        fresh.load_state_dict(vae.state_dict())
        pools = (PICTURES[:12], PICTURES[12:])
        return autoencoder.train(tmp_path / folder, fresh, pools, plan, "cpu", False, redraw).state_dict()

    def redraw(latents: Tensor, generator: torch.Generator) -> Tensor:
        asked.append(latents.shape)
        return latents + torch.randn(latents.shape, generator=generator)

    plain, drawn = trained("plain", None), trained("drawn", redraw)
    assert asked == [(3, autoencoder.LATENT, 16, 16)] * 2  # steps 1 and 3 of six; the sixth has another shape
    assert any(not torch.equal(plain[name], drawn[name]) for name in plain)
