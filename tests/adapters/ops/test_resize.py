"""Linear algebra on factors and resizing, each against plain dense fp64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adapters import SEARCH
from torch import Tensor

from personalize.adapters import files
from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.delta import Delta, Dense, LowRank, Structured
from personalize.adapters.ops import linalg
from personalize.adapters.ops.resize import RULES, on_demand, resize
from personalize.errors import AdapterError
from personalize.families.names import FAMILIES, modules

PATHS = ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "unet.conv_in", "unet.conv_out", "unet.conv_out.bias")
SHAPES = [(1, 1), (1, 6), (7, 1), (5, 4), (16, 12), (3, 4, 3, 3), (8, 2, 1, 1), (2, 3, 1, 3), (5,)]
TARGETS = {"rank": 2, "sv_ratio": 3.0, "sv_fro": 0.9, "sv_cumulative": 0.8, "error": 0.3}


def low_rank(shape: tuple[int, ...], rank: int = 2, alpha: float = 1.0, seed: int = 0) -> LowRank:
    """Random factors whose columns fade, as trained ones do."""
    draw = torch.Generator().manual_seed(seed)
    tail = (1, 1) if len(shape) == 4 else ()
    up, down = torch.randn(shape[0], rank, *tail, generator=draw), torch.randn(rank, *shape[1:], generator=draw)
    fading = torch.logspace(0, -1.5, rank).reshape(1, rank, *tail)
    return LowRank(up * fading, down, alpha)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    deltas: dict[str, Delta] = {}
    for path in PATHS[: draw(st.integers(1, len(PATHS)))]:
        shape, seed = draw(st.sampled_from(SHAPES)), draw(st.integers(0, 99))
        if len(shape) == 1 or draw(st.integers(0, 4)) == 0:
            deltas[path] = Dense(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        else:
            deltas[path] = low_rank(shape, draw(st.integers(1, 9)), draw(st.sampled_from([1.0, 7.0, -0.5, 0.0])), seed)
    return Adapter(deltas, {"kept": "yes"})


def exact(delta: Delta) -> Tensor:
    """dW as a matrix in fp64, computed the plain way."""
    if isinstance(delta, LowRank):
        return delta.alpha / delta.rank * delta.up.double().flatten(1) @ delta.down.double().flatten(1)
    return delta.delta().double().reshape(delta.shape[0], -1)


def errors(before: Adapter, after: Adapter) -> dict[str, float]:
    """||dW - dW at the new rank|| of each module."""
    return {
        path: float((exact(delta) - (exact(after.deltas[path]) if path in after.deltas else 0)).norm())
        for path, delta in before.deltas.items()
    }


def spectra(adapter: Adapter) -> dict[str, Tensor]:
    return {path: torch.linalg.svdvals(exact(delta)) for path, delta in adapter.deltas.items()}


def make(pick: str, rank: int = 4) -> Adapter:
    chosen = [(path, shape) for path, shape in modules(FAMILIES[0]).items() if pick in path]
    return Adapter({path: low_rank(shape, rank, 1.0, i) for i, (path, shape) in enumerate(chosen)})


# ---------------------------------------------------------------- linear algebra


@SEARCH
@given(st.sampled_from([shape for shape in SHAPES if len(shape) > 1]), st.integers(1, 9), st.integers(0, 99))
def test_svd_of_factors_is_that_of_the_product(shape: tuple[int, ...], rank: int, seed: int) -> None:
    delta = low_rank(shape, rank, -3.0, seed)
    whole, parts = exact(delta), linalg.svd(delta)
    count = min(rank, *whole.shape)
    assert torch.allclose(parts.s, torch.linalg.svdvals(whole)[:count], rtol=0, atol=1e-13 * float(whole.norm()))
    assert torch.allclose(parts.u * parts.s @ parts.v, whole, rtol=0, atol=1e-13 * float(whole.norm()))
    for side in (parts.u.T, parts.v):
        assert torch.allclose(side @ side.T, torch.eye(count, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(linalg.singular_values(delta), parts.s, atol=1e-13 * float(whole.norm()))
    back = linalg.low_rank(parts, shape)
    assert back.shape == shape and float((exact(back) - whole).norm()) < 1e-6 * float(whole.norm())
    sizes = back.up.flatten(1).norm(dim=0), back.down.flatten(1).norm(dim=1)
    assert torch.allclose(*sizes, rtol=1e-5, atol=1e-6)  # balanced


def noisy(out: int, inside: int) -> Tensor:
    """Some strong directions in much noise: what entrywise merges leave."""
    draw = torch.Generator().manual_seed(0)
    strong = exact(low_rank((out, inside), 24)).float()
    return strong + 0.3 * strong.std() * torch.randn(out, inside, generator=draw)


@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
def test_the_quick_ways_for_dense_matrices_are_as_good_as_they_say(shape: tuple[int, int]) -> None:
    matrix = noisy(*shape)
    best = linalg.full_svd(matrix)
    smallest = float(best.s[40:].norm())
    for parts, excess in [
        (linalg.leading_svd(matrix, 40), 1e-8),
        (linalg.sketch(matrix, 40), 2e-3),
        (linalg.sketch(matrix, 40, 12), 5e-5),
        (linalg.of_matrix(matrix, 40), 2e-3),
        (linalg.of_matrix(matrix, 200), None),
    ]:
        left_out = float((matrix.double() - parts.u * parts.s @ parts.v).norm())
        assert parts.rest == pytest.approx(left_out, rel=1e-7)
        assert left_out <= (smallest * (1 + excess) if excess else smallest)
    assert torch.equal(linalg.sketch(matrix, 40).s, linalg.sketch(matrix, 40).s)
    fits = exact(low_rank(shape, 24))
    assert max(linalg.sketch(fits, 24).rest, linalg.leading_svd(fits, 24).rest) < 1e-7 * float(fits.norm())


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("rule", TARGETS)
@settings(max_examples=20)
@given(adapter=adapters(), cap=st.sampled_from([None, 1, 3]))
def test_what_is_kept_is_the_best_of_its_rank_and_the_report_is_true(rule: str, adapter: Adapter, cap: int | None) -> None:
    small, report = resize(adapter, rule, TARGETS[rule], max_rank=cap)
    assert small.deltas.keys() == adapter.deltas.keys() and small.metadata == adapter.metadata
    values, lost, size = spectra(adapter), errors(adapter, small), 1e-6 * math.hypot(*(d.norm() for d in adapter.deltas.values()))
    for line in report.lines:
        kept = small.deltas[line.path]
        assert 1 <= line.new <= (cap or line.old) and line.new <= line.old
        assert not isinstance(kept, LowRank) or kept.rank == line.new
        assert lost[line.path] == pytest.approx(float(values[line.path][line.new :].norm()), abs=size)
        assert lost[line.path] == pytest.approx(line.error * line.norm, abs=size)
        assert kept is adapter.deltas[line.path] or line.new < line.old
    assert report.error * size * 1e6 == pytest.approx(math.hypot(*lost.values()), abs=size)
    assert [name for name, _ in report.rows()] == [*small.parts, "total"]


def by_definition(rule: str, values: list[float], target: float) -> int:
    """kohya's three, one rank after the other."""
    if rule == "sv_ratio":
        return sum(value > values[0] / target for value in values)
    power = 2 if rule == "sv_fro" else 1
    wanted = target**power * sum(value**power for value in values)
    return next(k for k in range(1, len(values) + 1) if sum(value**power for value in values[:k]) >= wanted)


