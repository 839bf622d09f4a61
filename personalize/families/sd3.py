"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): a transformer on a rectified flow, with 16-channel latents.

It listens to two CLIPs side by side, to T5 behind them, and to the projections of both CLIPs.

Its kohya files are written under diffusers' names (`lora_transformer_transformer_blocks_0_attn_to_q`), as OneTrainer's are and
ComfyUI reads: q, k and v are layers of their own here, and sd-scripts' names know only the three fused
(`lora_unet_joint_blocks_0_x_block_attn_qkv`), of which three adapters of one rank are not an adapter of that rank. What else
sd-scripts names is read. Single files are not: two of their layers hold scale and shift the other way round, and T5's
tokenizer is in none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BaseModelError
from ..formats.shapes import Shape
from ..text import first_line
from .clip import Clip
from .emphasis import pieces
from .family import Family, LatentFormat, Layer, Read, TextRow
from .noise import Flow
from .words import Words, everywhere, speaking, spell, tokenize

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .cond import Cond

LENGTH = 256  # tokens that T5 reads, as in diffusers' pipeline
_LDM = {  # diffusers' name of a layer inside a block => that of single files and sd-scripts, which fuse q, k and v
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


@dataclass(frozen=True)
class Mmdit:
    """The numbers of an `SD3Transformer2DModel` that decide its module names and weight shapes."""

    count: int  # of blocks
    heads: int
    head: int = 64  # channels of each
    context: int = 4096  # joint_attention_dim
    pooled: int = 2048  # pooled_projection_dim
    latent: int = 16
    patch: int = 2
    dual: int = 0  # so many first blocks have a second attention, of the image alone
    normed: bool = False  # RMS norms of queries and keys
    side: int = field(default=128, compare=False)  # of the latents that it was trained at
    largest: int = field(default=192, compare=False)  # pos_embed_max_size, in patches

    part: ClassVar[str] = "transformer"
    sized: ClassVar[bool] = False
    prefixes: ClassVar[tuple[str, ...]] = ("lora_transformer", "lora_unet", "lycoris")
    text_layers: ClassVar[str] = ""  # the text changes from block to block
    targets: ClassVar[Mapping[str, str]] = {
        "attention": r".*\.attn2?\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)",
        "self-attention": r".*\.attn2\.to_(q|k|v|out\.0)",
        "feedforward": r".*\.ff(_context)?\.net\.(0\.proj|2)",
        "modulation": r".*\.norm1(_context)?\.linear",
    }

    @property
    def width(self) -> int:
        """Channels of its tokens."""
        return self.heads * self.head

    @property
    def multiple(self) -> int:
        return self.patch

    @property
    def structure(self) -> str:
        return "dual" if self.dual else "normed" if self.normed else "plain"

    def layers(self) -> Iterator[Layer]:
        d = self.width
        yield Layer("pos_embed.proj", (d, self.latent, self.patch, self.patch))
        yield Layer("time_text_embed.timestep_embedder.linear_1", (d, 256))
        yield Layer("time_text_embed.timestep_embedder.linear_2", (d, d))
        yield Layer("time_text_embed.text_embedder.linear_1", (d, self.pooled))
        yield Layer("time_text_embed.text_embedder.linear_2", (d, d))
        yield Layer("context_embedder", (d, self.context))
        for i in range(self.count):
            yield from self._block(f"transformer_blocks.{i}", i < self.dual, i == self.count - 1)
        yield Layer("norm_out.linear", (2 * d, d))
        yield Layer("proj_out", (self.patch**2 * self.latent, d))

    def _block(self, path: str, dual: bool, last: bool) -> Iterator[Layer]:
        """A block; the last one leaves the text as it is."""
        d = self.width
        yield Layer(f"{path}.norm1.linear", ((9 if dual else 6) * d, d))
        yield Layer(f"{path}.norm1_context.linear", ((2 if last else 6) * d, d))
        outs = ("to_out.0",) if last else ("to_out.0", "to_add_out")
        for leaf in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", *outs):
            yield Layer(f"{path}.attn.{leaf}", (d, d))
        for leaf in ("to_q", "to_k", "to_v", "to_out.0") if dual else ():
            yield Layer(f"{path}.attn2.{leaf}", (d, d))
        norms = [f"attn.{norm}" for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
        for norm in (*norms, *(("attn2.norm_q", "attn2.norm_k") if dual else ())) if self.normed else ():
            yield Layer(f"{path}.{norm}", (self.head,), bias=False)
        for ff in ("ff",) if last else ("ff", "ff_context"):
            yield Layer(f"{path}.{ff}.net.0.proj", (4 * d, d))
            yield Layer(f"{path}.{ff}.net.2", (d, 4 * d))

    def tables(self) -> Sequence[str]:
        return ()

    def address(self, path: str) -> None:
        return None

    def model(self) -> Any:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel

    def names_in(self, style: str) -> Mapping[str, str]:
        return _ldm_names(self) if style == "ldm" else {layer.path: layer.path for layer in self.layers()}

    def block_of(self, path: str) -> str:
        """D00, D01, ..., as UIs count the double blocks of such transformers."""
        words = path.split(".")
        return f"D{int(words[1]):02}" if words[0] == "transformer_blocks" else "BASE"

    def blocks(self, attention: bool = False) -> tuple[str, ...]:
        return ("BASE", *(f"D{i:02}" for i in range(self.count)))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Mmdit:
        dual = tuple(config.get("dual_attention_layers") or ())
        if dual != tuple(range(len(dual))) or config.get("qk_norm") not in (None, "rms_norm"):
            raise ValueError("another transformer")
        return cls(
            count=int(config["num_layers"]),
            heads=int(config["num_attention_heads"]),
            head=int(config["attention_head_dim"]),
            context=int(config["joint_attention_dim"]),
            pooled=int(config["pooled_projection_dim"]),
            latent=int(config.get("out_channels") or config["in_channels"]),
            patch=int(config["patch_size"]),
            dual=len(dual),
            normed=config.get("qk_norm") is not None,
        )

    def config(self, texts: Sequence[TextRow]) -> dict[str, Any]:
        return {
            "sample_size": self.side,
            "patch_size": self.patch,
            "in_channels": self.latent,
            "num_layers": self.count,
            "attention_head_dim": self.head,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.context,
            "caption_projection_dim": self.width,
            "pooled_projection_dim": self.pooled,
            "out_channels": self.latent,
            "pos_embed_max_size": self.largest,
            "dual_attention_layers": tuple(range(self.dual)),
            "qk_norm": "rms_norm" if self.normed else None,
        }

    @classmethod
    def recognise(cls, shapes: Mapping[str, Shape]) -> None:
        return None

    @classmethod
    def reads(cls, shapes: Mapping[str, Shape]) -> int:
        return 0

    @staticmethod
    def beside(channels: int, title: str) -> str:
        return f"a model of {title} that reads {channels} more channels than a noisy picture has"

    def forward(self, model: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        said = {"encoder_hidden_states": cond.tokens, "pooled_projections": cond.pooled}
        predicted: Tensor = model(x, timestep=t, **said, return_dict=False)[0]
        return predicted


@cache
def _ldm_names(row: Mmdit) -> Mapping[str, str]:
    """Path => sd-scripts' path, for the layers that have one of their own there; the last block's text modulation is turned."""
    names = {}
    for layer in row.layers():
        words = layer.path.split(".", 2)
        own = _LDM.get(words[2]) if words[0] == "transformer_blocks" else None
        if own and (words[1], words[2]) != (str(row.count - 1), "norm1_context.linear"):
            names[layer.path] = f"joint_blocks.{words[1]}.{own}"
    return names


@dataclass(frozen=True)
class T5:
    """The numbers of a `T5EncoderModel` (version 1.1: gated)."""

    width: int = 4096
    layer_count: int = 24
    inner: int = 10240
    heads: int = 64
    head: int = 64
    part: ClassVar[str] = "text_encoder_3"
    optional: ClassVar[bool] = True
    prefixes: ClassVar[tuple[str, ...]] = ("lora_te3",)
    prefix: ClassVar[str] = ""
    targets: ClassVar[Mapping[str, str]] = {
        "attention": r".*\.SelfAttention\.[qkvo]",
        "feedforward": r".*\.DenseReluDense\.w[io](_[01])?",
    }

    def layers(self) -> Iterator[Layer]:
        d, inside = self.width, self.heads * self.head
        for block in (f"encoder.block.{i}" for i in range(self.layer_count)):
            for leaf in "qkv":
                yield Layer(f"{block}.layer.0.SelfAttention.{leaf}", (inside, d), bias=False)
            yield Layer(f"{block}.layer.0.SelfAttention.o", (d, inside), bias=False)
            for leaf in ("wi_0", "wi_1"):
                yield Layer(f"{block}.layer.1.DenseReluDense.{leaf}", (self.inner, d), bias=False)
            yield Layer(f"{block}.layer.1.DenseReluDense.wo", (d, self.inner), bias=False)
            for i in range(2):
                yield Layer(f"{block}.layer.{i}.layer_norm", (d,), bias=False)
        yield Layer("encoder.final_layer_norm", (d,), bias=False)

    def tables(self) -> Sequence[str]:
        return "shared", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"

    def address(self, path: str) -> None:
        return None

    def recognise(self, shapes: Mapping[str, Shape]) -> None:
        return None

    def config(self, tokens: int) -> dict[str, Any]:
        return {
            "vocab_size": tokens,
            "d_model": self.width,
            "d_kv": self.head,
            "d_ff": self.inner,
            "num_layers": self.layer_count,
            "num_heads": self.heads,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        }

    def model(self) -> Any:
        from transformers import T5EncoderModel

        return T5EncoderModel

    def load_tokenizer(self, folder: Path) -> Any:
        from transformers import T5TokenizerFast

        try:
            return T5TokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise BaseModelError(f"{folder} cannot be loaded: {first_line(error)}", "is the download complete?") from error

    def own_tokenizer(self) -> Any:
        raise BaseModelError("T5's tokenizer did not come along", "give the diffusers folder of the base")

    def reader(self, tokenizer: Any, model: Any, clip_skip: int = 1) -> T5Reader:
        return T5Reader(tokenizer, model)


@dataclass(frozen=True, eq=False)
class T5Reader:
    """T5 and its tokenizer: reads the first LENGTH tokens of a prompt; what UIs' brackets weigh weighs alike."""

    tokenizer: Any
    model: Any
    part: str = T5.part
    layer: int = 1
    window: int = LENGTH
    words: Words = field(default_factory=dict)  # that stand for vectors, and not for the tokenizer's tokens
    emphasis: float = 1.0  # which it does not read, as it reads no weights

    def windows(self, prompt: str, weighted: bool = False, shuffled: bool = False) -> int:
        """It reads a prompt at once."""
        return 1

    def chunks(self, prompt: str, weighted: bool) -> list[list[tuple[int, float]]]:
        """A prompt's tokens, all in one."""
        text = "".join(piece for piece, _ in pieces(prompt)) if weighted else prompt
        return [[(token, 1.0) for token in tokenize(text, self.words, self._ids)]]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def vectors_of(self, text: str, count: int) -> Any:
        """So many vectors [count, width] that say what a text says, as far as so many can: see `spell`."""
        return spell(self.model, self._ids(text), count)

    def embed(self, prompts: Sequence[list[list[tuple[int, float]]]], windows: int) -> Read:
        """Prompts in chunks => hidden states [b, LENGTH, d]."""
        import torch

        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        rows = [[*(token for token, _ in chunk[: LENGTH - 1]), end] for (chunk,) in prompts]
        ids = torch.tensor([row + [pad] * (LENGTH - len(row)) for row in rows])
        with speaking(self.model, ids.to(self.model.get_input_embeddings().weight.device), self.words) as known:
            return self.model(known)[0], None

    def blank(self, rows: int, windows: int, dtype: torch.dtype, run: bool) -> Read:
        """The shapes of what so many prompts would give, in zeros; what the model itself gives for zeros, if it is to `run`."""
        import torch

        if run:
            with everywhere(self.model, self.words):
                return self.model(torch.zeros(rows, LENGTH, dtype=torch.long))[0], None
        return torch.zeros(rows, LENGTH, self.model.config.d_model, dtype=dtype), None


def joint(family: Family, read: Sequence[Read]) -> Cond:
    """The CLIPs side by side and filled up with zeros, T5 (or zeros, without it) behind them; the projections side by side."""
    import torch

    from .cond import Cond

    assert isinstance(family.denoiser, Mmdit)
    width, clips = family.denoiser.context, torch.cat([states for states, _ in read[:2]], dim=-1)
    pooled = torch.cat([projected for _, projected in read if projected is not None], dim=-1)
    clips = torch.nn.functional.pad(clips, (0, width - clips.shape[-1]))
    behind = read[2][0] if len(read) > 2 else clips.new_zeros(len(clips), LENGTH, width)
    return Cond(torch.cat([clips, behind], dim=1), pooled)


_TEXTS = (
    Clip(768, 12, "lora_te1", projection=True, layer=2, normed=False),
    Clip(1280, 32, "lora_te2", projection=True, part="text_encoder_2", openclip=True, layer=2, normed=False),
    T5(),
)


def _row(name: str, title: str, denoiser: Mmdit, version: str) -> Family:
    return Family(
        name,
        title,
        denoiser,
        _TEXTS,
        joint,
        f"sd3_{version}",  # sd-scripts' words
        f"stable-diffusion-3-{version}/lora",
        preset="sd35",
        pipeline="StableDiffusion3Pipeline",
        latents=LatentFormat(channels=16, scale=1.5305, shift=0.0609, side=1024, upcast=True),
        noise=Flow.of,
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    )


LARGE = _row("sd35-large", "SD 3.5 Large", Mmdit(38, 38, normed=True), "5-large")
MEDIUM = _row("sd35-medium", "SD 3.5 Medium", Mmdit(24, 24, dual=13, normed=True, largest=384), "5-medium")
SD3 = _row("sd3", "SD 3", Mmdit(24, 24), "m")
