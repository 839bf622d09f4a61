"""The benchmark of the algebra, on tiny adapters: the answers it measures against, our side of it, and its tables."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.describe import describe
from personalize.adapters.ops import merge as merging
from personalize.adapters.ops import resize as resizing
from personalize.errors import DataError, RecipeError, TrainingError
from personalize.families import names as keys
from tools.bench import algebra, pairs, peers
from tools.bench.__main__ import main, parser

pytestmark = pytest.mark.slow

ROW = pairs.family("pocket")
RANK = 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pairs.write_pair(tmp_path_factory.mktemp("pair"), ROW, RANK, 0)


@pytest.fixture(scope="module")
def few() -> list[str]:
    return pairs.spread(pairs.targets(ROW), 5)


def options(folder: Path, **more: object) -> argparse.Namespace:
    told = {"family": "pocket", "rank": 4, "modules": 6, "checked": 3, "rounds": 1, "work": folder / "work", "to": folder, **more}
    flags = [text for name, value in told.items() for text in (f"--{name}", str(value))]
    return parser().parse_args(["algebra", *flags])


def test_the_adapters_are_what_kohyas_trainer_writes(pair: tuple[Path, Path]) -> None:
    for file, alpha in zip(pair, (RANK / 2, RANK), strict=True):
        told = describe(file)
        assert (told.family, told.dtype, told.kind) == ("pocket", "fp16", "LoRA")
        adapter = Adapter.load(file)
        assert {(delta.rank, delta.alpha) for delta in adapter.deltas.values()} == {(RANK, alpha)}  # type: ignore[attr-defined]
    assert not any("conv" in name or "norm" in name for name in pairs.targets(ROW))


def test_sdxl_has_as_many_targets_as_kohya_counts() -> None:
    names = pairs.targets(pairs.family("sdxl"))
    counts = [sum(name.startswith(part) for name in names) for part in ("lora_unet_", "lora_te1_", "lora_te2_")]
    assert counts == [722, 72, 192]
    with pytest.raises(RecipeError, match="sdxl"):
        pairs.family("sdlx")


def test_the_spectrum_falls_as_told(pair: tuple[Path, Path]) -> None:
    _, report = resizing.resize(Adapter.load(pair[0]), "rank", RANK)
    for line in report.lines:
        wanted = 1 / torch.arange(1, RANK + 1)
        assert torch.allclose(line.values.float(), wanted, rtol=0.35)


def test_a_sample_has_layers_of_all_sizes(pair: tuple[Path, Path], few: list[str], tmp_path: Path) -> None:
    sample = pairs.write_sample(pair[0], tmp_path / "sample.safetensors", few)
    assert {key.split(".")[0] for key in load_file(sample)} == set(few)
    shapes = pairs.targets(ROW)
    assert len({shapes[name] for name in few}) >= 3
    assert pairs.spread(shapes, 10**6) == sorted(shapes)


def test_answers_are_those_of_the_algebra(pair: tuple[Path, Path], few: list[str], tmp_path: Path) -> None:
    a, b = map(Adapter.load, pair)
    made: Mapping[str, tuple[Adapter, dict[str, Tensor]]] = {
        "sum": (merging.merge([a, b], pairs.WEIGHTS), pairs.answers(pair, few, None)),
        "svd": (merging.merge([a, b], pairs.WEIGHTS, "svd", RANK), pairs.answers(pair, few, RANK)),
        "resize": (resizing.resize(a, "rank", 2)[0], pairs.answers(pair[:1], few, 2)),
    }
    for name, (adapter, wanted) in made.items():
        file = adapter.save(tmp_path / f"{name}.safetensors")
        assert pairs.error(file, wanted, ROW) < 1e-6, name
    assert pairs.error(tmp_path / "resize.safetensors", made["svd"][1], ROW) > 0.1


def test_a_missing_layer_counts_as_nothing(pair: tuple[Path, Path], few: list[str], tmp_path: Path) -> None:
    wanted = pairs.answers(pair[:1], few[:2], None)
    sizes = [float(answer.norm()) for answer in wanted.values()]
    one = pairs.write_sample(pair[0], tmp_path / "one.safetensors", few[:1])
    assert pairs.error(one, wanted, ROW) == pytest.approx(sizes[1] / (sizes[0] ** 2 + sizes[1] ** 2) ** 0.5)


def test_a_hollow_file_has_a_true_header_and_no_weights(tmp_path: Path) -> None:
    file = pairs.hollow(tmp_path / "hollow.safetensors", pairs.family("sdxl"), 10**9)
    assert file.stat().st_size == pytest.approx(1e9, rel=0.01) and file.stat().st_blocks * 512 < 10**7
    assert (describe(file).family, len(keys.weights(pairs.family("sdxl"))) > 986) == ("sdxl", True)


def test_a_cost_is_that_of_the_command_alone(tmp_path: Path) -> None:
    small = algebra.run([sys.executable, "-S", "-c", "pass"], tmp_path)
    large = algebra.run([sys.executable, "-S", "-c", "x = b'1' * 300_000_000"], tmp_path)
    assert small.peak < 60e6 < 300e6 < large.peak and small.wall > 0 and small.cpu > 0
    with pytest.raises(TrainingError, match="ended with 3"):
        algebra.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def result(tool: str, task: str, layers: int, cpu: float, error: float | None, start: float = 1.0) -> algebra.Result:
    return algebra.Result(
        tool, task, layers, 100, algebra.Cost(cpu, cpu, 120), algebra.Cost(start, start, 10), error, layers == 100
    )


def test_what_was_not_run_on_all_layers_is_extrapolated_and_marked() -> None:
    theirs, ours = result("kohya", "svd", 10, 21, 1e-6), result("personalize", "svd", 100, 2, 1e-7)
    assert algebra.seconds_for_layers(theirs, 100) == 201 and algebra.seconds_for_layers(ours, 100) == 2
    assert "≈ 201.0" in algebra.cells(theirs, 100) and "2.0" in algebra.cells(ours, 100)


def test_goals_are_judged_by_what_was_measured() -> None:
    results = [result("kohya", "svd", 10, 21, 1e-6), result("personalize merge", "svd", 100, 2, 1e-7)]
    results += [result("personalize merge", "concat", 100, 2.5, 1e-4), result("cat A B > C, sync", "concat", 100, 0.5, None)]
    found = algebra.goals(results, algebra.Cost(0.9, 0.1, 1), 10**9, 100)
    assert [(goal.measured, goal.met) for goal in found] == [
        ("≈ 100x", True),
        ("1.0e-07 beside 1.0e-06", True),
        ("1.5 s beside 0.5 s", False),
        ("1.20x", True),
        ("0.90 s", False),
    ]


def test_commands_ask_all_tools_for_the_same(tmp_path: Path) -> None:
    for tool in peers.tools(tmp_path, tmp_path / "sd-scripts", 32):
        files = [f"{letter}.safetensors" for letter in "ab"][: peers.tasks(32)[tool.task].files]
        words = " ".join(tool.command(files, "c.safetensors"))
        assert "c.safetensors" in words and all(file in words for file in files), tool
        if tool.task != "resize" and tool.judged:
            assert all(f"{weight}" in words for weight in pairs.WEIGHTS), tool
        for script in tmp_path.glob("*.py"):
            compile(script.read_text(encoding="utf-8"), script.name, "exec")


def test_a_whole_run_of_our_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "HOLLOW", 10**7)
    algebra.main(options(tmp_path, only="alone"))
    page, data = (tmp_path / "algebra.md").read_text(), json.loads((tmp_path / "algebra.json").read_text())
    assert {one["tool"] for one in data["results"]} == {
        "personalize resize",
        "personalize merge --method svd",
        "personalize merge",
        "safetensors alone",
    }
    judged = [one for one in data["results"] if one["error"] is not None]
    assert judged and all(one["error"] < 1e-3 and one["cost"]["peak"] > 0 for one in judged)
    assert all(f"## {task.title}" in page for task in peers.tasks(4).values()) and str(tmp_path) not in page


def test_a_wrong_checkout_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"resize_lora\.py"):
        algebra.main(options(tmp_path, kohya=tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", "algebra", "--family", "nonsense", "--work", str(tmp_path)])
        assert main() == 2
    assert capsys.readouterr().err.startswith("bench: no family")


def test_help_is_there() -> None:
    command = [sys.executable, "-m", "tools.bench", "algebra", "--help"]
    assert "--kohya" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