@SEARCH
@given(adapters(), st.floats(0.05, 0.999), st.floats(1.01, 50))
def test_rules_of_each_module_by_definition(adapter: Adapter, share: float, ratio: float) -> None:
    values = spectra(adapter)
    for rule, target in [("sv_ratio", ratio), ("sv_fro", share), ("sv_cumulative", share)]:
        for line in resize(adapter, rule, target)[1].lines:
            assert line.new == (by_definition(rule, values[line.path].tolist(), target) if line.norm else 1)
    for rule in ("sv_fro", "sv_cumulative"):
        assert resize(adapter, rule, 1)[1].error < 1e-6


@SEARCH
@given(adapters(), st.floats(0.001, 0.9), st.booleans())
def test_error_is_met_with_nothing_to_spare(adapter: Adapter, target: float, drop: bool) -> None:
    _, report = resize(adapter, "error", target, drop=drop)
    assert report.error <= target * (1 + 1e-6)
    squares = sum(line.norm**2 for line in report.lines)
    floor = 0 if drop else 1
    next_out = [
        line.norm_beyond(line.new - 1) ** 2 - line.norm_beyond(line.new) ** 2 for line in report.lines if line.new > floor
    ]
    if next_out and squares:
        assert (report.error**2 * squares + min(next_out)) / squares > target**2 * (1 - 1e-6)
    gone = [float(line.values[i]) for line in report.lines for i in range(line.new, len(line.values)) if i >= floor]
    kept = [float(line.values[i]) for line in report.lines for i in range(floor, line.new)]
    assert not gone or not kept or max(gone) <= min(kept) * (1 + 1e-9)
    capped, best = (resize(adapter, rule, value, max_rank=2)[1].error for rule, value in (("error", target), ("rank", 2)))
    assert capped <= max(target, best) * (1 + 1e-6)


