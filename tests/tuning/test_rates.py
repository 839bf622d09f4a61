"""How fast layers learn and from when on: by name, by depth, thawed one after the other; and layers that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.api.recipes import layers_at_hand
from personalize.errors import RecipeError
from personalize.families.family import Family
from personalize.families.names import FAMILIES
from personalize.models.model import Base
from personalize.models.skeleton import skeleton_of
from personalize.recipe.fields import AdapterSpec, Optim, Recipe
from personalize.training.events import Started, Step
from personalize.training.fleet import train_fleet
from personalize.training.loop import train
from personalize.training.rundir import Run
from personalize.tuning.rates import Rate, depths, groups_of, rates_of
from personalize.tuning.targets import fresh, is_named

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., Recipe]
STEADY = {"warmup": 0, "schedule": "constant", "clip": 0, "weight_decay": 0, "checkpoint_every": 1, "batch_size": 1}
DOWN, UP = "unet.down_blocks", "unet.up_blocks"
SD1 = next(one for one in FAMILIES if one.name == "sd1")


@pytest.fixture(scope="module")
def paths() -> list[str]:
    """Attention layers of SD 1.5 and of its text encoder."""
    ends = "attn1.to_q", "self_attn.q_proj"
    return [f"{row.part}.{one.path}" for row in SD1.networks for one in row.layers() if one.path.endswith(ends)]


def rates(paths: list[str], steps: int = 100, **optim: Any) -> dict[str, Rate]:
    return rates_of(SD1, paths, Optim(**optim), steps)


def of(found: Mapping[str, Rate], begins: str) -> set[Rate]:
    return {rate for path, rate in found.items() if path.startswith(begins)}


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(("pattern", "path", "named"), [
    ("up_blocks", "unet.up_blocks.1.attentions.0.proj_in", True),
    ("up_blocks.1", "unet.up_blocks.1.attentions.0.proj_in", True),
    ("up_blocks.1", "unet.up_blocks.11.attentions.0.proj_in", False),
    ("up_blocks.*", "unet.up_blocks.1.attentions.0.proj_in", True),
    ("*.proj_in", "unet.up_blocks.1.attentions.0.proj_in", True),
    ("mid", "unet.mid_block.attentions.0.proj_in", True),
    ("MID", "unet.mid_block.attentions.0.proj_in", True),
    ("OUT", "unet.up_blocks.1.attentions.0.proj_in", True),
    ("OUT03", "unet.up_blocks.1.attentions.0.proj_in", True),
    ("OUT04", "unet.up_blocks.1.attentions.0.proj_in", False),
    ("attention", "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", True),
    ("text_encoder", "text_encoder.text_model.encoder.layers.1.mlp.fc1", True),
    ("text_model.encoder.layers.1", "text_encoder.text_model.encoder.layers.11.mlp.fc1", False),
    ("unet", "text_encoder.text_model.encoder.layers.1.mlp.fc1", False),
])  # fmt: skip
def test_patterns_name_layers_as_people_do(pattern: str, path: str, named: bool) -> None:
    assert is_named(SD1, pattern, path) == named


def test_the_last_scale_that_names_a_layer_counts(paths: list[str]) -> None:
    found = rates(paths, lr_scale=("unet=0.5", "up_blocks.3=2"))
    assert of(found, "unet.up_blocks.3") == {Rate(0, 2.0)} and of(found, "unet.up_blocks.1") == {Rate(0, 0.5)}
    assert of(found, "text_encoder") == {Rate()}


def test_rates_decay_from_the_output(paths: list[str]) -> None:
    found, deep = rates(paths, lr_decay=0.5), depths(SD1, paths)
    assert all(rate.scale == 0.5 ** deep[path] for path, rate in found.items())
    layers = [found[f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj"].scale for i in range(12)]
    assert layers == [0.5 ** (11 - i) for i in range(12)]
    order = [
        "up_blocks.3.attentions.2",
        "up_blocks.3.attentions.0",
        "up_blocks.1.attentions.0",
        "mid_block",
        "down_blocks.2",
        "down_blocks.0",
    ]
    scales = [max(of(found, f"unet.{name}")).scale for name in order]
    assert scales == sorted(scales, reverse=True) and len(set(scales)) == len(order) and scales[0] == 1.0


def test_layers_are_thawed_for_a_share_of_the_steps(paths: list[str]) -> None:
    found = rates(paths, unfreeze="1.0:up_blocks,mid; 0.6:down_blocks")
    assert of(found, UP) == of(found, "unet.mid") == of(found, "text_encoder") == {Rate()}
    assert of(found, DOWN) == {Rate(40)}


def test_gradual_thaws_from_the_output_in_the_first_half(paths: list[str]) -> None:
    found, deep = rates(paths, unfreeze="gradual"), depths(SD1, paths)
    for part in ("unet", "text_encoder"):
        own = sorted((deep[path], rate.start) for path, rate in found.items() if path.startswith(part))
        starts = [start for _, start in own]
        assert starts == sorted(starts) and starts[0] == 0 and 40 < starts[-1] < 50
    assert len(of(found, "text_encoder")) == 12


@pytest.mark.parametrize(("optim", "what"), [
    ({"lr_scale": ("up",)}, "--lr-scale takes PATTERN=NUMBER"),
    ({"lr_scale": ("up_blocks=0",)}, "--lr-scale takes PATTERN=NUMBER above 0"),
    ({"lr_scale": ("nowhere=2",)}, "--lr-scale: 'nowhere' names no layer that is trained"),
    ({"unfreeze": "2:up_blocks"}, "--unfreeze takes SHARE:LAYERS"),
    ({"unfreeze": "up_blocks"}, "--unfreeze takes SHARE:LAYERS"),
    ({"unfreeze": "0.5:up_block.7"}, "--unfreeze: 'up_block.7' names no layer"),
    ({"unfreeze": "0.5:unet,text_encoder"}, "--unfreeze: nothing would learn in the first 50 steps"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(paths: list[str], optim: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        rates(paths, **optim)
    assert what in str(caught.value)


def test_groups_name_their_blocks(paths: list[str]) -> None:
    told = groups_of(SD1, rates(paths, lr_scale=("IN=0.3",), unfreeze="0.5:mid"))
    assert [(one.layers, one.rate) for one in told] == [
        ("unet OUT03 to OUT11", Rate()), ("text_encoder layer 0 to layer 11", Rate()), ("unet IN01 to IN08", Rate(0, 0.3)),
        ("unet MID", Rate(50)),
    ]  # fmt: skip
    assert sum(one.count for one in told) == len(paths)


# ---------------------------------------------------------------- what stays as it is


@pytest.mark.parametrize("kind", ["lora", "full", "norms"])
def test_frozen_layers_are_left_out(narrow_base: Path, kind: str) -> None:
    base, parts = Base.load(narrow_base), ("unet", "text_encoder")
    whole, some = (fresh(base, AdapterSpec(kind=kind, freeze=freeze), parts, 0) for freeze in ((), ("down_blocks.*",)))
    assert some.keys() == {path for path in whole if not path.startswith(DOWN)} and len(some) < len(whole)
    assert all(torch.equal(*(value.delta(torch.ones(value.shape)) for value in (some[path], whole[path]))) for path in some)
    with pytest.raises(RecipeError, match="--freeze: 'nowhere' names no layer"):
        fresh(base, AdapterSpec(kind=kind, freeze=("nowhere",)), parts, 0)
    with pytest.raises(RecipeError, match="--freeze leaves no layer to train"):
        fresh(base, AdapterSpec(kind=kind, freeze=("unet", "text_encoder")), parts, 0)


@pytest.mark.parametrize("kind", ["lora", "full", "norms"])
def test_a_base_without_weights_has_the_same_layers(narrow_base: Path, kind: str) -> None:
    spec, parts = AdapterSpec(kind=kind), ("unet", "text_encoder")
    own, shapes = fresh(Base.load(narrow_base), spec, parts, 0), fresh(skeleton_of(str(narrow_base)), spec, parts, 0)
    assert {path: delta.shape for path, delta in own.items()} == {path: delta.shape for path, delta in shapes.items()}


# ---------------------------------------------------------------- runs


def run(recipe: Recipe) -> list[Any]:
    return list(train(recipe))


def checkpoint(recipe: Recipe, step: int) -> dict[str, Tensor]:
    """What was learned, by path."""
    assert recipe.output
    deltas = Adapter.load(recipe.output / "checkpoints" / f"zwx-{step:06d}.safetensors").deltas
    return {path: delta.delta() for path, delta in deltas.items()}


def moved(found: dict[str, Tensor], begins: str) -> set[bool]:
    return {bool(value.any()) for path, value in found.items() if path.startswith(begins)}


def test_a_rate_of_half_takes_half_of_the_step(make: Make, tmp_path: Path) -> None:
    """AdamW's first step is the rate times the gradient's sign."""
    even = make(kind="full", targets=["attention"], steps=1, **STEADY, output=tmp_path / "even")
    half = make(kind="full", targets=["attention"], steps=1, **STEADY, output=tmp_path / "half", lr_scale=["down_blocks=0.5"])
    for recipe in (even, half):
        run(recipe)
    one, other = checkpoint(even, 1), checkpoint(half, 1)
    for path, value in one.items():
        torch.testing.assert_close(other[path], value * (0.5 if path.startswith(DOWN) else 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_not_thawed_yet_does_not_learn_and_changes_nothing(make: Make, tmp_path: Path, kind: str) -> None:
    how = {"kind": kind, "targets": ["attention"], "text_encoder_lr": 1e-3, **STEADY}
    plain = make(steps=1, output=tmp_path / "plain", **how)
    thawed = make(steps=3, output=tmp_path / "thawed", unfreeze="1:up_blocks; 0.34:down_blocks", **how)
    run(plain)
    started = next(event for event in run(thawed) if isinstance(event, Started))
    one, first, second, third = checkpoint(plain, 1), *(checkpoint(thawed, step) for step in (1, 2, 3))
    assert moved(first, DOWN) == moved(second, DOWN) == {False} and moved(third, DOWN) == {True}
    assert all(torch.equal(one[path], value) for path, value in first.items() if path.startswith(UP))
    assert [(row["start"], row["scale"]) for row in started.rates] == [(0, 1.0), (0, 1.0), (2, 1.0)]
    assert thawed.output
    state = Run(thawed.output, "zwx").load_state()
    steps = (
        {float(value) for name, value in state.tensors.items() if name.startswith(DOWN) and name.endswith(".step")}
        if state
        else {}
    )
    assert steps == {1.0}


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_stopped_in_any_phase_ends_with_the_same_bytes(make: Make, tmp_path: Path, stop: int) -> None:
    how = {"steps": 4, "unfreeze": "1:up_blocks; 0.5:down_blocks", "lr_decay": 0.9, **STEADY, "warmup": 2}
    whole, broken = make(output=tmp_path / "whole", **how), make(output=tmp_path / "broken", **how)
    run(whole)
    events = train(broken)
    while not (isinstance(event := next(events), Step) and event.step == stop):
        pass
    events.close()  # type: ignore[attr-defined]
    run(broken)
    files = [recipe.output / "zwx.safetensors" for recipe in (whole, broken) if recipe.output]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_members_of_a_fleet_thaw_each_by_itself(make: Make, tmp_path: Path) -> None:
    how = {"targets": ["attention"], "unfreeze": "1:up_blocks; 0.5:down_blocks", **STEADY}
    alone = make(steps=4, output=tmp_path / "alone", **how)
    run(alone)
    members = [make(steps=steps, output=tmp_path / f"member{steps}", **how) for steps in (4, 2)]
    list(train_fleet(members))
    for step, learned in ((1, {False}), (2, {False}), (3, {True})):
        assert moved(checkpoint(members[0], step), DOWN) == learned
    assert moved(checkpoint(members[1], 1), DOWN) == {False} and moved(checkpoint(members[1], 2), DOWN) == {True}
    for path, value in checkpoint(alone, 4).items():
        torch.testing.assert_close(checkpoint(members[0], 4)[path], value, rtol=1e-3, atol=1e-6)


def test_layers_at_hand_are_those_of_the_run(make: Make) -> None:
    recipe = make(unfreeze="gradual", lr_scale=["OUT=2"], freeze=["mid"], text_encoder_lr=1e-4)
    assert recipe.is_layered and not make().is_layered
    told, started = layers_at_hand(recipe), next(event for event in train(recipe) if isinstance(event, Started))
    assert [
        {"layers": one.layers, "count": one.count, "start": one.rate.start, "scale": one.rate.scale} for one in told
    ] == started.rates


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_depths_are_known_for_every_layer_of_every_family(family: Family) -> None:
    for row in family.networks:
        deep = depths(family, [f"{row.part}.{layer.path}" for layer in row.layers()])
        assert min(deep.values()) == 0 < max(deep.values())
