"""Attaching: which layers, what shape, that it is reversible to the bit, and that stacks are exact."""

from __future__ import annotations

import functools
import operator
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small import LATENT
from torch import Tensor, nn

from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import Dense, LowRank
from personalize.errors import AdapterError, FamilyMismatchError, RecipeError
from personalize.families.names import FAMILIES, modules
from personalize.models.model import Base
from personalize.recipe.fields import AdapterSpec
from personalize.tuning.attach import attach, total
from personalize.tuning.targets import adaptable

BOTH = ("unet", "text_encoder")
POCKET = next(family for family in FAMILIES if family.name == "pocket")
TARGETS = {row.part: row.targets for row in POCKET.networks}
EVERYTHING = AdapterSpec(rank=2, targets=("attention", "feedforward", "projection", "conv"), text_rank=3)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return Base.load(tiny_base)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(1))


def predict(base: Base, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return base.denoise(latents, torch.tensor([3, 700]), base.embed(["zwx", "a cat"]))


def random_adapter(base: Base, seed: int, rank: int, alpha: float, parts: tuple[str, ...] = BOTH) -> Adapter:
    """An adapter on every layer of the parts, convolutions included, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for path, module in adaptable(base).items():
        if path.startswith(parts):
            out, *fan_in = module.weight.shape  # type: ignore[union-attr, misc]
            up = torch.randn(out, rank, *[1] * (len(fan_in) - 1), generator=generator)
            deltas[path] = LowRank(up, 0.02 * torch.randn(rank, *fan_in, generator=generator), alpha)
    return Adapter(deltas)


def fingerprint(base: Base) -> dict[str, Any]:
    """Everything about a base's models that attaching could leave behind."""
    return {
        f"{part}.{name}": (
            type(module),
            module.training,
            sorted(vars(module)),
            [(n, p.data_ptr(), p.requires_grad, p.sum()) for n, p in own],
        )
        for part, model in base.parts.items()
        for name, module in model.named_modules()
        for own in [list(module.named_parameters(recurse=False))]
    }


# ---------------------------------------------------------------- which layers


def expected(base: Base, part: str, target: str) -> set[str]:
    """The layers of a target, told from the models' own structure instead of patterns over names."""
    found = set()
    for name, module in base.parts[part].named_modules():
        kind = type(module).__name__
        if kind == "Attention" and (
            target == "attention" or name.endswith({"self-attention": "attn1", "cross-attention": "attn2"}.get(target, "-"))
        ):
            found |= {f"{name}.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")}
        elif kind == "FeedForward" and target == "feedforward":
            found |= {f"{name}.{n}" for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        elif kind == "Transformer2DModel" and target == "projection":
            found |= {f"{name}.proj_in", f"{name}.proj_out"}
        elif kind in ("ResnetBlock2D", "Downsample2D", "Upsample2D") and target == "conv":
            found |= {f"{name}.{n}" for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        elif (kind, target) in {("CLIPAttention", "attention"), ("CLIPMLP", "feedforward")}:
            found |= {f"{name}.{n}" for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    prefix = "unet." if part == "unet" else "text_encoder.text_model."
    return {prefix + name for name in found}


@pytest.mark.parametrize(("part", "target"), [(part, target) for part in TARGETS for target in TARGETS[part]])
def test_named_targets_are_the_layers_they_say(base: Base, part: str, target: str) -> None:
    spec = AdapterSpec(targets=(target,)) if part == "unet" else AdapterSpec(text_targets=(target,))
    layers = expected(base, part, target)
    with attach(base, spec, parts=(part,)) as attached:
        assert set(attached.layers) == layers != set()


def test_all_targets_together_are_the_familys_layers_but_for_its_ends(base: Base) -> None:
    known = modules(POCKET)
    with attach(base, EVERYTHING, parts=BOTH) as attached:
        left = set(known) - set(attached.layers)
    assert left == {"unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1", "unet.time_embedding.linear_2"}


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("mid_block.*.attn2.to_k", 1),
        ("unet.mid_block.*.attn2.to_k", 1),
        ("*.attn[12].to_v", 14),
        ("conv_in", 1),
        ("time_embedding.*", 2),
    ],
)
def test_globs_match_module_paths(base: Base, target: str, count: int) -> None:
    with attach(base, AdapterSpec(targets=(target,))) as attached:
        assert len(attached.layers) == count


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        (AdapterSpec(targets=("atention",)), "did you mean attention?"),
        (AdapterSpec(targets=("attention", "*.attn2.to_x")), "nearest layer is unet.*attn2.to_"),
        (AdapterSpec(text_targets=("conv",)), "choose from attention, feedforward"),
        (AdapterSpec(text_targets=("*.self_attn.to_q",)), "nearest layer is text_encoder.text_model.*self_attn"),
    ],
)
def test_targets_that_match_nothing_are_errors_that_name_the_nearest(base: Base, spec: AdapterSpec, hint: str) -> None:
    before = fingerprint(base)
    with pytest.raises(RecipeError, match=hint):
        attach(base, spec, parts=BOTH)
    assert fingerprint(base) == before


