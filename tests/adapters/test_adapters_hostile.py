"""Adapter files that lie, are broken or are something else: each ends in one line, whatever the bytes."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import struct
import time
from collections import Counter
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import make

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.delta import LowRank, Structured
from personalize.adapters.describe import describe
from personalize.adapters.doctor.exam import examine
from personalize.adapters.embedding import Embedding
from personalize.errors import AdapterError, HostileFileError, PersonalizeError
from personalize.families.checkpoint import open_weights
from personalize.families.names import ROWS, modules
from personalize.formats.header import MAX_HEADER
from tools.bench import fuzz
from tools.bench.fuzz import mutations, sources, trials

UP, DOWN, ALPHA = (f"lora_unet_conv_in.{leaf}" for leaf in ("lora_up.weight", "lora_down.weight", "alpha"))
FUZZED = 500  # of each dialect


def packed(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape: list[object], start: object = 0, end: object = 16, dtype: object = "F32", **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def one(**changes: object) -> bytes:
    return packed({DOWN: entry([2, 2]) | changes}, bytes(16))


MID = "lora_mid.weight"
LOHA = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4)}
GLORA = {"a1.weight": (4, 2), "a2.weight": (2, 4), "b1.weight": (4, 2), "b2.weight": (2, 4)}


MISFITS: list[tuple[str, Mapping[str, tuple[int, ...]], str]] = [
    ("Tucker core of two sides", {UP: (4, 2), DOWN: (2, 4), MID: (2, 2)}, "make no update"),
    (
        "Tucker core that makes much of little",
        {UP: (1, 1, 1, 1), DOWN: (1, 900, 1, 1), MID: (1, 1, 90, 90)},
        "make no update",
    ),
    ("Tucker core beside a kernel", {UP: (4, 2, 1, 1), DOWN: (2, 4, 3, 3), MID: (2, 2, 3, 3)}, "make no update"),
    ("LoHa of scalars", {f"hada_w{i}_{s}": () for i in (1, 2) for s in "ab"}, "make no update"),
    ("LoHa with one core", LOHA | {"hada_t1": (2, 2, 3, 3)}, "hada_t1 .* make no update"),
    ("LoHa flat in four dimensions", {role: (*size, 1, 1) for role, size in LOHA.items()}, "make no update"),
    ("LoKr of a vector", {"lokr_w1": (2,), "lokr_w2": (2, 2)}, "make no update"),
    ("LoKr without its other half", {"lokr_w1": (2, 2), "lokr_w2_a": (2, 2)}, "do not fit each other"),
    ("LoKr twice", {"lokr_w1": (2, 2), "lokr_w1_b": (), "lokr_w2": (2, 2)}, "make no update"),
    ("LoKr that claims 40 GB", {"lokr_w1": (100, 100), "lokr_w2": (1000, 1000)}, "larger than any model's weight"),
    ("LoRA that claims 40 GB", {UP: (100_000, 1), DOWN: (1, 100_000)}, "larger than any model's weight"),
    ("OFT of one block", {"oft_blocks": (4, 4)}, "do not fit each other"),
    ("OFT of no size", {"oft_blocks": (4, 0, 0)}, "make no update"),
    ("BOFT of too many stages", {"oft_blocks": (9, 2, 2, 2)}, "make no update"),
    ("OFT with a short rescale", {"oft_blocks": (4, 2, 2), "rescale": (3,)}, "make no update"),
    ("GLoRA that mixes other widths", GLORA | {"a1.weight": (5, 2)}, "make no update"),
    ("GLoRA of vectors", dict.fromkeys(GLORA, (4,)), "do not fit each other"),
    ("IA3 of nothing", {"weight": (0,), "on_input": ()}, "make no update"),
    ("IA3 with two flags", {"weight": (4,), "on_input": (2,)}, "one number"),
    ("full update of one number", {"diff": ()}, "make no update"),
    ("norm that is a matrix", {"w_norm": (4, 4)}, "make no update"),
    ("bias that is a matrix", {"diff": (4, 4), "diff_b": (4, 4)}, "make no update"),
    ("bias of nothing, alone", {"diff_b": (0,)}, "make no update"),
    ("DoRA with empty norms", {UP: (4, 2), DOWN: (2, 4), "dora_scale": (0,)}, "make no update"),
    ("DoRA with other norms", {UP: (4, 2), DOWN: (2, 4), "dora_scale": (1, 3)}, "do not fit a weight of"),
    (
        "DoRA with norms of too many dimensions",
        {UP: (4, 2), DOWN: (2, 4), "dora_scale": (1, 4, 3)},
        "do not fit a weight of",
    ),
]


def file(shapes: Mapping[str, tuple[int, ...]], value: float = 0.5) -> bytes:
    """One module with tensors of these roles and shapes, all of one value."""
    stored = {role if "conv_in" in role else f"lora_unet_conv_in.{role}": size for role, size in shapes.items()}
    draft = sources.Draft({key: sources.number(value, "F32", size) for key, size in stored.items()})
    return packed(draft.header(), draft.data())


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "few bytes": (b"\x10\0\0", "not a .safetensors file, or is truncated"),
    "text": (b"this is a text file that somebody renamed", "not a .safetensors file"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
    "pickle": (pickle.dumps({"a": [1.0] * 99}), "pickle.*never opened"),
    "zip": (b"PK\x03\x04\0\0\x08\x08" + bytes(99), "zip archive.*never opened"),
    "header cut": (one()[:40], "truncated: its header"),
    "data cut": (one()[:-3], "3 bytes are missing"),
    "data too long": (one() + b"123", "3 bytes at its end"),
    "header length beyond file": (
        (1 << 62).to_bytes(8, "little") + b"{}" + bytes(64),
        "truncated: its header of 4611686018427387904",
    ),
    "negative header length": (b"\xff" * 8 + b"{}" + bytes(64), "truncated"),
    "huge header": ((MAX_HEADER + 8).to_bytes(8, "little") + b"{" + b" " * (MAX_HEADER + 8), "no adapter's"),
    "not json": (packed(b'{"a": oops}'), "not sound JSON"),
    "not utf-8": (packed(b'{"\xff\xfe": 1}'), "not sound JSON"),
    "deep json": (packed(b'{"a":' + b"[" * 200_000), "not sound JSON"),
    "endless number": (packed(b'{"a": ' + b"9" * 9999 + b"}"), "not sound JSON"),
    "not a number": (packed(b'{"a": NaN}'), "not sound JSON"),
    "duplicate keys": (packed(b'{"a": {}, "a": {}}'), "a appears twice"),
    "metadata not texts": (packed({"__metadata__": {"a": 1}}), "metadata"),
    "metadata a list": (packed({"__metadata__": ["a"]}), "metadata"),
    "entry a number": (packed({DOWN: 7}), "needs exactly"),
    "entry without offsets": (packed({DOWN: {"dtype": "F32", "shape": []}}), "needs exactly"),
    "entry with more": (one(code="import os"), "needs exactly"),
    "unknown dtype": (one(dtype="F128"), "unknown dtype F128"),
    "dtype a list": (one(dtype=["F32"]), "unknown dtype"),
    "negative shape": (one(shape=[-2, -2]), "impossible shape"),
    "fractional shape": (one(shape=[2.0, 2]), "impossible shape"),
    "shape of truth": (one(shape=[True, 4]), "impossible shape"),
    "shape a text": (one(shape="22"), "impossible shape"),
    "many dimensions": (one(shape=[1] * 99), "impossible shape"),
    "huge shape": (one(shape=[2**62, 2**62]), "cannot lie in 16 bytes"),
    "shape that overflows to fit": (one(shape=[2**62, 4, 1, 1]), "cannot lie in"),
    "shape lies": (one(shape=[2, 3]), "cannot lie in 16 bytes"),
    "offsets backwards": (one(data_offsets=[16, 0]), "cannot lie in"),
    "offsets negative": (one(data_offsets=[-16, 0]), "impossible offsets"),
    "three offsets": (one(data_offsets=[0, 8, 16]), "impossible offsets"),
    "gap": (packed({DOWN: entry([2, 2], 16, 32)}, bytes(32)), "leaves a gap"),
    "overlap": (packed({DOWN: entry([2, 2]), UP: entry([2, 2], 8, 24)}, bytes(24)), "overlaps"),
    "no tensors": (packed({}), "holds no adapter"),
    "half a pair": (one(), "1 of 1 tensors belong to no"),
    "ranks differ": (packed({DOWN: entry([2, 2]), UP: entry([4, 1], 16, 32)}, bytes(32)), "does not fit its other half"),
    "rank zero": (packed({DOWN: entry([0, 2], 0, 0), UP: entry([2, 0], 0, 0)}), "does not fit its other half"),
    "scalars": (packed({DOWN: entry([], 0, 4), UP: entry([], 4, 8)}, bytes(8)), "does not fit its other half"),
    "weights of integers": (packed({DOWN: entry([2, 2], dtype="I32"), UP: entry([2, 2], 16, 32)}, bytes(32)), "holds I32"),
    "alpha of two": (
        packed({DOWN: entry([1, 4]), UP: entry([4, 1], 16, 32), ALPHA: entry([2], 32, 40)}, bytes(40)),
        "one number",
    ),
    "alpha too large": (
        packed(
            {ALPHA: entry([], 0, 8, "F64"), DOWN: entry([1, 1], 8, 12), UP: entry([1, 1], 12, 16)},
            struct.pack("<dff", 1e300, 1, 1),
        ),
        "holds NaN or Inf",
    ),
    **{name: (file(shapes), words) for name, shapes, words in MISFITS},
    "alpha beyond fp32 beside zeros": (
        packed(
            {ALPHA: entry([], 0, 8, "F64"), DOWN: entry([1, 1], 8, 12), UP: entry([1, 1], 12, 16)},
            struct.pack("<dff", 1e300, 0, 0),
        ),
        "holds NaN or Inf",
    ),
    "LoHa beyond fp32": (file(LOHA, 1e30), "holds NaN or Inf"),
    "control characters": (packed({"\x1b[31mred\nline": entry([2, 2])}, bytes(16)), r"\?\[31mred\?line"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line(tmp_path: Path, name: str) -> None:
    raw, words = HOSTILE[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(AdapterError, match=words) as caught:
        Adapter.load(path)
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    try:
        describe(path)
    except PersonalizeError as error:
        assert isinstance(error, HostileFileError)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    folder = make(pick="conv_in").save(tmp_path / "folder" / "rex").parent
    os.mkfifo(tmp_path / "pipe")
    for place, words in [
        (tmp_path / "missing.safetensors", "does not exist"),
        (folder, "is a folder.*rex.safetensors"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "not an ordinary file"),
        (tmp_path / ("x" * 300), "cannot read"),
        (folder / "rex.safetensors" / "inside", "does not exist|cannot read"),
    ]:
        for read in (Adapter.load, describe):
            with pytest.raises(AdapterError, match=words):
                read(place)


@pytest.mark.parametrize("length", [0x280, 0x480])
def test_header_length_that_looks_like_a_pickle_is_fine(tmp_path: Path, length: int) -> None:
    """Such a length begins with the bytes 80 02 or 80 04, as pickles do."""
    path = make(pick="conv_in", rank=1).save(tmp_path / "a")
    header, data = split(path.read_bytes())
    del header["__metadata__"]
    path.write_bytes(packed(json.dumps(header).encode().ljust(length), data))
    assert distance(Adapter.load(path), make(pick="conv_in", rank=1)) < 1e-7


@pytest.mark.parametrize("key", [UP, DOWN, ALPHA])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, key: str, value: float) -> None:
    tensors = load_file(make(pick="conv_in").save(tmp_path / "a"))
    tensors[key].view(-1)[0] = value
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match=key):
        Adapter.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("alpha", ["int64", "int32", "int8", "uint8", "float64", "float16", "bfloat16", "vector", "missing"])
def test_storage_types_in_the_wild(tmp_path: Path, dtype: str, alpha: str) -> None:
    a = make(pick="conv_in", rank=4, alpha=2.0)
    tensors = {key: value.to(getattr(torch, dtype)) for key, value in load_file(a.save(tmp_path / "a")).items()}
    tensors[ALPHA] = torch.tensor([2.0]) if alpha == "vector" else torch.tensor(2).to(getattr(torch, alpha, torch.int64))
    if alpha == "missing":
        del tensors[ALPHA]
    save_file(tensors, tmp_path / "b.safetensors")
    b = Adapter.load(tmp_path / "b.safetensors")
    assert {delta.alpha for delta in b.deltas.values()} == {4.0 if alpha == "missing" else 2.0}
    assert distance(b * (0.5 if alpha == "missing" else 1), a) < (0.2 if "float8" in dtype else 4e-3)
    assert list(describe(tmp_path / "b.safetensors").alphas) == [4.0 if alpha == "missing" else 2.0]


BAD_CONFIGS = [
    "not json",
    "[]",
    "[" * 99_999,
    '{"unet.lora_alpha": "8"}',
    '{"unet.lora_alpha": true}',
    '{"unet.lora_alpha": 1e999}',
    '{"unet.lora_alpha": null}',
    '{"unet.lora_alpha": 8, "unet.alpha_pattern": {"(a+)+$": 4}}',
    '{"unet.lora_alpha": 8, "unet.alpha_pattern": {"conv_in": []}}',
    '{"unet.init_lora_weights": "pissa_\\u001b[31m\\nniter"}',
]


@pytest.mark.parametrize("config", BAD_CONFIGS)
def test_bad_lora_configs(tmp_path: Path, config: str) -> None:
    tensors = load_file(make(pick="conv_in").save(tmp_path / "a", "diffusers"))
    save_file(tensors, tmp_path / "b.safetensors", metadata={"lora_adapter_metadata": config})
    for read in (Adapter.load, describe):
        with pytest.raises(AdapterError, match=r"b\.safetensors: (its|pissa)") as caught:
            read(tmp_path / "b.safetensors")
        assert str(caught.value).isprintable()


def test_many_patterns_for_many_layers_are_looked_up(tmp_path: Path) -> None:
    """Every pattern tried on every layer took a minute for a file of 700 kB."""
    paths = [path for path in modules(ROWS["sdxl"]) if path.startswith("unet.")][:700]
    inside = [path.partition(".")[2] for path in paths]
    tensors = {f"{path}.lora_{side}.weight": sources.number(1, "F16", (1, 1)) for path in paths for side in "AB"}
    patterns = {inside[7]: 2, f"^{inside[8]}": 3, f"x.{inside[9]}": 4} | {f"x{i}": 1 for i in range(20_000)}
    config = json.dumps({"unet.lora_alpha": 5, "unet.alpha_pattern": patterns})
    draft = sources.Draft(tensors, {"lora_adapter_metadata": config})
    path = sources.write_file(tmp_path / "a.safetensors", packed(draft.header(), draft.data()))
    began = time.process_time()
    assert describe(path).alphas == {5.0: 698, 2.0: 1, 3.0: 1}
    assert time.process_time() - began < 5


def test_small_factors_are_not_multiplied_out(tmp_path: Path) -> None:
    """Rank r^2 of LoHa, and the unit matrix in LoKr's factors, are gigabytes where dW is one number."""
    shapes = {"hada_w1_a": (1, 30_000), "hada_w1_b": (30_000, 1), "hada_w2_a": (1, 30_000), "hada_w2_b": (30_000, 1)}
    path = sources.write_file(tmp_path / "a.safetensors", file(shapes, 1e-3))
    (loha,) = Adapter.load(path).deltas.values()
    assert loha.low_rank() is None and loha.norm() == pytest.approx(9e-4, rel=1e-3)
    assert examine(path).modules[0].norm == pytest.approx(9e-4, rel=1e-3)
    lokr = Structured(
        "LoKr", {"lokr_w1": torch.ones(1, 1), "lokr_w2_a": torch.ones(1, 9000), "lokr_w2_b": torch.ones(9000, 1)}, 1, (1, 1)
    )
    assert lokr.low_rank() is None and lokr.finite()


