"""The tables of families and names, against the real model classes and other tools' own tables."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bases import plain_clip, plain_unet
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn

from personalize.families import names as keys
from personalize.families.clip import Clip
from personalize.families.names import FAMILIES, Shape
from personalize.families.spelling import find_paths
from personalize.families.unet import UNet
from personalize.models.loaded import build

ROWS = {family.name: family for family in FAMILIES}
UNETS = {family.name: family for family in FAMILIES if isinstance(family.denoiser, UNet)}
LDM = [name for name, family in UNETS.items() if "ldm" in family.blocks]
every_family = pytest.mark.parametrize("name", ROWS)


# --- the real classes -----------------------------------------------------------------------------------------------


@functools.cache
def reference(name: str) -> dict[str, nn.Module]:
    """The real models of a family by part, on the meta device; those of UNets and CLIPs as others configure them."""
    family = ROWS[name]
    with torch.device("meta"):
        parts = {row.part: build(row, row.config(8)) for row in family.texts if not isinstance(row, Clip)}
        parts |= {text.part: plain_clip(text, text.width // 16) for text in family.texts if isinstance(text, Clip)}
        own = family.denoiser
        return parts | {own.part: plain_unet(own, 16, 256) if isinstance(own, UNet) else build(own, own.config(family.texts))}


def without_tables(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a model less its embedding tables."""
    tables = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return [(path, parameter) for path, parameter in model.named_parameters() if path not in tables]


@every_family
def test_rows_generate_the_real_weights(name: str) -> None:
    found = {
        keys.canonical(f"{part}.{path}").removesuffix(".weight"): tuple(parameter.shape)
        for part, model in reference(name).items()
        for path, parameter in without_tables(model)
    }
    assert keys.weights(ROWS[name]) == found