def test_rank_and_alpha_of_each_part(base: Base) -> None:
    with attach(base, AdapterSpec(rank=6, alpha=3.0, text_rank=4), parts=BOTH) as attached:
        deltas = attached.snapshot().deltas
    shapes = {(path.split(".")[0], delta.rank, delta.alpha) for path, delta in deltas.items()}
    assert shapes == {("unet", 6, 3.0), ("text_encoder", 4, 2.0)}


# ---------------------------------------------------------------- a fresh adapter


@pytest.mark.parametrize("parts", [("unet",), ("text_encoder",), BOTH])
def test_starts_as_nothing_and_leaves_no_trace(base: Base, latents: Tensor, parts: tuple[str, ...]) -> None:
    before, plain = fingerprint(base), predict(base, latents)
    attached = attach(base, EVERYTHING, parts=parts)
    assert torch.equal(predict(base, latents), plain)
    assert set(attached.parameters()) == set(parts)
    adapter = attached.detach()
    assert set(adapter.parts) == set(parts)
    assert fingerprint(base) == before
    assert torch.equal(predict(base, latents), plain)


def test_only_the_adapter_is_trainable(base: Base, latents: Tensor) -> None:
    with attach(base, EVERYTHING, parts=BOTH) as attached:
        own = {id(p) for group in attached.parameters().values() for p in group.values()}
        trainable = {id(p) for model in base.parts.values() for p in model.parameters() if p.requires_grad}
        assert own == trainable
        base.denoise(latents, torch.tensor([3, 700]), base.embed(["zwx", "a cat"])).square().mean().backward()
        ups = [p for group in attached.parameters().values() for name, p in group.items() if name.endswith(".up")]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ups)


def test_seed_decides_the_start(base: Base) -> None:
    def start(seed: int) -> Tensor:
        return torch.cat(
            [delta.down.flatten() for delta in attach(base, AdapterSpec(rank=2), seed=seed).detach().deltas.values()]
        )

    torch.manual_seed(5)
    first = start(0)
    assert torch.equal(first, start(0))
    assert not torch.equal(first, start(1))


def test_what_is_detached_is_a_copy(base: Base) -> None:
    with attach(base, AdapterSpec(rank=2)) as attached:
        before = attached.snapshot()
        for p in attached.parameters()["unet"].values():
            p.data.fill_(7)
        assert all((delta.up == 0).all() for delta in before.deltas.values())
        assert all((delta.up == 7).all() for delta in attached.snapshot().deltas.values())


def test_dropout_acts_only_where_it_is_asked_for_and_by_its_seed(base: Base, latents: Tensor) -> None:
    state = torch.get_rng_state()
    with attach(base, AdapterSpec(rank=4, dropout=0.5)) as attached:
        for name, p in attached.parameters()["unet"].items():
            if name.endswith(".up"):
                p.data.fill_(0.05)
        calm = predict(base, latents)
        assert torch.equal(predict(base, latents), calm)
        drawn = []
        for seed in (1, 1, 2):
            with attached.dropout(seed):
                drawn.append(predict(base, latents))
        assert torch.equal(predict(base, latents), calm)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], calm)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- loaded adapters


def merged(base: Base, latents: Tensor, stack: list[tuple[Adapter, dict[str, float]]]) -> Tensor:
    """The prediction with sum of strength * dW added to the weights themselves."""
    layers = adaptable(base)
    kept = {path: layer.weight.clone() for path, layer in layers.items()}  # type: ignore[operator, union-attr]
    try:
        for adapter, strengths in stack:
            for path, delta in adapter.deltas.items():
                strength = strengths.get(path.split(".")[0], 1.0)
                layers[path].weight.data += strength * delta.delta().reshape(layers[path].weight.shape)  # type: ignore[operator, union-attr, arg-type]
        return predict(base, latents)
    finally:
        for path, weight in kept.items():
            layers[path].weight.data.copy_(weight)  # type: ignore[operator, union-attr, arg-type]


STACKS: dict[str, list[tuple[int, Any]]] = {
    "one": [(0, 1.0)],
    "one at half": [(0, 0.5)],
    "parts apart": [(0, {"unet": 0.8, "text_encoder": 0.3})],
    "a part unnamed": [(0, {"unet": 0.8})],
    "mixed ranks and alphas": [(0, 0.7), (1, 0.4), (2, 1.25)],
    "negative": [(1, -0.6), (2, {"unet": 0.0, "text_encoder": 2.0})],
    "one text only": [(3, 1.0), (0, 0.5)],
}


@pytest.fixture(scope="module")
def shelf(base: Base) -> list[Adapter]:
    return [
        random_adapter(base, 0, 2, 2.0),
        random_adapter(base, 1, 5, 1.0),
        random_adapter(base, 2, 1, 0.25),
        random_adapter(base, 3, 3, 3.0, ("text_encoder",)),
    ]