def test_kronecker_products_of_sides_of_one() -> None:
    """torch.kron fails on some of these, such as Tucker cores [1, 1, 1, 1]: found by the fuzzer."""
    draw = torch.Generator().manual_seed(0)
    for out, inside, low, deep, kernel, rank in itertools.product((1, 2), (1, 2), (1, 2, 6), (1, 2, 6), (1, 3), (1, 2)):
        tensors = {
            "lokr_w1": torch.randn(out, inside, generator=draw),
            "lokr_w2_a": torch.randn(rank, low, generator=draw),
            "lokr_w2_b": torch.randn(rank, deep, generator=draw),
            "lokr_t2": torch.randn(rank, rank, kernel, 1, generator=draw),
        }
        two = torch.einsum("ijkl,ip,jr->prkl", *(tensors[f"lokr_{role}"] for role in ("t2", "w2_a", "w2_b"))).contiguous()
        wanted = torch.einsum("ab,cdkl->acbdkl", tensors["lokr_w1"], two).reshape(out * low, inside * deep, kernel, 1)
        made = Structured("LoKr", tensors, None, tuple(wanted.shape)).delta()
        torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize("alpha", [1e300, 1e39, float("nan")])
def test_a_scale_beyond_fp32_is_not_finite_whatever_it_multiplies(alpha: float) -> None:
    """In fp32, 0 times it is NaN, and what brings it back comes too late."""
    zeros, small = torch.zeros(1, 1), torch.full((1, 1), 1e-20)
    assert not LowRank(zeros, zeros, alpha).finite() and not LowRank(small, small, alpha).finite()
    lokr = {"lokr_w1": small, "lokr_w2_a": small, "lokr_w2_b": small}
    assert not Structured("LoKr", lokr, alpha, (1, 1)).finite()


