"""Every kind that `--kind` names: trained, stopped and resumed, in fleets, begun from files, and held against LyCORIS and peft.

One battery over the registry: a row that is added, with `start`, is in it.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from children import start_child
from safetensors import safe_open
from slow import all_but
from small import LATENT
from torch import Tensor, nn

from personalize.adapters import kinds
from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.delta import Delta, Dense, LowRank
from personalize.adapters.describe import describe
from personalize.adapters.kinds.kind import ALPHA, DORA, DOWN, UP, Kind, Size
from personalize.adapters.kinds.lokr import split
from personalize.errors import AdapterError, PersonalizeError, RecipeError
from personalize.models.model import Base
from personalize.recipe.fields import AdapterSpec, Recipe
from personalize.recipe.resolve import resolve, to_toml
from personalize.training.events import Step
from personalize.training.fleet import train_fleet
from personalize.training.loop import train
from personalize.training.memory.apply import apply_plan
from personalize.training.memory.estimate import Configs, Workload, estimate
from personalize.training.memory.ladder import ComputePlan
from personalize.training.memory.meter import counting, tensors_of
from personalize.training.optimizers import Optimizer
from personalize.training.preflight import check
from personalize.training.rundir import Run
from personalize.tuning.attach import attach, weight_named
from personalize.tuning.fleet import Fleet
from personalize.tuning.targets import fresh

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., Recipe]
KINDS = list(kinds.trainable())
OTHERS = [kind for kind in KINDS if kind != "lora"]
ALL = ["attention", "feedforward", "conv"]
TINY = {"steps": 2, "batch_size": 1, "checkpoint_every": 1, "text_encoder_lr": 1e-3, "targets": ALL, "warmup": 0}
FEW = {**TINY, "targets": ["mid_block.*attn1*", "mid_block.resnets.0.conv1"], "text_targets": ["*layers.0.mlp*"]}
LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.mid_block.resnets.0.conv1"


@pytest.fixture
def make(make: Make, tiny_base: Path, tmp_path: Path) -> Make:
    """On a base of the embedded one's true widths: a few of its layers."""

    def small(name: str, **flags: Any) -> Recipe:
        few = FEW | ({"targets": ["mid_block.*"], "text_targets": ["attention"]} if flags.get("kind") == "norms" else {})
        return make(**{"base": str(tiny_base), "output": tmp_path / name, **few, **flags})

    return small


def run(recipe: Recipe) -> list[Any]:
    return list(train(recipe))


def file_of(recipe: Recipe) -> Path:
    assert recipe.output
    return recipe.output / "zwx.safetensors"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


