"""A bound on the norm of each layer's update: as kohya has it, and for every kind whose tensors carry a strength."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personalize.adapters import kinds
from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.describe import describe
from personalize.adapters.kinds.kind import DOWN, UP
from personalize.errors import RecipeError
from personalize.models.model import Base
from personalize.recipe.fields import AdapterSpec, Recipe
from personalize.recipe.resolve import resolve
from personalize.training.events import Step, event_record, parse
from personalize.training.fleet import train_fleet
from personalize.training.loop import train
from personalize.tuning.attach import attach, weight_named
from personalize.tuning.fleet import Fleet
from personalize.tuning.targets import fresh

Make = Callable[..., Recipe]
BOUNDED = [name for name, row in kinds.trainable().items() if row.linear_in]
UNBOUNDED = [name for name in kinds.trainable() if name not in BOUNDED]


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> Base:
    return Base.load(narrow_base)


def norms(adapter: Adapter, base: Base) -> dict[str, float]:
    """The norm of each dW, which is formed for it."""
    plain = adapter.resolve(lambda path: weight_named(base, path))
    return {path: float(delta.delta().norm()) for path, delta in plain.deltas.items()}


def spread(tensors: dict[str, Tensor], seed: int) -> None:
    """Random values of very different sizes."""
    for i, tensor in enumerate(tensors.values()):
        tensor.normal_(std=0.05 * (1 + seed % 7), generator=torch.Generator().manual_seed(100 * seed + i))


@pytest.mark.parametrize("kind", BOUNDED)
def test_what_is_too_large_is_brought_down_and_the_rest_stays(base: Base, kind: str) -> None:
    spec = AdapterSpec(
        kind=kind, rank=4, targets=("all",) if kind in ("full", "norms") else ("attention", "conv"), biases=kind == "norms"
    )
    with attach(base, spec) as attached:
        for seed, layer in enumerate(attached.layers.values()):
            spread(layer.tensors(), seed)
        before = norms(attached.snapshot(), base)
        middle = len(before) // 2
        most = sum(sorted(before.values())[middle - 1 : middle + 1]) / 2
        start = attached.snapshot()
        assert attached.bound(most) == sum(norm > most for norm in before.values()) > 0
        bounded = attached.snapshot()
        after = norms(bounded, base)
    for path, norm in after.items():
        assert norm == pytest.approx(min(before[path], most), rel=1e-4)
        if before[path] < most * 0.999:
            stored = start.deltas[path].stored()
            assert all(torch.equal(value, stored[role]) for role, value in bounded.deltas[path].stored().items())


def test_a_lora_is_scaled_as_kohya_scales_it(base: Base) -> None:
    """networks/lora.py's apply_max_norm_regularization: both halves by the root of max norm / norm."""
    with attach(base, AdapterSpec(rank=4, alpha=2.0, targets=("attention",))) as attached:
        for seed, layer in enumerate(attached.layers.values()):
            spread(layer.tensors(), seed)
        wanted = {}
        for path, layer in attached.layers.items():
            up, down = (layer.tensors()[role].double() for role in (UP, DOWN))
            root = (0.3 / (0.5 * up @ down).norm()).clamp(max=1).sqrt()
            wanted[path] = up * root, down * root
        attached.bound(0.3)
        for path, layer in attached.layers.items():
            for role, value in zip((UP, DOWN), wanted[path], strict=True):
                assert torch.allclose(layer.tensors()[role].double(), value, rtol=1e-5)


def test_a_member_is_bounded_and_the_others_are_not(base: Base) -> None:
    spec = AdapterSpec(rank=2, targets=("attention",))
    with Fleet(base, [fresh(base, spec, ("unet",), seed) for seed in range(2)]) as company:
        for seed, layer in enumerate(company.layers.values()):
            for number in (0, 1):
                spread(layer.tensors(number), seed)
        other = company.members[1].snapshot()
        assert company.members[0].bound(1e-3) == len(company.layers)
        assert max(norms(company.members[0].snapshot(), base).values()) == pytest.approx(1e-3, rel=1e-4)
        for path, delta in company.members[1].snapshot().deltas.items():  # to the bit, which no difference of products is
            assert all(torch.equal(value, other.deltas[path].stored()[role]) for role, value in delta.stored().items())


def test_a_run_tells_how_many_layers_were_held_back(make: Make, base: Base, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"steps": 3, "warmup": 0, "lr": 1e-2, "scale_weight_norms": 0.02}
    recipe, free = make(**flags, output=tmp_path / "run"), make(**flags | {"scale_weight_norms": 0.0}, output=tmp_path / "free")
    steps = [event for event in train(recipe) if isinstance(event, Step)]
    assert steps[-1].bounded > 0 and event_record(steps[-1])["bounded"] == steps[-1].bounded
    assert parse(event_record(steps[-1])) == steps[-1]
    plain = [event for event in train(free) if isinstance(event, Step)]
    assert not any("bounded" in event_record(event) for event in plain)
    file = tmp_path / "run" / "zwx.safetensors"
    assert max(norms(Adapter.load(file), base).values()) == pytest.approx(0.02, rel=1e-4)
    assert describe(file).metadata["ss_scale_weight_norms"] == "0.02"
    assert "ss_scale_weight_norms" not in describe(tmp_path / "free" / "zwx.safetensors").metadata
    members = [make(**flags, seed=seed, output=tmp_path / f"member{seed}") for seed in (0, 1)]
    list(train_fleet(members))
    assert distance(Adapter.load(tmp_path / "member0" / "zwx.safetensors"), Adapter.load(file)) < 2e-4


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_kinds_without_a_strength_refuse_it(tmp_path: Path, kind: str) -> None:
    with pytest.raises(
        RecipeError, match=f"--scale-weight-norms scales an update, which --kind {kind} has no tensors for .*lora"
    ):
        resolve(flags={"folder": tmp_path, "kind": kind, "scale_weight_norms": 1.0})
    with pytest.raises(RecipeError, match="--scale-weight-norms scales what --optimizer schedulefree does not go on from"):
        resolve(flags={"folder": tmp_path, "optimizer": "schedulefree", "scale_weight_norms": 1.0})
