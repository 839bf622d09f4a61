"""What every row of the kinds must keep: roles, shapes, one differentiable dW, true shortcuts, files. And a row of a stranger."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_kinds import KINDS, noise
from torch import Tensor, nn

from personalize.adapters import kinds
from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.build import build
from personalize.adapters.delta import Structured
from personalize.adapters.describe import describe
from personalize.adapters.kinds.kind import (
    ALPHA,
    DORA,
    DOWN,
    INDICES,
    MAGNITUDE,
    MID,
    SIZE,
    UP,
    VALUES,
    Kind,
    Shapes,
    Size,
    ratio,
    shapes_of,
)
from personalize.adapters.ops.convert import convert
from personalize.adapters.ops.merge import merge
from personalize.families.names import FAMILIES, Shape, same, weights
from personalize.recipe.fields import AdapterSpec, Optim
from personalize.registry import BUILT_IN, table

POCKET = weights(FAMILIES[0])
LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
NORM = "unet.down_blocks.0.resnets.0.norm1"


@dataclass(frozen=True)
class Example:
    """Tensors of one update of the weight at `path`, as a file of kohya's dialect would hold them."""

    row: str
    path: str
    tensors: dict[str, Tensor]
    alpha: float | None

    @property
    def kind(self) -> Kind:
        return kinds.row(self.row)

    @property
    def weight(self) -> Tensor:
        return noise(*POCKET[self.path], seed=77)

    def delta(self, tensors: dict[str, Tensor] | None = None) -> Tensor:
        return self.kind.delta(self.tensors if tensors is None else tensors, self.weight, self.alpha)


def examples() -> Iterator[tuple[str, Example]]:
    """By name: those of test_kinds on a linear layer and a convolution, and what only the table itself tells apart."""
    for name, make in KINDS.items():
        for path in (LINEAR, CONV):
            tensors = make(POCKET[path]).stored()
            alpha = float(tensors.pop(ALPHA)) if ALPHA in tensors else None
            row = "dora" if DORA in tensors else kinds.kind_of(tensors)
            yield f"{name}, {'linear' if path == LINEAR else 'conv'}", Example(row, path, tensors, alpha)
    core = {UP: noise(96, 3, 1, 1), MID: noise(3, 3, 3, 3), DOWN: noise(3, 96, 1, 1)}
    yield "LoRA, core", Example("lora", CONV, core, 1.5)
    rows = {UP: noise(96, 3), DOWN: noise(3, 96), MAGNITUDE: 1 + noise(96).abs()}
    yield "DoRA, rows", Example("dora", LINEAR, rows, 1.5)
    rest = {INDICES: torch.tensor([[0, 95], [7, 0]]), VALUES: noise(2), SIZE: torch.tensor([96, 96])}
    yield "LoRA+sparse", Example("lora+sparse", LINEAR, {UP: noise(96, 3), DOWN: noise(3, 96), **rest}, 1.5)
    yield "norm", Example("norm", NORM, {"w_norm": noise(96)}, None)


EXAMPLES = dict(examples())
every = pytest.mark.parametrize("name", EXAMPLES)


def test_every_row_has_an_example() -> None:
    assert {one.row for one in EXAMPLES.values()} == set(table("kinds"))
    assert list(table("kinds")) == [name.lower() for name in table("kinds")]
    assert {name: kind.title.lower() for name, kind in table("kinds").items()} == {name: name for name in table("kinds")}


@every
def test_the_roles_tell_the_kind(name: str) -> None:
    one = EXAMPLES[name]
    assert one.tensors.keys() <= kinds.roles()
    inner = one.kind.on_top
    assert inner or kinds.kind_of(one.tensors) == one.row
    below = kinds.kind_of(one.tensors)
    assert below and not kinds.row(below).on_top
    if not inner:
        assert kinds.name_of(below, one.tensors).startswith((one.kind.title, "LoCon"))
    for role in one.tensors:
        assert kinds.kind_of({key: value for key, value in one.tensors.items() if key != role}) != one.row or role in one.kind.may


@every
def test_the_shape_that_is_told_is_that_of_dw(name: str) -> None:
    one = EXAMPLES[name]
    told, made = one.kind.shape(shapes_of(one.tensors)), one.delta()
    assert same(told, POCKET[one.path])
    assert tuple(made.shape) in (told, POCKET[one.path]) and made.numel() == math.prod(POCKET[one.path])
    assert made.isfinite().all() and made.abs().max() > 0


