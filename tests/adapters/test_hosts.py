"""What hosts make of our files: our account of their rules, against diffusers' converter, and against the hosts' own sources.

The sources are looked for in the folder that PERSONALIZE_HOSTS names: checkouts called `ComfyUI`, `stable-diffusion-webui`
(A1111) and `stable-diffusion-webui-forge`. What they import besides themselves is stood in for.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_kinds import KINDS, noise
from torch import Tensor, nn

from personalize.adapters import contract, dialects, host_names, hosts
from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import Dense, LowRank, Structured
from personalize.errors import AdapterError
from personalize.families import names as keys
from personalize.families.family import Family
from personalize.families.names import FAMILIES, modules, part_of, weights
from personalize.formats.header import read_header

FAMILY = {family.name: family for family in FAMILIES}
HOST = {host.name: host for host in hosts.HOSTS}
TRANSFORMER = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
LAYERS = (  # few, of true shapes
    f"{TRANSFORMER}.attn1.to_q",
    f"{TRANSFORMER}.attn2.to_k",
    "unet.down_blocks.1.resnets.0.conv1",
    "unet.down_blocks.0.downsamplers.0.conv",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
)


def rank_one(family: Family, paths: Any = None, alpha: float = 1.0) -> Adapter:
    """A LoRA of every layer, or of some, that is cheap: no layer is written wider than its factors."""
    shapes = modules(family)
    down = {path: torch.ones(1, *shapes[path][1:]) for path in paths or shapes}
    deltas = {p: LowRank(torch.ones(shapes[p][0], 1, *[1] * (d.ndim - 2)), d, alpha) for p, d in down.items()}
    return Adapter(deltas).for_family(family.name)  # few layers are shared by several


def written(family: Family, blocks: str) -> dict[str, str]:
    """Canonical path => kohya's name, with the UNet's blocks named as diffusers or LDM does."""
    return dict(keys.kohya_names(replace(family, blocks=(blocks,))))


def slots(adapter: Adapter, path: Path, dialect: str = "kohya") -> Mapping[str, dialects.Slot]:
    return dialects.read_keys(read_header(adapter.save(path, dialect))).slots


# ---------------------------------------------------------------- our account


@pytest.mark.parametrize("host", hosts.HOSTS, ids=lambda host: host.name)
def test_every_layer_that_we_name_is_found(host: hosts.Host) -> None:
    for family in FAMILIES:
        if family.name in host.families:
            names = keys.kohya_names(family)
            lost = [path for path in modules(family) if host.where(names[path], family) != path]
            assert [path for path in lost if not path.endswith(host.lacks)] == [], family.name


def test_names_that_hosts_do_not_find_are_known() -> None:
    """As seen by running them (SDXL's convolutions under diffusers' names), or by reading them."""
    sdxl, sd1 = written(FAMILY["sdxl"], "diffusers"), written(FAMILY["sd1"], "ldm")
    a1111 = [
        path for path, name in sdxl.items() if path in modules(FAMILY["sdxl"]) and not HOST["A1111"].where(name, FAMILY["sdxl"])
    ]
    added = ["unet.add_embedding.linear_1", "unet.add_embedding.linear_2"]
    assert a1111 == [*added, "unet.up_blocks.0.upsamplers.0.conv", "text_encoder_2.text_projection"]
    conv = "unet.up_blocks.0.upsamplers.0.conv"
    assert HOST["diffusers"].where(sd1[conv], FAMILY["sd1"]) == "unet.up_blocks.0.attentions.2.conv"
    assert HOST["ComfyUI"].where(sd1[conv], FAMILY["sd1"]) == HOST["A1111"].where(sd1[conv], FAMILY["sd1"]) == conv


def test_what_a_host_leaves_out_is_told(tmp_path: Path) -> None:
    sdxl, comfy, a1111 = FAMILY["sdxl"], HOST["ComfyUI"], HOST["A1111"]
    attention = "text_encoder_2.text_model.encoder.layers.3.self_attn"
    every = [f"{attention}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")]
    assert hosts.ignored_layers(a1111, "kohya", sdxl, slots(rank_one(sdxl, every), tmp_path / "a")) == []
    part = slots(rank_one(sdxl, every[:3]), tmp_path / "b")  # it joins the four
    assert hosts.ignored_layers(a1111, "kohya", sdxl, part) == sorted(every[:3])
    assert hosts.ignored_layers(comfy, "kohya", sdxl, part) == []
    mixed = slots(rank_one(FAMILY["sd1"], LAYERS), tmp_path / "c", "diffusers")
    unheard = hosts.ignored_layers(comfy, "diffusers", FAMILY["sd1"], mixed)
    assert unheard == [path for path in sorted(LAYERS)[::-1] if ".to_" in path][::-1]
    norm = "text_encoder.text_model.encoder.layers.0.layer_norm1"
    norms = slots(Adapter({norm: Dense(noise(768)), f"{norm}.bias": Dense(noise(768))}).for_family("sd1"), tmp_path / "d")
    assert hosts.ignored_layers(comfy, "kohya", FAMILY["sd1"], norms) == [norm] and not hosts.ignored_layers(
        a1111, "kohya", FAMILY["sd1"], norms
    )


@pytest.mark.parametrize("blocks", ["ldm", "diffusers"])
def test_a_file_that_a_host_would_misread_is_not_written(blocks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILY["sdxl" if blocks == "diffusers" else "sd1"]
    own = ["unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q"] if blocks == "diffusers" else [LAYERS[1]]
    conv = "unet.up_blocks.0.upsamplers.0.conv"
    old = rank_one(family, [conv, *own]).save(tmp_path / "a").read_bytes()
    names = written(family, blocks)
    monkeypatch.setattr(contract, "kohya_names", lambda _: names)
    meant = "A1111 would not find" if blocks == "diffusers" else "diffusers would take"
    with pytest.raises(AdapterError, match=rf"{meant} unet.up_blocks.0.upsamplers.0.conv"):
        rank_one(family, [conv, *own], alpha=0.5).save(tmp_path / "a")
    assert (tmp_path / "a.safetensors").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_alphas_that_a_host_would_lose_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sd1 = FAMILY["sd1"]
    unlike = Adapter(dict(rank_one(sd1, LAYERS[:4]).deltas) | dict(rank_one(sd1, LAYERS[:1], alpha=0.5).deltas))
    unlike.save(tmp_path / "a")
    monkeypatch.setattr(contract.Draft, "choose_alpha", lambda draft, path, *own: draft.low.update({path: own}) or own[1])
    with pytest.raises(AdapterError, match=r"diffusers would take unet.*to_q at another strength"):
        unlike.save(tmp_path / "b")
    assert not (tmp_path / "b.safetensors").exists()


def test_what_no_host_can_name_does_not_fail(tmp_path: Path) -> None:
    """Norms of text encoders in ComfyUI, biases beside a LoRA in A1111, projections: the doctor's to say, not the writer's."""
    sdxl = FAMILY["sdxl"]
    own = [path for path in weights(sdxl) if path.endswith(("layer_norm1", "final_layer_norm", "conv_norm_out"))]
    dense = {path: Dense(noise(*weights(sdxl)[path])) for path in (*own, f"{LAYERS[2]}.bias")}
    adapter = Adapter(dense | dict(rank_one(sdxl, ["text_encoder_2.text_projection", LAYERS[2]]).deltas))
    assert Adapter.load(adapter.save(tmp_path / "a")).deltas.keys() == adapter.deltas.keys()


# ---------------------------------------------------------------- diffusers' own converter


def as_diffusers_names(stems: list[str], family: Family) -> dict[str, str]:
    """kohya's name => the module that diffusers' converter makes of it, for each layer alone."""
    from diffusers.loaders import lora_conversion_utils as own

    found, config = {}, SimpleNamespace(layers_per_block=family.denoiser.layers_per_block)
    for stem in stems:
        state = {f"{stem}.lora_{side}.weight": torch.ones(1) for side in ("up", "down")}
        state, _ = own._convert_non_diffusers_lora_to_diffusers(own._maybe_map_sgm_blocks_to_diffusers(state, config))
        name = next(iter(state))
        for end in ("_lora.down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight"):
            name = name.removesuffix(end)
        leaf = name.rpartition(".")[2]
        text = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
        if part_of(name) != "unet" and leaf in text:
            name = f"{name.removesuffix(leaf)}{text[leaf]}"
        name = name.replace(".processor", "")
        found[stem] = f"{name}.0" if name.startswith("unet.") and leaf == "to_out" else name
    return found


@pytest.mark.parametrize("blocks", ["diffusers", "ldm"])
@pytest.mark.parametrize("family", ["pocket", "sd1", "sd2", "sdxl"])
def test_diffusers_converter_agrees(family: str, blocks: str) -> None:
    row = FAMILY[family]
    stems = [name for path, name in written(row, blocks).items() if path in modules(row)]
    own = as_diffusers_names(stems, row)
    ours = {stem: HOST["diffusers"].where(stem, row) for stem in stems}
    agreed = {stem for stem in stems if own[stem] == ours[stem]}
    astray = {stem for stem in stems if own[stem] not in modules(row)}  # two ways to be nowhere
    assert set(stems) - agreed <= {stem for stem in astray if ours[stem] not in modules(row)}


# ---------------------------------------------------------------- the hosts' own sources


def checkout(name: str, *inside: str) -> Path:
    """A host's checkout, or this test is skipped."""
    folder = Path(os.environ.get("PERSONALIZE_HOSTS", "/nowhere")) / name
    if not all((folder / path).exists() for path in inside):
        pytest.skip(f"PERSONALIZE_HOSTS names no folder with {name}")
    return folder


