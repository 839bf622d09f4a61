"""Checkpoints on disk: where every parameter lies (judged by diffusers' own converter), reading one at a time, writing anew."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from bases import plain_clip, plain_unet
from diffusers.loaders import single_file_utils as theirs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from personalize.errors import AdapterError, BaseModelError, HostileFileError, OutputError
from personalize.families import names as keys
from personalize.families.checkpoint import open_weights
from personalize.families.family import Family, addresses, parameters_at
from personalize.families.names import FAMILIES, canonical
from personalize.formats.checkpoint import Weights, rewrite
from personalize.formats.header import Address
from personalize.models.sources import NAMED

POCKET = NAMED["pocket"]
ROWS = {family.name: family for family in FAMILIES if addresses(family)}  # that come in single files
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


# --- checkpoints to work on -----------------------------------------------------------------------------------------


def tiny(family: Family) -> Family:
    """The same depths with widths of next to nothing: names depend on depths only."""
    width = 16
    unet = dataclasses.replace(family.denoiser, channels=tuple(width * (1 + i) for i in range(len(family.denoiser.channels))))
    unet = dataclasses.replace(unet, context=family.denoiser.context // 64, added=40 if unet.added else 0)
    texts = tuple(dataclasses.replace(text, width=width * (1 + i)) for i, text in enumerate(family.texts))
    return dataclasses.replace(family, denoiser=unet, texts=texts)


def models(family: Family) -> dict[str, nn.Module]:
    """The real classes by part, random weights."""
    texts = {text.part: plain_clip(text, 2) for text in family.texts}
    return {"unet": plain_unet(family.denoiser, 8, 8), **texts}


@cache
def parameters(name: str) -> dict[str, Tensor]:
    """Canonical path => random values, of a family's real classes at tiny widths."""
    draw = torch.Generator().manual_seed(1)
    found = {}
    for part, model in models(tiny(ROWS[name])).items():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                found[canonical(f"{part}.{key.removesuffix('.weight')}")] = torch.randn(value.shape, generator=draw)
    return found


def single(values: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The tensors of a single-file checkpoint with these parameters, put together from the table."""
    table = addresses(family)
    parts: dict[str, list[tuple[Address, Tensor]]] = {}
    for path, value in values.items():
        parts.setdefault(table[path].key, []).append((table[path], value))
    tensors = {}
    for key, some in parts.items():
        ordered = [value.T if address.transposed else value for address, value in sorted(some, key=lambda one: one[0].rows or ())]
        tensors[key] = torch.cat(ordered).contiguous() if len(ordered) > 1 else ordered[0].contiguous()
    return tensors


def converted(tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """What diffusers makes of a single file: canonical path => tensor."""
    config = {
        "layers_per_block": family.denoiser.layers_per_block,
        "addition_embed_type": "text_time" if family.denoiser.added else None,
    }
    found = {f"unet.{key}": value for key, value in theirs.convert_ldm_unet_checkpoint(tensors, config).items()}
    for text in family.texts:
        if (family.name, text.part) in (("sd2", "text_encoder"), ("sdxl", "text_encoder_2"), ("sdxl-refiner", "text_encoder_2")):
            prefixes = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
            prefix = prefixes.get(family.name, "conditioner.embedders.0.model.")
            model = models(family)[text.part]
            own = theirs.convert_open_clip_checkpoint(model, tensors, prefix)
        else:
            own = theirs.convert_ldm_clip_checkpoint(tensors)
        found |= {canonical(f"{text.part}.{key}"): value for key, value in own.items()}
    return {path.removesuffix(".weight"): value for path, value in found.items()}


def sparse(path: Path, family: Family, extra: dict[str, tuple[int, ...]] | None = None) -> Path:
    """A checkpoint in fp16 with a family's true shapes, all zeros that occupy nothing."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in keys.weights(family).items():
        address = addresses(family)[name]
        shapes[address.key] = (3 * shape[0], *shape[1:]) if address.rows else shape
    return hollow(path, shapes | (extra or {}))


def hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of zeros in fp16 that occupies next to nothing."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * int(torch.tensor(shape).prod())
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + end)
    return path


