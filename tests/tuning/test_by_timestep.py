"""Ranks that go by the timestep (T-LoRA): the paper's rule, layers in fp64, whole steps, and what becomes of the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.contract import BY_TIMESTEP
from personalize.adapters.delta import LowRank
from personalize.adapters.kinds.kind import DOWN, UP
from personalize.adapters.kinds.lora import LORA, least_rank
from personalize.adapters.ops.convert import convert
from personalize.adapters.ops.merge import merge
from personalize.adapters.ops.resize import resize
from personalize.cli import run
from personalize.errors import RecipeError
from personalize.families.cond import Cond
from personalize.inference.pipeline import draw
from personalize.models.model import Base
from personalize.recipe.fields import AdapterSpec, Recipe
from personalize.recipe.resolve import resolve
from personalize.training.events import Shared, Started, Step
from personalize.training.fleet import train_fleet
from personalize.training.loop import train
from personalize.training.memory.apply import apply_plan
from personalize.training.memory.ladder import ComputePlan
from personalize.training.memory.plan import choose_memory_plan, estimate_of
from personalize.training.preflight import check
from personalize.tuning.attach import Attached, attach
from personalize.tuning.by_timestep import Clock, TimedLayer, ranks_at
from personalize.tuning.layers import ActiveRows, AdapterLayer

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., Recipe]
ALL = ("attention", "feedforward", "conv")
TIMED: dict[str, Any] = {"rank": 4, "rank_by_timestep": 0.25, "lr": 2e-2, "warmup": 0}
T = torch.tensor([0, 300, 999])


@pytest.fixture
def base(narrow_base: Path) -> Base:
    return Base.load(narrow_base)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(("rank", "share", "least"), [(8, 0.5, 4), (8, 0.01, 1), (5, 0.5, 2), (64, 0.3, 19), (3, 0.9, 3)])
def test_the_rule_is_the_papers(rank: int, share: float, least: int) -> None:
    t = torch.arange(1000)
    wanted = [(rank - least) * (1000 - i) // 1000 + least for i in range(1000)]
    assert least_rank(rank, share) == least and wanted[0] == rank and wanted[-1] == least
    for kind in (torch.long, torch.float32):  # timesteps of a sampler may lie between
        assert ranks_at(t.to(kind), 1000, rank, least).tolist() == wanted
        assert ranks_at(t.to(kind)[:, None], 1000, torch.tensor([rank, 8]), torch.tensor([least, 4]))[:, 0].tolist() == wanted
    assert [ranks_at(float(i), 1000, rank, least) for i in t] == wanted


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, padding=1, stride=2)], ids=["linear", "conv"])
def test_each_row_meets_the_ranks_of_its_timestep(base: Base, layer: nn.Module, members: int) -> None:
    layer, rows, r = layer.double(), 3, 4
    kernel = layer.weight.shape[2:]  # type: ignore[union-attr, index]
    ones = [1] * len(kernel)
    specs = [({DOWN: noise(r, 6, *kernel, seed=i), UP: noise(5, r, *ones, seed=9 + i)}, float(1 + i)) for i in range(members)]
    timed = TimedLayer(layer, LORA, specs, ActiveRows(*range(members)), torch.device("cpu"))
    clock = Clock(base, 0.25)
    timed.follow(clock)
    shape = (4, 4) if kernel else ()
    x = noise(rows * members, *(() if kernel else (7,)), 6, *shape, seed=5).double()
    t = torch.tensor([0, 300, 999, 600, 100, 998, 500, 1, 250])[: len(x)]
    clock.hear(layer, (x, t), {})
    for i, (one, found) in enumerate(zip(x, timed(x), strict=True)):
        (tensors, alpha), k = specs[i // rows], (3 * (1000 - int(t[i]))) // 1000 + 1
        up, down = tensors[UP].double()[:, :k], tensors[DOWN].double()[:k]
        weight = layer.weight + alpha / r * (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)  # type: ignore[union-attr, operator]
        wanted = torch.func.functional_call(layer, {"weight": weight, "bias": layer.bias}, one[None])[0]
        torch.testing.assert_close(found, wanted)


def learn_something(attached: Attached, size: float = 0.1) -> None:
    for group in attached.parameters().values():
        for name, p in group.items():
            nn.init.normal_(p, std=size, generator=torch.Generator().manual_seed(len(name)))


def pass_through(base: Base, attached: Attached, rows: Sequence[int], keep: Callable[[int], int] | None) -> dict[str, Tensor]:
    """Gradients of these rows' squared predictions; `keep`: by LoRAs that were cut to so many ranks for each row by itself."""
    x, cond = noise(3, base.channels, 8, 8), Cond(noise(3, 77, base.embed(["a"]).tokens.shape[2], seed=1))
    found: dict[str, Tensor] = {}
    whole = {name: p for group in attached.parameters().values() for name, p in group.items()}
    saved = {name: p.detach().clone() for name, p in whole.items()}
    for group in [list(rows)] if keep is None else [[i] for i in rows]:
        for name, p in whole.items():
            if keep is not None:
                k = keep(int(T[group[0]]))
                (p.data[k:] if name.endswith(".down") else p.data[:, k:]).zero_()
            p.grad = None
        (base.denoise(x[group], T[group], cond[group]) ** 2).mean((1, 2, 3)).sum().backward()
        for name, p in whole.items():
            assert p.grad is not None
            p.data.copy_(saved[name])
            if keep is not None:  # a column whose partner is 0 has a gradient: in T-LoRA it does not count at all
                (p.grad[k:] if name.endswith(".down") else p.grad[:, k:]).zero_()
            found[name] = found.get(name, torch.zeros_like(p)) + p.grad
    return found