class StandIn(ModuleType):
    """A module of which every name is some class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def stood_in(stubs: Mapping[str, Any], paths: list[Path]) -> Iterator[None]:
    """Imports find these first; what was imported is forgotten, but by those who hold it."""
    before, path = dict(sys.modules), list(sys.path)
    sys.modules.update(stubs)
    for name, stub in stubs.items():
        if (parent := stubs.get(name.rpartition(".")[0])) is not None:
            setattr(parent, name.rpartition(".")[2], stub)  # as an import that finds its file does
    sys.path[:0] = map(str, paths)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = path
        for name in sys.modules.keys() - before.keys():
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(tuple(map(str, paths))) or name in stubs:
                del sys.modules[name]


def package(name: str, folder: Path) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    return module


@cache
def comfy() -> Any:
    """ComfyUI's `comfy.lora`."""
    root = checkout("ComfyUI", "comfy/lora.py", "comfy/weight_adapter", "comfy/utils.py")
    names = "cli_args checkpoint_pickle interruption execution_context patcher_extension component_model memory_management"
    inner = [f"comfy.{name}" for name in names.split()]
    inner += [
        f"comfy.component_model.{name}" for name in ("files", "_deprecate", "deprecation", "executor_types", "tqdm_watcher")
    ]
    stubs: dict[str, Any] = {name: MagicMock() for name in (*inner, "comfy_execution", "comfy_execution.progress", "comfy_aimdo")}
    stubs |= {"comfy": package("comfy", root / "comfy"), "comfy.model_base": StandIn("comfy.model_base")}
    management = ModuleType("comfy.model_management")
    management.cast_to_device = lambda tensor, device, dtype, copy=False: tensor.to(device, dtype, copy=copy)  # type: ignore[attr-defined]
    with stood_in(stubs | {"comfy.model_management": management}, [root]):
        return importlib.import_module("comfy.lora")


