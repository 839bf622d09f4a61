"""Useless work: left out to the bit, and only that."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from personalize.models.model import Base
from personalize.models.useless import FACTORS, ONE, One, activate_once, skip_divisions, write_divisions
from personalize.training.memory.apply import apply_plan
from personalize.training.memory.ladder import ComputePlan
from tools.bench.counting import Work, phases

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pocket() -> Base:
    return Base.load("pocket")


def predict(base: Base) -> tuple[Tensor, Tensor, int]:
    """A prediction, the gradient of its square, and how many divisions they took."""
    torch.manual_seed(0)
    latents = torch.randn(1, base.channels, 8, 8, requires_grad=True)
    with phases(work := Work(), []), work:
        out = base.denoise(latents, torch.tensor([3]), base.embed(["a red cat"]))
        out.square().mean().backward()
    assert latents.grad is not None
    return out.detach(), latents.grad, work.names["div"]


def test_a_base_has_the_bits_of_one_that_divides(pocket: Base) -> None:
    factors = [getattr(m, name) for m in pocket.denoiser.modules() for name in FACTORS if hasattr(m, name)]
    assert len(factors) > 8 and all(one is ONE for one in factors)
    out, grad, few = predict(pocket)
    picture = pocket.decode(out)
    try:
        for model in (pocket.denoiser, pocket.vae):
            write_divisions(model)
        assert getattr(pocket.vae.decoder.mid_block.resnets[0], FACTORS[0]) == 1.0
        plain, slope, many = predict(pocket)
        assert torch.equal(out, plain) and torch.equal(grad, slope) and torch.equal(picture, pocket.decode(plain))
        assert many - few >= 2 * len(factors) - 1
    finally:
        skip_divisions(pocket.denoiser, pocket.vae)


def test_the_timestep_is_activated_once_to_the_bit(pocket: Base) -> None:
    unet, plain = pocket.denoiser, copy.deepcopy(pocket.denoiser)
    assert unet.time_embed_act is not None
    plain.time_embed_act = None
    blocks = [module for module in plain.modules() if getattr(module, "skip_time_act", False)]
    for block in blocks:
        block.skip_time_act = False
    counts, outs = list[int](), list[Tensor]()
    for model in (unet, plain):
        with phases(work := Work(), []), work, torch.no_grad():
            outs.append(
                model(torch.ones(1, pocket.channels, 8, 8), torch.tensor(7), torch.ones(1, 77, 192), return_dict=False)[0]
            )
        counts.append(work.names["silu"])
    assert torch.equal(*outs) and counts[1] - counts[0] == len(blocks) - 1 > 3
    activate_once(unet)
    assert all(one.skip_time_act for one in unet.modules() if hasattr(one, "skip_time_act")), "once is enough"
    plain.mid_block.resnets[0].skip_time_act = True  # somebody's own choice
    activate_once(plain)
    assert plain.time_embed_act is None


def test_other_factors_divide(pocket: Base) -> None:
    block = copy.deepcopy(pocket.denoiser.down_blocks[0].resnets[0])
    x, time = torch.randn(1, block.in_channels, 8, 8), torch.randn(1, block.time_emb_proj.in_features)
    whole = block(x, time)
    block.output_scale_factor = 2.0
    skip_divisions(block)
    assert torch.equal(block(x, time), whole / 2)


def test_one_is_one_elsewhere() -> None:
    x = torch.rand(3, dtype=torch.bfloat16)
    assert x / ONE is x and torch.equal(x * One(), x) and torch.equal(torch.add(x, ONE), x + 1)
    assert float(ONE) == 1 and f"{ONE}" == "1.0" and torch.equal(torch.div(2 * x, ONE), 2 * x)


def test_a_compiler_gets_numbers(pocket: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pocket.denoiser), "compile_repeated_blocks", lambda self: None)
    monkeypatch.setattr("personalize.training.memory.apply.missing_compiler", lambda device: "")
    apply_plan(pocket, ComputePlan(compile=True), CPU)
    assert not any(getattr(module, name, None) is ONE for module in pocket.denoiser.modules() for name in FACTORS)
    skip_divisions(pocket.denoiser)
