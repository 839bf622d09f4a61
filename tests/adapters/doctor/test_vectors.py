"""The doctor on textual inversions, and what else is told of them: show, convert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize.adapters.describe import describe
from personalize.adapters.doctor.exam import examine
from personalize.adapters.embedding import Embedding
from personalize.cli import run
from personalize.reports.adapter import doctor as report
from personalize.reports.adapter import heatmap
from personalize.reports.adapter.summary import as_text


def words(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


FAULTS: dict[str, tuple[dict[str, torch.Tensor], dict[str, str], dict[str, str]]] = {
    "sound": ({"emb_params": words(2, 768)}, {}, {}),
    "sdxl": ({"clip_l": words(2, 768), "clip_g": words(2, 1280)}, {}, {}),
    "counts": ({"clip_l": words(2, 768), "clip_g": words(3, 1280)}, {}, {"unsound": "error"}),
    "not finite": ({"emb_params": words(2, 768) / 0}, {}, {"unsound": "error"}),
    "zeros": ({"emb_params": torch.zeros(2, 768)}, {}, {"empty": "warning"}),
    "long": ({"emb_params": words(40, 768)}, {}, {"many-vectors": "warning"}),
    "diffusers": ({"<zwx>": words(768)}, {}, {"spelling": "info"}),
    "renamed": ({"emb_params": words(2, 768)}, {"modelspec.trigger_phrase": "rex"}, {"renamed": "info"}),
    "named": ({"emb_params": words(2, 768)}, {"modelspec.trigger_phrase": "zwx"}, {}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_textual_inversion(name: str, tmp_path: Path) -> None:
    tensors, metadata, faults = FAULTS[name]
    save_file(tensors, tmp_path / "zwx.safetensors", metadata)
    found = examine(tmp_path / "zwx.safetensors")
    assert {finding.code: finding.level for finding in found.findings} == faults
    table = report.table([found])
    assert "textual inversion" in table and "||dW||" not in table
    assert json.loads(report.as_json([found])) and heatmap.heat_map([found])


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        ({"emb_params": words(3, 768)}, "sd1"),
        ({"emb_params": words(3, 1024)}, "sd2"),
        ({"emb_params": words(3, 192)}, "pocket"),
        ({"clip_l": words(3, 768), "clip_g": words(3, 1280)}, "sdxl"),
        ({"emb_params": words(3, 77)}, "unknown"),
    ],
)
def test_show_tells_word_vectors_and_family(tensors: dict[str, torch.Tensor], family: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "zwx.safetensors")
    found = describe(tmp_path / "zwx.safetensors")
    assert (found.family, found.dtype, dict(found.words)) == (family, "fp32", {"zwx": 3})
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values()) and found.is_learned
    assert f"textual inversion for {family}" in as_text(found) and "zwx (3 vectors)" in as_text(found)


def test_convert_writes_what_uis_read(tmp_path: Path) -> None:
    vector = words(768)
    save_file({"<cat-toy>": vector}, tmp_path / "learned.safetensors", {"who": "me"})
    assert run(["convert", str(tmp_path / "learned.safetensors"), "-o", str(tmp_path / "toy"), "--dtype", "fp16"]) == 0
    assert {name: tuple(one.shape) for name, one in load_file(tmp_path / "toy.safetensors").items()} == {"emb_params": (1, 768)}
    read = Embedding.load(tmp_path / "toy.safetensors")
    assert torch.equal(read.vectors["text_encoder"][0], vector.half().float()) and read.metadata["who"] == "me"
    assert run(["convert", str(tmp_path / "learned.safetensors"), "-o", str(tmp_path / "bare"), "--strip-metadata"]) == 0
    bare = describe(tmp_path / "bare.safetensors")
    assert bare.dtype == "fp32" and "who" not in bare.metadata
