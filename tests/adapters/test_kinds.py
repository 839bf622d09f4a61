"""Every kind of update: written and read back, scaled, added, as factors, and what depends on the base."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import LATENT
from torch import Tensor

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.build import build
from personalize.adapters.delta import Decomposed, Delta, Dense, LowRank, Structured, as_low_rank
from personalize.adapters.describe import describe
from personalize.adapters.distance import is_within, relative_difference
from personalize.adapters.ops.convert import convert
from personalize.adapters.ops.merge import merge
from personalize.errors import AdapterError
from personalize.families.names import FAMILIES, weights
from personalize.models.model import Base
from personalize.tuning.attach import attach, weight_named

POCKET = weights(FAMILIES[0])
LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
NORM = "unet.down_blocks.0.resnets.0.norm1"
PATHS = (LINEAR, CONV, TEXT)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


def factored(prefix: str, out: int, inside: int, rank: int, seed: int = 0) -> dict[str, Tensor]:
    return {f"{prefix}_a": noise(out, rank, seed=seed), f"{prefix}_b": noise(rank, inside, seed=seed + 1)}


def lora(shape: tuple[int, ...]) -> Delta:
    ones = [1] * len(shape[2:])
    return LowRank(noise(shape[0], 3, *ones), noise(3, *shape[1:]), 1.5)


def tucker(shape: tuple[int, ...]) -> Delta:
    if len(shape) == 2:
        return lora(shape)
    up, mid, down = noise(shape[0], 3, 1, 1), noise(3, 3, *shape[2:]), noise(3, shape[1], 1, 1)
    return build("LoRA", {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}, 1.5, shape)


def loha(shape: tuple[int, ...], core: bool = False) -> Delta:
    out, inside = shape[0], math.prod(shape[1:])
    if core and len(shape) == 4:
        tensors = {}
        for i in (1, 2):
            tensors |= {f"hada_t{i}": noise(2, 2, *shape[2:], seed=i), f"hada_w{i}_a": noise(2, out, seed=i)}
            tensors |= {f"hada_w{i}_b": noise(2, shape[1], seed=i + 5)}
        return Structured("LoHa", tensors, 1.0, shape)
    return Structured("LoHa", factored("hada_w1", out, inside, 2) | factored("hada_w2", out, inside, 2, 9), 1.0, shape)


def lokr(shape: tuple[int, ...], one: bool = False, two: bool = True, core: bool = False) -> Delta:
    """`one`, `two`: which halves are factored."""
    out, inside, kernel = shape[0] // 4, shape[1] // 4, shape[2:]
    tensors = factored("lokr_w1", 4, 4, 2) if one else {"lokr_w1": noise(4, 4)}
    if core and kernel:
        tensors |= {"lokr_t2": noise(2, 2, *kernel), "lokr_w2_a": noise(2, out), "lokr_w2_b": noise(2, inside)}
    elif two:
        tensors |= factored("lokr_w2", out, inside * math.prod(kernel), 2)
    else:
        tensors |= {"lokr_w2": noise(out, inside, *kernel)}
    return Structured("LoKr", tensors, 1.0, shape)


def oft(shape: tuple[int, ...], stages: int = 0, rescale: bool = False) -> Delta:
    blocks = {"oft_blocks": noise(*([stages] if stages else []), shape[0] // 8, 8, 8)}
    more = {"rescale": 1 + noise(shape[0], *[1] * len(shape[1:]))} if rescale else {}
    return Structured("OFT", blocks | more, 1e-3, shape)


def glora(shape: tuple[int, ...]) -> Delta:
    ones = [1] * len(shape[2:])
    a = {"a1.weight": noise(shape[1], 2, *ones), "a2.weight": noise(2, shape[1], *ones)}
    return Structured("GLoRA", a | {"b1.weight": noise(shape[0], 2, *ones), "b2.weight": noise(2, *shape[1:])}, 1.0, shape)


def ia3(shape: tuple[int, ...], on_input: bool = False) -> Delta:
    side = shape[1] if on_input else shape[0]
    factors = noise(side) if len(shape) == 2 else noise(1, side, 1, 1)
    return Structured("IA3", {"weight": factors, "on_input": torch.tensor(float(on_input))}, None, shape)


def dora(shape: tuple[int, ...], inner: Callable[[tuple[int, ...]], Delta] = lora) -> Delta:
    return Decomposed(inner(shape), 1 + noise(1, shape[1], *[1] * len(shape[2:])))


KINDS: dict[str, Callable[[tuple[int, ...]], Delta]] = {
    "LoRA": lora,
    "Tucker": tucker,
    "LoHa": loha,
    "LoHa, Tucker": lambda shape: loha(shape, core=True),
    "LoKr": lokr,
    "LoKr, whole": lambda shape: lokr(shape, two=False),
    "LoKr, both factored": lambda shape: lokr(shape, one=True),
    "LoKr, Tucker": lambda shape: lokr(shape, core=True),
    "OFT": oft,
    "OFT, rescaled": lambda shape: oft(shape, rescale=True),
    "BOFT": lambda shape: oft(shape, stages=2),
    "GLoRA": glora,
    "IA3": ia3,
    "IA3, input": lambda shape: ia3(shape, on_input=True),
    "full": lambda shape: Dense(noise(*shape)),
    "DoRA": dora,
    "LoHa + DoRA": lambda shape: dora(shape, loha),
}
PLAIN = [name for name in KINDS if not KINDS[name]((96, 96)).needs_base]
STRONG = [name for name in KINDS if name not in ("OFT", "OFT, rescaled", "BOFT", "DoRA", "LoHa + DoRA")]  # tensors that carry one


def adapter(kind: str) -> Adapter:
    return Adapter({path: KINDS[kind](POCKET[path]) for path in PATHS}, {"k": "v"})


def base(path: str) -> Tensor:
    return noise(*POCKET[path], seed=77)


@pytest.mark.parametrize("kind", KINDS)
def test_written_and_read_it_is_the_same(kind: str, tmp_path: Path) -> None:
    a = adapter(kind)
    read = Adapter.load(a.save(tmp_path / "a"))
    assert read.deltas.keys() == a.deltas.keys() and read.family == "pocket"
    for path in PATHS:
        assert read.deltas[path].shape == POCKET[path]
        ours, theirs = a.deltas[path].delta(base(path)), read.deltas[path].delta(base(path))
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) and ours.abs().max() > 0
    assert distance(a, read) < 1e-6
    told = describe(tmp_path / "a.safetensors")
    assert not told.unmatched and sum(told.parts.values()) == 3
    if kind.split(",")[0] not in ("Tucker", "BOFT"):
        assert told.kind == kind.split(",")[0]


@pytest.mark.parametrize("kind", STRONG)
def test_a_strength_is_written_too(kind: str, tmp_path: Path) -> None:
    a = adapter(kind)
    half = Adapter.load((a * -0.5).save(tmp_path / "a"))
    for path in PATHS:
        assert torch.allclose(half.deltas[path].delta(base(path)), -0.5 * a.deltas[path].delta(base(path)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STRONG])
def test_a_strength_that_no_file_can_hold_is_refused_until_the_base_is_known(kind: str, tmp_path: Path) -> None:
    half = adapter(kind) * 0.5
    with pytest.raises(AdapterError, match=r"strength of 0\.5"):
        half.save(tmp_path / "a")
    read = Adapter.load(half.resolve(base).save(tmp_path / "a"))
    for path in PATHS:
        assert torch.allclose(read.deltas[path].delta(), 0.5 * adapter(kind).deltas[path].delta(base(path)), rtol=1e-4, atol=1e-6)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_depends_on_the_base_says_so(kind: str) -> None:
    for path in PATHS:
        delta = KINDS[kind](POCKET[path])
        if delta.needs_base:
            with pytest.raises(AdapterError, match="depends on the base"):
                delta.delta()
            with pytest.raises(AdapterError, match="depends on the base"):
                delta + delta
        plain = Adapter({path: delta}).resolve(base).deltas[path]
        assert not plain.needs_base and torch.allclose(plain.delta(), delta.delta(base(path)))


@pytest.mark.parametrize("one", PLAIN)
@pytest.mark.parametrize("other", ["LoRA", "LoHa", "full"])
def test_sums_of_unlike_kinds_are_exact(one: str, other: str) -> None:
    total = adapter(one) * 0.7 - adapter(other) * 0.3
    for path in PATHS:
        wanted = 0.7 * KINDS[one](POCKET[path]).delta() - 0.3 * KINDS[other](POCKET[path]).delta()
        assert torch.allclose(total.deltas[path].delta(), wanted, rtol=1e-4, atol=1e-5)
        assert total.deltas[path].norm() == pytest.approx(float(wanted.norm()), rel=1e-5)


@pytest.mark.parametrize("kind", PLAIN)
def test_factors_are_exact(kind: str) -> None:
    for path in PATHS:
        delta = KINDS[kind](POCKET[path])
        assert torch.allclose(as_low_rank(delta).delta(), delta.delta(), rtol=1e-4, atol=1e-5)
        if small := delta.low_rank():
            assert small.rank < min(small.shape[0], math.prod(small.shape[1:]))


def test_norms_and_biases_are_entries_of_their_own(tmp_path: Path) -> None:
    shapes = {CONV: POCKET[CONV], f"{CONV}.bias": (96,), NORM: (96,), f"{NORM}.bias": (96,), f"{TEXT}.bias": (768,)}
    a = Adapter({path: Dense(noise(*shape)) for path, shape in shapes.items()})
    read = Adapter.load(a.save(tmp_path / "a"))
    assert read.deltas.keys() == shapes.keys() and distance(a, read) == 0
    with pytest.raises(AdapterError, match="diffusers files hold LoRA only"):
        a.save(tmp_path / "b", "diffusers")


def test_doras_along_the_other_axis_are_refused_by_name(tmp_path: Path) -> None:
    rows = Adapter({LINEAR: Decomposed(lora((96, 96)), 1 + noise(96, 1))})
    with pytest.raises(AdapterError, match="norms of rows"):
        rows.save(tmp_path / "a")
    rows.resolve(base).save(tmp_path / "a")


def test_dora_keeps_the_norms_it_learned() -> None:
    weight = noise(24, 16, 3, 3, seed=5)
    for shape, dims in (((1, 16, 1, 1), (0, 2, 3)), ((24, 1, 1, 1), (1, 2, 3))):
        magnitude = 1 + noise(*shape).abs()
        tuned = weight + Decomposed(lora((24, 16, 3, 3)), magnitude).delta(weight)
        assert torch.allclose(torch.linalg.vector_norm(tuned, dim=dims), magnitude.flatten(), rtol=1e-4)


def test_rotations_keep_the_length_of_columns() -> None:
    weight = noise(96, 40, seed=5)
    for stages in (0, 1, 3):
        turned = weight + oft((96, 40), stages).delta(weight)
        assert not torch.allclose(turned, weight, atol=1e-3)
        assert torch.allclose(turned.norm(dim=0), weight.norm(dim=0), rtol=1e-4)


def test_updates_of_one_weight_differ_by_what_they_add() -> None:
    assert relative_difference(lora((96, 96)), None) == pytest.approx(lora((96, 96)).norm())
    assert relative_difference(loha((96, 96)), Dense(loha((96, 96)).delta())) == pytest.approx(0, abs=1e-6)
    assert relative_difference(oft((96, 96)), glora((96, 96))) == math.inf


# ---------------------------------------------------------------- inside the real model


@pytest.fixture(scope="module")
def pocket() -> Base:
    return Base.load("pocket")


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_predicts_what_the_live_stack_does(kind: str, pocket: Base) -> None:
    """Concat of any kind with a LoRA equals stacking both in the embedded base's UNet and text encoder."""
    small = Adapter({path: KINDS[kind](POCKET[path]) for path in PATHS}).resolve(lambda path: weight_named(pocket, path)) * 0.1
    norm = Adapter({NORM: Dense(noise(96)), f"{CONV}.bias": Dense(noise(96))})
    other = Adapter({path: lora(POCKET[path]) for path in PATHS}) * 0.1
    stack = [(small, {"unet": 0.7, "text_encoder": -0.4}), (other, -0.3), (norm, 0.5)]
    scaled = [small.part("unet") * 0.7 + small.part("text_encoder") * -0.4, other * -0.3, norm * 0.5]
    plain = predicted(pocket)
    with attach(pocket, stack):
        live = predicted(pocket)
    if not all(delta.low_rank() for delta in scaled[0].deltas.values()):  # such a sum would be cut, and told
        scaled[0] = convert(scaled[0], "full")[0]
    with attach(pocket, merge(scaled, [1.0] * 3)):
        merged = predicted(pocket)
    assert (live - merged).abs().max() <= 1e-5 * live.abs().max() and (live - plain).abs().max() > 1e-3
    assert torch.equal(predicted(pocket), plain)  # everything is taken off again, norms and biases too


def predicted(base: Base) -> Tensor:
    latents = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return base.denoise(latents, torch.tensor([100, 700]), base.embed(["a red cat", "a house in the snow"]))


@pytest.mark.parametrize("two", [False, True])
def test_norms_and_nearness_of_kronecker_products_need_no_dense_update(two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one = lokr(POCKET[LINEAR], two=two)
    norm = float(one.delta().double().norm())
    moved = Structured("LoKr", {role: value * (1 + 1e-4) for role, value in one.tensors.items()}, one.alpha, one.shape)
    exact = float((moved.delta() - one.delta()).double().norm())
    monkeypatch.setattr(Structured, "delta", lambda *_: pytest.fail("dW was made"))
    assert one.norm() == pytest.approx(norm, rel=1e-6)
    assert is_within(moved, one, 2 * exact) and is_within(one, one, 0)
    monkeypatch.undo()
    assert not is_within(moved, one, 0.5 * exact)