def comfy_model(family: Family) -> tuple[Any, Any]:
    """What ComfyUI makes its tables from: the keys of a UNet and of text encoders in its layout, and the UNet's configuration."""
    row, ldm = family.denoiser, keys.ldm_names(family)
    depth = [depth for depth in row.depth for _ in range(row.layers_per_block)]
    config = {"num_res_blocks": [row.layers_per_block] * len(row.depth), "channel_mult": row.channels, "transformer_depth": depth}
    config["transformer_depth_output"] = [depth for depth in row.depth for _ in range(row.layers_per_block + 1)]
    config["transformer_depth_middle"] = row.middle
    unet = {f"diffusion_model.{name}.weight" for name in ldm.values()}
    clip = set()
    for path in weights(family):
        if part_of(path) != "unet":
            clip.add(f"{encoder(family, path)}.transformer.{path.partition('.')[2]}.weight")
    model = SimpleNamespace(state_dict=lambda: dict.fromkeys(unet), model_config=SimpleNamespace(unet_config=config))
    return model, SimpleNamespace(state_dict=lambda: dict.fromkeys(clip))


def encoder(family: Family, path: str) -> str:
    return "clip_g" if part_of(path) == "text_encoder_2" else "clip_h" if family.name == "sd2" else "clip_l"