def pocket_file(path: Path, values: dict[str, Tensor] | None = None, metadata: dict[str, str] | None = None) -> Path:
    """The embedded base as a single file in LDM's names, with a VAE tensor and a table of numbers, as such files have."""
    source = open_weights(POCKET)
    tensors = single({name: source[name] for name in source} | (values or {}), ROWS["pocket"])
    tensors["first_stage_model.encoder.conv_in.weight"] = torch.randn(4, 3, 3, 3)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path, metadata)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The families at tiny widths, so that whole checkpoints of each fit into a test."""
    monkeypatch.setattr(keys, "FAMILIES", tuple(tiny(family) for family in ROWS.values()))


# --- where everything lies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_every_parameter_has_an_address_where_diffusers_finds_it(name: str) -> None:
    family, values = tiny(ROWS[name]), parameters(name)
    assert addresses(family).keys() == values.keys()
    found = converted(single(values, family), family)
    assert found.keys() == values.keys()
    for path, value in values.items():
        assert torch.equal(found[path], value), path


@pytest.mark.parametrize("name", ROWS)
def test_the_table_goes_both_ways(name: str) -> None:
    family = ROWS[name]
    back = parameters_at(family)
    assert sorted(path for paths in back.values() for path in paths) == sorted(addresses(family))
    for path, address in addresses(family).items():
        assert path in back[address.key]
        assert (len(back[address.key]) == 3) == (address.rows is not None)


def test_addresses_as_sites_know_them() -> None:
    sd1, sd2, sdxl, refiner = (addresses(ROWS[name]) for name in ("sd1", "sd2", "sdxl", "sdxl-refiner"))
    block = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"
    assert sd1[TO_Q].key == f"{block}.attn1.to_q.weight"
    q_proj = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
    assert sd1[q_proj].key == "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.q_proj.weight"
    fused = "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_bias"
    assert sd2[q_proj.replace("q_", "v_") + ".bias"] == Address(fused, (2048, 3072))
    assert sdxl["text_encoder_2.text_projection"] == Address("conditioner.embedders.1.model.text_projection", transposed=True)
    assert refiner["text_encoder_2.text_model.embeddings.position_embedding"].key.endswith(
        "embedders.0.model.positional_embedding"
    )


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_as_it_is() -> None:
    weights = open_weights(str(POCKET))
    assert (weights.family, weights.parts, len(weights.headers)) == ("pocket", ("unet", "text_encoder"), 3)
    assert set(weights) == set(addresses(ROWS["pocket"])) and TO_Q in weights and "unet.nonsense" not in weights
    raw: dict[str, Tensor] = {}
    for file in POCKET.glob("unet/*.safetensors"):
        raw |= load_file(file)
    assert torch.equal(weights[TO_Q], raw[TO_Q.removeprefix("unet.") + ".weight"]) and weights[TO_Q].dtype == torch.float16
    assert torch.equal(weights["unet.conv_in.bias"], raw["conv_in.bias"])
    assert {path: weights.shape(path) for path in keys.weights(ROWS["pocket"])} == keys.weights(ROWS["pocket"])
    with pytest.raises(BaseModelError, match=r"no parameter unet.conv_inn \(did you mean unet.conv_in\?\)"):
        weights["unet.conv_inn"]


def test_a_single_file_is_the_same_to_the_reader(tmp_path: Path) -> None:
    folder, file = open_weights(POCKET), open_weights(pocket_file(tmp_path / "a.safetensors", metadata={"modelspec.title": "A"}))
    assert (file.family, file.parts, dict(file.metadata)) == ("pocket", folder.parts, {"modelspec.title": "A"})
    assert set(file) == set(folder) and not folder.metadata
    assert all(torch.equal(file[path], folder[path]) for path in folder)

    bare = {key.replace(".text_model.", "."): value for key, value in load_file(file.path).items()}
    save_file(bare, tmp_path / "b.safetensors")
    assert set(open_weights(tmp_path / "b.safetensors")) == set(folder)


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("name", ROWS)
def test_fused_and_transposed_parameters_are_taken_apart(tmp_path: Path, name: str) -> None:
    save_file(single(parameters(name), tiny(ROWS[name])), tmp_path / "a.safetensors")
    weights = open_weights(tmp_path / "a.safetensors")
    assert weights.family == name
    for path, value in parameters(name).items():
        assert weights.shape(path) == value.shape and torch.equal(weights[path], value), path


@pytest.mark.parametrize("name", ROWS)
def test_real_sizes_tell_the_family(tmp_path: Path, name: str) -> None:
    path = sparse(tmp_path / "a.safetensors", ROWS[name])
    weights = open_weights(path)
    assert weights.family == name and {one: weights.shape(one) for one in keys.weights(ROWS[name])} == keys.weights(ROWS[name])
    place = weights.place(TO_Q if TO_Q in weights else "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q").entry
    with path.open("r+b") as file:
        file.seek(place.start)
        file.write(torch.full((3,), 2.0, dtype=torch.float16).numpy().tobytes())
    assert weights[TO_Q if TO_Q in weights else "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].sum() == 6


def test_models_for_inpainting_and_without_text_encoders(tmp_path: Path) -> None:
    conv_in = {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}
    weights = open_weights(sparse(tmp_path / "a.safetensors", ROWS["sd1"], conv_in))
    assert (weights.family, weights.shape("unet.conv_in")) == ("sd1", (320, 9, 3, 3))
    unet = {address.key: shape for path, shape in keys.weights(ROWS["sd1"]).items() if (address := addresses(ROWS["sd1"])[path])}
    unet = {key: shape for key, shape in unet.items() if key.startswith("model.")}
    assert open_weights(hollow(tmp_path / "b.safetensors", unet)).parts == ("unet",)


def test_variants_and_shards(tmp_path: Path) -> None:
    folder = shutil.copytree(POCKET, tmp_path / "base")
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "model.fp16.safetensors")
    for file in sorted((folder / "unet").glob("*.safetensors")):
        file.rename(file.with_name(file.name.replace("model-", "model.fp16-")))
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    text = index.read_text().replace("model-0", "model.fp16-0")
    index.unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(text)
    assert set(open_weights(folder)) == set(open_weights(POCKET))


def test_folders_that_are_none(tmp_path: Path) -> None:
    def refused(kind: type[Exception], words: str) -> None:
        with pytest.raises(kind, match=words) as caught:
            open_weights(folder)
        assert "\n" not in str(caught.value)

    folder = shutil.copytree(POCKET, tmp_path / "base")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    whole = index.read_text()
    index.write_text(whole.replace("conv_in.bias", "conv_in.bios"))
    refused(BaseModelError, r"00001-of-00002.safetensors lacks conv_in.bios")
    index.write_text(whole.replace("diffusion_pytorch_model-00001", "../../diffusion_pytorch_model-00001"))
    refused(HostileFileError, "points outside its folder")
    for nonsense in ("", "[]", '{"weight_map": 3}', "[" * 100_000):
        index.write_text(nonsense)
        refused(BaseModelError, "is no index of shards")
    index.unlink()
    refused(BaseModelError, "no diffusion_pytorch_model.safetensors in it")
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    refused(BaseModelError, r"only pickled weights \(diffusion_pytorch_model-00001-of-00002.bin\).*take the .safetensors")
    folder = POCKET / "scheduler"
    refused(BaseModelError, "not a diffusers folder")


def test_files_that_are_none(tmp_path: Path) -> None:
    torch.save({"state_dict": {"model.diffusion_model.out.2.bias": torch.ones(4)}}, tmp_path / "a.ckpt")
    shutil.copy(tmp_path / "a.ckpt", tmp_path / "b.safetensors")
    for name in ("a.ckpt", "b.safetensors"):
        with pytest.raises(HostileFileError, match=r"never opened; convert"):
            open_weights(tmp_path / name)
    save_file({"lora_unet_conv_in.lora_down.weight": torch.ones(1, 2)}, tmp_path / "c.safetensors")
    with pytest.raises(BaseModelError, match="that is an adapter"):
        open_weights(tmp_path / "c.safetensors")
    save_file({"model.diffusion_model.joint_blocks.0.x": torch.ones(1, 2)}, tmp_path / "d.safetensors")
    with pytest.raises(BaseModelError, match=r"no checkpoint of a known family: it is Stable Diffusion 3 \(known: pocket, sd1"):
        open_weights(tmp_path / "d.safetensors")
    scaled = sparse(tmp_path / "e.safetensors", ROWS["sd1"], {"model.diffusion_model.out.2.scale_weight": (1,)})
    with pytest.raises(BaseModelError, match="scaled to fit"):
        open_weights(scaled)


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_only_what_changed_changes(tmp_path: Path, layout: str) -> None:
    source = open_weights(POCKET if layout == "folder" else pocket_file(tmp_path / "a.safetensors", metadata={"x": "1"}))
    before = contents(POCKET) if layout == "folder" else source.path.read_bytes()
    changed = {TO_Q: torch.randn(96, 96), "unet.conv_norm_out": torch.ones(96), "unet.conv_in.bias": torch.zeros(96)}
    after = open_weights(rewrite(source, tmp_path / "out" / "b", changed))
    assert (after.path.name, list(after), dict(after.metadata)) == (
        "b" if layout == "folder" else "b.safetensors",
        list(source),
        dict(source.metadata),
    )
    for path in source:
        wanted = changed[path].half() if path in changed else source[path]
        assert torch.equal(after[path], wanted) and after[path].dtype == torch.float16, path
    if layout == "folder":
        assert contents(POCKET) == before
        now = contents(after.path)
        assert now.keys() == before.keys()
        differing = {name for name in now if now[name] != before[name]}
        assert differing == {f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    else:
        assert source.path.read_bytes() == before
        ours, theirs = load_file(after.path), load_file(source.path)
        same = {key for key in theirs if torch.equal(ours[key], theirs[key])}
        assert ours.keys() == theirs.keys() and len(theirs) - len(same) == 3


def test_writing_nothing_new_is_a_copy(tmp_path: Path) -> None:
    assert contents(rewrite(open_weights(POCKET), tmp_path / "copy", {})) == contents(POCKET)
    file = pocket_file(tmp_path / "a.safetensors")
    copy = rewrite(open_weights(file), tmp_path / "b.safetensors", lambda path: None)
    ours, theirs = load_file(copy), load_file(file)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("name", ["sd2", "sdxl", "sdxl-refiner"])
def test_fused_and_transposed_parameters_are_written_in_place(tmp_path: Path, name: str) -> None:
    family, values = tiny(ROWS[name]), parameters(name)
    save_file(single(values, family), tmp_path / "a.safetensors")
    part = family.texts[-1].part
    layer = f"{part}.text_model.encoder.layers.1.self_attn"
    picked = [f"{layer}.q_proj", f"{layer}.v_proj.bias", f"{part}.text_model.embeddings.position_embedding"]
    picked += [f"{part}.text_projection"] * (name != "sd2")
    changed = {path: torch.randn(values[path].shape) for path in picked}
    written = rewrite(open_weights(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", changed)
    found = converted(load_file(written), family)
    assert found.keys() == values.keys()
    for path in values:
        assert torch.equal(found[path], changed.get(path, values[path])), path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_float_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {path: value.to(dtype) for path, value in parameters("pocket").items()}
    (tmp_path / "base" / "unet").mkdir(parents=True)
    unet = {path.removeprefix("unet."): value for path, value in values.items() if path.startswith("unet.")}
    named = {key if key.endswith(".bias") else f"{key}.weight": value for key, value in unet.items()}
    save_file(named, tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    new = torch.randn(values[TO_Q].shape)
    after = open_weights(rewrite(open_weights(tmp_path / "base"), tmp_path / "out", {TO_Q: new}))
    assert after.family == "unknown" and after[TO_Q].dtype == dtype
    assert torch.equal(after[TO_Q].float(), new.to(dtype).float())
    assert torch.equal(after["unet.conv_in"].float(), values["unet.conv_in"].float())


def test_a_1x1_convolution_takes_a_matrix(tmp_path: Path) -> None:
    path = "unet.down_blocks.0.attentions.0.proj_in"
    after = open_weights(rewrite(open_weights(POCKET), tmp_path / "out", {path: torch.ones(96, 96)}))
    assert after.shape(path) == (96, 96, 1, 1) and bool((after[path] == 1).all())


def test_metadata_is_added_and_hashes_that_no_longer_hold_go(tmp_path: Path) -> None:
    old = {"modelspec.hash_sha256": "0xabc", "sshs_model_hash": "abc", "modelspec.title": "Ä", "format": "pt"}
    file = pocket_file(tmp_path / "a.safetensors", metadata=old)
    written = rewrite(open_weights(file), tmp_path / "b.safetensors", {}, {"story": "told"})
    with safe_open(written, "pt") as opened:
        assert opened.metadata() == {"modelspec.title": "Ä", "format": "pt", "story": "told"}
    assert list(open_weights(written).headers[0].tensors) == list(open_weights(file).headers[0].tensors)


def test_other_forms_of_the_same_weights_are_not_carried_along(tmp_path: Path) -> None:
    folder = shutil.copytree(POCKET, tmp_path / "base")
    shutil.copy(folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "model.fp16.safetensors")
    stale = ["model.safetensors", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors.index.fp16.json"]
    for name in [*stale, ".git/huge", "safety_checker/model.bin", "LICENSE"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    shutil.move(folder / "vae", tmp_path / "vae")
    (folder / "vae").symlink_to(tmp_path / "vae")
    now = contents(rewrite(open_weights(folder), tmp_path / "out", {}))
    assert now == contents(POCKET) | {"safety_checker/model.bin": b"{}", "LICENSE": b"{}"}


def test_no_source_is_ever_overwritten(tmp_path: Path) -> None:
    file = pocket_file(tmp_path / "a.safetensors")
    folder = shutil.copytree(POCKET, tmp_path / "base")
    (tmp_path / "link.safetensors").symlink_to(file)
    before = contents(tmp_path)
    for source, destination, words in [
        (file, file, "would overwrite"),
        (file, tmp_path / "a", "would overwrite"),
        (file, tmp_path / "link.safetensors", "would overwrite"),
        (tmp_path / "link.safetensors", file, "would overwrite"),
        (folder, folder, "would overwrite"),
        (folder, folder / "unet" / "new", "would overwrite"),
        (folder, tmp_path, "is there already"),
        (folder, tmp_path / "b.safetensors", "name a new folder"),
        (folder, file, "name a new folder"),
        (folder, tmp_path / ("x" * 300), "cannot write"),
        (file, tmp_path / ("x" * 300), "cannot write"),
        (file, file / "inside", "would overwrite"),
        (folder, file / "inside", "cannot write"),
    ]:
        with pytest.raises(OutputError, match=words):
            rewrite(open_weights(source), destination, {})
    assert contents(tmp_path) == before


def test_an_older_file_is_replaced_and_an_empty_folder_filled(tmp_path: Path) -> None:
    file = pocket_file(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("old")
    (tmp_path / "new").mkdir()
    assert open_weights(rewrite(open_weights(file), tmp_path / "b.safetensors", {})).family == "pocket"
    assert open_weights(rewrite(open_weights(POCKET), tmp_path / "new", {})).family == "pocket"


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, layout: str) -> None:
    source = POCKET if layout == "folder" else pocket_file(tmp_path / "a.safetensors")
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, limits[1]))  # the kernel refuses more, as a full disk does
    try:
        with pytest.raises(OutputError, match=rf"cannot write {tmp_path / 'out'}"):
            rewrite(open_weights(source), tmp_path / "out", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == len(before)


def test_new_tensors_that_do_not_fit(tmp_path: Path) -> None:
    for changed, words in [
        ({"unet.conv_inn": torch.ones(1)}, "no parameter unet.conv_inn .*unet.conv_in"),
        ({"unet.conv_in": torch.ones(96, 16)}, r"unet.conv_in is \[96, 16, 3, 3\] .* \[96, 16\] does not fit"),
        ({"unet.conv_in.bias": torch.full((96,), 1e6)}, "unet.conv_in.bias would hold NaN or Inf in float16"),
        ({"unet.conv_in.bias": torch.full((96,), float("nan"))}, "NaN or Inf"),
    ]:
        with pytest.raises(AdapterError, match=words):
            rewrite(open_weights(POCKET), tmp_path / "out", changed)
    assert not list(tmp_path.iterdir())


def test_a_file_that_shrinks_while_it_is_copied(tmp_path: Path) -> None:
    weights: Weights = open_weights(pocket_file(tmp_path / "a.safetensors"))
    os.truncate(weights.path, weights.path.stat().st_size - 1)
    with pytest.raises(HostileFileError, match="became shorter"):
        rewrite(weights, tmp_path / "b.safetensors", {})
    assert [child.name for child in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.slow  # extracting, which reads and writes the same way, is measured in test_checkpoint_ops
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    shapes = {f"layer_{i}.weight": (2048, 2048) for i in range(48)}
    hollow(tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors", shapes)
    code = """if True:
        import sys, torch
        from personalize.families.checkpoint import open_weights
        from personalize.formats.checkpoint import rewrite
        def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10  # MiB, not the parent's
        weights = open_weights(sys.argv[1] + "/base")
        torch.zeros(2048, 2048).half().float().isfinite().all()
        before = peak()
        rewrite(weights, sys.argv[1] + "/out", lambda path: weights[path].float() + 1 if path != "unet.layer_3" else None)
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120, "MiB, of a file of 384"
    after = open_weights(tmp_path / "out")
    assert bool((after["unet.layer_2"] == 1).all()) and not after["unet.layer_3"].any()
    shutil.rmtree(tmp_path / "out")
