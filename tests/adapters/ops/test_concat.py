"""Merges of plain LoRA files as bytes: the same to the byte as by deltas, under the same contract, and without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from personalize.adapters import contract
from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import Delta, Dense, LowRank
from personalize.adapters.describe import describe
from personalize.adapters.kinds.kind import DOWN, UP
from personalize.adapters.ops import concat, merge
from personalize.adapters.ops.concat import NeedsDeltas, stack
from personalize.adapters.strengths.grammar import split
from personalize.cli import run
from personalize.errors import AdapterError, HostileFileError
from personalize.families.family import modules
from personalize.families.names import ROWS
from personalize.formats.tensors import write_tensors

LINEAR, OTHER = "unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV, TEXT = "unet.conv_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1"
FAMILY = ROWS["pocket"]
ALIKE = {"modelspec.title": "both", "ss_base_model_version": FAMILY.base_version}


def lora(path: str, rank: int, seed: int, alpha: float | None = None, size: float = 0.1) -> LowRank:
    """A LoRA of one layer of the embedded base."""
    out, *inside = modules(FAMILY)[path]
    draw = torch.Generator().manual_seed(seed)
    ones = [1] * (len(inside) - 1)
    up, down = torch.randn(out, rank, *ones, generator=draw), torch.randn(rank, *inside, generator=draw)
    return LowRank(up * size, down, rank / 2 if alpha is None else alpha)


def write(path: Path, deltas: Mapping[str, Delta], dtype: str = "fp16", dialect: str = "kohya", **said: str) -> str:
    return str(Adapter(deltas, ALIKE | said).save(path, dialect, dtype=dtype))


def pair(folder: Path, dtype: str = "fp16", dialects: tuple[str, str] = ("kohya", "kohya")) -> tuple[str, str]:
    """Two files that share some of their layers; ranks and alphas differ."""
    first = {LINEAR: lora(LINEAR, 4, 0), CONV: lora(CONV, 2, 1), TEXT: lora(TEXT, 3, 2)}
    second = {LINEAR: lora(LINEAR, 5, 3, 7.0), OTHER: lora(OTHER, 2, 4, 7.0), TEXT: lora(TEXT, 2, 5, 1.0)}
    return write(folder / "a", first, dtype, dialects[0], mine="1"), write(folder / "b", second, dtype, dialects[1], mine="2")


def as_bytes(to: Path, *files: str, dialect: str = "kohya", dtype: str | None = None) -> bytes:
    whole = stack([(Path(path), weighting) for path, weighting in map(split, files)], dtype)
    return whole.save(to, dialect, {"said": "so"}).path.read_bytes()


def by_deltas(to: Path, *files: str, dialect: str = "kohya", dtype: str = "fp16") -> bytes:
    opened = [Adapter.open(path).weighted(weighting) for path, weighting in map(split, files)]
    return merge.merge(opened, [1.0] * len(opened)).save(to, dialect, {"said": "so"}, dtype).read_bytes()


STRENGTHS = [(":0.7", ":0.5"), ("", ""), (":-0.3", ":1.7"), (":0.5:0", ":0"), (":*proj*=0.3", ""), (":unet=0.25", ":te=-2")]


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_file_is_the_same_to_the_byte(tmp_path: Path, dtype: str, dialect: str) -> None:
    a, b = pair(tmp_path, dtype, ("diffusers", dialect))
    for strengths in STRENGTHS:
        files = [path + strength for path, strength in zip((a, b), strengths, strict=True)]
        wanted = by_deltas(tmp_path / "c", *files, dialect=dialect, dtype=dtype)
        assert as_bytes(tmp_path / "c", *files, dialect=dialect) == wanted, strengths
    for files in ([a], [f"{a}:0.3"], [a, b, f"{a}:0.25"]):
        assert as_bytes(tmp_path / "c", *files) == by_deltas(tmp_path / "c", *files, dtype=dtype)


def test_ranks_and_metadata_are_those_of_both(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    whole = stack([(Path(a), split(a)[1]), (Path(b), split(b)[1])])
    assert {line.path: line.new for line in whole.lines()} == {LINEAR: 9, OTHER: 2, CONV: 2, TEXT: 5}
    assert whole.metadata["modelspec.title"] == "both" and "mine" not in whole.metadata


def test_every_number_is_rounded_as_torch_rounds_it() -> None:
    """All 65,536 of them; the rest of the way to the same bytes is where they lie."""
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()]
        bits = every.view(torch.int16).numpy().view("uint16")
        for steps in ((0.7,), (0.5, 1 / 3), (-1e-4, 7.0, 0.1)):
            wanted = every.float()
            for step in steps:
                wanted = wanted * step
            found = torch.from_numpy(concat.table(name, steps)[bits].view("int16")).view(dtype)
            assert torch.equal(found, wanted.to(dtype))
            moved = (found.double() - wanted.double()).abs()[found.isfinite()]
            share, least = concat.STEPS[name]
            assert (moved <= share * found.double().abs()[found.isfinite()] + least).all()


def strange(folder: Path) -> dict[str, tuple[list[str], str | None]]:
    """Files that bytes alone cannot merge."""
    a, _ = pair(folder)
    plain = {LINEAR: lora(LINEAR, 4, 0)}
    full = write(folder / "full", {LINEAR: Dense(torch.ones(modules(FAMILY)[LINEAR]))})
    bias = write(folder / "bias", plain | {f"{LINEAR}.bias": Dense(torch.ones(modules(FAMILY)[LINEAR][0]))})
    other = {CONV: LowRank(torch.ones(320, 1, 1, 1), torch.ones(1, 4, 3, 3), 1)}
    sd = write(folder / "sd", other, ss_base_model_version=ROWS["sd1"].base_version)
    return {
        "fp32": ([a, write(folder / "fp32", plain, "fp32")], None),
        "to another dtype": ([a], "bf16"),
        "another kind": ([a, full], None),
        "a bias": ([bias], None),
        "another family": ([a, sd], None),
        "what cancels out": ([a, f"{a}:-1"], None),
        "what fp16 cannot hold": ([f"{a}:0.000001", f"{a}:0.000001"], None),
        "beyond fp16": ([f"{a}:60000000"], None),
    }


def test_what_is_not_plain_is_left_to_deltas_and_nothing_is_written(tmp_path: Path) -> None:
    for what, (files, dtype) in strange(tmp_path).items():
        (tmp_path / "c.safetensors").write_bytes(b"old")
        before = sorted(tmp_path.iterdir())
        with pytest.raises(NeedsDeltas):
            as_bytes(tmp_path / "c", *files, dtype=dtype)
            pytest.fail(what)
        assert (tmp_path / "c.safetensors").read_bytes() == b"old" and sorted(tmp_path.iterdir()) == before, what


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", [UP, DOWN])
def test_what_is_not_finite_is_left_to_deltas_which_name_it(tmp_path: Path, role: str, value: float) -> None:
    one, stem = lora(LINEAR, 2, 0), "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{stem}.{name}": tensor.half() for name, tensor in one.stored().items()}
    tensors[f"{stem}.{role}"][0, 0] = value
    file = tmp_path / "sick.safetensors"
    write_tensors(file, tensors, {"ss_base_model_version": FAMILY.base_version})
    for strength in ("", ":0.5"):
        with pytest.raises(NeedsDeltas):
            as_bytes(tmp_path / "c", f"{file}{strength}")
        with pytest.raises(AdapterError, match="NaN or Inf"):
            by_deltas(tmp_path / "c", f"{file}{strength}")


def test_a_file_that_changes_meanwhile_is_named(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    whole = stack([(Path(path), split(path)[1]) for path in (a, b)])
    os.utime(b, (1, 1))
    with pytest.raises(AdapterError, match=r"b\.safetensors has changed"):
        whole.save(tmp_path / "c", "kohya", {})
    assert not (tmp_path / "c.safetensors").exists()


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = pair(tmp_path)
    whole = stack([(Path(a), split(a)[1])])
    Path(a).write_bytes(Path(a).read_bytes()[:-100])
    monkeypatch.setattr(contract, "identify", lambda stat: whole.sources[0].stamp)
    with pytest.raises(HostileFileError, match="became shorter"):
        whole.save(tmp_path / "c", "kohya", {})


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(tmp_path)
    monkeypatch.setattr(contract, "weights_hash", lambda path: "other")
    with pytest.raises(AdapterError, match="the disk gives back other bytes"):
        as_bytes(tmp_path / "c", a, b)
    assert not (tmp_path / "c.safetensors").exists()


def test_options_that_bytes_know_nothing_of_are_not_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair(tmp_path)
    words = ["merge", a, b, "--output", str(tmp_path / "c.safetensors")]
    for option in (["--density", "0.5"], ["--no-mean"], ["--dtype", "fp17"], ["--family", "sdxl"], ["--dialect", "kohia"]):
        assert run([*words, *option]) == 2, option
    assert not (tmp_path / "c.safetensors").exists()
    assert run([*words, "--rank", "2"]) == 0
    assert set(describe(tmp_path / "c.safetensors").ranks) == {2}
    assert run([*words, "--strip-metadata"]) == 0
    assert "mine" not in (found := describe(tmp_path / "c.safetensors").metadata) and "personalize.merge" not in found
    assert run([*words, "--json"]) == 0
    assert '"layers":4' in capsys.readouterr().out.replace(" ", "")


def test_the_command_loads_no_torch_for_it_and_writes_what_it_writes_with(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    program = (
        "import sys; from personalize.cli import run; code = run(sys.argv[1:]); sys.exit(code or 10 * ('torch' in sys.modules))"
    )
    words = ["merge", f"{a}:0.7", f"{b}:0.5", "--output", str(tmp_path / "c.safetensors")]
    assert subprocess.run([sys.executable, "-c", program, *words], check=False).returncode == 0
    found = (tmp_path / "c.safetensors").read_bytes()
    assert subprocess.run([sys.executable, "-c", f"import torch; {program}", *words], check=False).returncode == 10
    assert (tmp_path / "c.safetensors").read_bytes() == found
    repeated = ["merge", "--replay", str(tmp_path / "c.safetensors"), "--output", str(tmp_path / "d.safetensors")]
    assert subprocess.run([sys.executable, "-c", program, *repeated], check=False).returncode == 0