def moved(delta: Delta, seed: int = 0) -> Delta:
    """An update that is not nothing any more, of the same kind and shape."""
    tensors = dict(delta.stored())
    fixed = {role: tensors.pop(role) for role in (ALPHA, "on_input") if role in tensors}
    changed = {role: value + 0.1 * noise(*value.shape, seed=seed) for role, value in tensors.items()}
    if isinstance(delta, Dense):
        return Dense(changed["diff"])
    from personalize.adapters.build import build

    alpha = float(fixed[ALPHA]) if ALPHA in fixed else None
    return build(kinds.kind_of(changed | fixed), changed | {k: v for k, v in fixed.items() if k != ALPHA}, alpha, delta.shape)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of each kind on all its layers, convolutions and text encoder among them."""
    from small import small_recipe

    folder = tmp_path_factory.mktemp("kinds") / request.param
    recipe = small_recipe(tiny_base, pictures, output=folder, kind=request.param, **TINY)
    run(recipe)
    return recipe


def test_a_run_leaves_a_file_of_its_kind_on_every_layer(trained: Recipe) -> None:
    kind, told, adapter = trained.adapter.kind, describe(file_of(trained)), Adapter.load(file_of(trained))
    row = kinds.trainable()[kind]
    title = "full + norm" if kind == "full" else row.title
    assert (told.kind, told.dialect, told.unmatched) == (title, "kohya", ())
    assert set(adapter.parts) == {"text_encoder", "unet"}
    base = Base.of(trained, "cpu")
    start = fresh(base, trained.adapter, ("unet", "text_encoder"), trained.seed)
    assert adapter.deltas.keys() == start.keys() and len(start) > 100
    shapes = {len(delta.shape) for delta in adapter.deltas.values()}
    assert shapes == {"norms": {1}, "full": {1, 2, 4}}.get(kind, {2, 4})
    assert all(delta.norm() > 0 for delta in adapter.resolve(lambda path: weight_named(base, path)).deltas.values())
    assert not any(delta.delta(weight_named(base, path)).any() for path, delta in start.items())  # to the bit


def test_what_was_trained_is_what_the_file_says(trained: Recipe) -> None:
    """The state's tensors are the file's, and a base with the file predicts what the layers of the run did."""
    assert trained.output
    state, adapter = Run(trained.output, "zwx").load_state(), Adapter.load(file_of(trained))
    assert state
    base = Base.of(trained, "cpu")
    x, t, cond = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(1)), torch.tensor([300]), base.embed(["a zwx"])
    with Fleet(base, [fresh(base, trained.adapter, ("unet", "text_encoder"), trained.seed)]) as fleet:
        opt = Optimizer(fleet.members[0].parameters(), trained.optim, 2)
        opt.load(state.tensors)
        assert distance(fleet.members[0].snapshot(), adapter) < 1e-6
        with torch.no_grad(), fleet.members[0].computing():
            learned = base.denoise(x, t, cond)
            with fleet.members[0].off():
                plain = base.denoise(x, t, cond)
    with torch.no_grad(), attach(base, adapter):
        drawn = base.denoise(x, t, cond)
    assert float((learned - drawn).norm()) < 2e-2 * float((learned - plain).norm()) and not torch.equal(learned, plain)
    with torch.no_grad():
        assert torch.equal(base.denoise(x, t, cond), plain)


def test_the_header_says_how_kohyas_trainer_would_make_it(trained: Recipe) -> None:
    said, kind = describe(file_of(trained)).metadata, trained.adapter.kind
    arguments = json.loads(said["ss_network_args"])
    assert said["ss_network_module"] == ("networks.lora" if kind == "lora" else "lycoris.kohya")
    words = {"dora": "locon", "oft": "diag-oft"}
    assert arguments.get("algo") == (None if kind in ("lora", "norms") else words.get(kind, kind))
    assert said["ss_network_dim"] == ("0" if kind in ("ia3", "norms", "full") else "2")
    assert said["modelspec.description"].startswith(kinds.trainable()[kind].trained_as or kinds.trainable()[kind].title)
    assert resolve(start=resolve(flags=json.loads(said["personalize.recipe"]))).adapter == trained.adapter


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_closed_ends_with_the_same_bytes(make: Make, tmp_path: Path, kind: str) -> None:
    whole, broken = make("whole", kind=kind, steps=3), make("broken", kind=kind, steps=3)
    run(whole)
    events = train(broken)
    while not (isinstance(event := next(events), Step) and event.step == 2):
        pass
    events.close()  # type: ignore[attr-defined]
    run(broken)
    assert file_of(whole).read_bytes() == file_of(broken).read_bytes()


@pytest.mark.usefixtures("short_exam")
@pytest.mark.parametrize("kind", all_but({"dora", "norms"}, OTHERS))
def test_checkpoints_are_chosen_and_drawn_as_with_lora(make: Make, kind: str) -> None:
    flags = {"choose": "best", "sample_prompts": ["{trigger}"], "text_encoder_lr": 0.0}
    recipe = make("run", kind=kind, **flags)
    events = run(recipe)
    told = [type(event).__name__ for event in events]
    assert told.count("Chosen") == 1 and told.count("Sweep") == 6 and told[-1] == "Finished"
    assert file_of(recipe).with_suffix(".json").is_file() and file_of(recipe).with_suffix(".png").is_file()


def train_until_killed(preset: Path, output: Path) -> None:
    for event in train(resolve(flags={"preset": preset, "output": output})):
        if isinstance(event, Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", all_but({"dora"}, OTHERS))
def test_a_run_that_was_killed_ends_with_the_same_bytes(make: Make, tmp_path: Path, kind: str) -> None:
    whole, broken = make("whole", kind=kind, steps=3), make("broken", kind=kind, steps=3)
    run(whole)
    assert whole.output and broken.output
    child = start_child(train_until_killed, whole.output / "recipe.toml", broken.output)
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    run(broken)
    assert file_of(whole).read_bytes() == file_of(broken).read_bytes()


@pytest.mark.parametrize("kind", OTHERS)
def test_members_of_a_fleet_share_passes_and_end_as_alone(make: Make, kind: str) -> None:
    small = {"kind": kind, "text_encoder_lr": 0.0, "sample_every": 0}
    alone = [make(f"alone{seed}", seed=seed, **small) for seed in (0, 1)]
    together = [make(f"together{seed}", seed=seed, **small) for seed in (0, 1)]
    for recipe in alone:
        run(recipe)
    told = [type(event).__name__ for _, event in train_fleet(together)]
    assert told.count("Shared") == 1 and told.count("Finished") == 2
    for one, other in zip(alone, together, strict=True):
        assert distance(Adapter.load(file_of(one)), Adapter.load(file_of(other))) < 1e-3
    assert distance(Adapter.load(file_of(alone[0])), Adapter.load(file_of(alone[1]))) > 1e-3 or kind in ("oft", "ia3", "norms")


@pytest.mark.parametrize("dtype", all_but({torch.float32}, [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("kind", OTHERS)
def test_rows_of_a_fleet_meet_their_own_tensors(narrow_base: Path, kind: str, dtype: torch.dtype) -> None:
    base = Base.load(narrow_base, dtype=dtype)
    start = fresh(base, AdapterSpec(kind=kind, rank=2, targets=ALL), ("unet",), 0)
    starts = [{path: moved(delta, seed) for path, delta in start.items()} for seed in (1, 2)]
    x, t, cond = (
        torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(1)),
        torch.tensor([3, 700]),
        base.embed(["a", "b"]),
    )
    wanted, gradients = [], []
    for m, one in enumerate(starts):
        with Fleet(base, [one]) as fleet:
            y = base.denoise(x[m : m + 1], t[m : m + 1], cond[m : m + 1])
            y.float().square().mean().backward()
            wanted.append(y.detach())
            gradients.append([p.grad for group in fleet.members[0].parameters().values() for p in group.values()])
    with torch.no_grad():
        plain = base.denoise(x, t, cond)
    near = {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
    with Fleet(base, starts) as fleet:
        with fleet.active.of(0, 1):
            y = base.denoise(x, t, cond)
            y.float().square().mean(dim=(1, 2, 3)).sum().backward()
        change = (y - plain).float().norm()
        assert (y - torch.cat(wanted)).float().norm() < near * change and change > 0
        for member, theirs in zip(fleet.members, gradients, strict=True):
            member.collect_gradients()
            own = [p.grad for group in member.parameters().values() for p in group.values()]
            pairs = [(a, b) for a, b in zip(own, theirs, strict=True) if a is not None and b is not None]
            assert len(pairs) == len(own) > 0
            gap = math.hypot(*(float((a - b).norm()) for a, b in pairs))
            assert gap < near * math.hypot(*(float(b.norm()) for _, b in pairs))


@pytest.mark.parametrize("kind", OTHERS)
def test_strength_dropout_and_bf16_count(narrow_base: Path, kind: str) -> None:
    base = Base.load(narrow_base)
    start = {path: moved(delta) for path, delta in fresh(base, AdapterSpec(kind=kind, rank=2, targets=ALL), ("unet",), 0).items()}
    whole = Adapter(start).resolve(lambda path: weight_named(base, path))
    x, t, cond = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(1)), torch.tensor([300]), base.embed(["a"])
    with torch.no_grad(), attach(base, whole * 0.5):
        wanted = base.denoise(x, t, cond)
    whole_layers = kind in ("norms", "full")
    drops = 0.0 if whole_layers else 0.5
    with Fleet(base, [start], drops) as fleet, torch.no_grad():
        member = fleet.members[0]
        full = base.denoise(x, t, cond)
        with member.at(0.5):
            torch.testing.assert_close(base.denoise(x, t, cond), wanted, rtol=1e-3, atol=1e-3)
        with member.dropout(3):
            assert torch.equal(base.denoise(x, t, cond), full) == whole_layers
    low = Base.load(narrow_base, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = low.denoise(x, t, low.embed(["a"])).float()
        with Fleet(low, [start]):
            assert float((low.denoise(x, t, low.embed(["a"])).float() - full).norm()) < 0.3 * float((plain - full).norm()) + 0.05


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", all_but({"dora"}, OTHERS))
def test_the_estimate_is_what_a_step_of_the_kind_takes(narrow_base: Path, pictures: Path, kind: str) -> None:
    recipe = resolve(flags={"folder": pictures, "rank": 2, "batch_size": 1, "kind": kind})
    base, fit = Base.load(narrow_base), ComputePlan(micro_batch=1)
    apply_plan(base, fit, torch.device("cpu"))
    told = estimate(Configs.of(base), Workload(recipe, 8, 8, drawn=1), fit, ("unet",))
    with attach(base, recipe.adapter) as attached:
        opt = Optimizer(attached.parameters(), recipe.optim, 4)
        models = [base.denoiser, base.vae, *(text.model for text in base.texts)]
        moments = [torch.zeros_like(p) for p in opt.parameters.values() for _ in range(2)]
        with counting(tensors_of(models), moments) as count:
            assert told.weights + told.adapter // 4 * 3 == count.now
            cond = base.embed(["a"])
            base.denoise(torch.zeros(1, *LATENT), torch.tensor([3]), cond).square().mean().backward()
            assert told.weights + told.adapter + told.activations == pytest.approx(count.peak, rel=0.02)


# ---------------------------------------------------------------- settings


def deltas_of(base: Base, **flags: Any) -> dict[str, Delta]:
    return fresh(base, AdapterSpec(**{"targets": ALL, **flags}), ("unet", "text_encoder"), 0)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return Base.load(tiny_base)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_rank_stabilized_scaling_is_in_the_alpha_of_the_file(base: Base, tmp_path: Path, kind: str) -> None:
    spec = {"kind": kind, "rank": 3, "alpha": 2.0, "text_rank": 5, "rslora": True}
    deltas = deltas_of(base, **spec)
    with safe_open(Adapter(deltas).save(tmp_path / "a"), "pt") as file:
        alphas = {key: float(file.get_tensor(key)) for key in file.keys() if key.endswith(".alpha")}  # noqa: SIM118
    assert len(alphas) == len(deltas)
    for key, alpha in alphas.items():  # readers divide by the rank
        rank = 5 if key.startswith("lora_te") else 3
        scale = 2.0 / 3 * math.sqrt(rank)
        assert alpha / rank == pytest.approx(scale, rel=1e-7)
    read, plain = Adapter.load(tmp_path / "a.safetensors").deltas, deltas_of(base, **{**spec, "rslora": False})
    for path, rank in ((LINEAR, 3), ("text_encoder.text_model.encoder.layers.0.mlp.fc1", 5)):
        both = [float(moved(some[path]).stored()[ALPHA]) for some in (deltas, read, plain)]
        assert both[0] == both[1] and both[0] == pytest.approx(both[2] * math.sqrt(rank), rel=1e-7)


def test_lora_plus_is_a_rate_of_the_second_factor(make: Make) -> None:
    def states(name: str, **flags: Any) -> dict[str, Tensor]:
        recipe = make(name, steps=1, weight_decay=0.0, **flags)
        run(recipe)
        assert recipe.output
        state = Run(recipe.output, "zwx").load_state()
        assert state
        return dict(state.tensors)

    one, four = states("one"), states("four", lora_plus=4.0)
    ups = [name for name in one if name.endswith(".up")]
    downs = [name for name in one if name.endswith(".down")]
    assert ups and downs and one.keys() == four.keys()
    assert all(torch.allclose(4 * one[name], four[name]) and one[name].any() for name in ups)
    assert all(torch.equal(one[name], four[name]) for name in downs)


def test_norms_of_a_dora_do_not_decay(make: Make) -> None:
    recipe = make("run", kind="dora", weight_decay=0.9, lr=0.5, text_encoder_lr=0.0, clip=1e-9, steps=1)
    run(recipe)
    start = check(make("other", kind="dora", text_encoder_lr=0.0)).start
    for path, delta in Adapter.load(file_of(recipe)).deltas.items():
        before, after = start[path].stored(), delta.stored()
        assert float((after[DOWN] - before[DOWN]).norm() / before[DOWN].norm()) > 0.3
        assert after[DORA].shape == (1, delta.shape[1], *[1] * (len(delta.shape) - 2)) and float(after[DORA].min()) >= 0
        assert not torch.allclose(after[DORA], before[DORA] * (1 - 0.5 * 0.9), rtol=0.05)


def test_a_dora_in_fp16_rounds_dw_and_not_w(base: Base, tmp_path: Path) -> None:
    weight = weight_named(base, LINEAR)
    delta = moved(deltas_of(base, kind="dora")[LINEAR])
    read = Adapter.load(Adapter({LINEAR: delta}).save(tmp_path / "a", dtype="fp16")).deltas[LINEAR]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        dtypes = {key.rpartition(".")[2]: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert dtypes == {"weight": torch.float16, "alpha": torch.float32, "dora_scale": torch.float32}
    assert torch.equal(read.stored()[DORA], delta.stored()[DORA])
    assert float((read.delta(weight) - delta.delta(weight)).norm()) < 1e-3 * float(delta.delta(weight).norm())


def test_sides_of_lokr_are_those_of_lycoris() -> None:
    from lycoris.functional.general import factorization

    for side in (1, 2, 7, 13, 48, 64, 96, 127, 192, 250, 320, 384, 640, 768, 1280, 2816, 5120):
        assert split(side, 0) == factorization(side, -1), side
        for factor in (1, 2, 3, 4, 5, 8, 10, 16, 32):
            assert split(side, factor) == factorization(side, factor), (side, factor)


def test_settings_of_lokr_and_oft_are_its_shapes(base: Base) -> None:
    def shapes(path: str, **flags: Any) -> dict[str, list[int]]:
        return {role: list(value.shape) for role, value in deltas_of(base, **flags)[path].stored().items() if value.ndim}

    width, *_ = weight_named(base, LINEAR).shape
    assert shapes(LINEAR, kind="lokr", rank=2)["lokr_w1"] == [8, 8]
    assert shapes(LINEAR, kind="lokr", rank=2, lokr_factor=4)["lokr_w1"] == [4, 4]
    assert shapes(LINEAR, kind="lokr", rank=2)["lokr_w2_a"] == [width // 8, 2]
    assert shapes(LINEAR, kind="lokr", lokr_full=True)["lokr_w2"] == [width // 8, width // 8]
    assert shapes(CONV, kind="lokr", lokr_full=True)["lokr_w2"][2:] == [3, 3]
    assert shapes(LINEAR, kind="oft", rank=8)["oft_blocks"] == [width // 8, 8, 8]
    assert shapes(LINEAR, kind="oft", rank=8, oft_block=6)["oft_blocks"] == [width // 6, 6, 6]
    assert shapes(LINEAR, kind="oft", rank=7)["oft_blocks"] == [width // 6, 6, 6]  # the next below that divides it
    odd = kinds.row("oft").start(torch.zeros(35, 4), Size(block=4), torch.Generator())  # type: ignore[misc]
    assert odd["oft_blocks"].shape == (7, 5, 5)  # blocks of one row would turn nothing


def test_norms_take_in_biases_and_globs_choose(base: Base) -> None:
    plain = deltas_of(base, kind="norms")
    both = deltas_of(base, kind="norms", biases=True, targets=["attention"])
    assert set(plain) < set(both) and f"{LINEAR.replace('to_q', 'to_out.0')}.bias" in both
    assert all(f"{path}.bias" in plain for path in plain if not path.endswith(".bias"))
    some = deltas_of(base, kind="norms", targets=["mid_block.*"])
    assert some and all(path.startswith(("unet.mid_block", "text_encoder")) for path in some)
    with pytest.raises(RecipeError, match=r"no norm of the unet .* matches the target 'nowhere"):
        deltas_of(base, kind="norms", targets=["nowhere.*"])


def test_biases_are_trained_and_written(make: Make) -> None:
    recipe = make("run", kind="norms", biases=True, targets=["mid_block.*"])
    run(recipe)
    with safe_open(file_of(recipe), "pt") as file:
        roles = {key.partition(".")[2] for key in file.keys()}  # noqa: SIM118
    assert roles == {"w_norm", "b_norm", "diff_b"}
    adapter = Adapter.load(file_of(recipe))
    assert all(delta.norm() > 0 for delta in adapter.deltas.values()) and f"{CONV}.bias" in adapter.deltas
    assert "biases = true" in to_toml(recipe)


@pytest.mark.parametrize(("flags", "what"), {
    "rslora of norms": ({"kind": "norms", "rslora": True}, "--rslora is nothing that --kind norms has"),
    "lora+ of loha": ({"kind": "loha", "lora_plus": 2.0}, "--lora-plus is nothing that --kind loha has"),
    "factor of lora": ({"lokr_factor": 4}, "--lokr-factor is nothing that --kind lora has (it is a setting of lokr)"),
    "whole of loha": ({"kind": "loha", "lokr_full": True}, "--lokr-full is nothing"),
    "block of lokr": ({"kind": "lokr", "oft_block": 4}, "--oft-block is nothing"),
    "biases of oft": ({"kind": "oft", "biases": True}, "--biases is nothing"),
    "scaled whole": ({"kind": "lokr", "rslora": True, "lokr_full": True}, "--rslora and --lokr-full exclude each other"),
    "dialect": ({"kind": "dora", "dialect": "diffusers"}, "--dialect diffusers holds LoRA only, not --kind dora"),
    "dropout": ({"kind": "norms", "dropout": 0.1}, "--dropout drops inputs of an adapter, and --kind norms has none"),
    "dropout of weights": ({"kind": "full", "dropout": 0.1}, "--dropout drops inputs of an adapter, and --kind full has none"),
    "rounded weights": ({"kind": "full", "quantize": "int8"}, "--quantize int8 rounds the weights that --kind full trains"),
    "no kind": ({"kind": "norm"}, "--kind must be one of lora, "),
    "not trained": ({"kind": "glora"}, "--kind must be one of lora, "),
}.values(), ids=str)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything(flags: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError) as refused:
        resolve(flags=flags)
    assert str(refused.value).startswith(what) and "\n" not in str(refused.value)


def test_what_is_left_at_its_default_is_not_written() -> None:
    text = to_toml(resolve(flags={"kind": "loha"}))
    for name in ("rslora", "lora_plus", "lokr_factor", "lokr_full", "oft_block", "biases"):
        assert f"\n{name} =" not in text
    assert 'kind = "loha"' in text and "lokr_factor = 4" in to_toml(resolve(flags={"kind": "lokr", "lokr_factor": 4}))


# ---------------------------------------------------------------- begun from files


def first_step(recipe: Recipe) -> Mapping[str, Delta]:
    return check(recipe).start


@pytest.mark.parametrize("kind", OTHERS)
def test_a_run_begins_with_a_file_of_its_own_kind(make: Make, kind: str) -> None:
    before = make("before", kind=kind)
    run(before)
    start = first_step(make("after", kind=kind, init=file_of(before), seed=1))
    assert distance(Adapter(start), Adapter.load(file_of(before))) < 1e-9
    if kind in ("loha", "lokr", "oft"):
        size = {"lokr": {"lokr_factor": 4}}.get(kind, {"rank": 3, "text_rank": 3})
        with pytest.raises(AdapterError, match=r"and what is trained is .* of "):
            first_step(make("other", kind=kind, init=file_of(before), **size))


def test_a_dora_begins_with_a_lora_and_a_lora_with_anything(make: Make, base: Base) -> None:
    lora = make("lora", lora_plus=8.0)
    run(lora)
    dora = first_step(make("dora", kind="dora", rank=3, text_rank=5, init=file_of(lora)))
    wanted = Adapter.load(file_of(lora)).deltas
    for path in wanted:
        weight = weight_named(base, path)
        torch.testing.assert_close(dora[path].delta(weight), wanted[path].delta(), rtol=0, atol=3e-7)
    with pytest.raises(AdapterError, match=r"has rank 2 at .*more than --rank 1 holds"):
        first_step(make("less", kind="dora", rank=1, init=file_of(lora)))
    for kind in ("loha", "oft"):
        with pytest.raises(AdapterError, match=r"holds a LoRA at .* what is trained is "):
            first_step(make(f"from {kind}", kind=kind, init=file_of(lora)))
    lokr = make("lokr", kind="lokr")
    run(lokr)
    again = first_step(make("again", rank=96, text_rank=96, init=file_of(lokr)))
    assert all(isinstance(delta, LowRank) for delta in again.values())
    assert distance(Adapter(again), Adapter.load(file_of(lokr))) < 1e-6


# ---------------------------------------------------------------- LyCORIS' and peft's own modules

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 16),
    "conv": lambda: nn.Conv2d(24, 16, 3, padding=1),
}
SIZES = {"lokr full": Size(rank=2, factor=4, whole=True), "lokr": Size(rank=1, factor=4)}


def their_module(kind: str, layer: nn.Module, tensors: Mapping[str, Tensor], alpha: float | None) -> nn.Module:
    """LyCORIS' module on a layer, made as our metadata say, with these tensors: all of them, and no others."""
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    usual: dict[str, Any] = {"lora_dim": SIZES.get(kind, Size(rank=2)).rank, "alpha": alpha}
    made: nn.Module = {
        "lora": lambda: LoConModule("a", layer, **usual),
        "dora": lambda: LoConModule("a", layer, **usual, weight_decompose=True, wd_on_out=False),
        "loha": lambda: LohaModule("a", layer, **usual),
        "lokr": lambda: LokrModule("a", layer, **usual, factor=4),
        "lokr full": lambda: LokrModule("a", layer, **usual, factor=4, full_matrix=True),
        "oft": lambda: DiagOFTModule("a", layer, **usual),
        "ia3": lambda: IA3Module("a", layer, train_on_input=isinstance(layer, nn.Conv2d)),
    }[kind]()
    made = made if kind == "oft" else made.double()  # this is fp32 inside, whatever it is given
    own = dict(made.named_parameters())
    wanted = {role: value for role, value in tensors.items() if role != "on_input"}
    own |= {DORA: made.dora_scale} if kind == "dora" else {}  # type: ignore[dict-item]
    assert own.keys() - {"scalar"} == wanted.keys()
    with torch.no_grad():
        for role, value in wanted.items():
            assert own[role].shape == value.shape, role
            own[role].data = value.to(own[role].dtype, copy=True)
    return made


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "lokr full", "oft", "ia3"])
def test_dw_and_its_gradients_are_those_of_lycoris(kind: str, layer: str) -> None:
    """In fp64, at a start that has moved on: what a layer makes of an input, and the gradient of each tensor."""
    torch.manual_seed(0)
    exact = torch.float32 if kind == "oft" else torch.float64
    module, row = LAYERS[layer]().to(exact).requires_grad_(False), kinds.row(kind.split()[0])
    weight: Tensor = module.weight  # type: ignore[assignment]
    size = SIZES.get(kind, Size(rank=2))
    begun = row.start(weight, size, torch.Generator().manual_seed(1))  # type: ignore[misc]
    tensors = {role: (value + noise(*value.shape)).to(exact) if role != "on_input" else value for role, value in begun.items()}
    alpha = 3.0 if row.has_alpha else None
    theirs = their_module(kind, module, tensors, alpha)
    ours = {role: value.clone().requires_grad_(role != "on_input") for role, value in tensors.items()}
    x = noise(*((3, 24) if layer == "linear" else (2, 24, 5, 5))).to(exact)
    delta = row.delta(ours, weight, alpha).reshape(weight.shape)
    out = torch.func.functional_call(module, {"weight": weight + delta}, (x,))
    wanted, near = theirs(x), 1e-4 if kind == "oft" else 1e-9
    with torch.no_grad():
        assert float((out - wanted).norm()) < near * float((wanted - module(x)).norm())
    out.square().sum().backward()
    wanted.square().sum().backward()
    own = dict(theirs.named_parameters()) | ({DORA: theirs.dora_scale} if kind == "dora" else {})
    for role, value in ours.items():
        if role != "on_input" and own[role].grad is not None:
            gap = (value.grad - own[role].grad).norm() / own[role].grad.norm()  # type: ignore[operator,union-attr]
            assert float(gap) < near, role


