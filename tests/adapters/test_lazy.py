"""Adapters that are read and merged layer by layer: the same bytes as from memory, and never all of it there at once."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_adapters import make

from personalize.adapters import contract
from personalize.adapters import files as adapter_files
from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import Delta, Dense, Structured
from personalize.adapters.describe import describe
from personalize.adapters.lazy import prefetch
from personalize.adapters.ops import merge as merging
from personalize.adapters.ops.methods import METHODS
from personalize.adapters.strengths.grammar import split
from personalize.errors import AdapterError

NORM, BIAS = "unet.conv_norm_out", "unet.conv_in.bias"


def mixed(seed: int = 0) -> Adapter:
    """LoRA, LoKr, a norm and a bias."""
    draw = torch.Generator().manual_seed(seed)
    low = make(pick="attentions.0", rank=2, alpha=3.0)
    deltas: dict[str, Delta] = dict(low.deltas)
    for path in [path for path in low.deltas if path.endswith("to_k")]:
        out, inside = low.deltas[path].shape
        roles = {"lokr_w1": (2, 2), "lokr_w2_a": (out // 2, 1), "lokr_w2_b": (1, inside // 2)}
        tensors = {role: torch.randn(shape, generator=draw) for role, shape in roles.items()}
        deltas[path] = Structured("LoKr", tensors, 1.0, (out, inside))
    width = make(pick="conv_in").deltas["unet.conv_in"].shape[0]
    return Adapter(deltas | {path: Dense(torch.randn(width, generator=draw)) for path in (NORM, BIAS)}, {"told": "yes"})


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_what_is_opened_is_what_is_loaded(tmp_path: Path, dtype: str) -> None:
    path = mixed().save(tmp_path / "a", dtype=dtype)
    opened, loaded = Adapter.open(path), Adapter.load(path)
    assert (repr(opened), opened.metadata, opened.shapes) == (repr(loaded), loaded.metadata, loaded.shapes)
    assert list(opened.deltas) == list(loaded.deltas) and "unet.nothing" not in opened.deltas
    for change in (
        lambda one: one,
        lambda one: one * -0.3,
        lambda one: one.part("unet"),
        lambda one: one.scaled({"unet": 0.5}),
        lambda one: one.weighted(split("x.safetensors:0.8:*to_q*=0.5")[1]),
        lambda one: one.resolve({}),
    ):
        one, other = (
            change(opened).save(tmp_path / "x" / "b", dtype=dtype),
            change(loaded).save(tmp_path / "y" / "b", dtype=dtype),
        )
        assert one.read_bytes() == other.read_bytes()
    before = path.read_bytes()
    assert opened.save(path, dtype=dtype).read_bytes() == before  # over the file that it reads


@pytest.mark.parametrize("method", METHODS)
def test_merges_on_demand_are_those_of_memory(tmp_path: Path, method: str) -> None:
    files = [make(pick=pick, rank=3).save(tmp_path / pick) for pick in ("to_k", "mid_block")]
    opened, loaded = ([get(file) for file in files] for get in (Adapter.open, Adapter.load))
    merged, report = merging.merge_with_report(loaded, [0.7, -0.3], method)
    demanded, lines = merging.on_demand(opened, [0.7, -0.3], method)
    assert lines == {}  # nothing was computed yet
    one, other = merged.save(tmp_path / "one" / "c"), demanded.save(tmp_path / "other" / "c")
    assert one.read_bytes() == other.read_bytes()
    assert [(line.path, line.new, line.norm) for line in lines.values()] == [(x.path, x.new, x.norm) for x in report.lines]


def test_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [make("sd1", "attn", rank=1).save(tmp_path / name) for name in "ab"]
    alive, most, read = weakref.WeakSet[Any](), 0, adapter_files.read_delta

    def watched(*args: Any) -> Delta:
        nonlocal most
        delta = read(*args)
        alive.add(delta)
        most = max(most, len(alive))
        return delta

    monkeypatch.setattr(adapter_files, "read_delta", watched)
    merged, lines = merging.on_demand([Adapter.open(file) * 0.5 for file in files], [1, 1], "svd")
    merged.save(tmp_path / "c")
    assert len(lines) > 100 and most <= 4


def test_files_that_change_under_an_opened_adapter(tmp_path: Path) -> None:
    path = make(pick="to_q").save(tmp_path / "a")
    opened = Adapter.open(path)
    first = next(iter(opened.deltas))
    make(pick="to_k").save(path)
    with pytest.raises(AdapterError, match="has changed since it was opened"):
        opened.deltas[first]
    path.unlink()
    with pytest.raises(AdapterError, match="does not exist"):
        opened.save(tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_found_when_they_are_read(tmp_path: Path) -> None:
    path = (make(pick="to_q") * 10).save(tmp_path / "a")
    raw = bytearray(path.read_bytes())
    raw[-8:-4] = torch.tensor([float("nan")]).numpy().tobytes()
    path.write_bytes(raw)
    with pytest.raises(AdapterError, match="holds NaN or Inf"):
        Adapter.open(path).save(tmp_path / "b")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("room", [0, 9999])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_any_room_for_the_header_and_tensors_of_odd_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, room: int
) -> None:
    """Three numbers in fp16 would leave what follows unaligned."""
    monkeypatch.setattr(contract, "_room", lambda *_: room)
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    roles = {"lokr_w1": (1, 1), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 3)}
    one = Structured("LoKr", {role: torch.ones(shape) for role, shape in roles.items()}, 1.0, (3, 3))
    adapter = Adapter({path: one, path.replace("to_q", "to_k"): one})
    file = adapter.save(tmp_path / "a", dtype=dtype)
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = load_file(file)
    assert len(tensors) == 8 and all(bool((value == 1).all()) for value in tensors.values())
    assert describe(file).metadata["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()
    assert (raw[start - 9 : start] == b" " * 9) == bool(room)
    read = Adapter.load(file)
    for path, delta in adapter.deltas.items():
        stored = read.deltas[path].stored()
        assert {role: value.tolist() for role, value in stored.items()} == {
            role: value.tolist() for role, value in delta.stored().items()
        }


def test_items_come_in_order_and_errors_where_they_happen() -> None:
    """Another thread makes them; what fails there fails here, after all that was made before it."""

    def made() -> Iterator[int]:
        yield from range(7)
        raise AdapterError("no more")

    seen = []
    with pytest.raises(AdapterError, match="no more"):
        for item in prefetch(made()):
            seen.append(item)
    assert seen == list(range(7)) and list(prefetch([])) == []