def test_a_small_half_does_not_make_up_for_one_beyond_fp32() -> None:
    lokr = {"lokr_w1": torch.full((2, 2), 0.3), "lokr_w2_a": torch.ones(8, 3), "lokr_w2_b": torch.full((3, 8), 3e38)}
    assert not Structured("LoKr", lokr, None, (16, 16)).finite()


@pytest.mark.parametrize("alpha", [5e-324, 1e-200])
def test_the_smallest_alpha_has_a_spectrum(tmp_path: Path, alpha: float) -> None:
    """Squares of 1e-200 are nothing, and shares of nothing NaN."""
    tensors = {UP: torch.ones(4, 1), DOWN: torch.ones(1, 4), ALPHA: torch.tensor(alpha, dtype=torch.float64)}
    save_file(tensors, tmp_path / "a.safetensors")
    (module,) = examine(tmp_path / "a.safetensors").modules
    assert (module.effective, module.needed) == (pytest.approx(1), 1)


def test_updates_that_turn_or_mix_the_wrong_weight_are_refused() -> None:
    for kind, tensors in [("GLoRA", GLORA), ("OFT", {"oft_blocks": (2, 2, 2)}), ("IA3", {"weight": (4, 1), "on_input": ()})]:
        made = {role: torch.ones(size) for role, size in tensors.items()}
        delta = Structured(kind, made, None, {"GLoRA": (4, 4), "OFT": (4, -1), "IA3": (-1, -1)}[kind])
        for wrong in (torch.ones(5, 5), torch.ones(4), torch.ones(4, 4, 3)):
            with pytest.raises(AdapterError, match="fit a weight"):
                delta.delta(wrong)
    with pytest.raises(AdapterError, match="nothing that can be computed"):
        turned = torch.tensor([[[0.0, 1e30, 0], [0, 0, 1e30], [1e30, 0, 0]]])
        Structured("OFT", {"oft_blocks": turned}, None, (3, -1)).delta(torch.ones(3, 3))