@pytest.mark.parametrize("plan", [None, ComputePlan(checkpointing=True)], ids=["plain", "checkpointed"])
def test_a_step_has_the_gradient_of_rows_with_fewer_ranks(base: Base, plan: ComputePlan | None) -> None:
    """As separate passes of each row through LoRAs that are cut to the ranks of its timestep, convolutions among them."""
    if plan:
        apply_plan(base, plan, torch.device("cpu"))
    with attach(base, AdapterSpec(rank=4, targets=ALL, rank_by_timestep=0.25), seed=1) as timed:
        learn_something(timed)
        ours = pass_through(base, timed, range(3), None)
    with attach(base, AdapterSpec(rank=4, targets=ALL), seed=1) as plain:
        learn_something(plain)
        theirs = pass_through(base, plain, range(3), lambda t: 3 * (1000 - t) // 1000 + 1)
    assert ours.keys() == theirs.keys() and any(".conv1." in name for name in ours)
    far = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours]).norm()
    assert far / torch.cat([one.flatten() for one in theirs.values()]).norm() < 1e-4


# ---------------------------------------------------------------- what it is put on


def test_without_it_every_layer_is_what_it_was(base: Base) -> None:
    for spec, kinds in ((AdapterSpec(rank=4), {AdapterLayer}), (AdapterSpec(rank=4, rank_by_timestep=0.5), {TimedLayer})):
        with attach(base, spec) as attached:
            assert {type(layer) for layer in attached.layers.values()} == kinds
            assert len(base.denoiser._forward_pre_hooks) == (TimedLayer in kinds)
        assert not base.denoiser._forward_pre_hooks


def test_text_encoders_have_no_timestep(base: Base) -> None:
    with attach(base, AdapterSpec(rank=4, rank_by_timestep=0.5), parts=("unet", "text_encoder")) as attached:
        kinds = {path.partition(".")[0]: type(layer) for path, layer in attached.layers.items()}
    assert kinds == {"unet": TimedLayer, "text_encoder": AdapterLayer}


def test_off_and_strengths_hold(base: Base) -> None:
    x, cond, t = noise(2, base.channels, 8, 8), base.embed(["a cat", "b"]), torch.tensor([10, 900])
    with torch.no_grad():
        before = base.denoise(x, t, cond)
        with attach(base, AdapterSpec(rank=4, rank_by_timestep=0.5)) as attached:
            learn_something(attached)
            changed = base.denoise(x, t, cond)
            with attached.off():
                assert torch.equal(base.denoise(x, t, cond), before)
            with attached.at(0.0):
                assert torch.allclose(base.denoise(x, t, cond), before, atol=1e-6)
            assert not torch.allclose(changed, before, atol=1e-3)


# ---------------------------------------------------------------- runs


def trained(make: Make, **flags: Any) -> Recipe:
    recipe = make(**{**TIMED, **flags})
    list(train(recipe))
    return recipe


def file_of(recipe: Recipe) -> Path:
    assert recipe.output
    return recipe.output / "zwx.safetensors"


def test_a_stopped_run_ends_with_the_same_bytes(make: Make, tmp_path: Path) -> None:
    flags = {**TIMED, "steps": 3, "dropout": 0.1, "text_encoder_lr": 1e-3, "prior": "output", "accumulate": 2}
    whole = trained(make, **flags, output=tmp_path / "whole")
    events = train(broken := make(**flags, output=tmp_path / "broken"))
    next(event for event in events if isinstance(event, Step) and event.step == 2)
    events.close()  # type: ignore[attr-defined]
    assert next(event for event in list(train(broken)) if isinstance(event, Started)).resumed == 2
    assert file_of(whole).read_bytes() == file_of(broken).read_bytes()


