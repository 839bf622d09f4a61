"""The benchmarks of a training step: what is counted, on shapes and on real tensors, and how throughput goes on."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from personalize.errors import DataError, TrainingError
from personalize.models.model import Base
from personalize.training.memory.estimate import Workload
from personalize.training.memory.ladder import ComputePlan
from tools.bench import beside, ladder, memory, pairs, scripts, step, svd, throughput
from tools.bench.__main__ import main, parser
from tools.bench.counting import Work, phases

pytestmark = pytest.mark.slow

POCKET = memory.configs_of(pairs.family("pocket"), 64)
RECIPE = step.recipe_of(1, 4)

SCRIPT = """
import argparse, torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextModel
parser = argparse.ArgumentParser()
for flag in ("pretrained_model_name_or_path", "mixed_precision"): parser.add_argument("--" + flag)
told, _ = parser.parse_known_args()
path, accelerator = told.pretrained_model_name_or_path, Accelerator(mixed_precision=told.mixed_precision, cpu=True)
models = [kind.from_pretrained(path, subfolder=part) for kind, part in
          ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder"))]
for model in models: model.requires_grad_(False); model.to("cpu", dtype=torch.float32)
unet, vae, text = models
unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
learned = [p for p in unet.parameters() if p.requires_grad]
unet, opt = accelerator.prepare(unet, torch.optim.AdamW(learned))
while True:
    with accelerator.accumulate(unet):
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.sample()
        cond = text(torch.zeros(1, 77, dtype=torch.long), return_dict=False)[0]
        loss = unet(latents, torch.tensor([3]), cond, return_dict=False)[0].square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(learned, 1.0)
        opt.step()
        opt.zero_grad()
    accelerator.log({"loss": loss.item(), "again": loss.tolist()})
"""


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return step.ours(POCKET, RECIPE, 64, "float32")


def options(name: str, folder: Path, *flags: str) -> argparse.Namespace:
    return parser().parse_args([name, "--to", str(folder), *flags])


def test_operations_are_those_that_compute() -> None:
    a = torch.ones(4, 8)  # 128 bytes
    with phases(work := Work(), []), work:
        b = a.T.reshape(-1)[:3].expand(2, 3)[None].detach()  # one copy, of 128 bytes
        torch.empty(3), torch.empty_like(a)
    assert (work.ops, work.bytes, work.waits) == ({"forward": 1}, {"forward": 256}, 0) and b.shape == (1, 2, 3)
    with phases(work := Work(), []), work:
        a + a, a.mul_(2)
        b + 1  # three numbers shown twice: no more than their storage is read
    assert work.ops == {"forward": 3} and work.bytes == {"forward": 3 * 128 + 2 * 128 + 24 + 24}
    assert work.names == {"add": 2, "mul_": 1}


def test_waits_are_what_the_host_reads() -> None:
    a = torch.tensor([1.0, 2.0])
    with phases(work := Work(), []), work:
        assert (a[1].item(), a.tolist(), a.cpu() is a) == (2.0, [1.0, 2.0], True)
        a.nonzero()
    assert work.waits == 4 and torch.Tensor.tolist is not None
    with work:
        a.tolist()
    assert work.waits == 4, "nothing is changed for good"


def test_phases_are_those_of_the_methods() -> None:
    class Owner:
        def double(self, a: torch.Tensor) -> torch.Tensor:
            return a + a

    before = Owner.double
    with phases(work := Work(), [(Owner, "double", "update")]), work:
        Owner().double(torch.ones(2) * 3)
    assert (work.ops["update"], work.ops["forward"]) == (1, 2) and Owner.double is before


def test_shapes_launch_what_a_real_step_launches(counted: dict[str, Any]) -> None:
    take = throughput.trainer(POCKET, RECIPE, ComputePlan("float32"), torch.device("cpu"))
    take()
    with phases(work := Work(), step.OURS), work:
        take()
    assert Counter(counted["names"]) == work.names and counted["ops"] == work.ops and counted["bytes"] == work.bytes
    assert counted["waits"] == work.waits == 1
    assert counted["ops"]["update"] < 12, "clipping and AdamW go over all tensors at once"


def test_a_larger_batch_touches_more_with_the_same_forward(counted: dict[str, Any]) -> None:
    one, four = counted, step.ours(POCKET, step.recipe_of(4, 4), 64, "float32")
    assert one["ops"]["forward"] == four["ops"]["forward"] and one["bytes"]["forward"] < four["bytes"]["forward"]
    assert one["bytes"]["update"] == four["bytes"]["update"]


def test_low_precision_launches_fewer_than_float32(counted: dict[str, Any]) -> None:
    low = step.ours(POCKET, RECIPE, 64, "bfloat16")
    assert sum(low["ops"].values()) < sum(counted["ops"].values()) and low["waits"] == 1
    assert low["names"]["_foreach_copy_"] == 2 and low["names"]["_to_copy"] < 10, "factors and gradients are cast all at once"
    blocks = low["names"]["_scaled_dot_product_flash_attention_for_cpu"] // 2
    assert low["names"]["baddbmm_"] == 3 * 5 * blocks, "q k v, k v, and three alone: forward, and both factors backward"


@pytest.mark.slow
def test_another_trainers_step_is_counted_as_it_is(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    counts = step.theirs(POCKET, RECIPE, 64, "float32", script)
    assert set(counts["ops"]) == set(step.PHASES) and min(counts["ops"].values()) > 5 and counts["waits"] == 2
    script.write_text(SCRIPT.replace("while True", "raise SystemExit('no torch');\nwhile True"))
    with pytest.raises(TrainingError, match="no torch"):
        step.theirs(POCKET, RECIPE, 64, "float32", script)


def row(whose: str, ops: int, touched: int) -> dict[str, Any]:
    case = {"family": "sd1", "precision": "float32", "batch": 1, "whose": whose}
    return {**case, "ops": {"forward": ops}, "bytes": {"forward": touched}, "waits": 1, "names": {}}


def test_counts_are_published_side_by_side(tmp_path: Path) -> None:
    step.publish(options("step", tmp_path), [row("personalize", 100, 10**9), row("diffusers", 150, 3 * 10**9)])
    page = (tmp_path / "step.md").read_text()
    assert "1.50 times as many operations and touches 3.00 times the bytes" in page
    assert "| sd1 | float32 | 1 | diffusers | 0 | 150 | 0 | 0 | 150 | 1 | 3.0 |" in page
    assert len(json.loads((tmp_path / "step.json").read_text())["rows"]) == 2
    with pytest.raises(DataError, match=r"no script"):
        step.main(options("step", tmp_path, "--script", str(tmp_path / "none.py")))


def test_flop_are_those_of_the_shapes() -> None:
    one, two = (throughput.flops_of(POCKET, step.recipe_of(b, 4)) for b in (1, 2))
    assert one > 10**8 and two == pytest.approx(2 * one, rel=0.01)


def test_throughput_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--tiny", "--modes", "eager", "--seconds", "0"]
    throughput.main(options("throughput", tmp_path, *flags, "--batches", "1", "2", "--minutes", "-1"))
    assert "goes on with pocket 1 eager" in capsys.readouterr().out and not (tmp_path / "throughput.json").exists()
    throughput.main(options("throughput", tmp_path, *flags, "--batches", "1"))
    first = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    assert [row["case"] for row in first] == [["pocket", 1, "eager"]]
    assert first[0]["share"] == pytest.approx(first[0]["flops"] / first[0]["seconds"] / first[0]["peak"])
    failed = {"family": "pocket", "side": 64, "batch": 2, "mode": "eager", "failed": "out of memory"}
    second = {"case": ["pocket", 2, "eager"], **failed}
    monkeypatch.setattr(throughput, "row_of", lambda *_: failed)
    throughput.main(options("throughput", tmp_path, *flags, "--batches", "1", "2"))
    assert json.loads((tmp_path / "throughput.json").read_text())["rows"] == [*first, second]
    assert "| pocket | 64 | 2 | eager | out of memory |" in (tmp_path / "throughput.md").read_text()
    throughput.main(options("throughput", tmp_path, *flags, "--rank", "2", "--batches", "2"))
    assert json.loads((tmp_path / "throughput.json").read_text())["rows"] == [{"case": ["pocket", 2, "eager"], **failed}], (
        "other settings, another table"
    )


def test_other_trainers_are_told_as_multiples_of_ours() -> None:
    def took(mode: str, batch: int, seconds: float) -> dict[str, Any]:
        return {"family": "sd1", "batch": batch, "mode": mode, "seconds": seconds}

    failed = {"family": "sd1", "batch": 1, "mode": "kohya", "failed": "failed: no module"}
    rows = [took("eager", 1, 0.2), took("graphs", 1, 0.1), took("diffusers", 1, 0.3), failed, took("diffusers", 4, 1.0)]
    assert beside.ratios(rows) == ["- sd1, batch 1: a step of diffusers takes 1.50 times ours eager, 3.00 times ours graphs"]


@pytest.mark.slow
def test_other_trainers_are_timed_beside_ours(tmp_path: Path) -> None:
    script, kohya = tmp_path / "script.py", tmp_path / "sd-scripts"
    script.write_text(SCRIPT)
    kohya.mkdir()
    (kohya / "train_network.py").write_text("import no_such_module")
    flags = ["--tiny", "--seconds", "0", "--batches", "1", "--modes", "eager", "graphs", "--work", str(tmp_path / "work")]
    flags += ["--script", str(script), "--kohya", str(kohya)]
    throughput.main(options("throughput", tmp_path, *flags))
    rows = {row["mode"]: row for row in json.loads((tmp_path / "throughput.json").read_text())["rows"]}
    assert list(rows) == ["eager", "graphs", "diffusers", "kohya"] and rows["diffusers"]["seconds"] > 0
    assert rows["graphs"]["failed"] == "CUDA graphs need a GPU"
    assert "train_network.py ended with 1: ModuleNotFoundError: No module named 'no_such_module'" in rows["kohya"]["failed"]
    assert "- pocket, batch 1: a step of diffusers takes " in (tmp_path / "throughput.md").read_text()


def test_scripts_get_a_base_that_diffusers_loads(tmp_path: Path) -> None:
    _, configs = throughput.tiny("sdxl")
    scripts.write_weights(tmp_path, configs, torch.device("cpu"))
    assert Base.load(tmp_path).family.name == "sdxl"
    before = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    scripts.write_weights(tmp_path, configs, torch.device("cpu"))
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="no script"):
        beside.trainers(options("throughput", tmp_path, "--kohya", str(tmp_path)), "sdxl")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_graphs_take_the_steps_of_an_eager_run() -> None:
    def steps(graphs: bool) -> list[list[float]]:
        torch.manual_seed(0)
        take = throughput.trainer(
            POCKET, RECIPE, ComputePlan("bfloat16", channels_last=True), torch.device("cuda"), graphs=graphs
        )
        return [take() for _ in range(3)]  # type: ignore[misc]

    torch.testing.assert_close(steps(True), steps(False), rtol=0.02, atol=0.02)


def test_the_ladder_is_measured_beside_its_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tiny", "--batches", "1", "--rank", "2", "--precision", "float32"]
    ladder.main(options("ladder", tmp_path, *flags))
    rows = {row["case"][-1]: row for row in json.loads((tmp_path / "ladder.json").read_text())["rows"]}
    assert next(iter(rows)) == "everything at once" and {"checkpointing", "nf4"} < set(rows)
    for name in ("everything at once", "checkpointing"):  # on a CPU encoders have nowhere to go
        assert rows[name]["step"] == pytest.approx(rows[name]["step_estimate"], rel=0.02)
        assert rows[name]["sample"] == pytest.approx(rows[name]["sample_estimate"], rel=0.02)
    assert rows["nf4"]["step"] < rows["checkpointing"]["step"] < rows["everything at once"]["step"]
    assert "| pocket | 64 | 1 | checkpointing |" in (tmp_path / "ladder.md").read_text()
    capsys.readouterr()
    ladder.main(options("ladder", tmp_path, *flags))
    assert capsys.readouterr().out == "", "nothing is measured twice"


def test_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ladder, "measure_step", full)
    row = ladder.measure_or_fail(POCKET, Workload(RECIPE, 8, 8), ComputePlan(), torch.device("cpu"))
    told = {"case": ["sdxl", 1024, 4, "checkpointing"], "step_estimate": 2**33, "sample_estimate": 2**32, **row}
    assert ladder.cells(told) == ["sdxl", "1024", "4", "checkpointing", "out of memory", "8.00", "–", "4.00"]


def test_the_algebra_on_a_gpu_gives_what_the_cpu_gives(tmp_path: Path) -> None:
    svd.main(options("svd", tmp_path, "--tiny", "--family", "pocket", "--rank", "4", "--seconds", "0"))
    rows = json.loads((tmp_path / "svd.json").read_text())["rows"]
    assert sum(row["count"] for row in rows) == len(pairs.targets(pairs.family("pocket")))
    assert all(0 <= row["gap"] < 1e-12 and svd.gain(row) > 0 for row in rows)
    assert "| 192 x 192 | " in (tmp_path / "svd.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["throughput", "ladder", "svd"])
def test_no_gpu_is_said_in_a_line(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", name])
    assert main() == 2
    assert capsys.readouterr().err.startswith("bench: there is no GPU here")