@every_family
def test_modules_are_the_real_linear_and_convolutional_layers(name: str) -> None:
    found = {
        keys.canonical(f"{part}.{path}"): tuple(module.weight.shape)
        for part, model in reference(name).items()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert keys.modules(ROWS[name]) == found


def test_pocket_row_is_the_tiny_base(tiny_base: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    shapes = {f"unet.{path}".removesuffix(".weight"): tuple(p.shape) for path, p in model.named_parameters()}
    assert keys.families_of(shapes) == (ROWS["pocket"],)


# --- names ----------------------------------------------------------------------------------------------------------


@every_family
def test_names_are_unique_and_come_back(name: str) -> None:
    family = ROWS[name]
    names, paths = keys.kohya_names(family), keys.kohya_paths(family)
    layers = {path for path in keys.weights(family) if not path.endswith(".bias")}
    assert names.keys() == layers == set(paths.values())
    assert len(set(names.values())) == len(names)
    assert all(paths[name] == path for path, name in names.items())
    assert all(found.startswith(keys.KOHYA_PREFIXES) for found in paths)


@pytest.mark.parametrize("name", UNETS)
def test_ldm_names_are_unique(name: str) -> None:
    names = keys.ldm_names(ROWS[name])
    assert len(set(names.values())) == len(names) == sum(path.startswith("unet.") for path in keys.kohya_names(ROWS[name]))


def test_kohya_names_are_those_of_the_uis() -> None:
    """Spelled out from files in the wild, not from our own generator."""
    sd1, sdxl, refiner = (keys.kohya_names(ROWS[name]) for name in ("sd1", "sdxl", "sdxl-refiner"))
    block = "unet.down_blocks.1.attentions.0"
    assert sd1[f"{block}.transformer_blocks.0.attn1.to_out.0"] == (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    )
    assert sd1["unet.down_blocks.0.resnets.0.norm1"] == "lora_unet_down_blocks_0_resnets_0_norm1"
    assert sd1["text_encoder.text_model.encoder.layers.0.mlp.fc1"] == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert sdxl[f"{block}.transformer_blocks.1.ff.net.0.proj"] == "lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_0_proj"
    assert sdxl[f"{block}.transformer_blocks.1.norm3"] == "lora_unet_input_blocks_4_1_transformer_blocks_1_norm3"
    assert sdxl["unet.down_blocks.0.downsamplers.0.conv"] == "lora_unet_input_blocks_3_0_op"
    assert sdxl["unet.up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_2_2_conv"
    assert sdxl["unet.up_blocks.2.resnets.2.conv_shortcut"] == "lora_unet_output_blocks_8_0_skip_connection"
    assert sdxl["unet.down_blocks.0.resnets.0.norm1"] == "lora_unet_input_blocks_1_0_in_layers_0"
    assert sdxl["unet.down_blocks.0.resnets.0.norm2"] == "lora_unet_input_blocks_1_0_out_layers_0"
    assert sdxl["unet.conv_norm_out"] == "lora_unet_out_0"
    assert sdxl["text_encoder_2.text_projection"] == "lora_te2_text_projection"
    assert refiner["unet.up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_2_1_conv"
    assert refiner["text_encoder_2.text_model.final_layer_norm"] == "lora_te_text_model_final_layer_norm"


@pytest.mark.parametrize(
    ("family", "name", "path"),
    [
        ("sd1", "oft_unet_down_blocks_0_resnets_0_conv1", "unet.down_blocks.0.resnets.0.conv1"),
        ("sdxl", "oft_unet_input_blocks_1_0_in_layers_2", "unet.down_blocks.0.resnets.0.conv1"),
        ("sdxl", "lora_unet_down_blocks_0_resnets_0_conv1", "unet.down_blocks.0.resnets.0.conv1"),
        ("sdxl", "lycoris_down_blocks_0_resnets_0_conv1", "unet.down_blocks.0.resnets.0.conv1"),
        ("sd1", "lora_te1_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("sdxl-refiner", "lora_te_text_model_encoder_layers_31_mlp_fc1", "text_encoder_2.text_model.encoder.layers.31.mlp.fc1"),
        ("sdxl-refiner", "lora_te2_text_model_encoder_layers_31_mlp_fc1", "text_encoder_2.text_model.encoder.layers.31.mlp.fc1"),
    ],
)
def test_spellings_that_tools_use_are_read(family: str, name: str, path: str) -> None:
    assert keys.kohya_paths(ROWS[family])[name] == path


@pytest.mark.parametrize("name", LDM)
def test_ldm_names_are_those_of_whole_checkpoints(name: str) -> None:
    """diffusers' converter turns a checkpoint under our LDM names into just the state dict of its UNet."""
    family, model = ROWS[name], reference(name)["unet"]
    names = keys.ldm_names(family)
    checkpoint = {}
    for path, parameter in model.named_parameters():
        layer, _, kind = path.rpartition(".")
        checkpoint[f"model.diffusion_model.{names[f'unet.{layer}']}.{kind}"] = parameter
    found = convert_ldm_unet_checkpoint(checkpoint, model.config)
    assert found.keys() == model.state_dict().keys()
    assert all(found[path] is parameter for path, parameter in model.named_parameters())


@pytest.mark.parametrize("name", LDM)
def test_diffusers_finds_the_layers_of_ldm_names(name: str) -> None:
    """Its tables for LoRA files lead from each of our LDM names to the module that we mean."""
    family = ROWS[name]
    misread = {
        f"unet.up_blocks.{i}.upsamplers.0.conv"
        for i, depth in enumerate(reversed(family.denoiser.depth))
        if not depth  # the upsampler of a level without attention is taken for an attention: SDXL's base has none
    }
    wanted = {path: inside for path, inside in keys.ldm_names(family).items() if path in keys.modules(family)}
    for path, inside in wanted.items():
        key = f"lora_unet_{inside.replace('.', '_')}.lora_down.weight"
        (mapped,) = _maybe_map_sgm_blocks_to_diffusers(
            {key: 0}, SimpleNamespace(layers_per_block=family.denoiser.layers_per_block)
        )
        found = re.sub(r"[._]lora\.down\.weight$", "", _convert_unet_lora_key(mapped)).replace(".processor", "")
        same = f"unet.{found}".replace("to_out", "to_out.0") == path
        assert same != (path in misread), (path, found)


# --- detection ------------------------------------------------------------------------------------------------------


def picked(name: str, pick: str) -> dict[str, Shape]:
    return {path: shape for path, shape in keys.weights(ROWS[name]).items() if pick in path}


def said(name: str) -> dict[str, str]:
    return {"ss_base_model_version": ROWS[name].base_version, "modelspec.architecture": ROWS[name].architecture}


@every_family
@pytest.mark.parametrize("pick", ["to_k", "resnets", "text_encoder", "mid_block", "norm"])
def test_family_is_told_from_few_weights(name: str, pick: str) -> None:
    if not (shapes := picked(name, pick)):
        assert name not in UNETS
        return
    twins = {("sd2", "resnets"): "sd1", ("sdxl-refiner", "text_encoder"): "sdxl"}
    twins |= {(name, "text_encoder"): "sd35-large" for name in ("sd3", "sd35-medium")}
    assert keys.family_of(shapes) is ROWS[twins.get((name, pick), name)]
    assert keys.family_of(shapes, said(name)) is ROWS[name]


@every_family
def test_metadata_claims_one_family(name: str) -> None:
    for key, value in said(name).items():
        assert [family.name for family in FAMILIES if keys.says({key: value}, family)] == [name]


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("ss_base_model_version", "sd_v2_v", "sd2"),
        ("modelspec.architecture", "stable-diffusion-v2-768-v/lora", "sd2"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-edit", "sdxl"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-refiner", "sdxl-refiner"),
    ],
)
def test_other_words_of_metadata(key: str, value: str, name: str) -> None:
    assert [family.name for family in FAMILIES if keys.says({key: value}, family)] == [name]


def named(name: str, blocks: str, pick: str = "") -> dict[str, Shape]:
    """kohya name => shape, as a file in which the UNet's blocks have diffusers' or LDM's names, or half of them each."""
    family = ROWS[name]
    ldm = {path: f"lora_unet_{inside}".replace(".", "_") for path, inside in keys.ldm_names(family).items()}
    plain = {path: path.replace("unet.", "lora_unet_").replace(".", "_") for path in ldm}
    half = {path: (ldm if i % 2 else plain)[path] for i, path in enumerate(ldm)}
    spelled = {**keys.kohya_names(family), **{"ldm": ldm, "diffusers": plain, "mixed": half}[blocks]}
    return {spelled[path]: shape for path, shape in keys.weights(family).items() if path in spelled and pick in path}


@pytest.mark.parametrize("name", LDM)
@pytest.mark.parametrize("blocks", ["ldm", "diffusers", "mixed"])
@pytest.mark.parametrize("unknown", ["nothing", "in", "kernel"])
def test_kohya_names_find_their_family(name: str, blocks: str, unknown: str) -> None:
    """All layers, whatever the file does not tell of their shapes."""
    blur = {
        "nothing": lambda shape: shape,
        "in": lambda shape: (shape[0], *(-1 for _ in shape[1:2])),
        "kernel": lambda shape: (*shape[:1], shape[1] * shape[2] * shape[3]) if len(shape) == 4 else shape,
    }[unknown]
    file = {name: blur(shape) for name, shape in named(name, blocks).items()}
    paths = find_paths(file, {})
    assert {paths[each] for each in file} == keys.kohya_names(ROWS[name]).keys()
    assert keys.family_of({paths[each]: shape for each, shape in file.items()}) is ROWS[name]


@pytest.mark.parametrize("name", LDM)
@pytest.mark.parametrize("pick", ["to_k", "mid_block", "down_blocks.1"])
def test_few_kohya_names_find_their_family(name: str, pick: str) -> None:
    file = named(name, "ldm", pick)
    paths = find_paths(file, {})
    assert keys.families_of({paths[each]: shape for each, shape in file.items()}) == (ROWS[name],)


@pytest.mark.parametrize(
    ("prefix", "width", "part"),
    [
        ("lora_te", 192, "text_encoder"),
        ("lora_te", 768, "text_encoder"),
        ("lora_te", 1024, "text_encoder"),
        ("lora_te", 1280, "text_encoder_2"),
        ("lora_te1", 768, "text_encoder"),
        ("lora_te1", 1024, "text_encoder"),
        ("lora_te2", 1280, "text_encoder_2"),
    ],
)
def test_a_lone_text_encoder_is_known_by_its_shapes(prefix: str, width: int, part: str) -> None:
    paths = find_paths({f"{prefix}_text_model_encoder_layers_0_mlp_fc1": (4 * width, width)}, {})
    assert paths[f"{prefix}_text_model_encoder_layers_0_mlp_fc1"] == f"{part}.text_model.encoder.layers.0.mlp.fc1"


def test_both_text_encoders_of_sdxl() -> None:
    shapes = {f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1": (4 * width, width) for i, width in ((1, 768), (2, 1280))}
    paths = find_paths(shapes, {})
    assert [keys.part_of(paths[name]) for name in shapes] == ["text_encoder", "text_encoder_2"]


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "known", "same"),
    [
        ((320, 4, 3, 3), (320, 4, 3, 3), True),
        ((320, 4, 3, 1), (320, 4, 3, 3), False),
        ((320, 36), (320, 4, 3, 3), True),
        ((320, 4), (320, 4, 3, 3), False),
        ((320, -1), (320, 4, 3, 3), True),
        ((-1, -1), (320, 4, 3, 3), True),
        ((-1, 4, -1, -1), (320, 4, 3, 3), True),
        ((321, -1), (320, 4, 3, 3), False),
        ((320, 640, 1, 1), (320, 640), True),
        ((320, 640, 3, 3), (320, 640), False),
        ((320, 640), (320, 640, 1, 1), True),
        ((-1, 640), (320, 640), True),
        ((320,), (320,), True),
        ((-1,), (320,), True),
        ((320,), (320, 1), False),
        ((-1, -1), (320,), False),
        ((), (320,), False),
    ],
)
def test_shapes_that_may_be_the_same(shape: Shape, known: Shape, same: bool) -> None:
    assert keys.same(shape, known) is same


def test_a_shape_becomes_the_true_one() -> None:
    sd1, conv = ROWS["sd1"], "unet.conv_in"
    assert keys.resolve_shape(conv, (320, -1), sd1) == keys.resolve_shape(conv, (320, 36), sd1) == (320, 4, 3, 3)
    assert keys.resolve_shape(conv, (321, 36), sd1) == (321, 36)
    assert keys.resolve_shape("unet.down_blocks.0.attentions.0.proj_in", (320, 320), sd1) == (320, 320, 1, 1)
    assert keys.resolve_shape("unet.nowhere", (1, -1), sd1) == keys.resolve_shape(conv, (1, -1), None) == (1, -1)


def test_biases_and_norms_belong_to_a_family() -> None:
    sd1 = ROWS["sd1"]
    assert keys.families_of({"unet.conv_norm_out": (320,), "unet.conv_norm_out.bias": (320,)})[0] is sd1
    assert not keys.families_of({"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.bias": (1280,)})
    assert not keys.families_of({})