@pytest.mark.parametrize("layer", ["layer", "group"])
def test_norms_and_their_gradients_are_those_of_lycoris(layer: str) -> None:
    from lycoris.modules.norms import NormModule

    from personalize.tuning.dense import DenseLayer
    from personalize.tuning.layers import ActiveRows

    torch.manual_seed(0)
    module: nn.Module = nn.LayerNorm(8) if layer == "layer" else nn.GroupNorm(2, 8)
    nn.init.normal_(module.weight)  # type: ignore[arg-type]
    module.requires_grad_(False)
    values = {"w_norm": noise(8), "b_norm": noise(8, seed=1)}
    ours = DenseLayer(module, kinds.row("norm"), [(values, None)], ActiveRows(0), torch.device("cpu"))
    theirs = NormModule("a", module)
    with torch.no_grad():
        theirs.w_norm.copy_(values["w_norm"]), theirs.b_norm.copy_(values["b_norm"])
    x = torch.randn(3, 5, 8) if layer == "layer" else torch.randn(3, 8, 5)
    mine, wanted = ours(x), theirs(x)
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
    mine.square().sum().backward(), wanted.square().sum().backward()
    for role, value in (("w_norm", theirs.w_norm), ("b_norm", theirs.b_norm)):
        torch.testing.assert_close(ours.factors[role].weight.grad, value.grad, rtol=1e-4, atol=1e-4)


