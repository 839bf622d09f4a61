"""Adapters as values: algebra, and what goes together. The tables of names and families are in test_keys.py."""

from __future__ import annotations

import functools
import operator
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.delta import LowRank
from personalize.errors import AdapterError, FamilyMismatchError
from personalize.families.names import FAMILIES, PARTS, modules

ROWS = {family.name: family for family in FAMILIES}
SEARCH = settings(max_examples=40)
FEWER = settings(max_examples=8)  # where each is written to a file, or merged many times


def low_rank(shape: tuple[int, ...], rank: int = 2, alpha: float = 1.0, seed: int = 0) -> LowRank:
    """A random update of a weight of this shape."""
    draw = torch.Generator().manual_seed(seed)
    tail = (1, 1) if len(shape) == 4 else ()
    up, down = torch.randn(shape[0], rank, *tail, generator=draw), torch.randn(rank, *shape[1:], generator=draw)
    return LowRank(up * 0.3, down * 0.3, alpha)


def make(family: str = "pocket", pick: str = "", rank: int = 2, alpha: float = 1.0, seed: int = 0) -> Adapter:
    """A random adapter on the modules of a family whose path contains `pick`."""
    chosen = [(path, shape) for path, shape in modules(ROWS[family]).items() if pick in path]
    return Adapter({path: low_rank(shape, rank, alpha, seed + i) for i, (path, shape) in enumerate(chosen)})


@st.composite
def adapters(draw: st.DrawFn, family: str = "", alphas: st.SearchStrategy[float] | None = None) -> Adapter:
    """Some modules of a family with small strange widths, mixed ranks and alphas, linear and convolution."""
    paths = sorted(modules(ROWS[family or draw(st.sampled_from(sorted(ROWS)))]))
    deltas = {}
    for path in draw(st.lists(st.sampled_from(paths), min_size=1, max_size=4, unique=True)):
        kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (1, 3)]))
        shape = (draw(st.integers(1, 5)), draw(st.integers(1, 5)), *kernel)
        alpha = draw(alphas or st.one_of(st.integers(-3, 8).map(float), st.floats(-100, 100, width=32, allow_subnormal=False)))
        deltas[path] = low_rank(shape, draw(st.integers(1, 4)), alpha, draw(st.integers(0, 99)))
    return Adapter(deltas)


def exact(adapter: Adapter) -> dict[str, torch.Tensor]:
    """dW of each module in fp64, computed the plain way."""
    return {
        path: (delta.alpha / delta.rank * delta.up.double().flatten(1) @ delta.down.double().flatten(1)).reshape(delta.shape)
        for path, delta in adapter.deltas.items()
    }


