"""Adapter files that lie, are broken or are something else: each ends in one line, whatever the bytes."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import make

from personalize.adapters import Adapter, describe, distance
from personalize.adapters.headers import MAX_HEADER
from personalize.errors import AdapterError, HostileFileError, PersonalizeError

UP, DOWN, ALPHA = (f"lora_unet_conv_in.{leaf}" for leaf in ("lora_up.weight", "lora_down.weight", "alpha"))
FUZZED = 1500  # of each dialect


def packed(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape: list[object], start: object = 0, end: object = 16, dtype: object = "F32", **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def one(**changes: object) -> bytes:
    return packed({DOWN: entry([2, 2]) | changes}, bytes(16))


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
]


@pytest.mark.parametrize("config", BAD_CONFIGS)
def test_bad_lora_configs(tmp_path: Path, config: str) -> None:
    tensors = load_file(make(pick="conv_in").save(tmp_path / "a", "diffusers"))
    save_file(tensors, tmp_path / "b.safetensors", metadata={"lora_adapter_metadata": config})
    for read in (Adapter.load, describe):
        with pytest.raises(AdapterError, match=r"b\.safetensors: its"):
            read(tmp_path / "b.safetensors")


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
