"""Names in adapter files, whoever wrote them and whatever wrapped the model, and what they tell of a family."""

from __future__ import annotations

import pytest

from personalize.families.names import FAMILIES, candidates, kohya_names, ldm_names, modules, names_of
from personalize.families.spelling import find_paths, path_in, tell_apart

ROWS = {family.name: family for family in FAMILIES}
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT = "text_encoder.text_model.encoder.layers.3.self_attn.out_proj"


@pytest.mark.parametrize(
    "name",
    [
        f"unet.unet.{LAYER}",
        f"unet.base_model.model.{LAYER}",
        f"base_model.model.unet.{LAYER}",
        f"module._orig_mod.unet.{LAYER}",
        f"unet.module.module.{LAYER}",
        f"unet.{LAYER.replace('attentions', '_checkpoint_wrapped_module.attentions')}",
        f"unet.{LAYER.replace('to_k', 'processor.to_k')}",
        f"unet.{LAYER.replace('to_k', 'processor.to_k_lora')}",
        f"unet.{LAYER}.base_layer",
        f"lora_unet.{LAYER}",
        f"diffusion_model.{LAYER}",
        LAYER,
        "unet.middle_block.1.transformer_blocks.0.attn2.to_k",
        "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k",
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k",
        f"lora_unet_{LAYER.replace('.', '_')}",
        f"lora_unet__orig_mod_{LAYER.replace('.', '_')}",
        f"lora_unet_unet_{LAYER.replace('.', '_')}",
        f"lora_unet_base_model_model_{LAYER.replace('.', '_')}",
        f"lora_unet_{LAYER.replace('.', '_').replace('attentions', '_checkpoint_wrapped_module_attentions')}",
        f"lycoris_{LAYER.replace('.', '_')}",
    ],
)
def test_a_denoisers_layer_in_any_wrapping(name: str) -> None:
    assert path_in(ROWS["sd1"], name) == f"unet.{LAYER}"


@pytest.mark.parametrize(
    "name",
    [
        TEXT,
        TEXT.replace("text_model.", ""),
        TEXT.replace("text_encoder.", "text_encoder.text_encoder."),
        TEXT.replace("text_encoder.", "text_encoder._orig_mod."),
        TEXT.replace("text_encoder.", "clip_l."),
        TEXT.replace("text_encoder.", "text_encoders.clip_l.transformer."),
        TEXT.replace("text_encoder.", "cond_stage_model.transformer."),
        TEXT.replace("text_encoder.", "te1."),
        TEXT.replace("out_proj", "to_out_lora"),
        "lora_te_text_model_encoder_layers_3_self_attn_out_proj",
        "lora_te__orig_mod_text_model_encoder_layers_3_self_attn_out_proj",
    ],
)
def test_a_text_encoders_layer_in_any_wrapping(name: str) -> None:
    assert path_in(ROWS["sd1"], name) == TEXT


@pytest.mark.parametrize(
    "name",
    [
        "unet.down_blocks.7.attentions.0.proj_in",
        f"unet.somebody.{LAYER}",
        f"unet.text_encoder.{LAYER}",
        f"text_encoder.{LAYER}",
        "unet.conv_in.weight",
        "lora_unet_down_blocks_7_attentions_0_proj_in",
        "lora_unet__orig_mod_",
        "",
    ],
)
def test_what_no_family_has_is_no_layer(name: str) -> None:
    assert [path_in(family, name) for family in FAMILIES] == [""] * len(FAMILIES)


@pytest.mark.parametrize("name", ROWS)
def test_every_spelling_of_every_layer_comes_back(name: str) -> None:
    family = ROWS[name]
    spelled = {path: [path, kohya_names(family)[path], f"module.{path}"] for path in modules(family)}
    if "ldm" in family.blocks:
        for path, inside in ldm_names(family).items():
            spelled.setdefault(path, []).append(f"diffusion_model.{inside}")
    assert {path: [name for name in names if path_in(family, name) != path] for path, names in spelled.items()} == {
        path: [] for path in spelled
    }


def test_without_a_part_the_shape_tells_the_text_encoder() -> None:
    name = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    assert find_paths({name: (5120, 1280)}, {})[name].startswith("text_encoder_2.")
    assert find_paths({name: (3072, 768)}, {})[name].startswith("text_encoder.")


# --- which family ---------------------------------------------------------------------------------------------------


def told(names: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> str:
    """The families that a file with these names and shapes can be of."""
    paths = find_paths(names, metadata or {})
    shapes = {paths[name]: shape for name, shape in names.items()}
    return names_of(candidates(shapes, {"personalize.families": tell_apart(paths, shapes, metadata or {}), **(metadata or {})}))


SELF = "transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("name", "shape", "families"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", (3072, 768), "sdxl or sd35-large or sd3 or sd35-medium"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", (3072, 768), "sd1"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", (3072, 768), "sd1 or sdxl or sd35-large or sd3 or sd35-medium"),
        (f"lora_unet_middle_block_1_{SELF}", (1280, 1280), "sdxl"),
        (f"lora_unet_mid_block_attentions_0_{SELF}", (1280, 1280), "sd1 or sd2"),
        (f"unet.{LAYER.replace('attn2.to_k', 'attn1.to_q')}", (1280, 1280), "sd1 or sd2 or sdxl"),
        (f"lora_unet_{LAYER.replace('.', '_')}", (1280, 768), "sd1"),
        (f"lora_unet_{LAYER.replace('.', '_')}", (1280, 7), "unknown"),
    ],
)
def test_shapes_and_spelling_tell_the_family(name: str, shape: tuple[int, int], families: str) -> None:
    assert told({name: shape}) == families


def test_metadata_tell_the_family_before_the_spelling() -> None:
    assert told({"lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768)}, {"ss_base_model_version": "sd_v1"}) == "sd1"