@pytest.mark.parametrize("shapes", [{"emb_params": (2, 2, 2)}, {"clip_l": (2, 4), "clip_g": (3, 8)}, {"emb_params": (0, 4)}])
def test_embeddings_that_are_none_are_named(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    draft = sources.Draft({key: sources.number(1, "F32", size) for key, size in shapes.items()})
    path = sources.write_file(tmp_path / "word.safetensors", packed(draft.header(), draft.data()))
    with pytest.raises(AdapterError, match=r"word\.safetensors is no sound"):
        Embedding.load(path)


def test_tag_counts_without_end_are_no_trigger(tmp_path: Path) -> None:
    tags = {"ss_tag_frequency": '{"a": {"rex": Infinity}}'}
    save_file({UP: torch.ones(4, 2), DOWN: torch.ones(2, 4)}, tmp_path / "a.safetensors", metadata=tags)
    assert examine(tmp_path / "a.safetensors").trigger == ""


def test_an_index_of_shards_with_control_characters(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "a\n\x1b[31m.safetensors"}}))
    with pytest.raises(HostileFileError) as caught:
        open_weights(tmp_path)
    assert str(caught.value).isprintable()


# --- fuzzing --------------------------------------------------------------------------------------------------------

NASTY = [None, True, -1, 0, 1, 2**31, 2**63, 2**70, 1.5, "", "F32", "I8", "\0", [], [0], [2**40, 2**40], [-1, 1], {}, {"a": {}}]


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def mutate_bytes(draw: random.Random, raw: bytes) -> bytes:
    header, at = 8 + int.from_bytes(raw[:8], "little"), draw.randrange(len(raw))
    inside, noise = draw.randrange(header), draw.randbytes(draw.randrange(1, 9))
    return draw.choice(
        [
            raw[:at],
            raw[:at] + noise + raw[at:],
            raw[:at] + noise + raw[at + len(noise) :],
            raw[:inside] + noise[:1] + raw[inside + 1 :],
            raw[:inside] + raw[inside + len(noise) :],
            draw.choice([0, 1, header, len(raw), 2**31, 2**63]).to_bytes(8, "little") + raw[8:],
        ]
    )


