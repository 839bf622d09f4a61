"""CLIP's text models, OpenAI's and OpenCLIP's: `CLIPTextModel` under transformers' and single files' names, from a few numbers.

Text encoders that were trained with OpenCLIP (SD2's, and bigG of SDXL) keep q, k and v in one tensor in single files, and the
text projection as x @ W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BaseModelError
from ..formats.header import Address
from ..formats.shapes import Shape
from .family import Family, Layer, Read, split_bias
from .tokens import clip_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from .cond import Cond
    from .text import TextEncoder

_EMBEDDINGS = ("text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding")
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OPENCLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPENCLIP_TOP = {
    "text_model.embeddings.token_embedding": "token_embedding.weight",
    "text_model.embeddings.position_embedding": "positional_embedding",
    "text_model.final_layer_norm": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
# How files begin its layers' names: a lone text encoder is `lora_te` to most tools, and `lora_te1` to some.
_SPOKEN = {"text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}


@dataclass(frozen=True)
class Clip:
    """The numbers of a `CLIPTextModel`, how files name it, and which of its layers the denoiser listens to."""

    width: int
    layer_count: int
    kohya: str = "lora_te"  # what kohya's tools begin its layers' names with
    projection: bool = False  # CLIPTextModelWithProjection
    part: str = "text_encoder"  # where pipelines keep it
    prefix: str = "cond_stage_model.transformer."  # of its keys in a single file
    openclip: bool = False  # whether OpenCLIP named what follows, and trained it
    unread: int = 0  # its last layers, which nobody listens to and diffusers leaves out
    layer: int = 1  # that is read, from the last; `clip_skip` may go further back
    normed: bool = True  # whether that goes through the final norm
    optional: ClassVar[bool] = False
    targets: ClassVar[Mapping[str, str]] = {
        "attention": r".*\.self_attn\.(q|k|v|out)_proj",
        "feedforward": r".*\.mlp\.fc[12]",
    }

    @property
    def prefixes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.kohya, *_SPOKEN.get(self.part, ())]))

    def layers(self) -> Iterator[Layer]:
        for i in range(self.layer_count):
            layer = f"text_model.encoder.layers.{i}"
            for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield Layer(f"{layer}.self_attn.{leaf}", (self.width, self.width))
            for norm in ("layer_norm1", "layer_norm2"):
                yield Layer(f"{layer}.{norm}", (self.width,))
            yield Layer(f"{layer}.mlp.fc1", (4 * self.width, self.width))
            yield Layer(f"{layer}.mlp.fc2", (self.width, 4 * self.width))
        yield Layer("text_model.final_layer_norm", (self.width,))
        if self.projection:
            yield Layer("text_projection", (self.width, self.width), bias=False)

    def tables(self) -> Sequence[str]:
        return _EMBEDDINGS

    def address(self, path: str) -> Address:
        if not self.openclip:
            return Address(self.prefix + ".".join(split_bias(path)))
        if path == "text_projection":
            return Address(f"{self.prefix}text_projection", transposed=True)
        if path in _OPENCLIP_TOP:
            return Address(self.prefix + _OPENCLIP_TOP[path])
        module, kind = split_bias(path)
        number, _, leaf = module.removeprefix("text_model.encoder.layers.").partition(".")
        block = f"{self.prefix}transformer.resblocks.{number}."
        if leaf in _FUSED:
            start = _FUSED.index(leaf) * self.width
            return Address(f"{block}attn.in_proj_{kind}", (start, start + self.width))
        return Address(f"{block}{_OPENCLIP[leaf]}.{kind}")

    def recognise(self, shapes: Mapping[str, Shape]) -> Clip | None:
        table = "token_embedding.weight" if self.openclip else "embeddings.token_embedding.weight"
        own = [key for key in shapes if key.startswith(self.prefix)]
        found = next((shapes[key] for key in own if key.endswith(table)), None)
        mark = "resblocks." if self.openclip else "encoder.layers."
        numbers = {int(key.partition(mark)[2].partition(".")[0]) for key in own if mark in key}
        if found is None or not numbers:
            return None
        return replace(self, width=found[1], layer_count=len(numbers) - self.unread)

    def config(self, tokens: int) -> dict[str, Any]:
        """`tokens` is the size of its vocabulary, whose last two are begin and end."""
        return {
            "vocab_size": tokens,
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.layer_count,
            "num_attention_heads": max(1, self.width // 64),
            "projection_dim": self.width,
            "hidden_act": "gelu" if self.openclip else "quick_gelu",
            "max_position_embeddings": 77,
            "bos_token_id": tokens - 2,
            "eos_token_id": tokens - 1,
            "pad_token_id": 0 if self.openclip else tokens - 1,
        }

    def model(self) -> Any:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        return CLIPTextModelWithProjection if self.projection else CLIPTextModel

    def load_tokenizer(self, folder: Path) -> Any:
        return load_tokenizer(folder)

    def own_tokenizer(self) -> Any:
        return clip_tokenizer("!") if self.openclip else clip_tokenizer()

    def reader(self, tokenizer: Any, model: Any, clip_skip: int = 1) -> TextEncoder:
        from .text import TextEncoder

        layer = max(clip_skip, self.layer)
        if layer > model.config.num_hidden_layers:
            raise BaseModelError(f"--clip-skip {clip_skip}, but the text encoder has {model.config.num_hidden_layers} layers")
        return TextEncoder(self.part, tokenizer, model, layer, self.normed)


def side_by_side(family: Family, read: Sequence[Read]) -> Cond:
    """The states of all text encoders side by side; where the denoiser is told sizes, the last one's projection too."""
    import torch

    from .cond import Cond

    return Cond(torch.cat([states for states, _ in read], dim=-1), read[-1][1] if family.denoiser.sized else None)
