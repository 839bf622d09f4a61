"""The benchmark of fleets, at tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from personalize.errors import TrainingError
from personalize.training.memory.ladder import ComputePlan
from tools.bench import fleet
from tools.bench.__main__ import main, parser
from tools.bench.resuming import device_of
from tools.bench.step import recipe_of
from tools.bench.throughput import tiny

pytestmark = pytest.mark.slow

FLAGS = ["fleet", "--tiny", "--modes", "eager", "--seconds", "0", "--rank", "2", "--precision", "float32"]


def test_a_fleet_is_timed_beside_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.main(parser().parse_args([*FLAGS, "--members", "2", "--to", str(tmp_path)]))
    rows = json.loads((tmp_path / "fleet.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [["pocket", 0, "eager"], ["pocket", 2, "eager"]]
    ratio = 2 * rows[1]["alone"] / rows[1]["seconds"]  # both taken in turns
    assert f"| {ratio:.2f}x |" in (tmp_path / "fleet.md").read_text()
    capsys.readouterr()
    fleet.main(parser().parse_args([*FLAGS, "--members", "2", "--to", str(tmp_path)]))
    assert capsys.readouterr().out == "", "nothing is timed twice"


def test_a_step_of_the_benchmark_is_each_members_own() -> None:
    options = parser().parse_args(FLAGS)
    configs = tiny("pocket")[1]
    take = fleet.fleet(configs, recipe_of(1, 2), ComputePlan("float32", micro_batch=1), device_of(options), 3)
    *losses, _, _, _ = first = take()
    assert isinstance(first, list) and len(first) == 6 and len(set(losses)) == 3  # a loss and a norm for each
    assert take() != first


def test_memory_per_member_is_what_each_further_one_takes() -> None:
    rows = [{"case": ["sd1", n, "eager"], "side": 512, "seconds": 0.1 * (n or 1), "bytes": (4 + n) << 30} for n in (0, 1, 4)]
    assert fleet.cells(rows[2], rows) == ["sd1", "512", "4", "eager", "400", "400", "1.00x", "10.00", "8.00", "1.000"]
    failed = {"case": ["sd1", 8, "eager"], "side": 512, "failed": "out of memory"}
    assert fleet.cells(failed, rows)[4] == "out of memory" and len(fleet.cells(failed, rows)) == len(fleet.HEADS)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TrainingError, match="no GPU here"):
        fleet.main(parser().parse_args(["fleet"]))
    monkeypatch.setattr("sys.argv", ["bench", "fleet"])
    assert main() == 2 and "no GPU here" in capsys.readouterr().err