def mutate_header(draw: random.Random, raw: bytes) -> bytes:
    header, data = split(raw)
    keys = [key for key in header if key != "__metadata__"]
    key, other = draw.choice(keys), draw.choice(keys)
    choice = draw.randrange(6)
    if choice == 0:
        header[key][draw.choice(["dtype", "shape", "data_offsets"])] = draw.choice(NASTY)
    elif choice == 1:
        draw.choice([header[key]["shape"] or [0], header[key]["data_offsets"]])[-1] = draw.choice(NASTY)
    elif choice == 2:
        header[key], header[other] = header[other], header[key]
    elif choice == 3:
        header[key] = draw.choice(NASTY)
    elif choice == 4:
        header[draw.choice([key[:-1], key + "x", key.replace("_", "."), "x", "", "../" + key, "alpha", "unet.alpha"])] = (
            header.pop(key)
        )
    else:
        header["__metadata__"] = draw.choice([*NASTY, {"lora_adapter_metadata": draw.choice(BAD_CONFIGS)}])
    return packed(header, data)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_mutated_files_load_or_end_in_one_line(tmp_path: Path, dialect: str) -> None:
    raw = make(pick="mid_block.attentions.0.proj", rank=1).save(tmp_path / "good", dialect).read_bytes()
    draw, outcomes, path = random.Random(0), Counter[str](), tmp_path / "bad.safetensors"
    for i in range(FUZZED):
        bad = (mutate_header if i % 2 else mutate_bytes)(draw, raw)
        if draw.random() < 0.2:
            bad = mutate_bytes(draw, bad) if len(bad) > 16 and int.from_bytes(bad[:8], "little") else bad
        path.write_bytes(bad)
        try:
            loaded = Adapter.load(path)
            outcomes["loaded"] += 1
            assert all(delta.finite() for delta in loaded.deltas.values())
            assert not describe(path).unmatched
        except AdapterError as error:
            outcomes[type(error).__name__] += 1
            assert "\n" not in str(error) and len(str(error)) < 900, error
    print(f"{dialect}: {FUZZED} mutated files: {dict(outcomes)}")
    assert set(outcomes) <= {"loaded", "HostileFileError", "UnmatchedKeysError", "AdapterError"}
    assert outcomes["HostileFileError"] > FUZZED / 3