@SEARCH
@given(adapters(), st.floats(0.001, 0.9))
def test_rank_for_is_the_smallest_that_is_good_enough(adapter: Adapter, target: float) -> None:
    rank = resize(adapter, "rank", 1)[1].rank_for(target)
    assert rank is not None
    if rank:
        assert resize(adapter, "rank", rank)[1].error <= target * (1 + 1e-9)
    if rank > 1:
        assert resize(adapter, "rank", rank - 1)[1].error > target


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_size_is_that_of_the_file(tmp_path: Path, dialect: str, dtype: str) -> None:
    adapter = make("attn", rank=16)
    whole = adapter.save(tmp_path / "whole", dialect, dtype=dtype).stat().st_size
    for share in (0.3, 0.6, 0.9):
        small, report = resize(adapter, "size", share * whole, dtype=dtype)
        size = small.save(tmp_path / "small", dialect, dtype=dtype).stat().st_size
        assert 0.9 * share * whole - 8192 <= size <= share * whole
        uniform, _ = resize(adapter, "rank", max(1, int(16 * share) - 1))
        assert uniform.save(tmp_path / "uniform", dialect, dtype=dtype).stat().st_size <= size
        assert distance(adapter, small) == pytest.approx(report.error, rel=1e-3) and distance(adapter, small) < distance(
            adapter, uniform
        )
    assert resize(adapter, "size", 2 * whole, dtype=dtype)[1].error < 1e-9
    with pytest.raises(AdapterError, match=r"no ranks fit.*bytes more"):
        resize(adapter, "size", 20000, dtype=dtype)


def test_size_buys_what_saves_most_per_byte() -> None:
    draw = torch.Generator().manual_seed(0)

    def ranks(spare: int, *modules: tuple[int, float]) -> list[int]:
        """Of modules [side, side] with nine equal singular values each, for so many bytes beside those of one rank each."""
        sides = [(torch.linalg.qr(torch.randn(side, 9, generator=draw)).Q, strength) for side, strength in modules]
        deltas = [LowRank(strength * q, q.T, 9) for q, strength in sides]
        adapter = Adapter(dict(zip(PATHS, deltas, strict=False)))
        header = 5500
        return [line.new for line in resize(adapter, "size", header + spare + sum(4 * side for side, _ in modules))[1].lines]

    assert ranks(16000, (4000, 1.0), (400, 1.0)) == [1, 9]
    assert ranks(64000, (4000, 0.9), (4000, 1.0)) == [1, 5]