@every
def test_dw_is_differentiable_in_all_its_tensors(name: str) -> None:
    one = EXAMPLES[name]
    probe = noise(*one.delta().shape, seed=3)
    fixed = {role: value for role, value in one.tensors.items() if role in ("on_input", *kinds.INTEGERS)}
    leaves = {role: value.clone().requires_grad_() for role, value in one.tensors.items() if role not in fixed}
    (one.delta(leaves | fixed) * probe).sum().backward()
    for role, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any(), role
        way = noise(*leaf.shape, seed=5)
        with torch.no_grad():
            ahead, behind = (one.delta(leaves | fixed | {role: leaf + step * way}) for step in (3e-3, -3e-3))
            slope = float(((ahead - behind).double() * probe).sum()) / 6e-3
        assert slope == pytest.approx(float((leaf.grad.double() * way).sum()), rel=2e-2, abs=2e-2), role


@every
def test_a_strength_goes_into_the_roles_that_carry_it(name: str) -> None:
    one = EXAMPLES[name]
    if not one.kind.linear_in:
        pytest.skip("linear in none of its tensors")
    half = {role: value * -0.5 if role in one.kind.linear_in else value for role, value in one.tensors.items()}
    assert torch.allclose(one.delta(half), -0.5 * one.delta(), rtol=1e-5, atol=1e-6)


@every
def test_shortcuts_are_exact(name: str) -> None:
    """Factors and Kronecker halves make the same dW, and no entry exceeds the bound; all but for the scale."""
    one = EXAMPLES[name]
    whole, scale = one.delta(), one.kind.scale(shapes_of(one.tensors), one.alpha)
    if one.kind.factors and (pair := one.kind.factors(one.tensors)):
        assert torch.allclose(scale * pair[0] @ pair[1], whole.flatten(1), rtol=1e-4, atol=1e-5)
        assert pair[0].shape[1] < min(whole.flatten(1).shape)
    if one.kind.halves:
        first, second = one.kind.halves(one.tensors)
        assert torch.allclose(scale * torch.kron(first, second.flatten(1)), whole.flatten(1), rtol=1e-4, atol=1e-5)
    if one.kind.bound:
        assert float(whole.abs().max()) <= abs(scale) * one.kind.bound(one.tensors)


@every
def test_a_file_gives_back_what_was_stored(name: str, tmp_path: Path) -> None:
    one = EXAMPLES[name]
    if MAGNITUDE in one.tensors:
        pytest.skip("kohya's files have no norms of rows")
    kept = Adapter({one.path: build(kinds.kind_of(one.tensors), one.tensors, one.alpha, POCKET[one.path])})
    read = Adapter.load(kept.save(tmp_path / "a"))
    assert distance(kept, read) < 1e-12 and not describe(tmp_path / "a.safetensors").unmatched
    assert torch.allclose(read.deltas[one.path].delta(one.weight), one.delta().reshape(POCKET[one.path]), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- training

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 16),
    "conv": lambda: nn.Conv2d(24, 16, 3, stride=2, padding=1),
    "1x1": lambda: nn.Conv2d(24, 16, 1, bias=False),
}
TRAINABLE = [name for name, kind in table("kinds").items() if kind.start]


