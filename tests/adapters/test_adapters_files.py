"""Adapters as files: every dialect, the export contract, what a file says about itself."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from slow import all_but
from test_adapters import FEWER, ROWS, adapters, assert_updates, exact, low_rank, make

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.delta import LowRank
from personalize.adapters.describe import describe
from personalize.errors import AdapterError, OutputError, UnmatchedKeysError

DIALECTS = ("kohya", "diffusers", "peft")


@pytest.mark.parametrize("dialect", DIALECTS)
@FEWER
@given(a=adapters(), dtype=st.sampled_from(["fp32", "bf16"]))
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, dialect: str, a: Adapter, dtype: str) -> None:
    path = a.save(tmp_path_factory.getbasetemp() / f"property-{dialect}", dialect, dtype=dtype)
    b = Adapter.load(path)
    assert b.deltas.keys() == a.deltas.keys()
    assert_updates(b, exact(a), tolerance=1e-6 if dtype == "fp32" else 2e-2)
    seen = describe(path)
    assert (seen.dialect, seen.kind, seen.family, seen.unmatched) == (dialect, "LoRA", b.family, ())
    assert sorted(seen.ranks) == sorted({delta.rank for delta in b.deltas.values()})
    assert sorted(seen.alphas) == sorted({delta.alpha for delta in b.deltas.values()})


@functools.cache
def whole(family: str) -> Adapter:
    """An adapter on every module of a family."""
    return make(family, rank=1, alpha=0.5)


PAIRS = [(family, dialect) for family in ROWS for dialect in DIALECTS]
QUICK = {(family, DIALECTS[i % len(DIALECTS)]) for i, family in enumerate(ROWS)}  # every family once, every dialect in turn


@pytest.mark.parametrize(("family", "dialect"), all_but(QUICK, PAIRS))
def test_every_module_of_every_family_is_portable(tmp_path: Path, family: str, dialect: str) -> None:
    a = whole(family)
    path = a.save(tmp_path / "all", dialect)
    assert distance(Adapter.load(path), a) < 1e-7
    seen = describe(path)
    assert (seen.family, seen.unmatched, sum(seen.parts.values())) == (family, (), len(a.deltas))


def test_files_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    a = make(pick="attn", alpha=3.0)
    first, second = (a.save(tmp_path / name / "rex", metadata={"z": 1, "a": "ü \udcff"}) for name in ("1", "2"))
    assert first.read_bytes() == second.read_bytes()
    shuffled = Adapter(dict(reversed(a.deltas.items())))
    assert shuffled.save(tmp_path / "3" / "rex", metadata={"a": "ü \udcff", "z": 1}).read_bytes() == first.read_bytes()


@pytest.mark.parametrize("dtype, size", [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_header_and_hashes(tmp_path: Path, dtype: str, size: int) -> None:
    a = make(rank=8, alpha=4.0)
    path = a.save(
        tmp_path / "rex", metadata={"modelspec.trigger_phrase": "zwx", "modelspec.title": "Rex", "steps": 200}, dtype=dtype
    )
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    with safe_open(path, "pt") as file:  # the library agrees with our own writer
        said = file.metadata()
        assert file.get_tensor("lora_unet_conv_in.alpha").item() == 4.0
        assert file.get_tensor("lora_unet_conv_in.lora_down.weight").shape == (8, 16, 3, 3)
    assert start % 8 == 0 and len(raw) > 0x110000 and said["steps"] == "200"
    assert said["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()
    assert said["modelspec.hash_sha256"] == "0x" + said["sshs_model_hash"]
    assert said["sshs_legacy_hash"] == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_network_module"]) == ("8", "4", "networks.lora")
    assert (said["ss_base_model_version"], said["modelspec.architecture"], said["ss_v2"]) == ("pocket", "pocket/lora", "False")
    seen = describe(path)
    assert (seen.title, seen.trigger, seen.dtype, seen.bytes) == ("Rex", "zwx", dtype, len(raw))
    assert seen.parameters == (len(raw) - start - 4 * len(a.deltas)) // size


def test_metadata_is_carried_along(tmp_path: Path) -> None:
    a = Adapter.load(
        make("sd2", "attn2.to_k").save(tmp_path / "a", "diffusers", {"recipe": "…", "ss_base_model_version": "sd_v2_v"})
    )
    b = Adapter.load((a * 0.5).save(tmp_path / "b"))
    assert (b.metadata["recipe"], b.metadata["ss_base_model_version"]) == ("…", "sd_v2_v")
    assert "lora_adapter_metadata" not in b.metadata  # diffusers refuses it together with alphas
    assert (a + Adapter(b.deltas, {"recipe": "…", "x": "1"})).metadata == {"recipe": "…"}


def test_kohya_files_have_one_positive_alpha_per_part(tmp_path: Path) -> None:
    a = make(pick="attn1", rank=4, alpha=3.0) + make(pick="attn2", rank=2, alpha=-2.0) + make(pick="layers.0.", alpha=0.0)
    seen = describe(a.save(tmp_path / "a"))
    assert set(seen.alphas) == {3.0, 1.0} and set(seen.ranks) == {4, 2}


def test_saving_keeps_the_promise_or_the_old_file(tmp_path: Path) -> None:
    path = make(pick="to_q").save(tmp_path / "rex")
    before = path.read_bytes()
    tiny, sick = (
        make(pick="to_q") * 1e-9,
        Adapter({"unet.conv_in": LowRank(torch.full((2, 1), float("nan")), torch.ones(1, 2), 1)}),
    )
    strange = Adapter({"unet.my_own.layer": low_rank((2, 2))})
    for adapter, options, words in [
        (tiny, {"dtype": "fp16"}, "fp16 cannot hold"),
        (make(pick="to_q") * 1e9, {"dtype": "fp16"}, "does not read back|fp16"),
        (sick, {}, "unet.conv_in holds NaN"),
        (strange, {}, "no known family has unet.my_own.layer"),
        (Adapter({}), {}, "changes nothing"),
        (tiny, {"dialect": "koyha"}, "did you mean kohya"),
        (tiny, {"dtype": "float16"}, "did you mean fp16"),
    ]:
        with pytest.raises(AdapterError, match=words):
            adapter.save(path, **options)
        assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["rex.safetensors"]


def test_full_disk_and_bad_places(tmp_path: Path) -> None:
    path = make(pick="conv_in").save(tmp_path / "rex")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the kernel refuses more, as a full disk does
    try:
        with pytest.raises(OutputError, match="cannot write"):
            make(pick="to_q").save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    (tmp_path / "folder.safetensors").mkdir()
    for bad in (path / "inside", tmp_path / "folder.safetensors", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError):
            make(pick="conv_in").save(bad)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["folder.safetensors", "rex.safetensors"]


def test_unmatched_keys_are_listed(tmp_path: Path) -> None:
    tensors = load_file(make(pick="to_q").save(tmp_path / "a"))
    extra = {f"lora_unet_other_{i}.lora_down.weight": torch.ones(2, 2) for i in range(5)}
    save_file(tensors | extra, tmp_path / "b.safetensors")
    with pytest.raises(UnmatchedKeysError, match=r"5 of \d+ tensors.*lora_unet_other_0.lora_down.weight, .*, …"):
        Adapter.load(tmp_path / "b.safetensors")
    assert len(describe(tmp_path / "b.safetensors").unmatched) == 5
    kept = Adapter.load(tmp_path / "b.safetensors", allow_unmatched=True)
    assert distance(kept, make(pick="to_q")) < 1e-6

    mixed = tensors | {"unet.conv_in.lora_A.weight": torch.ones(1, 2), "unet.conv_in.lora_B.weight": torch.ones(2, 1)}
    save_file(mixed, tmp_path / "c.safetensors")
    with pytest.raises(UnmatchedKeysError, match=r"2 of .*unet.conv_in"):
        Adapter.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    "key, kind",
    [
        ("lora_unet_conv_in.hada_w1_a", "LoHa"),
        ("lora_unet_conv_in.lokr_w1", "LoKr"),
        ("unet.conv_in.lora_magnitude_vector", "DoRA"),
        ("emb_params", "textual inversion"),
        ("model.diffusion_model.input_blocks.0.0.weight", "unknown"),
    ],
)
def test_other_kinds_are_named(tmp_path: Path, key: str, kind: str) -> None:
    save_file({key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    assert describe(tmp_path / "a.safetensors").kind == kind
    for choice in (True, False):
        with pytest.raises(UnmatchedKeysError, match=kind if kind != "unknown" else "1 of 1 tensors"):
            Adapter.load(tmp_path / "a.safetensors", allow_unmatched=choice)


def test_describe_needs_neither_weights_nor_torch(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    size = 2 << 30
    shapes = {"lora_unet_conv_in.lora_up.weight": [2**13, 2**15], "lora_unet_conv_in.lora_down.weight": [2**15, 2**13]}
    header = {
        key: {"dtype": "F32", "shape": shape, "data_offsets": [i * size // 2, (i + 1) * size // 2]}
        for i, (key, shape) in enumerate(shapes.items())
    }
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + size)  # a sparse file: 2 GB that occupy nothing
    code = (
        "import sys; from personalize.adapters import describe; print(describe(sys.argv[1]).parameters, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(2**29), "False"]