@pytest.mark.parametrize("rule", RULES)
def test_one_at_a_time_comes_out_the_same_and_is_read_once(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Adapter({"unet.conv_in": low_rank((96, 4, 3, 3), 6), "unet.conv_out": low_rank((4, 96, 3, 3), 3, 7.0, 1)})
    file, asked, read = whole.save(tmp_path / "a"), list[str](), files.read_delta
    monkeypatch.setattr(files, "read_delta", lambda *words: asked.append("") or read(*words))
    value = TARGETS.get(rule, 12000.0)
    small, lines = on_demand(Adapter.open(file), rule, value, dtype="fp32")
    found = dict(small.deltas)
    assert len(asked) == (4 if RULES[rule].together else 2)
    wanted, report = resize(Adapter.load(file), rule, value, dtype="fp32")
    assert found.keys() == wanted.deltas.keys() == lines.keys()
    for line in report.lines:
        mine, ours, theirs = lines[line.path], found[line.path].stored(), wanted.deltas[line.path].stored()
        assert all(torch.equal(ours[role], theirs[role]) for role in theirs)
        assert (mine.old, mine.new, mine.error) == (line.old, line.new, line.error)
    with pytest.raises(AdapterError, match="no storage dtype"):
        on_demand(whole, rule, value, dtype="fp17")


def test_modules_are_dropped_only_on_request() -> None:
    strong, faint, nothing = low_rank((9, 9)), low_rank((9, 9), seed=1) * 1e-4, low_rank((9, 9), seed=2) * 0.0
    adapter = Adapter(dict(zip(PATHS[:3], (strong, faint, nothing), strict=True)))
    assert [line.new for line in resize(adapter, "error", 0.01)[1].lines] == [2, 1, 1]
    small, report = resize(adapter, "error", 0.01, drop=True)
    assert list(small.deltas) == [PATHS[0]] and [line.new for line in report.lines] == [2, 0, 0]
    assert [line.error for line in report.lines] == [pytest.approx(0), 1, 0]
    assert list(resize(adapter, "sv_fro", 0.9, drop=True)[0].deltas) == list(PATHS[:2])
    assert not resize(Adapter({}), "error", 0.1)[0].deltas


def test_other_kinds_become_plain_and_what_has_no_factors_stays() -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {f"hada_w{i}_{side}": torch.randn(9, 2, generator=draw) for i in (1, 2) for side in "ab"}
    tensors |= {role: value.T for role, value in tensors.items() if role.endswith("b")}
    loha = Structured("LoHa", tensors, 2.0, (9, 9))
    norm = Dense(torch.randn(9, generator=draw))
    adapter = Adapter({"unet.conv_in": loha, "unet.conv_norm_out": norm})
    small, report = resize(adapter, "rank", 64)
    assert isinstance(small.deltas["unet.conv_in"], LowRank) and small.deltas["unet.conv_norm_out"] is norm
    assert report.error < 1e-12 and distance(adapter, small) < 1e-6
    assert resize(adapter, "rank", 1)[0].deltas["unet.conv_norm_out"] is norm


def test_what_cannot_be_resized_is_said() -> None:
    adapter = Adapter({"unet.conv_in": low_rank((9, 9))})
    scaled = Structured("IA3", {"weight": torch.ones(4), "on_input": torch.tensor(True)}, None, (4, 4))
    for match, arguments, options in [
        ("did you mean sv_fro", (adapter, "sv_for", 0.9), {}),
        ("rank 0 makes no sense", (adapter, "rank", 0), {}),
        ("sv-ratio 1 ", (adapter, "sv_ratio", 1), {}),
        ("sv-fro 1.5", (adapter, "sv_fro", 1.5), {}),
        ("error 1 ", (adapter, "error", 1), {}),
        ("error nan", (adapter, "error", math.nan), {}),
        ("size inf", (adapter, "size", math.inf), {}),
        ("at most 0", (adapter, "rank", 4), {"max_rank": 0}),
        ("did you mean fp16", (adapter, "rank", 4), {"dtype": "f16"}),
        ("conv_in.*base", (Adapter({"unet.conv_in": scaled}), "rank", 4), {}),
    ]:
        with pytest.raises(AdapterError, match=match):
            resize(*arguments, **options)  # type: ignore[arg-type]
    assert TARGETS.keys() | {"size"} == RULES.keys()


def test_what_has_exact_factors_and_loses_nothing_is_not_computed_anew() -> None:
    path, draw = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(0)
    roles = {"lokr_w1": (2, 2), "lokr_w2_a": (48, 1), "lokr_w2_b": (1, 48)}
    tensors = {role: torch.randn(shape, generator=draw) for role, shape in roles.items()}
    one = Structured("LoKr", tensors, 1.0, (96, 96))
    exact, kept = one.low_rank(), resize(Adapter({path: one}), "rank", 8)[0].deltas[path]
    assert exact and isinstance(kept, LowRank) and torch.equal(kept.up, exact.up) and torch.equal(kept.down, exact.down)