@pytest.mark.parametrize("name", STACKS)
def test_stacks_are_exact_and_reversible(base: Base, latents: Tensor, shelf: list[Adapter], name: str) -> None:
    stack = [(shelf[i], strengths) for i, strengths in STACKS[name]]
    explicit = [(a, s if isinstance(s, dict) else {"unet": s, "text_encoder": s}) for a, s in stack]
    before, plain = fingerprint(base), predict(base, latents)
    wanted = merged(base, latents, explicit)
    with attach(base, stack) as attached:
        seen = predict(base, latents)
        with attached.off():
            assert torch.equal(predict(base, latents), plain)
        assert torch.equal(predict(base, latents), seen)
    assert (seen - wanted).norm() / (wanted - plain).norm() < 1e-5
    assert fingerprint(base) == before and torch.equal(predict(base, latents), plain)


def test_strength_zero_is_the_base_to_the_bit(base: Base, latents: Tensor, shelf: list[Adapter]) -> None:
    plain = predict(base, latents)
    with attach(base, [(shelf[0], 0.0)]) as attached:
        assert not attached.layers
        assert torch.equal(predict(base, latents), plain)


def test_at_scales_all_that_is_attached(base: Base, latents: Tensor, shelf: list[Adapter]) -> None:
    with attach(base, [(shelf[0], 0.5)]):
        half = predict(base, latents)
    with attach(base, shelf[0]) as attached:
        whole = predict(base, latents)
        with attached.at(0.5):
            assert torch.allclose(predict(base, latents), half, atol=1e-5)
        assert torch.equal(predict(base, latents), whole)


def test_a_saved_adapter_predicts_what_the_attached_one_did(
    base: Base, latents: Tensor, shelf: list[Adapter], tmp_path: Path
) -> None:
    with attach(base, shelf[0]) as attached:
        before = predict(base, latents)
        path = attached.snapshot().save(tmp_path / "a.safetensors")
    with attach(base, Adapter.load(path)):
        assert torch.equal(predict(base, latents), before)


def test_a_loaded_adapter_can_be_trained_on(base: Base, shelf: list[Adapter]) -> None:
    with attach(base, shelf[0]) as attached:
        groups = attached.parameters()
    assert all(p.requires_grad for group in groups.values() for p in group.values())
    assert torch.equal(groups["unet"]["unet.conv_in.down"], shelf[0].deltas["unet.conv_in"].down)


def test_one_attachment_at_a_time(base: Base) -> None:
    with attach(base, AdapterSpec(rank=1)), pytest.raises(AdapterError, match="already carries an adapter"):
        attach(base, AdapterSpec(rank=1))


def test_an_adapter_of_another_family_is_refused_by_name(base: Base) -> None:
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    foreign = Adapter({path: LowRank(torch.ones(320, 2), torch.ones(2, 320), 2)}, {"ss_output_name": "rex"})
    before = fingerprint(base)
    with pytest.raises(
        FamilyMismatchError, match=re.escape(f"rex (sd1 or sd2) does not fit {base.name} (pocket): 1 of 1")
    ) as caught:
        attach(base, foreign)
    assert path in str(caught.value) and "[320, 320]" in str(caught.value) and "[96, 96]" in str(caught.value)
    assert fingerprint(base) == before


def test_an_adapter_for_a_layer_that_is_not_there_is_refused(base: Base, shelf: list[Adapter]) -> None:
    lost = Adapter({"unet.down_blocks.7.attn1.to_q": LowRank(torch.ones(4, 1), torch.ones(1, 4), 1)})
    with pytest.raises(AdapterError, match=r"down_blocks.7.attn1.to_q .* does not exist"):
        attach(base, [(shelf[0], 1.0), (lost, 1.0)])


def test_a_linear_adapter_fits_a_one_by_one_convolution(base: Base, latents: Tensor) -> None:
    path = "unet.mid_block.attentions.0.proj_in"
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(192, 2, generator=generator), torch.randn(2, 192, generator=generator)
    with attach(base, Adapter({path: LowRank(up, down, 2)})):
        linear = predict(base, latents)
    with attach(base, Adapter({path: LowRank(up[..., None, None], down[..., None, None], 2)})):
        assert torch.equal(predict(base, latents), linear)
    assert not torch.equal(predict(base, latents), linear)


def test_a_stack_is_the_sum_of_its_adapters_one_after_the_other() -> None:
    draw = torch.Generator().manual_seed(0)
    ranks = ((1, 3.0), (4, 4.0), (2, 0.5))
    pairs = [LowRank(torch.randn(6, r, generator=draw), torch.randn(r, 5, generator=draw), alpha) for r, alpha in ranks]
    for deltas in (pairs[:1], pairs, [*pairs, Dense(torch.ones(6, 5))]):
        together, apart = total(deltas), functools.reduce(operator.add, deltas)
        assert type(together) is type(apart) and torch.equal(together.delta(), apart.delta())
    with pytest.raises(AdapterError, match="cannot be added"):
        total([pairs[0], LowRank(torch.ones(5, 1), torch.ones(1, 5), 1.0)])