@pytest.mark.parametrize("flags", [{"micro_batch": 1}, {"checkpointing": "yes"}], ids=str)
def test_memory_changes_nothing_but_the_rounding(make: Make, tmp_path: Path, flags: dict[str, Any]) -> None:
    plain = trained(make, prior="output", output=tmp_path / "plain")
    other = trained(make, prior="output", output=tmp_path / "other", **flags)
    assert distance(Adapter.load(file_of(plain)), Adapter.load(file_of(other))) < 1e-3


def test_members_of_a_fleet_learn_what_they_learn_alone(make: Make, tmp_path: Path) -> None:
    """But for one whose ranks do not go by the timestep: it goes alone."""

    def recipes(where: str) -> list[Recipe]:
        own: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2, "alpha": 2.0}, {"seed": 3, "rank_by_timestep": 0.0}]
        return [make(**{**TIMED, **one}, targets=ALL, output=tmp_path / where / str(i)) for i, one in enumerate(own)]

    told = list(train_fleet(recipes("fleet")))
    assert [event.members for _, event in told if isinstance(event, Shared)] == [2]
    for fleet, alone in zip(recipes("fleet"), recipes("alone"), strict=True):
        list(train(alone))
        assert distance(Adapter.load(file_of(fleet)), Adapter.load(file_of(alone))) < 1e-3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_is_estimated_and_learns(make: Make, precision: str) -> None:
    recipe = make(**TIMED, memory="900MB", precision=precision)
    plan = check(recipe)
    assert estimate_of(plan, choose_memory_plan(plan).compute).peak > 0
    steps = [event for event in train(recipe) if isinstance(event, Step)]
    assert len(steps) == 4 and not any(event.skipped for event in steps)
    assert any("generate` go by it; other programs use all ranks" in one for one in recipe.remarks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch 2.13 warns of its own compiler
def test_compiled_blocks_learn_the_same(make: Make, tmp_path: Path) -> None:
    plain, compiled = (trained(make, lr=1e-3, output=tmp_path / str(how), compile=how) for how in (False, True))
    assert distance(Adapter.load(file_of(compiled)), Adapter.load(file_of(plain))) < 0.1


# ---------------------------------------------------------------- its file


SAMPLED = {
    "sample_prompts": ["zwx cat"],
    "sample_seeds": [3],
    "sample_steps": 4,
    "guidance": 2.0,
    "sample_every": 0,
    "flip": False,
}


def apart(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two images."""
    return int(
        (
            torch.frombuffer(bytearray(a.tobytes()), dtype=torch.uint8).int()
            - torch.frombuffer(bytearray(b.tobytes()), dtype=torch.uint8).int()
        )
        .abs()
        .max()
    )


def test_generate_draws_as_the_run_did_and_a_file_that_says_nothing_otherwise(make: Make, tmp_path: Path) -> None:
    """Also once it was brought to another dialect; a sampler's timesteps and guidance come on top."""
    recipe = trained(make, **SAMPLED, steps=6)
    assert recipe.output
    (path,) = recipe.output.glob("samples/*6-zwx-cat-s3.png")
    brought = tmp_path / "peft.safetensors"
    assert run(["convert", str(file_of(recipe)), "--dialect", "peft", "-o", str(brought)]) == 0
    own, other = Adapter.load(file_of(recipe)), Adapter.load(brought)
    assert own.least_ranks == other.least_ranks == 0.25 and own.metadata[BY_TIMESTEP] == "0.25"
    plain = Adapter(own.deltas, {key: value for key, value in own.metadata.items() if key != BY_TIMESTEP})
    drawn = [
        draw(Base.load(recipe.base), ["zwx cat <lora:it:1>"], [3], adapters={"it": one}, steps=4, guidance=2.0)[0]
        for one in (own, other, plain)
    ]
    sample = Image.open(path).convert("RGB")
    assert apart(drawn[0], sample) <= 2 and apart(drawn[1], sample) <= 2 < apart(drawn[2], sample)


def test_in_a_stack_each_adapter_keeps_its_own_ranks(base: Base) -> None:
    """At every timestep the layers hold what the cut adapters add up to; afterwards, all of it."""
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    size = base.denoiser.get_submodule(path.removeprefix("unet.")).weight.shape

    def made(rank: int, seed: int) -> LowRank:
        return LowRank(noise(size[0], rank, seed=seed), noise(rank, size[1], seed=seed + 9), 1.0)

    own, other, still = made(4, 0), made(8, 1), made(3, 2)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    side = base.parts["text_encoder"].get_submodule(text.removeprefix("text_encoder.").removeprefix("text_model.")).weight.shape
    read_text = LowRank(noise(side[0], 4), noise(4, side[1]), 1.0)
    stack = [
        (Adapter({path: own, text: read_text}, {BY_TIMESTEP: "0.25"}), 0.5),
        (Adapter({path: other}, {BY_TIMESTEP: "0.5"}), "0@0,1@1"),
        (Adapter({path: still}), 2.0),
    ]
    with attach(base, stack) as attached:
        for step, t in ((0, 999), (1, 300), (2, 0)):
            changed = attached.turn(step, 3, torch.tensor(t))
            a, b = 3 * (1000 - t) // 1000 + 1, 4 * (1000 - t) // 1000 + 4
            parts = [0.5 * own.scale * own.up[:, :a] @ own.down[:a], step / 2 * other.scale * other.up[:, :b] @ other.down[:b]]
            wanted = sum(parts) + 2 * still.delta()
            deltas = attached.snapshot().deltas
            torch.testing.assert_close(deltas[path].delta(), wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(deltas[text].delta(), 0.5 * read_text.delta())
            assert "unet" in changed
        attached.turn(0, 1)
        torch.testing.assert_close(
            attached.snapshot().deltas[path].delta(), 0.5 * own.delta() + 2 * still.delta(), rtol=1e-4, atol=1e-4
        )


def test_captions_are_not_read_anew_for_it(base: Base) -> None:
    path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    with attach(base, AdapterSpec(rank=4), parts=("unet", "text_encoder")) as attached:
        learn_something(attached)
        adapter = Adapter(attached.snapshot().deltas, {BY_TIMESTEP: "0.5"})
    assert path in adapter.deltas
    with attach(base, adapter) as attached:
        assert [attached.turn(step, 3, t) for step, t in enumerate((999, 500, 0.0))] == [{"unet"}] * 3
    plain = Adapter(adapter.deltas)
    with attach(base, plain) as attached:
        assert not attached.moving.weightings and attached.turn(1, 3, 500.0) == set()


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_the_order_of_ranks_is_kept_in_every_dialect(tmp_path: Path, base: Base, dialect: str) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    size = base.denoiser.get_submodule(path.removeprefix("unet.")).weight.shape
    adapter = Adapter({path: LowRank(noise(size[0], 4), noise(4, size[1]), 2.0)}, {BY_TIMESTEP: "0.5"})
    again = Adapter.load(adapter.save(tmp_path / "one.safetensors", dialect))
    assert again.least_ranks == 0.5
    a, b = adapter.deltas[path], again.deltas[path]
    assert isinstance(a, LowRank) and isinstance(b, LowRank)
    for k in range(1, 5):
        torch.testing.assert_close(a.scale * a.up[:, :k] @ a.down[:k], b.scale * b.up[:, :k] @ b.down[:k])


def test_what_mixes_ranks_says_nothing_of_their_order(base: Base) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    size = base.denoiser.get_submodule(path.removeprefix("unet.")).weight.shape
    adapter = Adapter({path: LowRank(noise(size[0], 4), noise(4, size[1]), 2.0)}, {BY_TIMESTEP: "0.5", "ss_steps": "3"})
    made = [
        resize(adapter, "rank", 4)[0],
        convert(adapter, "lora", 2)[0],
        adapter + adapter,
        merge([adapter, adapter], [1.0, 0.5]),
    ]
    assert [(one.least_ranks, one.metadata["ss_steps"]) for one in made] == [(1.0, "3")] * 4
    kept = [0.5 * adapter, adapter.part("unet"), adapter.scaled({"unet": 2.0})]
    assert [one.least_ranks for one in kept] == [0.5] * 3
    for odd in ("", "nan", "2", "-1", "0", "x"):
        assert Adapter(adapter.deltas, {BY_TIMESTEP: odd}).least_ranks == 1.0


def test_refused_in_one_line(tmp_path: Path) -> None:
    for flags, why in (
        ({"kind": "dora"}, "--rank-by-timestep is nothing that --kind dora has"),
        ({"kind": "full"}, "--rank-by-timestep is nothing that --kind full has"),
        ({"kind": "embedding"}, "--rank-by-timestep is about layers"),
        ({"rank": 1}, "--rank-by-timestep 0.5 of --rank 1 is all of it at every timestep"),
        ({"lr": 0, "text_encoder_lr": 1e-3}, "--rank-by-timestep is about ranks in the UNet, and --lr 0"),
        ({"rank_by_timestep": 1.0}, "--rank-by-timestep must be"),
    ):
        with pytest.raises(RecipeError, match=why):
            resolve(flags={"folder": tmp_path, "rank_by_timestep": 0.5, **flags})