def assert_updates(adapter: Adapter, wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    found = exact(adapter)
    for path in found.keys() | wanted.keys():
        a, b = found.get(path, torch.zeros(())), wanted.get(path, torch.zeros(()))
        assert float((a - b).norm()) <= tolerance * max(1.0, float(b.norm())), path


# --- algebra --------------------------------------------------------------------------------------------------------


def test_update_of_a_convolution_is_its_two_convolutions() -> None:
    delta = low_rank((5, 4, 3, 3), rank=2, alpha=3.0)
    pixels = torch.randn(2, 4, 6, 6)
    through = 1.5 * nn.functional.conv2d(nn.functional.conv2d(pixels, delta.down, padding=1), delta.up)
    assert torch.allclose(nn.functional.conv2d(pixels, delta.delta(), padding=1), through, atol=1e-5)


@SEARCH
@given(adapters("pocket"), adapters("pocket"), st.floats(-2, 2), st.floats(-2, 2))
def test_sums_and_multiples_are_exact(a: Adapter, b: Adapter, wa: float, wb: float) -> None:
    if any(a.deltas[path].shape != b.deltas[path].shape for path in a.deltas.keys() & b.deltas.keys()):
        with pytest.raises(AdapterError, match="cannot be added"):
            a + b
        return
    da, db = exact(a), exact(b)
    wanted = {path: wa * da.get(path, torch.zeros(())) + wb * db.get(path, torch.zeros(())) for path in da.keys() | db.keys()}
    assert_updates(a * wa + wb * b, wanted)
    assert_updates(a - a, {}, tolerance=1e-5)
    assert distance(a * 1 + b * 0, a) < 1e-6
    assert distance(-a + a * 2, a) < 1e-6


@SEARCH
@given(adapters())
def test_distance_is_that_of_the_updates(a: Adapter) -> None:
    wanted = sum(float(update.norm()) ** 2 for update in exact(a).values()) ** 0.5
    norm = sum(delta.norm() ** 2 for delta in a.deltas.values()) ** 0.5
    assert norm == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert distance(a, a) < 1e-12
    assert distance(a, a * 0.5) == pytest.approx(0.5 if norm else 0, abs=1e-6)


def test_sum_folds_alpha_into_one_side_and_adds_ranks() -> None:
    path, a = "unet.conv_in", make(pick="unet.conv_in", rank=2, alpha=7.0)
    both = (a + make(pick="unet.conv_in", rank=3, alpha=0.5, seed=1)).deltas[path]
    assert (both.rank, both.alpha) == (5, 5.0)
    assert torch.equal(both.down[:2], a.deltas[path].down)


def test_parts_and_strengths() -> None:
    a = make(pick="0.attn") + make(pick="layers.1.")
    assert a.parts == ("unet", "text_encoder")
    assert a.part("unet").parts == ("unet",)
    assert not a.part("text_encoder_2").deltas
    assert_updates(a.scaled({"unet": 0.8, "text_encoder": -0.5}), exact(a.part("unet") * 0.8 + a.part("text_encoder") * -0.5))
    assert_updates(a.scaled({"unet": 0.8}), exact(a.part("unet") * 0.8 + a.part("text_encoder")))
    for wrong in (
        lambda: a.part("unte"),
        lambda: a.scaled({"te": 1}),
        lambda: a.scaled({"unet": float("nan")}),
        lambda: a * 1e999,
    ):
        with pytest.raises(AdapterError):
            wrong()


def test_an_adapter_never_changes() -> None:
    up, down = torch.ones(3, 2), torch.ones(2, 3)
    a = Adapter({"text_encoder.encoder.layers.0.mlp.fc1": LowRank(up, down, 1)}, {"k": "v"})
    up.zero_()
    assert list(a.deltas) == ["text_encoder.text_model.encoder.layers.0.mlp.fc1"]
    assert a.deltas["text_encoder.text_model.encoder.layers.0.mlp.fc1"].delta().sum() == pytest.approx(9)
    with pytest.raises(TypeError):
        a.deltas["x"] = low_rank((2, 2))  # type: ignore[index]
    with pytest.raises(AttributeError):
        a.metadata = {}  # type: ignore[misc]


@pytest.mark.parametrize("up, down", [((3, 2), (3, 3)), ((3, 2, 1, 1), (2, 3)), ((3, 2, 3, 3), (2, 3, 3, 3)), ((3, 0), (0, 3))])
def test_factors_that_do_not_fit_are_refused(up: tuple[int, ...], down: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match="do not fit"):
        LowRank(torch.ones(up), torch.ones(down), 1)


def test_two_updates_of_one_module_are_refused() -> None:
    leaf, delta = "encoder.layers.0.mlp.fc1", low_rank((2, 2))
    with pytest.raises(AdapterError, match="two updates"):
        Adapter({f"text_encoder.{leaf}": delta, f"text_encoder.text_model.{leaf}": delta})


def test_adapters_travel_between_processes() -> None:
    a = make(pick="to_q")
    b = pickle.loads(pickle.dumps(a))
    assert distance(a, b) < 1e-12 and b.family == "pocket"
    assert repr(b) == f"Adapter(pocket, {len(a.deltas)} modules of unet)"


@pytest.mark.parametrize("name", ROWS)
def test_parts_of_one_family_add_up(name: str) -> None:
    """Although the text encoder of SD1 is also one of SDXL's, and SD1 and SD2 share self-attention."""
    whole = make(name, "attn", rank=1)
    found = functools.reduce(operator.add, map(whole.part, PARTS)).family
    assert found == {"sd3": "sd3 or sd35-medium"}.get(name, name)  # its layers are among those of the other
    if whole.part("unet").deltas:
        assert (make(name, "attn1", rank=1) + make(name, "attn2", rank=1)).family == name


def test_families_do_not_mix() -> None:
    with pytest.raises(FamilyMismatchError, match=r"pocket.*sd1"):
        make("pocket", "to_k") + make("sd1", "to_k", rank=1)
