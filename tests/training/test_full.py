"""`--kind full`: a model's own weights are trained, and the model is left in its base's layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import LATENT

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.delta import LowRank
from personalize.models.model import Base
from personalize.recipe.fields import AdapterSpec, Recipe
from personalize.training.events import Derived
from personalize.training.loop import train
from personalize.training.preflight import check
from personalize.tuning.attach import attach, find_weight, weight_named
from personalize.tuning.fleet import Fleet
from personalize.tuning.targets import adaptable, find_norms, fresh

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., Recipe]
PARTS = ("unet", "text_encoder")
FULL = {"kind": "full", "steps": 1, "batch_size": 1, "warmup": 0, "checkpoint_every": 0, "text_encoder_lr": 1e-4}


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(1)), torch.tensor([300])


def test_all_weights_and_biases_are_trained_and_tables_are_not(narrow_base: Path) -> None:
    base = Base.load(narrow_base)
    start = fresh(base, AdapterSpec(kind="full"), PARTS, 0)
    layers = adaptable(base) | find_norms(base)
    with_bias = {f"{path}.bias" for path in layers if find_weight(base, f"{path}.bias") is not None}
    assert start.keys() == layers.keys() | with_bias
    learned = sum(weight_named(base, path).numel() for path in start)
    named = [one for model in base.parts.values() for one in model.named_parameters()]
    tables = sum(p.numel() for name, p in named if "embedding" in name and "time" not in name)
    assert learned + tables == sum(p.numel() for _, p in named)
    some = fresh(base, AdapterSpec(kind="full", targets=("attention",), freeze=("down_blocks",)), ("unet",), 0)
    assert some and all(".attn" in path and not path.startswith("unet.down") for path in some)
    globbed = fresh(base, AdapterSpec(kind="full", targets=("mid_block.*",)), ("unet",), 0)
    assert any("norm" in path for path in globbed) and all(path.startswith("unet.mid_block") for path in globbed)


def test_gradients_are_those_of_the_weights_themselves(narrow_base: Path, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """dW's gradient is W's, as torch computes it of the plain model."""
    base = Base.load(narrow_base)
    start = fresh(base, AdapterSpec(kind="full"), ("unet",), 0)
    cond = base.embed(["a cat"])
    with Fleet(base, [start]) as fleet:
        base.denoise(*inputs, cond).square().mean().backward()
        (parameters,) = fleet.members[0].parameters().values()
        ours = {name.rpartition("."): p.grad for name, p in parameters.items()}
    for path in start:
        weight_named(base, path).requires_grad_()
    base.denoise(*inputs, cond).square().mean().backward()
    for (path, _, role), gradient in ours.items():
        theirs = weight_named(base, f"{path}.bias" if role in ("b_norm", "diff_b") else path).grad
        assert gradient is not None and theirs is not None
        torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-7)
    assert len(ours) == len(start)


def test_the_model_and_a_lora_lie_beside_the_adapter(make: Make, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    recipe = make(**FULL)
    events = list(train(recipe))
    model, lora = (event for event in events if isinstance(event, Derived))
    assert recipe.output
    adapter, small = Adapter.load(recipe.output / "zwx.safetensors"), Adapter.load(recipe.output / lora.path)
    assert model.path == "zwx-model" and model.error < 1e-6  # the base is fp32
    base, tuned = Base.of(recipe), Base.load(recipe.output / model.path)
    with torch.no_grad(), attach(base, adapter):
        wanted = base.denoise(*inputs, base.embed(["a zwx"]))
    with torch.no_grad():
        assert torch.allclose(tuned.denoise(*inputs, tuned.embed(["a zwx"])), wanted, atol=1e-4)
        assert not torch.allclose(base.denoise(*inputs, base.embed(["a zwx"])), wanted, atol=1e-3)
    assert lora.error == pytest.approx(distance(small, adapter), rel=1e-3) and 0 < lora.error < 1
    assert all(delta.rank <= recipe.adapter.rank for delta in small.deltas.values() if isinstance(delta, LowRank))


def test_the_model_takes_the_place_of_an_earlier_one(make: Make) -> None:
    recipe = make(**{**FULL, "targets": ["attention"]})
    list(train(recipe))
    assert recipe.output
    before = Adapter.load(recipe.output / "zwx.safetensors")
    (recipe.output / ".zwx-model").mkdir()  # a killed run's
    longer = make(**{**FULL, "targets": ["attention"], "steps": 2})
    list(train(longer))
    assert distance(before, Adapter.load(recipe.output / "zwx.safetensors")) > 0
    assert sorted(path.name for path in recipe.output.iterdir() if "model" in path.name) == ["zwx-model"]


def test_rounded_weights_are_never_trained(make: Make) -> None:
    assert check(make(**FULL)).recipe.fitting.quantize == "none"
    assert check(make()).recipe.fitting.quantize == "auto"


def test_a_base_in_bf16_learns_what_is_smaller_than_its_rounding(narrow_base: Path, inputs: Any) -> None:
    """Sums are made in fp32, so that small updates add up until they are seen."""
    base = Base.load(narrow_base, dtype=torch.bfloat16)
    start = fresh(base, AdapterSpec(kind="full", targets=("attention",)), ("unet",), 0)
    x, t = inputs
    with torch.no_grad(), Fleet(base, [start]) as fleet:
        plain = base.denoise(x.bfloat16(), t, base.embed(["a"]))
        (parameters,) = fleet.members[0].parameters().values()
        for step in range(1, 65):
            for parameter in parameters.values():
                parameter += 2e-5
            if step == 64:
                assert not torch.equal(base.denoise(x.bfloat16(), t, base.embed(["a"])), plain)