def test_the_fuzzers_files_are_sound_before_they_are_broken(tmp_path: Path) -> None:
    for draft in sources.every(random.Random(0)):
        path = sources.write_file(tmp_path / "a.safetensors", sources.pack(draft.header(), draft.data()), draft.hole)
        if draft.kind == "embedding":
            assert Embedding.load(path).tokens == 2
        elif draft.kind == "checkpoint":
            assert open_weights(path).family == "pocket"
        elif draft.kind != "folder":
            assert not describe(path).unmatched and Adapter.load(path).deltas, draft.kind


def test_the_first_of_the_fuzzers_inputs(tmp_path: Path) -> None:
    """The published figure is made by `python -m tools.bench fuzz`; this is its beginning, in this process."""
    found = [trials.try_input(7, number, tmp_path / "in") for number in range(150)]
    assert [(trial.number, trial.bugs) for trial in found if trial.bugs] == []
    assert {trial.mutation for trial in found} == set(mutations.NAMES)
    answers = Counter(answer for trial in found for answer in trial.outcomes.values())
    assert answers["read"] > 150 and answers["refused"] > 150
    assert all("load" in trial.outcomes and trials.make_input(7, trial.number)[0] == trial.mutation for trial in found[:9])


@pytest.mark.slow
def test_crashes_and_hangs_of_the_fuzzers_worker_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "PATIENCE", 20)
    monkeypatch.setattr(fuzz, "work", dying)
    found = list(fuzz.every(0, range(3), tmp_path))
    assert [trial.number for trial in found] == [0, 1, 2] and "died with" in found[1].bugs[0][0]
    assert not found[0].bugs and not found[2].bugs
    fuzz.publish(tmp_path, {"inputs": "3"}, found)
    assert json.loads((tmp_path / "fuzz.json").read_text())["tables"]["By mutation"][-1]["bugs"] == "1"


def dying(pipe: Connection, seed: int, numbers: range, folder: Path) -> None:
    """A worker that dies of input 1."""
    for number in numbers:
        pipe.send(number)
        if number == 1:
            os._exit(9)
        pipe.send(trials.Trial(number, mutations.SOUND, "LoRA", {"load": "read"}, (), 0.0, 0))
    pipe.send(None)


def test_whatever_is_no_answer_is_a_bug(tmp_path: Path) -> None:
    """Crashes, warnings, errors of many lines and those that name no file. (Endless ones are cut by the errors themselves.)"""
    path = sources.write_file(tmp_path / "a.safetensors", one())

    def raising(error: Exception) -> Any:
        def read() -> None:
            raise error

        return read

    clean = trials.Trial(0, "", "", {}, (), 0.0, 0)
    for error in (
        IndexError("x"),
        MemoryError(),
        AdapterError("a.safetensors\nx"),
        AdapterError("no name"),
    ):
        assert trials.after(clean, "load", raising(error), path).bugs
    assert trials.after(clean, "load", lambda: bytes(bytearray(200 << 20)), path).bugs
    fine = trials.after(clean, "load", raising(AdapterError("a.safetensors is not")), path)
    assert fine.outcomes == {"load": "refused"} and not fine.bugs
