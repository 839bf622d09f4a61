"""Each host's own rule from a name in a file to the layer: what stands before a tensor's role, family => canonical path.

"" is a name that the host does not know. From the hosts' sources and not from our tables of names; no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache

from ..families.clip import Clip
from ..families.family import Family, weights
from ..families.unet import UNet


def from_openclip(path: str, family: Family) -> bool:
    return path.startswith("text_encoder_2.") or (family.name == "sd2" and path.startswith("text_encoder."))


# --- LDM's layers, as ComfyUI counts them ----------------------------------------------------------------------------

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
_RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_INNER = ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"]
_INNER += [f"attn{i}.to_{leaf}" for i in (1, 2) for leaf in ("q", "k", "v", "out.0")]


def _unet(family: Family) -> UNet:
    """The denoiser of the families that the rows below know."""
    assert isinstance(family.denoiser, UNet)
    return family.denoiser


@cache
def _layers(row: UNet) -> Mapping[str, str]:
    """diffusers' path => LDM's, for every layer that a UNet of these counts may have, and some that it lacks."""
    found = dict(_OUTER)
    step = row.layers_per_block + 1
    for level, depth in enumerate(row.depth):
        for i in range(row.layers_per_block):
            found |= _level(f"down_blocks.{level}", i, depth, f"input_blocks.{1 + level * step + i}")
        found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * step}.0.op"
    for level, depth in enumerate(reversed(row.depth)):
        for i in range(step):
            found |= _level(f"up_blocks.{level}", i, depth, f"output_blocks.{level * step + i}")
        found[f"up_blocks.{level}.upsamplers.0.conv"] = (
            f"output_blocks.{level * step + row.layers_per_block}.{2 if depth else 1}.conv"
        )
    for i in range(2):
        found |= {f"mid_block.resnets.{i}.{leaf}": f"middle_block.{2 * i}.{ldm}" for leaf, ldm in _RESNET.items()}
    return found | _attention("mid_block.attentions.0", row.middle, "middle_block.1")


def _level(block: str, i: int, depth: int, ldm: str) -> dict[str, str]:
    resnet = {f"{block}.resnets.{i}.{leaf}": f"{ldm}.0.{name}" for leaf, name in _RESNET.items()}
    return resnet | (_attention(f"{block}.attentions.{i}", depth, f"{ldm}.1") if depth else {})


def _attention(path: str, depth: int, ldm: str) -> dict[str, str]:
    leaves = ["norm", "proj_in", "proj_out"]
    leaves += [f"transformer_blocks.{k}.{leaf}" for k in range(depth) for leaf in _INNER]
    return {f"{path}.{leaf}": f"{ldm}.{leaf}" for leaf in leaves}


# --- ComfyUI ---------------------------------------------------------------------------------------------------------

_CLIP = ("mlp.fc1", "mlp.fc2", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")


@cache
def _comfy(family: Family) -> Mapping[str, str]:
    """Every name => canonical path. Under diffusers' names, attention is that of processors, as diffusers wrote it until 0.21."""
    found: dict[str, str] = {}
    for path, ldm in _layers(_unet(family)).items():
        old = path.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")
        names = [f"lora_unet_{ldm}", f"lora_unet_{path}", f"lycoris_{path}"]
        found |= {name.replace(".", "_"): f"unet.{path}" for name in names}
        found |= {f"diffusion_model.{ldm}": f"unet.{path}", f"unet.{old}": f"unet.{path}", old: f"unet.{path}"}
    for text in family.texts:
        assert isinstance(text, Clip)
        second = text.part == "text_encoder_2" and len(family.texts) > 1
        prefixes = ("lora_te2",) if second else ("lora_te",) if text.projection else ("lora_te", "lora_te1")
        for leaf in (f"text_model.encoder.layers.{i}.{leaf}" for i in range(text.layer_count) for leaf in _CLIP):
            found |= {f"{prefix}_{leaf}".replace(".", "_"): f"{text.part}.{leaf}" for prefix in prefixes}
            found[f"{'text_encoder_2' if second else 'text_encoder'}.{leaf}"] = f"{text.part}.{leaf}"
        if text.projection:
            found["lora_te2_text_projection"] = f"{text.part}.text_projection"
    return found


def comfy_path(stem: str, family: Family) -> str:
    return _comfy(family).get(stem, "")


# --- A1111 -----------------------------------------------------------------------------------------------------------

_IN_LDM = {leaf: ldm.replace(".", "_") for leaf, ldm in _RESNET.items()}
_A1111: tuple[tuple[str, Callable[..., str]], ...] = (  # a UNet's name => LDM's, which it looks for among the model's layers
    (r"conv_in", lambda: "input_blocks_0_0"),
    (r"conv_out", lambda: "out_2"),
    (r"time_embedding_linear_(\d+)", lambda i: f"time_embed_{2 * int(i) - 2}"),
    (r"down_blocks_(\d+)_attentions_(\d+)_(.+)", lambda i, j, leaf: f"input_blocks_{1 + 3 * int(i) + int(j)}_1_{leaf}"),
    (r"down_blocks_(\d+)_resnets_(\d+)_(.+)", lambda i, j, leaf: f"input_blocks_{1 + 3 * int(i) + int(j)}_0_{_in_ldm(leaf)}"),
    (r"down_blocks_(\d+)_downsamplers_0_conv", lambda i: f"input_blocks_{3 + 3 * int(i)}_0_op"),
    (r"mid_block_attentions_(\d+)_(.+)", lambda j, leaf: f"middle_block_1_{leaf}"),
    (r"mid_block_resnets_(\d+)_(.+)", lambda j, leaf: f"middle_block_{2 * int(j)}_{_in_ldm(leaf)}"),
    (r"up_blocks_(\d+)_attentions_(\d+)_(.+)", lambda i, j, leaf: f"output_blocks_{3 * int(i) + int(j)}_1_{leaf}"),
    (r"up_blocks_(\d+)_resnets_(\d+)_(.+)", lambda i, j, leaf: f"output_blocks_{3 * int(i) + int(j)}_0_{_in_ldm(leaf)}"),
    (r"up_blocks_(\d+)_upsamplers_0_conv", lambda i: f"output_blocks_{2 + 3 * int(i)}_{2 if int(i) else 1}_conv"),
)


