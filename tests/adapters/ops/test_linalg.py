"""QR by Cholesky beside Householder's, what Kronecker kinds tell without dW, and how often files are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_adapters import make
from test_kinds import CONV, LINEAR, POCKET, loha, lokr
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import Delta, LowRank, Structured
from personalize.adapters.distance import estimate_norm, is_within, relative_difference
from personalize.adapters.kinds import lokr as kronecker
from personalize.adapters.ops import linalg
from personalize.adapters.ops.convert import convert
from personalize.cli import run
from personalize.formats import header


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TWINS = torch.cat([noise(3, 90), noise(3, 90)])
HARD = {  # rows => whether Cholesky may be used
    "apart": (noise(6, 90), True),
    "of very different sizes": (noise(6, 90) * torch.logspace(0, -9, 6, dtype=torch.float64)[:, None], True),
    "nearly the same": (TWINS + 1e-6 * noise(6, 90, seed=1), False),
    "the same": (TWINS, False),
    "zero": (torch.zeros(6, 90, dtype=torch.float64), False),
    "more than columns": (noise(9, 4), False),
}


@pytest.mark.parametrize("case", HARD)
def test_rows_become_orthonormal_whichever_way_is_taken(case: str) -> None:
    rows, cholesky = HARD[case]
    made = linalg.lq(rows)
    count = made.triangle.shape[1]
    q = made.span(torch.eye(count, dtype=torch.float64))
    assert made.solve is cholesky
    assert torch.allclose(q @ q.T, torch.eye(count, dtype=torch.float64), atol=1e-11)
    assert torch.allclose(made.triangle @ q, rows, atol=1e-13)


@pytest.mark.parametrize("case", HARD)
def test_the_svd_of_factors_cut_to_a_rank_is_the_best_there_is(case: str) -> None:
    down, up = HARD[case][0], noise(80, len(HARD[case][0]), seed=2)
    parts, whole = linalg.of_factors(up, down, 2), up @ down
    values = torch.linalg.svdvals(whole)
    assert parts.u.shape[1] == parts.v.shape[0] == 2
    assert torch.allclose(parts.s, values[: len(parts.s)], rtol=0, atol=1e-12 * max(1.0, float(values[0])))
    lost = (whole - (parts.u * parts.s[:2]) @ parts.v).norm()
    assert torch.allclose(lost, values[2:].norm(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "delta", [lokr(POCKET[LINEAR]), lokr(POCKET[LINEAR], one=True), lokr(POCKET[CONV]), loha(POCKET[LINEAR])]
)
def test_kinds_tell_the_rank_of_their_factors_without_making_them(delta: Structured, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = delta.low_rank()
    monkeypatch.setattr(Structured, "low_rank", None)
    assert delta.factor_rank == (pair.rank if pair else 0) > 0


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_lokr_of_thin_factors_becomes_lora_without_its_half(kernel: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    shape, count = (64, 48, *kernel), 9 if kernel else 1
    tensors = {"lokr_w1": noise(4, 4), "lokr_w2_a": noise(16, 3), "lokr_w2_b": noise(3, 12 * count, seed=1)}
    delta: Delta = Structured("LoKr", tensors, 2.0, shape)
    whole = delta.delta().double().reshape(64, -1)
    values = torch.linalg.svdvals(whole)

    def formed(*_: object) -> None:
        raise AssertionError("a half or all factors were made")

    for name in ("half", "kron"):  # which make halves and dW, and exact factors
        monkeypatch.setattr(kronecker, name, formed)
    monkeypatch.setattr(Structured, "delta", formed)
    made, report = convert(Adapter({"unet.conv_in" if kernel else LINEAR: delta}), "lora", 5)
    (found,) = made.deltas.values()
    assert isinstance(found, LowRank) and found.rank == 5 and report is not None
    assert torch.allclose(report.lines[0].values, values[: len(report.lines[0].values)], atol=1e-5)
    assert report.error == pytest.approx(float(values[5:].norm() / values.norm()), rel=1e-5)
    assert float((found.delta().reshape(64, -1) - whole).norm()) == pytest.approx(float(values[5:].norm()), rel=1e-5)


@pytest.mark.parametrize("alpha", [4.0, 1.0, -3.0])
def test_the_bound_from_factors_never_lets_a_farther_update_through(alpha: float) -> None:
    wanted = LowRank(noise(20, 4), noise(4, 30, seed=1), 4.0)
    for scale in (0.0, 1e-4, 1e-2):
        up = wanted.up * 4.0 / alpha + scale * noise(20, 4, seed=2)
        found = LowRank(up, wanted.down + scale * noise(4, 30, seed=3), alpha)
        far = relative_difference(found, wanted)
        assert estimate_norm(wanted) == pytest.approx(wanted.norm(), rel=1e-5)
        for limit in (0.9 * far, 1.1 * far, 3 * far):
            assert is_within(found, wanted, limit + 1e-6) == (far <= limit + 1e-6)
    broken = LowRank(wanted.up / 0, wanted.down, 4.0)
    assert not is_within(broken, wanted, 1e9)


COMMANDS = {"merge": (["{0}", "{1}:0.5"], 2), "resize": (["{0}", "--rank", "1"], 1), "convert": (["{0}", "--dtype", "fp16"], 1)}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_each_header_once(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, inputs = COMMANDS[command]
    files = [str(make(pick="attn1").save(tmp_path / f"{name}.safetensors", dtype="bf16")) for name in "ab"]
    read, parse = [], header._parse
    monkeypatch.setattr(header, "_parse", lambda path, *rest: read.append(path) or parse(path, *rest))
    assert run([command, *(word.format(*files) for word in words), "-o", str(tmp_path / "c.safetensors")]) == 0
    assert sorted(map(str, read[:-1])) == files[:inputs] and ".tmp" in read[-1].name  # and what was written, to check it
    written = header.read_header(tmp_path / "c.safetensors").tensors
    wanted = "F16" if command == "convert" else "BF16"  # that of the first file
    assert {entry.dtype for key, entry in written.items() if not key.endswith("alpha")} == {wanted}