def comfy_paths(family: Family) -> dict[str, str]:
    """ComfyUI's key of a weight => canonical path."""
    found = {f"diffusion_model.{ldm}.weight": path for path, ldm in keys.ldm_names(family).items()}
    for path in weights(family):
        if part_of(path) != "unet":
            found[f"{encoder(family, path)}.transformer.{path.partition('.')[2]}.weight"] = path
    return found


def comfy_names(family: Family) -> dict[str, str]:
    """Every name that ComfyUI knows a layer by => canonical path."""
    unet, clip = comfy_model(family)
    found = comfy().model_lora_keys_clip(clip, comfy().model_lora_keys_unet(unet, {}))
    paths = comfy_paths(family)
    return {name: paths[key] for name, key in found.items() if key in paths}


def comfy_reads(path: Path, family: Family, bases: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """dW that ComfyUI adds: canonical path => tensor."""
    unet, clip = comfy_model(family)
    names = comfy().model_lora_keys_clip(clip, comfy().model_lora_keys_unet(unet, {}))
    patches, paths = comfy().load_lora(load_file(path), names, log_missing=False), comfy_paths(family)
    return {
        paths[key]: comfy().calculate_weight([(strength, patch, 1.0, None, None)], bases[paths[key]].clone(), key)
        - bases[paths[key]]
        for key, patch in patches.items()
        if key in paths
    }


@cache
def forge() -> tuple[Any, Any]:
    """Forge's loader of keys, and its patcher."""
    root = checkout("stable-diffusion-webui-forge", "backend/patcher/lora.py", "packages_3rdparty/comfyui_lora_collection")
    memory = MagicMock()
    memory.cast_to_device = lambda tensor, device, dtype: tensor.to(device, dtype)
    names = ("backend.args", "backend.utils", "backend.operations", "modules", "gguf")
    stubs: dict[str, Any] = {name: MagicMock() for name in names} | {"backend.memory_management": memory}
    stubs |= {
        "backend": package("backend", root / "backend"),
        "backend.patcher": package("backend.patcher", root / "backend/patcher"),
    }
    stubs["backend"].memory_management, stubs["backend"].utils = memory, MagicMock()
    stubs["backend"].operations = MagicMock()
    with stood_in(stubs, [root]):
        patcher = importlib.import_module("backend.patcher.lora")
        return patcher, importlib.import_module("packages_3rdparty.comfyui_lora_collection.lora")


def forge_reads(path: Path, family: Family, bases: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    patcher, names = forge()
    unet, clip = comfy_model(family)
    unet.diffusion_model, unet.config = SimpleNamespace(config=unet.model_config.unet_config), MagicMock()
    patches: dict[str, Any] = {}
    rest = load_file(path)
    for known in (names.model_lora_keys_unet(unet, {})[1], names.model_lora_keys_clip(clip, {})[1]):
        own, rest = names.load_lora(rest, known)
        patches |= own
    paths = comfy_paths(family)
    found = {}
    for key, patch in patches.items():
        base = bases[paths[key]]
        with suppress(RuntimeError), redirect_stdout(StringIO()):
            found[paths[key]] = patcher.merge_lora_to_weight([(strength, patch, 1.0, None, None)], base.clone(), key) - base
    return found


@cache
def a1111() -> Any:
    """A1111's `networks` of its Lora extension."""
    root = checkout("stable-diffusion-webui", "extensions-builtin/Lora/networks.py") / "extensions-builtin/Lora"
    names = "shared devices sd_models errors scripts sd_hijack textual_inversion cache hashes models models.sd3"
    stubs: dict[str, Any] = {f"modules.{name}": MagicMock() for name in names.split()} | {"modules": MagicMock()}
    for name in ("gradio", "lora_patches", "lora_logger", "modules.textual_inversion.textual_inversion"):
        stubs[name] = MagicMock()
    mmdit = StandIn("modules.models.sd3.mmdit")
    mmdit.QkvLinear = type("QkvLinear", (), {})  # type: ignore[attr-defined]
    stubs["modules.models.sd3.mmdit"] = stubs["modules"].models.sd3.mmdit = mmdit
    devices = SimpleNamespace(cpu=torch.device("cpu"), device=torch.device("cpu"), dtype=torch.float32)
    stubs["modules.devices"] = stubs["modules"].devices = devices
    with stood_in(stubs, [root]):
        return importlib.import_module("networks")


def a1111_model(family: Family, bases: Mapping[str, Tensor]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """A1111's name of each layer => a layer; and => canonical path. Layers without a base here are as small as can be."""
    layers, paths = {}, {}
    for path, shape in weights(family).items():
        if path.endswith(".bias"):
            continue
        name = a1111_name(family, path)
        paths[name], base = path, bases.get(path)
        size = shape if base is not None else (*[1] * min(2, len(shape)), *shape[2:])
        layers[name] = nn.LayerNorm(size[0]) if len(size) == 1 else nn.Linear(size[1], size[0])
        if len(size) == 4:
            layers[name] = nn.Conv2d(size[1], size[0], size[2:], padding=size[2] // 2)
        if base is not None:
            layers[name].weight.data = base.clone()
    for name in [
        name for name in layers if name.endswith(("_attn_q_proj", "_attn_k_proj", "_attn_v_proj")) and "resblocks" in name
    ]:
        width = layers[name].weight.shape[0]
        joint = name.rpartition("_")[0].rpartition("_")[0]
        layers[joint] = nn.MultiheadAttention(width, 1)
        del layers[name]
    if not any("resblocks" in name and "model" in name for name in layers if family.name == "sd2"):
        return layers, paths
    return layers | {"model_transformer_resblocks": nn.Identity()}, paths  # how it tells SD2


def a1111_name(family: Family, path: str) -> str:
    """As A1111 names the modules of a loaded checkpoint. OpenCLIP's norms have names of their own."""
    part, _, inside = path.partition(".")
    if part == "unet":
        return f"diffusion_model_{keys.ldm_names(family)[path]}".replace(".", "_")
    sdxl = len(family.texts) > 1
    if part == "text_encoder" and family.name != "sd2":
        return f"{'0_' if sdxl else ''}transformer_{inside}".replace(".", "_")
    for old, new in {
        "text_model.encoder.layers": "model.transformer.resblocks",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
        "layer_norm": "ln_",
        "text_model.final_layer_norm": "model.ln_final",
        "text_projection": "a parameter",
    }.items():
        inside = inside.replace(old, new)
    return f"{'1_' if sdxl else ''}{inside}".replace(".", "_")


def a1111_network(path: Path, family: Family, bases: Mapping[str, Tensor]) -> dict[str, Any]:
    """Canonical path => the module of A1111's network that is applied there."""
    networks, (layers, paths) = a1111(), a1111_model(family, bases)
    networks.shared.sd_model = SimpleNamespace(network_layer_mapping=layers)
    networks.sd_models.read_state_dict = load_file
    net = networks.load_network("x", SimpleNamespace(filename=str(path)))
    return {paths[name]: module for name, module in net.modules.items()}


def a1111_reads(path: Path, family: Family, bases: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """A layer that fails is left out, as A1111 does."""
    found = {}
    for layer, module in a1111_network(path, family, bases).items():
        module.network.te_multiplier = module.network.unet_multiplier = strength
        with torch.no_grad(), suppress(RuntimeError):
            own = module.calc_updown(bases[layer])[0]
            found[layer] = (bases[layer] + own) - bases[layer] if own.shape != bases[layer].shape else own
    return found


READERS: dict[str, Callable[..., dict[str, Tensor]]] = {"ComfyUI": comfy_reads, "Forge": forge_reads, "A1111": a1111_reads}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner", "pocket"])
def test_comfyui_has_these_names(family: str) -> None:
    row = FAMILY[family]
    own = comfy_names(row)
    ours = {name: path for name, path in host_names._comfy(row).items() if path in weights(row)}
    assert {name: path for name, path in own.items() if ours.get(name) != path and _spoken(name)} == {}
    assert {name: path for name, path in ours.items() if own.get(name) != path} == {}


def _spoken(name: str) -> bool:
    """Whether files of ours, or any that we read, may use this name: not the generic ones of full paths, nor those of others."""
    return not name.startswith(("text_encoders.", "lora_prior")) and not name.endswith(".bias") and "class_embedding" not in name


@pytest.mark.parametrize("blocks", ["diffusers", "ldm"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a1111_finds_these_layers(family: str, blocks: str, tmp_path: Path) -> None:
    row, names = FAMILY[family], written(FAMILY[family], blocks)
    roles = {path: ("lora_up.weight", "lora_down.weight") if path in modules(row) else ("w_norm", "b_norm") for path in names}
    save_file({f"{names[path]}.{role}": torch.ones(1, 1) for path in names for role in roles[path]}, tmp_path / "a")
    found = a1111_network(tmp_path / "a", row, {})
    assert set(found) == {path for path, name in names.items() if HOST["A1111"].where(name, row) == path}


# ---------------------------------------------------------------- dW as the hosts make it

FREE = {  # kinds whose rotation has no limit: ComfyUI takes alpha for another one
    name: lambda shape, name=name: Structured("OFT", KINDS[name](shape).tensors, 0.0, shape)  # type: ignore[attr-defined]
    for name in ("OFT", "OFT, rescaled", "BOFT")
}
CASES: dict[str, Callable[[tuple[int, ...]], Any]] = KINDS | {f"{name}, free": make for name, make in FREE.items()}
CASES["BOFT, no alpha"] = lambda shape: Structured("OFT", KINDS["BOFT"](shape).tensors, None, shape)  # type: ignore[attr-defined]
CASES["GLoRA, old"] = lambda shape: old_glora(KINDS["GLoRA"](shape), 1.0)
CASES["GLoRA, old, alpha is rank"] = lambda shape: old_glora(KINDS["GLoRA"](shape), 2.0)


def old_glora(new: Any, alpha: float) -> Structured:
    """The same update in the order of LyCORIS 1."""
    swapped = {f"{x}{i}.weight": new.tensors[f"{x}{3 - i}.weight"] for x in "ab" for i in (1, 2)}
    return Structured("GLoRA", swapped, alpha, new.shape)


def errors(host: str, kind: str, family: Family, folder: Path, strength: float = 1.0) -> dict[str, float]:
    """Layer => how far a host's dW is from ours, relative; infinite where it makes none."""
    adapter = Adapter({path: CASES[kind](weights(family)[path]) for path in LAYERS})
    bases = {path: noise(*weights(family)[path], seed=77) for path in LAYERS}
    found, far = READERS[host](adapter.save(folder / "a"), family, bases, strength), {}
    for layer, delta in adapter.deltas.items():
        wanted, own = strength * delta.delta(bases[layer]), found.get(layer)
        far[layer] = float((own - wanted).norm() / wanted.norm()) if own is not None and own.any() else float("inf")
    return far


TURNED = {"OFT", "OFT, rescaled", "BOFT", "OFT, free", "OFT, rescaled, free", "BOFT, free", "BOFT, no alpha"}
OFF = {  # what is not our dW on every layer at strengths 1 and 0.5; what is meant is in the rows of hosts.py
    "A1111": {"GLoRA", "GLoRA, old", "GLoRA, old, alpha is rank", "IA3"},  # IA3 on outputs: its convolutions fail
    "ComfyUI": {*TURNED, "LoKr, Tucker", "GLoRA, old", "GLoRA, old, alpha is rank", "IA3", "IA3, input"},
    "Forge": {*TURNED, "LoKr, Tucker", "GLoRA, old", "GLoRA, old, alpha is rank", "IA3", "IA3, input"},
}


@pytest.mark.parametrize("host", READERS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_hosts_make_our_updates(host: str, family: str, tmp_path: Path) -> None:
    off = set()
    for kind in CASES if family == "sd1" else ("LoRA", "LoHa", "DoRA", "full"):
        far = [max(errors(host, kind, FAMILY[family], tmp_path, strength).values()) for strength in (1.0, 0.5)]
        off |= {kind} if max(far) > 1e-4 else set()
    assert off == (OFF[host] if family == "sd1" else set())


def test_comfyui_turns_by_the_square_of_a_strength(tmp_path: Path) -> None:
    sd1 = FAMILY["sd1"]
    assert max(errors("ComfyUI", "OFT, free", sd1, tmp_path).values()) < 1e-4
    assert all(far == pytest.approx(0.5, abs=1e-4) for far in errors("ComfyUI", "OFT, free", sd1, tmp_path, 0.5).values())
    assert max(errors("ComfyUI", "BOFT, free", sd1, tmp_path).values()) < 1e-4


def test_a1111_reads_old_glora_whose_alpha_is_its_rank(tmp_path: Path) -> None:
    far = errors("A1111", "GLoRA, old, alpha is rank", FAMILY["sd1"], tmp_path)
    assert {path for path, error in far.items() if error > 1e-4} == {LAYERS[2], LAYERS[3]}


def test_a1111_refuses_files_for_a_lone_bias(tmp_path: Path) -> None:
    sd1, norm = FAMILY["sd1"], "unet.down_blocks.1.resnets.0.norm1"
    plain, size = dict(rank_one(sd1, LAYERS[:1]).deltas), weights(sd1)[norm]
    for lone in (norm, f"{norm}.bias", f"{LAYERS[2]}.bias"):
        path = Adapter(plain | {lone: Dense(noise(*weights(sd1)[lone]))}).for_family("sd1").save(tmp_path / "a")
        with pytest.raises(AssertionError, match="Could not find a module type"):
            a1111_network(path, sd1, {})
        told = hosts.departures(HOST["A1111"], dialects.read_keys(read_header(path)).slots)
        assert told == {"A1111 refuses the whole file for it": [lone.removesuffix(".bias")]}
    both = (
        Adapter(plain | {norm: Dense(noise(*size)), f"{norm}.bias": Dense(noise(*size))}).for_family("sd1").save(tmp_path / "b")
    )
    assert set(a1111_network(both, sd1, {})) == {LAYERS[0], norm}