def _in_ldm(leaf: str) -> str:
    return _IN_LDM.get(leaf, leaf)


@cache
def _ldm_layers(family: Family) -> Mapping[str, str]:
    """LDM's name with underscores => canonical path."""
    return {ldm.replace(".", "_"): f"unet.{path}" for path, ldm in _layers(_unet(family)).items()}


def a1111_path(stem: str, family: Family) -> str:
    for prefix in ("lora_unet_", "oft_unet_"):
        if stem.startswith(prefix):
            name, layers = stem.removeprefix(prefix), _ldm_layers(family)
            spoken = _a1111_name(name) if prefix == "lora_unet_" else name
            return layers.get(spoken) or layers.get(name, "")
    return _a1111_text(stem, family)


def _a1111_name(name: str) -> str:
    for pattern, say in _A1111:
        if found := re.fullmatch(pattern, name):
            return say(*found.groups())
    return name


def _a1111_text(stem: str, family: Family) -> str:
    """CLIP's layers by their own names; those of OpenCLIP are translated, and its norms not. `lora_te1` is CLIP's alone."""
    second = len(family.texts) > 1
    found = re.fullmatch(r"lora_(te|te1|te2)_text_model_(?:encoder_layers_(\d+)_(.+)|(final_layer_norm))", stem)
    if not found or found[1] == ("te" if second else "te2") or (family.name == "sd2" and found[1] == "te1"):
        return ""
    part = "text_encoder_2" if found[1] == "te2" else "text_encoder"
    if found[4]:
        return f"{part}.text_model.final_layer_norm" if found[1] == "te1" else ""
    leaf = re.sub(r"^(self_attn|mlp)_", r"\1.", found[3])
    known = _CLIP if from_openclip(f"{part}.", family) else (*_CLIP, "layer_norm1", "layer_norm2")
    return f"{part}.text_model.encoder.layers.{found[2]}.{leaf}" if leaf in known else ""


# --- diffusers -------------------------------------------------------------------------------------------------------

_WORDS = {  # in this order, on the name with dots for underscores
    "input.blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "input.blocks": "down_blocks",
    "down.blocks": "down_blocks",
    "middle.block": "mid_block",
    "mid.block": "mid_block",
    "output.blocks": "up_blocks",
    "up.blocks": "up_blocks",
    "transformer.blocks": "transformer_blocks",
    **{f"to.{leaf}": f"to_{leaf}" for leaf in ("q", "k", "v", "out")},
    "proj.in": "proj_in",
    "proj.out": "proj_out",
    "emb.layers.1": "time_emb_proj",
    "conv.in": "conv_in",
    "conv.out": "conv_out",
    "time.embed.0": "time_embedding.linear_1",
    "time.embed.2": "time_embedding.linear_2",
    "label.emb.0.0": "add_embedding.linear_1",
    "label.emb.0.2": "add_embedding.linear_2",
    "time.embedding.linear.1": "time_embedding.linear_1",
    "time.embedding.linear.2": "time_embedding.linear_2",
    "in.layers.2": "conv1",
    "out.layers.3": "conv2",
    "samplers.0.op": "samplers.0.conv",
    "skip.connection": "conv_shortcut",
    "time.emb.proj": "time_emb_proj",
    "conv.shortcut": "conv_shortcut",
}
_TEXT_WORDS = {"text.model": "text_model", "self.attn": "self_attn", "text.projection": "text_projection"}
_TEXT_WORDS |= {f"{leaf}.proj": f"{leaf}_proj" for leaf in ("q", "k", "v", "out")}
_SGM = re.compile(r"(input|middle|output)_blocks?_(\d+)_(?:(\d+)_)?(.+)")


def diffusers_path(stem: str, family: Family) -> str:
    if not stem.startswith("lora_"):
        return stem if stem in weights(family) else ""  # a path that its model lacks loads nothing, with a warning only
    prefix, _, name = stem.removeprefix("lora_").partition("_")
    if prefix == "unet":
        return f"unet.{_replace_words(_renumber(name, _unet(family).layers_per_block + 1), _WORDS)}"
    return f"{'text_encoder_2' if prefix == 'te2' else 'text_encoder'}.{_replace_words(name, _TEXT_WORDS)}"


def _replace_words(name: str, words: Mapping[str, str]) -> str:
    name = name.replace("_", ".")
    for old, new in words.items():
        name = name.replace(old, new)
    return name


def _renumber(name: str, step: int) -> str:
    """LDM's blocks as diffusers counts them: its second place is always attention, its third an upsampler."""
    found = _SGM.fullmatch(name)
    if not found or name.startswith("input_blocks_0_0"):
        return name
    side, i, inner, leaf = found[1], int(found[2]), int(found[3] or 0), found[4]
    if side == "middle":
        own = re.sub(r"^middle_block_\d+_", "", name)
        return f"mid_block_{'attentions_0' if i == 1 else f'resnets_{i // 2}'}_{own}"
    i -= side == "input"
    place = f"{('resnets', 'attentions')[inner]}_{i % step}" if inner < 2 else "upsamplers_0"
    place = "downsamplers_0" if "op" in leaf.split("_") and side == "input" else place
    return f"{'down' if side == 'input' else 'up'}_blocks_{i // step}_{place}_{leaf}"
