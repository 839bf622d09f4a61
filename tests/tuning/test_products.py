"""LoRA layers computed at once: the same numbers as one by one, in fewer products, whatever is attached to which of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from personalize.models.joined import Joined, as_one, join_projections, joined_of, neighbours
from personalize.models.model import Base
from personalize.models.quantized import Quantized, quantize
from personalize.recipe.fields import AdapterSpec, Fitting
from personalize.training.memory.apply import apply_plan
from personalize.training.memory.ladder import ComputePlan, first
from personalize.tuning.attach import Attached, attach
from personalize.tuning.products import LoraProducts
from tools.bench.counting import Work, phases

CPU = torch.device("cpu")
EVERY = AdapterSpec(rank=2, targets=("attention", "feedforward", "conv"))
ATTENTION = AdapterSpec(rank=2, targets=("attention",))
SOME = AdapterSpec(rank=2, targets=("*attn1.to_q", "*attn2.to_v", "*attn1.to_v"))
DROPPING = AdapterSpec(rank=2, targets=("attention",), dropout=0.5)


@pytest.fixture
def base(narrow_base: Path) -> Base:
    return Base.load(narrow_base, dtype=torch.float64)  # all but float32 is computed at once, where it is joined


def fill_adapter(attached: Attached) -> None:
    """Something in `up` as well, so that all gradients are there."""
    generator = torch.Generator().manual_seed(1)
    for group in attached.parameters().values():
        for p in group.values():
            p.data.copy_(torch.randn(p.shape, generator=generator) / 8)


def learn(base: Base, spec: AdapterSpec = EVERY, strength: float = 1.0) -> tuple[list[Tensor], Work]:
    """A loss and all gradients of an adapter, and what they took."""
    with attach(base, spec) as attached:
        fill_adapter(attached)
        latents = torch.randn(2, base.channels, 8, 8, generator=torch.Generator().manual_seed(2)).to(base.dtype)
        cond = base.embed(["a cat", "a red dog"])
        with phases(work := Work(), []), work, attached.cast_once(), attached.at(strength), attached.dropout(3):
            loss = base.denoise(latents, torch.tensor([3, 500]), cond).square().mean()
            loss.backward()
        grads = [p.grad for group in attached.parameters().values() for p in group.values()]
        assert all(isinstance(grad, Tensor) for grad in grads)
        return [loss.detach(), *map(torch.clone, grads)], work  # type: ignore[arg-type]


def near(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(one, other, strict=True))


def joins(base: Base) -> Iterator[Joined]:
    for module in base.denoiser.modules():
        if isinstance(module, nn.Linear) and (found := joined_of(module)):
            yield found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_gradients_are_the_derivatives(n: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(n * 6, 4, dtype=torch.float64)
    shapes = [(2, 4)] * n + [(6, 2)] * n
    factors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    b = torch.randn(n * 6, dtype=torch.float64) if bias else None
    outs = LoraProducts.apply(x, weight, b, 0.7, *factors)
    for i, out in enumerate(outs):
        rows = slice(6 * i, 6 * i + 6)
        whole = weight[rows] + 0.7 * factors[n + i] @ factors[i]
        assert torch.allclose(out, nn.functional.linear(x, whole, None if b is None else b[rows]))
    assert torch.autograd.gradcheck(lambda *given: LoraProducts.apply(given[0], weight, b, 0.7, *given[1:]), (x, *factors))


@pytest.mark.parametrize("spec", [EVERY, SOME, DROPPING], ids=["every layer", "some of three", "dropout"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_layers_one_by_one(base: Base, spec: AdapterSpec, checkpointing: bool) -> None:
    apply_plan(base, ComputePlan(checkpointing=checkpointing), CPU)
    plain, before = learn(base, spec, 0.5)
    apply_plan(base, ComputePlan(checkpointing=checkpointing, joined=True), CPU)
    joined, after = learn(base, spec, 0.5)
    assert near(joined, plain) and not any(one.ready for one in joins(base)), "nothing that was computed is left over"
    assert (sum(after.ops.values()) < sum(before.ops.values())) == (not spec.dropout)


def test_q_k_and_v_are_one_product(base: Base) -> None:
    _, plain = learn(base, ATTENTION)
    join_projections(base.denoiser)
    attention = base.denoiser.mid_block.attentions[0].transformer_blocks[0]
    assert [joined_of(attention.attn1.to_k).names, joined_of(attention.attn2.to_k).names] == [  # type: ignore[union-attr]
        ("to_q", "to_k", "to_v"), ("to_k", "to_v"),
    ]  # fmt: skip
    assert neighbours([attention.attn1.to_q.weight, attention.attn1.to_k.weight, attention.attn1.to_v.weight])
    _, work = learn(base, ATTENTION)
    blocks = sum(hasattr(module, "attn1") for module in base.denoiser.modules())
    assert work.names["baddbmm_"] == 3 * 5 * blocks, "forward and twice backward: q k v, their out, q, k v, and their out"
    assert work.names["_foreach_copy_"] == 2, "factors are neighbours from the start"
    assert work.names["cat"] - plain.names["cat"] == 2 * blocks, "gradients are not"


def test_what_is_not_alike_is_computed_alone(base: Base) -> None:
    def predict() -> Tensor:
        with attach(base, EVERY) as attached, torch.no_grad():
            fill_adapter(attached)
            layers: Any = attached.layers
            layers[next(path for path in layers if path.endswith("attn1.to_k"))].alphas = [9.0]
            return base.denoise(torch.ones(1, base.channels, 8, 8), torch.tensor([3]), base.embed(["a cat"]))

    before = predict()
    join_projections(base.denoiser)
    assert torch.allclose(predict(), before) and list(joins(base))
    quantize(base.denoiser, "int8")
    packed = [module for module in base.denoiser.modules() if isinstance(module, Quantized)]
    assert packed and not any(map(joined_of, packed)), "packed layers are computed as they were"
    assert torch.allclose(predict(), before, atol=0.2)


def test_joining_moves_no_number(base: Base) -> None:
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    join_projections(base.denoiser)
    join_projections(base.denoiser)  # each rung of a ladder does it anew
    after = base.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_neighbours_are_seen_as_one() -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    assert as_one(whole.chunk(3)).data_ptr() == whole.data_ptr() and torch.equal(as_one(whole.chunk(3)), whole)
    apart = [whole[:2], whole[4:]]
    assert not neighbours(apart) and torch.equal(as_one(apart), torch.cat(apart))
    assert not neighbours([whole[:2], whole[1:3].clone()]) and not neighbours([whole.T[:2], whole.T[2:]])


def test_a_plan_joins_on_a_gpu_in_low_precision_alone() -> None:
    gpu = torch.device("cuda")
    low, full, compiled = (
        Fitting(precision=p, compile=c) for p, c in (("bfloat16", False), ("float32", False), ("bfloat16", True))
    )  # type: ignore[arg-type]
    assert [first(one, 1, gpu).joined for one in (low, full, compiled)] == [True, False, False] and not first(low, 1, CPU).joined
    assert "joined" not in ComputePlan().record() and ComputePlan(joined=True).record()["joined"]
