"""Merging: every method against its definition in plain dense fp64, and what all methods have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_adapters import FEWER, SEARCH
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import Delta, Dense, LowRank, Structured
from personalize.adapters.ops import sums
from personalize.adapters.ops.convert import convert
from personalize.adapters.ops.linalg import inner
from personalize.adapters.ops.merge import merge, merge_with_report
from personalize.adapters.ops.methods import METHODS, OPTIONS
from personalize.errors import AdapterError, FamilyMismatchError

ONE = "unet.conv_in"
PATH = "unet.some.to_k"  # of any shape
PATHS = (ONE, "unet.mid_block.resnets.0.norm1", "text_encoder.text_model.encoder.layers.0.mlp.fc1", "unet.conv_out.bias")
NOTHING_LOST = {"density": 1.0, "outliers": 0.0}
SHAPES = [(1, 1), (1, 6), (7, 1), (5, 4), (6, 9), (3, 4, 3, 3), (8, 2, 1, 1), (2, 3, 1, 3), (5,)]


def low_rank(shape: tuple[int, ...], rank: int = 2, alpha: float = 1.0, seed: int = 0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    tail = (1, 1) if len(shape) == 4 else ()
    up, down = torch.randn(shape[0], rank, *tail, generator=draw), torch.randn(rank, *shape[1:], generator=draw)
    return LowRank(up, down, alpha)


def dense(shape: tuple[int, ...], seed: int = 0) -> Dense:
    return Dense(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@st.composite
def groups(draw: st.DrawFn, least: int = 1, most: int = 3, full: bool = True) -> list[Adapter]:
    """Adapters of one base: each changes some of its modules, in own ranks and alphas; with `full`, also as full updates."""
    shapes = {path: draw(st.sampled_from(SHAPES)) for path in PATHS[: draw(st.integers(1, len(PATHS)))]}
    found = []
    for _ in range(draw(st.integers(least, most))):
        deltas: dict[str, Delta] = {}
        for path in draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1)):
            seed, shape = draw(st.integers(0, 99)), shapes[path]
            plain = len(shape) == 1 or (full and draw(st.integers(0, 4)) == 0)
            alpha = draw(st.sampled_from([1.0, 4.0, -2.0, 0.5]))
            deltas[path] = dense(shape, seed) if plain else low_rank(shape, draw(st.integers(1, 5)), alpha, seed)
        found.append(Adapter(deltas, {"shared": "yes", "own": str(len(found))}))
    return found


WEIGHTS = st.lists(st.sampled_from([1.0, -1.0, 0.0, 0.7, 0.4, -0.3, 2.5]), min_size=3, max_size=3)


def exact(delta: Delta | None) -> Tensor:
    """dW in fp64, computed the plain way."""
    if not isinstance(delta, LowRank):
        return delta.delta().double() if delta else torch.zeros(())
    return (delta.alpha / delta.rank * delta.up.double().flatten(1) @ delta.down.double().flatten(1)).reshape(delta.shape)


def assert_updates(merged: Adapter, wanted: Mapping[str, Tensor], size: float = 1.0) -> None:
    for path in merged.deltas.keys() | wanted.keys():
        assert float((exact(merged.deltas.get(path)) - wanted.get(path, torch.zeros(()))).norm()) <= 1e-6 * max(size, 1), path


def weighted_sum(adapters: list[Adapter], weights: list[float]) -> dict[str, Tensor]:
    paths = set().union(*(adapter.deltas for adapter in adapters))
    return {path: sum(w * exact(a.deltas.get(path)) for a, w in zip(adapters, weights, strict=True)) for path in paths}


def size_of(adapters: list[Adapter], weights: list[float]) -> float:
    """What rounding is relative to, also where updates cancel."""
    return sum(abs(w) * sum(d.norm() for d in a.deltas.values()) for a, w in zip(adapters, weights, strict=True))


def options_of(method: str, **wanted: object) -> dict[str, object]:
    return {name: value for name, value in wanted.items() if name in METHODS[method].options}


def one(delta: Delta) -> Adapter:
    return Adapter({ONE: delta})


def matrix(*rows: list[float]) -> Adapter:
    return one(Dense(torch.tensor(rows)))


def result(merged: Adapter) -> Tensor:
    return exact(merged.deltas[ONE])


# ---------------------------------------------------------------- what all have in common


@SEARCH
@given(groups(), WEIGHTS)
def test_concat_and_svd_are_the_weighted_sum(adapters: list[Adapter], weights: list[float]) -> None:
    weights = weights[: len(adapters)]
    wanted, size = weighted_sum(adapters, weights), size_of(adapters, weights)
    merged, report = merge_with_report(adapters, weights)
    assert_updates(merged, wanted, size)
    assert_updates(merge(adapters, weights, "svd"), wanted, size)
    assert report.error == 0 and merged.metadata["shared"] == "yes"
    for path, delta in merged.deltas.items():
        ranks = [a.deltas[path] for a, w in zip(adapters, weights, strict=True) if w and path in a.deltas]
        if all(isinstance(each, LowRank) for each in ranks):
            assert isinstance(delta, LowRank) and delta.rank == sum(each.rank for each in ranks)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", METHODS)
@FEWER
@given(groups(2, 2), st.sampled_from([1.0, -0.7]))
def test_one_adapter_alone_comes_through_every_method(method: str, adapters: list[Adapter], weight: float) -> None:
    """Alone, or beside others of weight 0; if nothing is to be dropped and the rank suffices."""
    options = options_of(method, **NOTHING_LOST)
    for i, adapter in enumerate(adapters):
        wanted, size = weighted_sum([adapter], [weight]), size_of([adapter], [weight])
        weights = [weight * (i == j) for j in range(2)]
        for merged in (merge([adapter], [weight], method, **options), merge(adapters, weights, method, **options)):
            assert_updates(merged, wanted, size)
            assert merged.deltas.keys() == adapter.deltas.keys()
        assert_updates(merge(adapters, weights, method, rank=99, **options), wanted, size)


@pytest.mark.parametrize("method", METHODS)
@FEWER
@given(groups(2, 2), WEIGHTS, st.sampled_from([None, 1, 3]))
def test_every_merge_can_be_repeated_and_keeps_its_rank(
    method: str, adapters: list[Adapter], weights: list[float], rank: int | None
) -> None:
    merged, report = merge_with_report(adapters, weights[:2], method, rank)
    again = merge(adapters, weights[:2], method, rank)
    assert merged.deltas.keys() == again.deltas.keys() == {line.path for line in report.lines}
    for path, delta in merged.deltas.items():
        assert torch.equal(delta.delta(), again.deltas[path].delta()) and delta.finite()
        sources = [a.deltas[path] for a, w in zip(adapters, weights, strict=False) if w and path in a.deltas]
        factored = all(isinstance(source, LowRank) for source in sources)
        cap = rank or (sum(source.rank for source in sources) if factored else math.inf)  # type: ignore[union-attr]
        assert isinstance(delta, LowRank) or len(delta.shape) == 1 or not (rank or factored)
        assert not isinstance(delta, LowRank) or delta.rank <= cap


@SEARCH
@given(groups(full=False), WEIGHTS, st.integers(1, 4))
def test_a_cut_to_a_rank_is_the_best_of_that_rank(adapters: list[Adapter], weights: list[float], rank: int) -> None:
    weights = weights[: len(adapters)]
    wanted, size = weighted_sum(adapters, weights), size_of(adapters, weights)
    merged, report = merge_with_report(adapters, weights, "svd", rank)
    for line in report.lines:
        whole = wanted[line.path].flatten(1) if wanted[line.path].ndim > 1 else wanted[line.path][:, None]
        smallest = float(torch.linalg.svdvals(whole)[rank:].norm())
        apart = float((exact(merged.deltas[line.path]) - wanted[line.path]).norm())
        assert apart == pytest.approx(smallest, abs=1e-6 * max(1, size))
        assert line.error * line.norm == pytest.approx(smallest, abs=1e-6 * max(1, size))
    assert_updates(merge(adapters, weights, "concat", rank), {path: exact(delta) for path, delta in merged.deltas.items()}, size)


def test_what_entrywise_methods_make_is_cut_and_the_loss_is_told() -> None:
    adapters = [one(low_rank((30, 40), 3, seed=i)) for i in range(2)]
    whole = result(merge(adapters, [1, 1], "ties", rank=30))
    merged, report = merge_with_report(adapters, [1, 1], "ties")
    (line,) = report.lines
    assert (line.old, line.new) == (30, 6)
    error = float((result(merged) - whole).norm() / whole.norm())
    assert error > 0.1 and line.error == report.error == pytest.approx(error, rel=1e-5)
    assert report.rank_for(error * 1.001) == 6 and report.rank_for(error * 0.999) is None


def test_kinds_mix_and_alone_they_stay_what_they_are() -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"hada_w{i}_{side}": torch.randn(*shape, generator=draw) for i in (1, 2) for side, shape in (("a", (9, 2)), ("b", (2, 9)))
    }
    loha = Structured("LoHa", tensors, 2.0, (9, 9))
    adapters, weights = [one(loha), one(low_rank((9, 9)))], [0.7, -0.4]
    assert isinstance(merge(adapters[:1], [0.5]).deltas[ONE], Structured)
    assert_updates(merge(adapters, weights), weighted_sum(adapters, weights), 100)
    for method in METHODS:
        _, report = merge_with_report(adapters, weights, method)
        assert report.lines[0].new <= 6, method
        assert merge(adapters, weights, method, 2).deltas[ONE].rank == 2, method  # type: ignore[attr-defined]


# ---------------------------------------------------------------- each against its definition


def test_ties_by_hand() -> None:
    a, b, c = matrix([4.0, -3.0, 0.1, 2.0]), matrix([1.0, 2.0, -5.0, 0.2]), matrix([-2.0, -1.0, 0.3, 6.0])
    # the two largest of each: [4, -3, 0, 0], [0, 2, -5, 0], [-2, 0, 0, 6]; signs of the sums: +, -, -, +
    assert result(merge([a, b, c], [1, 1, 1], "ties")).tolist() == [[4, -3, -5, 6]]
    # weights vote: [4, -3, 0, 0], [0, -4, 10, 0], [-6, 0, 0, 18]
    assert result(merge([a, b, c], [1, -2, 3], "ties")).tolist() == [[-6, -7, 10, 18]]
    assert result(merge([a, b, c], [1, -2, 3], "ties", mean=True)).tolist() == [[-6, -3.5, 10, 18]]
    assert result(merge([a, b, c], [1, 1, 1], "magnitude")).tolist() == [[2, -1, -5, 6]]


def test_breadcrumbs_by_hand() -> None:
    a = matrix([9.0, -8.0, 7.0, -6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    kept = result(merge([a], [1], "breadcrumbs", density=0.3, outliers=0.2))
    assert kept.tolist() == [[0, 0, 7, -6, 5, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("method", ["dare", "della"])
def test_random_methods_keep_their_share_and_are_right_on_average(method: str) -> None:
    whole = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    merges = [result(merge([one(Dense(whole))], [1], method, density=0.4, seed=seed)) for seed in range(300)]
    kept = torch.stack([merged != 0 for merged in merges]).double().mean(0)
    assert float(kept.mean()) == pytest.approx(0.4, abs=0.005)
    assert float((torch.stack(merges).mean(0) - whole).norm() / whole.norm()) < 0.09
    assert not torch.equal(merges[0], merges[1])
    order = whole.abs().argsort(1)  # chances along each row, from its smallest entry to its largest
    rising = torch.gather(kept, 1, order).mean(0)
    assert float(rising[-10:].mean() - rising[:10].mean()) == pytest.approx(1 / 6 if method == "della" else 0, abs=0.02)


def test_random_numbers_are_those_of_an_adapter_in_a_module() -> None:
    """Not of the order in which modules are worked through, nor of what else is merged."""
    other = "unet.conv_out"
    a, b = dense((6, 6)), dense((6, 6), 1)
    alone = result(merge([one(a)], [1], "dare"))
    both = merge([Adapter({ONE: a, other: a})], [1], "dare")
    assert torch.equal(result(both), alone) and not torch.equal(exact(both.deltas[other]), alone)
    assert torch.equal(result(merge([one(a), Adapter({other: b})], [1, 1], "dare")), alone)
    assert not torch.equal(result(merge([one(b), one(a)], [0, 1], "dare")), alone)


@SEARCH
@given(st.sampled_from([(5, 4), (3, 2, 3, 3)]), st.floats(0.1, 2), st.floats(-2, -0.1) | st.floats(0.1, 2), st.booleans())
def test_slerp_turns_and_keeps_the_length(shape: tuple[int, ...], wa: float, wb: float, full: bool) -> None:
    a, b = low_rank(shape, 2, 3.0), dense(shape, 5) if full else low_rank(shape, 3, 1.0, 7)
    x, y = exact(a), exact(b) * math.copysign(1, wb)
    merged = result(merge([one(a), one(b)], [wa, wb], "slerp", rank=9))
    t = abs(wb) / (wa + abs(wb))

    def angle(p: Tensor, q: Tensor) -> float:
        return math.acos(float((p * q).sum() / p.norm() / q.norm()))

    assert float(merged.norm()) == pytest.approx((wa + abs(wb)) * float((1 - t) * x.norm() + t * y.norm()), rel=1e-5)
    assert angle(x, merged) == pytest.approx(t * angle(x, y), abs=1e-5)
    assert angle(merged, y) == pytest.approx((1 - t) * angle(x, y), abs=1e-5)
    assert inner(a, b) == pytest.approx(float((exact(a) * exact(b)).sum()), rel=1e-6)


def test_slerp_of_one_direction_is_the_sum() -> None:
    a = low_rank((5, 4))
    for other in (a * 3.0, a * -3.0, a * 0.0):
        assert_updates(merge([one(a), one(other)], [0.5, 0.25], "slerp"), weighted_sum([one(a), one(other)], [0.5, 0.25]))


@SEARCH
@given(st.sampled_from([(9, 12), (6, 3, 3, 3)]), st.booleans(), st.floats(0, 9))
def test_orthogonal_leaves_the_first_ones_inputs_alone(shape: tuple[int, ...], full: bool, mu: float) -> None:
    a, b = low_rank(shape, 3), dense(shape, 5) if full else low_rank(shape, 4, 2.0, 1)
    x, y = exact(a).flatten(1), exact(b).flatten(1)
    adapters, weights = [one(a), one(b)], [0.8, -1.5]
    hard = (result(merge(adapters, weights, "orthogonal", energy=1.0)).flatten(1) - 0.8 * x) / -1.5
    assert float((hard @ x.T).norm()) < 1e-5 * float(x.norm() * y.norm())
    soft = (result(merge(adapters, weights, "orthogonal", energy=1.0, mu=mu)).flatten(1) - 0.8 * x) / -1.5
    v = torch.linalg.svd(x).Vh[:3].T
    assert float((soft - y + mu * soft @ v @ v.T).norm()) < 1e-5 * float(y.norm() * (1 + mu))  # where the gradient vanishes
    s = torch.linalg.svdvals(x)
    top = float(s[0].square() / s.square().sum())
    for count, energy in [(1, 0.999 * top), (2, min(1.001 * top, 1))]:
        partly = (result(merge(adapters, weights, "orthogonal", energy=energy)).flatten(1) - 0.8 * x) / -1.5
        assert float((partly - (y - y @ v[:, :count] @ v[:, :count].T)).norm()) < 1e-5 * float(y.norm())


def test_the_third_is_orthogonal_to_the_first_two() -> None:
    a, b, c = (exact(low_rank((9, 12), 3, seed=i)) for i in range(3))
    merged = merge([one(Dense(each)) for each in (a, b, c)], [0.0 + 1, 1e-9, 1], "orthogonal", energy=1.0)
    third = result(merged) - a
    assert float((third @ a.T).norm() + (third @ b.T).norm()) < 1e-4 and float(third.norm()) > 1


@pytest.mark.parametrize("shape", [(9, 12), (8, 2, 3, 3)])
def test_knots_by_the_svd_of_all_side_by_side(shape: tuple[int, ...]) -> None:
    deltas = [low_rank(shape, 2 + i, alpha=2.0, seed=i) for i in range(2)]
    sides = [exact(delta).flatten(1) for delta in deltas]
    u, s, v = torch.linalg.svd(torch.cat(sides, 1), full_matrices=False)
    left = []
    for one_v, weight in zip(v[:5].chunk(2, 1), (0.7, -0.4), strict=True):
        bar = one_v.abs().flatten().sort(descending=True).values[round(0.5 * one_v.numel()) - 1]
        left.append(weight * one_v * (one_v.abs() >= bar))
    sign = (left[0] + left[1]).sign()
    wanted = u[:, :5] * s[:5] @ sum(one_v * (one_v.sign() == sign) for one_v in left)
    merged = merge([one(delta) for delta in deltas], [0.7, -0.4], "knots")
    assert_updates(merged, {ONE: wanted.reshape(shape)}, float(wanted.norm()))
    assert merged.deltas[ONE].rank == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [(9, 12), (8, 2, 3, 3)])
def test_common_is_what_each_does_in_the_others_directions(shape: tuple[int, ...]) -> None:
    a, b = low_rank(shape, 3, seed=1), low_rank(shape, 2, seed=2)
    found = merge([Adapter({ONE: a}), Adapter({ONE: b})], [0.5, 2.0], "common").deltas[ONE]
    matrices = [exact(delta).flatten(1) for delta in (a, b)]
    inverse = [torch.linalg.pinv(matrix) for matrix in matrices]  # M M+ and M+ M project onto what M writes to and listens to
    wanted = 0.5 * matrices[1] @ inverse[1] @ matrices[0] @ inverse[1] @ matrices[1]
    wanted = wanted + 2.0 * matrices[0] @ inverse[0] @ matrices[1] @ inverse[0] @ matrices[0]
    assert torch.allclose(exact(found).flatten(1), wanted, atol=1e-5)
    same = merge([Adapter({ONE: a})] * 2, [0.5, 0.5], "common").deltas[ONE]
    assert torch.allclose(exact(same), exact(a), atol=1e-5)
    other = Adapter({PATHS[2]: low_rank((5, 4), seed=3)})
    assert not merge([Adapter({ONE: a}), other], [1.0, 1.0], "common").deltas


def test_tsv_by_the_inverse_root() -> None:
    sides = [exact(low_rank((9, 12), 3, seed=i)) for i in range(2)]
    parts = [torch.linalg.svd(side) for side in sides]

    def whitened(columns: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(columns.T @ columns)
        return columns @ (vectors / values.sqrt()) @ vectors.T

    u = whitened(torch.cat([part.U[:, :3] for part in parts], 1))
    v = whitened(torch.cat([part.Vh[:3].T for part in parts], 1))
    wanted = u * torch.cat([0.7 * parts[0].S[:3], -0.4 * parts[1].S[:3]]) @ v.T
    merged = merge([one(low_rank((9, 12), 3, seed=i)) for i in range(2)], [0.7, -0.4], "tsv")
    assert_updates(merged, {ONE: wanted}, float(wanted.norm()))


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_merged_is_named() -> None:
    a = one(low_rank((4, 4)))
    scaled = one(Structured("IA3", {"weight": torch.ones(4), "on_input": torch.tensor(True)}, None, (4, 4)))
    for match, arguments, options in [
        ("did you mean ties", ([a], [1], "tise"), {}),
        ("dare has no option 'densty'.*did you mean density", ([a], [1], "dare"), {"densty": 0.5}),
        ("concat has no option 'density'.*none", ([a], [1]), {"density": 0.5}),
        ("density 0 makes no sense.*share", ([a], [1], "ties"), {"density": 0}),
        ("density nan", ([a], [1], "ties"), {"density": float("nan")}),
        ("density '1'", ([a], [1], "ties"), {"density": "1"}),
        ("seed 0.5", ([a], [1], "dare"), {"seed": 0.5}),
        ("mu -1", ([a], [1], "orthogonal"), {"mu": -1}),
        ("conv_in.*\\[4, 4\\] and \\[4, 5\\]", ([a, one(low_rank((4, 5)))], [1, 1], "ties"), {}),
        ("conv_in.*base", ([a, scaled], [1, 1]), {}),
        ("slerp cannot merge 3", ([a] * 3, [1, 1, 1], "slerp"), {}),
        ("cannot merge 0", ([], []), {}),
        ("2 adapters and 1 weights", ([a, a], [1]), {}),
        ("weight of inf", ([a], [math.inf]), {}),
        ("rank 0", ([a], [1], "svd", 0), {}),
    ]:
        with pytest.raises(AdapterError, match=match):
            merge(*arguments, **options)  # type: ignore[arg-type]


def test_families_are_not_merged() -> None:
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    pocket, sd1 = Adapter({path: low_rank((96, 192))}), Adapter({path: low_rank((320, 768))})
    with pytest.raises(FamilyMismatchError, match=r"for pocket, .* for sd1"):
        merge([pocket, sd1], [1, 1], "ties")


def test_rows_tell_what_they_take() -> None:
    assert next(iter(METHODS)) == "concat"
    assert set().union(*(row.options for row in METHODS.values())) == OPTIONS.keys()
    for row in METHODS.values():
        assert row.what and all(OPTIONS[name].allows(value) for name, value in row.options.items())


@pytest.mark.parametrize("shape", [(640, 768), (768, 64, 3, 3)])
def test_a_sum_with_kronecker_products_is_cut_without_being_made(shape: tuple[int, ...]) -> None:
    """As good a cut as that of dW, and the error that is told is the true one."""
    draw = torch.Generator().manual_seed(0)
    one, two = torch.randn(16, 16, generator=draw), torch.randn(shape[0] // 16, shape[1] // 16, *shape[2:], generator=draw) * 0.01
    kron = Structured("lokr", {"lokr_w1": one, "lokr_w2": two}, None, shape)
    terms = [low_rank(shape, 4, 4.0, 1), kron, low_rank(shape, 8, 8.0, 2)]
    parts = sums.sketch(sums.pieces_of(terms), 8)
    whole = sum(term.delta().double() for term in terms).flatten(1)
    exact = torch.linalg.svdvals(whole)
    made = parts.u * parts.s @ parts.v
    assert float((whole - made).norm()) == pytest.approx(parts.rest, rel=1e-6)
    assert parts.rest <= 1.01 * float(exact[8:].norm())
    assert sums.pieces_of(terms[:1]) is None  # factors alone have their own way


def kronecker(seed: int, *, one: Tensor | None = None, two: Tensor | None = None) -> Structured:
    """A LoKr of whole halves, [640, 768]."""
    draw = torch.Generator().manual_seed(seed)
    halves = torch.randn(16, 16, generator=draw), torch.randn(40, 48, generator=draw) * 0.01
    tensors = {"lokr_w1": halves[0] if one is None else one, "lokr_w2": halves[1] if two is None else two}
    return Structured("lokr", tensors, None, (640, 768))


@pytest.mark.parametrize("method", ["concat", "svd", "ties"])
def test_a_merge_without_a_rank_writes_no_whole_dw_and_says_so(method: str) -> None:
    """As `convert --to lora` would, LoKr of whole halves counts with 32 ranks; what goes in whole comes out whole, exactly."""
    lora, lokr = Adapter({PATH: low_rank((640, 768), 4)}), Adapter({PATH: kronecker(0)})
    with pytest.warns(UserWarning, match=f"^{re.escape(PATH)} and layers like it .* at a rank of 36, .*--rank chooses another"):
        merged, report = merge_with_report([lora, lokr], [1, 0.5], method)
    delta = merged.deltas[PATH]
    assert isinstance(delta, LowRank) and delta.rank == 36 and 0 < report.error < 1
    if method != "ties":
        whole = lora.deltas[PATH].delta() + 0.5 * lokr.deltas[PATH].delta()
        apart = [lora, convert(lokr, "lora")[0]]
        error, other = (float((one.delta() - whole).norm()) for one in (delta, merge(apart, [1, 0.5]).deltas[PATH]))
        assert error <= 1.02 * other and report.error == pytest.approx(error / float(whole.norm()), rel=0.02)
        exact = merge([lora, convert(lokr, "full")[0]], [1, 0.5]).deltas[PATH]
        assert torch.allclose(exact.delta(), whole, atol=1e-5) and isinstance(exact, Dense)


def test_kronecker_products_that_share_a_half_stay_one() -> None:
    a = kronecker(0)
    for b in (kronecker(1, one=a.tensors["lokr_w1"]), kronecker(2, two=a.tensors["lokr_w2"]), a):
        merged = merge([Adapter({PATH: a}), Adapter({PATH: b})], [1, -0.5]).deltas[PATH]
        assert isinstance(merged, Structured) and merged.kind == "lokr"
        assert torch.allclose(merged.delta(), a.delta() - 0.5 * b.delta(), atol=1e-5)