def input_of(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return (noise(2, 5, 24) if isinstance(layer, nn.Linear) else noise(2, 24, 8, 8)).to(dtype)


DRAWN = {"lora", "dora", "loha", "lokr"}  # kinds whose start is random; others begin with zeros alone


def begun(row: str, weight: Tensor, seed: int = 1) -> dict[str, Tensor]:
    return kinds.row(row).start(weight, Size(rank=4), torch.Generator().manual_seed(seed))  # type: ignore[misc]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("row", TRAINABLE)
def test_a_start_changes_nothing_and_depends_on_its_generator_alone(row: str, layer: str) -> None:
    kind, weight = kinds.row(row), noise(16) if row == "norm" else noise(*LAYERS[layer]().weight.shape)  # type: ignore[misc]
    first, again, other = (begun(row, weight, seed) for seed in (1, 1, 2))
    assert kinds.kind_of(first) == ("lora" if row == "dora" else row) and kind.complete(first) != kind.on_top
    assert kind.rank(shapes_of(first)) in (0, 4)
    assert not kind.delta(first, weight, 8.0).any()
    assert all(torch.equal(first[role], again[role]) for role in first)
    assert any(not torch.equal(first[role], other[role]) for role in first) == (row in DRAWN or row not in BUILT_IN["kinds"])
    assert kind.settings == () or {*kind.settings} <= {*AdapterSpec.model_fields, *Optim.model_fields}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("row", [name for name in TRAINABLE if kinds.row(name).forward])
def test_a_cheap_forward_is_that_of_the_layer_with_dw(row: str, layer: str, dtype: torch.dtype) -> None:
    kind, module = kinds.row(row), LAYERS[layer]().to(dtype)
    started = begun(row, module.weight.detach())  # type: ignore[operator]
    tensors = {role: (value + noise(*value.shape, seed=9)).requires_grad_() for role, value in started.items()}
    x, scale = input_of(module, dtype), kind.scale(shapes_of(tensors), 8.0)
    ours = kind.forward(module, x, module(x), tensors, scale)  # type: ignore[misc]
    ours.float().square().sum().backward()
    grads = {role: value.grad.clone() for role, value in tensors.items()}  # type: ignore[union-attr]
    for value in tensors.values():
        value.grad = None
    whole = {"weight": module.weight.float() + kind.delta(tensors, module.weight, 8.0)}  # type: ignore[operator]
    theirs = torch.func.functional_call(module.float(), whole, (x.float(),))
    theirs.square().sum().backward()
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 0.1}
    assert torch.allclose(ours.float(), theirs, **near)
    for role, value in tensors.items():
        assert float((value.grad - grads[role]).norm() / value.grad.norm()) < (1e-4 if dtype == torch.float32 else 5e-2)  # type: ignore[operator]


# ---------------------------------------------------------------- a kind of another package


def outer_shape(shapes: Shapes) -> Shape:
    return (shapes["one_u"][0], shapes["one_v"][0])


def outer(tensors: dict[str, Tensor], weight: Tensor | None, alpha: float | None) -> Tensor:
    return ratio(1, alpha) * tensors["one_u"][:, None] * tensors["one_v"]


@pytest.fixture
def stranger() -> Iterator[str]:
    row = Kind("Outer", ("one_u", "one_v"), (ALPHA,), outer_shape, lambda shapes: 1, outer, linear_in=("one_u",))
    table("kinds").add("outer", row)
    yield "outer"
    table("kinds").remove("outer")


def test_a_row_of_another_package_is_read_written_merged_and_converted(stranger: str, tmp_path: Path) -> None:
    tensors = {"one_u": noise(96), "one_v": noise(96 * 9, seed=1)}
    wanted = 0.5 * torch.outer(tensors["one_u"], tensors["one_v"]).reshape(POCKET[CONV])
    path = Adapter({CONV: Structured(stranger, tensors, 0.5, POCKET[CONV])}).save(tmp_path / "a")
    told, read = describe(path), Adapter.load(path)
    assert (told.kind, told.unmatched, told.ranks, told.alphas) == ("Outer", (), {1: 1}, {0.5: 1})
    assert torch.allclose(read.deltas[CONV].delta(), wanted) and repr(read.deltas[CONV]) == "Outer([96, 96, 3, 3])"
    with pytest.warns(UserWarning, match="no factors"):  # that it has rank 1 is more than its row tells
        both = merge([read, Adapter({CONV: KINDS["LoRA"](POCKET[CONV])})], [2.0, -1.0])
    assert torch.allclose(both.deltas[CONV].delta(), 2 * wanted - KINDS["LoRA"](POCKET[CONV]).delta(), atol=1e-5)
    low, report = convert(read, "lora", 1)
    assert report and report.error < 1e-6 and torch.allclose(low.deltas[CONV].delta(), wanted, atol=1e-6)
    full, _ = convert(read, "full")
    assert torch.allclose(full.deltas[CONV].delta(), wanted)
    assert distance(Adapter.load((read * 3).save(tmp_path / "b")), read * 3) < 1e-6


def test_without_its_row_the_file_is_a_strangers(stranger: str, tmp_path: Path) -> None:
    tensors = {"one_u": noise(96), "one_v": noise(96)}
    path = Adapter({LINEAR: Structured(stranger, tensors, None, POCKET[LINEAR])}).save(tmp_path / "a")
    row = table("kinds")[stranger]
    table("kinds").remove(stranger)
    assert len(describe(path).unmatched) == 2
    table("kinds").add(stranger, row)
    assert not describe(path).unmatched


def test_rows_import_no_torch() -> None:
    code = "import sys; from personalize.registry import table; print(len(dict(table('kinds'))), 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.split() == [str(len(table("kinds"))), "False"]
