"""What every row of the table "families" must hold. Its layers, names and metadata are held against the real classes in
test_names.py; the bases themselves in test_families.py and the family's own tests."""

from __future__ import annotations

import re

import pytest
import torch

from personalize.families.family import Family, LatentFormat, addresses, modules, parameters_at, weights
from personalize.families.names import FAMILIES, PARTS, kohya_names, kohya_paths, part_of
from personalize.families.noise import VP, Flow, Noise
from personalize.families.recognition import detect, family_in
from personalize.registry import table

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
ZERO = {"rescale_betas_zero_snr": True}
NOISES: dict[str, Noise] = {family.name: family.noise(family.scheduler) for family in FAMILIES}
NOISES |= {f"{p}, zero {zero}": VP.of(ZERO | {"prediction_type": p} if zero else {"prediction_type": p})
           for p in ("epsilon", "v_prediction", "sample") for zero in (False, True)}  # fmt: skip
NOISES["flow, no shift"] = Flow.of({})
every_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)


def test_the_table_is_in_the_order_of_recognition() -> None:
    assert tuple(table("families")) == tuple(family.name for family in FAMILIES)


@every_family
def test_parts_are_known_and_targets_name_layers(family: Family) -> None:
    assert [row.part for row in family.networks] == [part for part in PARTS if part in {row.part for row in family.networks}]
    for row in family.networks:
        own = [path for path in modules(family) if part_of(path) == row.part]
        empty = {name for name, pattern in row.targets.items() if not any(re.fullmatch(pattern, path) for path in own)}
        assert empty <= {"self-attention"} and {"attention", "feedforward"} <= row.targets.keys()


@every_family
def test_a_config_leads_back_to_the_row(family: Family) -> None:
    config, parts = family.denoiser.config(family.texts), [row.part for row in family.texts]
    assert detect(config, parts, family.denoiser.part) is family
    needed = [row.part for row in family.texts if not row.optional]
    assert [row.part for row in detect(config, needed, family.denoiser.part).texts] == needed


@every_family
def test_addresses_lead_back_to_the_parameters(family: Family) -> None:
    places = addresses(family)
    if not places:
        assert family_in({}) is None
        return
    assert weights(family).keys() <= places.keys()
    assert {path for paths in parameters_at(family).values() for path in paths} == places.keys()


@every_family
def test_kohya_names_lead_back_to_the_paths(family: Family) -> None:
    names, paths = kohya_names(family), kohya_paths(family)
    assert all(paths[name] == path for path, name in names.items()) and len(set(names.values())) == len(names)


@every_family
def test_blocks_cover_the_denoiser(family: Family) -> None:
    found = {family.denoiser.block_of(layer.path) for layer in family.denoiser.layers()}
    assert found == set(family.denoiser.blocks()) >= set(family.denoiser.blocks(attention=True))


@every_family
def test_latents_come_back(family: Family) -> None:
    raw = torch.randn(2, family.latents.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(family.latents.raw(family.latents.from_vae(raw)), raw, atol=1e-6)
    config = {"block_out_channels": (1, 1, 1, 1), "latent_channels": 4, "scaling_factor": 0.5, "shift_factor": None}
    assert LatentFormat.of(config) == LatentFormat(4, 8, 0.5, 0)


@every_noise
def test_clean_undoes_what_add_and_target_say(noise: Noise) -> None:
    t = torch.arange(0, noise.steps - 1, 111)
    x0, eps = (torch.randn(len(t), 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    x_t = noise.add(x0, eps, t)
    assert torch.allclose(noise.clean(noise.target(x0, eps, t), x_t, t), x0, atol=2e-2)
    nearly = noise.add(x0, eps, torch.zeros(len(t), dtype=torch.long))
    assert (nearly - x0).abs().max() < 0.2  # hardly any noise at first


@every_noise
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_weights_count_the_error_in_x0_by_min_snr(noise: Noise, gamma: float) -> None:
    """min(SNR, gamma) |x0 error|^2, whatever the network predicts."""
    t = torch.arange(50, noise.steps - 50, 50)
    x0, guess, eps = (torch.randn(len(t), 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    zero = torch.zeros_like(x0)
    signal, sigma = (noise.add(a, b, t).square().mean((1, 2, 3)).double() for a, b in ((zero + 1, zero), (zero, zero + 1)))
    x_t = noise.add(x0, eps, t)
    seen = noise.target(guess, (x_t - noise.add(guess, zero, t)) / sigma.sqrt().float()[:, None, None, None], t)
    squared = (seen - noise.target(x0, eps, t)).square().mean((1, 2, 3)).double()
    wanted = (signal / sigma).clamp(max=gamma) * (guess - x0).square().mean((1, 2, 3)).double()
    assert torch.allclose(noise.weight(t, gamma).double() * squared, wanted, rtol=1e-2)


@every_noise
def test_timesteps_are_drawn_by_seed_and_spread(noise: Noise) -> None:
    drawn = noise.draw_t(64, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, noise.draw_t(64, torch.Generator().manual_seed(1)))
    assert drawn.dtype == torch.long and drawn.min() >= 0 and drawn.max() < noise.steps and len(set(drawn.tolist())) > 32
    assert len(noise.time(drawn)) == 64 and noise.weight(torch.arange(noise.steps), 0).isfinite().all()