def test_starts_are_lycoris_own_distributions() -> None:
    """What LyCORIS draws at random has our spread, and what it leaves at nothing is ours."""
    for kind in ("lora", "loha", "lokr"):
        layer = nn.Linear(240, 160)
        mine = kinds.row(kind).start(layer.weight.detach(), Size(rank=8, factor=4), torch.Generator().manual_seed(1))  # type: ignore[misc]
        theirs = {
            "lora": lambda layer=layer: _lycoris("locon", "LoConModule")("a", layer, lora_dim=8),
            "loha": lambda layer=layer: _lycoris("loha", "LohaModule")("a", layer, lora_dim=8),
            "lokr": lambda layer=layer: _lycoris("lokr", "LokrModule")("a", layer, lora_dim=8, factor=4),
        }[kind]()
        for role, value in theirs.named_parameters():
            assert mine[role].shape == value.shape
            with torch.no_grad():
                assert value.numel() < 300 or float(mine[role].std()) == pytest.approx(float(value.std()), rel=0.1), (kind, role)


def _lycoris(module: str, name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(f"lycoris.modules.{module}"), name)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "oft", "ia3"])
def test_lycoris_reads_our_trained_file(kind: str, make: Make, base: Base) -> None:
    recipe = make(
        "run",
        kind=kind,
        text_encoder_lr=0.0,
        rank=SIZES.get(kind, Size(rank=2)).rank,
        **({"lokr_factor": 4} if kind == "lokr" else {}),
    )
    run(recipe)
    adapter = Adapter.load(file_of(recipe))
    for path in (LINEAR, CONV):
        delta, weight = adapter.deltas[path], weight_named(base, path)
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        if weight.ndim == 4:
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False)
        exact = torch.float32 if kind == "oft" else torch.float64
        layer.weight = nn.Parameter(weight.detach().to(exact), requires_grad=False)
        stored = dict(delta.stored())
        alpha = float(stored.pop(ALPHA, 0.0)) or None
        theirs = their_module(kind, layer, stored, alpha)
        x = noise(*((3, weight.shape[1]) if weight.ndim == 2 else (1, weight.shape[1], 4, 4))).to(exact)
        with torch.no_grad():
            change = torch.func.functional_call(layer, {"weight": delta.delta(weight).to(exact)}, (x,))
            gap = (theirs(x) - layer(x) - change).norm() / change.norm()
        assert float(gap) < 1e-2 and change.any()  # dW of two steps in fp32: what is left of W + dW - W


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_peft_makes_the_same_of_our_tensors(kind: str) -> None:
    import peft

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(24, 16))
    own: Any = layer[0]
    size = Size(rank=1, factor=4)
    begun = kinds.row(kind).start(own.weight.detach(), size, torch.Generator().manual_seed(1))  # type: ignore[misc]
    tensors = {role: value + noise(*value.shape) for role, value in begun.items()}
    wanted = kinds.row(kind).delta(tensors, own.weight.detach(), 2.0).reshape(own.weight.shape)
    config: Any = (
        peft.LoHaConfig(r=1, alpha=2, target_modules=["0"])
        if kind == "loha"
        else peft.LoKrConfig(r=1, alpha=2, decompose_factor=4, target_modules=["0"])
    )
    theirs: Any = peft.get_peft_model(layer, config).base_model.model[0]
    with torch.no_grad():
        for role, value in tensors.items():
            getattr(theirs, role)["default"].copy_(value)
        torch.testing.assert_close(theirs.get_delta_weight("default"), wanted, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- a kind of another package


def test_a_kind_of_another_package_is_trained_like_any_other(make: Make) -> None:
    """A row with `start` is a choice of --kind, and nothing else is to be done for it."""
    from personalize.registry import table

    def start(weight: Tensor, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
        return {"one_u": torch.zeros(len(weight)), "one_v": torch.randn(weight[0].numel(), generator=generator)}

    def delta(tensors: Mapping[str, Tensor], weight: Tensor | None, alpha: float | None) -> Tensor:
        return tensors["one_u"][:, None] * tensors["one_v"]

    def shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        return (shapes["one_u"][0], shapes["one_v"][0])

    row = Kind("Outer", ("one_u", "one_v"), (ALPHA,), shape, lambda shapes: 1, delta, linear_in=("one_u",), start=start)
    table("kinds").add("outer", row)
    try:
        recipe = make("run", kind="outer")
        run(recipe)
        adapter = Adapter.load(file_of(recipe))
        assert describe(file_of(recipe)).kind == "Outer" and all(delta.norm() > 0 for delta in adapter.deltas.values())
    finally:
        table("kinds").remove("outer")
    with pytest.raises(PersonalizeError, match="--kind must be one of"):
        make("again", kind="outer")


def test_up_is_what_lora_plus_speeds() -> None:
    assert list(islice((role for role in kinds.row("lora").needs), 2)) == [UP, DOWN]
