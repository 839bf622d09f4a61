"""Adapter files that other people's code wrote, with the dW that its own forward pass applies. No tests in here.

Every stranger is made on real layers of pocket's UNet and text encoder: the library puts its modules on them, each parameter gets
seeded noise (so that nothing is zero), the library saves the file, and dW is read off its forward pass: what a layer answers to
unit inputs, with the adapter less without. LyCORIS's `get_diff_weight` is no such truth: for LoHa and LoKr it applies
alpha / rank twice, its forward pass once. Nothing here calls our own reader or writer.

`lycoris`, `peft` and `diffusers` are the libraries themselves. `by_hand` writes what no library writes any more, or what cannot
be installed: kohya's networks/lora.py and networks/oft.py, LyCORIS 1 and diffusers before 0.22, with the arithmetic of their
forward passes.

transformers >= 5.6 has lost the `text_model` level of CLIPTextModel. LyCORIS names its files after modules, so it sees the
encoder inside a module that has the level (`Older`), as every real file does. peft and diffusers name theirs without it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from personalize.models.model import Base

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0")
FEEDFORWARD = f"{BLOCK}.ff.net.2"
CONVS = ("unet.down_blocks.1.resnets.0.conv1", "unet.down_blocks.1.resnets.0.conv_shortcut")  # 3x3 and 1x1
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
LAYERS = (*ATTENTION, FEEDFORWARD, *CONVS, TEXT)
NORMS = (f"{BLOCK}.norm1", "unet.down_blocks.1.resnets.0.norm1", "text_encoder.text_model.encoder.layers.0.layer_norm1")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Stranger:
    """A file and what it means: canonical path => dW, and under the same paths the base's own weights."""

    path: Path
    deltas: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, a library may warn and log: that is its own affair. Its draws do not move the caller's random numbers."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        logging.disable(before)


# ---------------------------------------------------------------- what a layer does


@cache
def base() -> dict[str, Any]:
    """Pocket's parts, never changed: every stranger is made on a copy."""
    return Base.load("pocket").parts


def cut(paths: Iterable[str]) -> dict[str, Any]:
    """Copies of these layers of the base, in parts with nothing else in them: the same names, and quickly made."""
    parts: dict[str, Any] = {path.partition(".")[0]: nn.Module() for path in paths}
    for path in paths:
        part, _, rest = path.partition(".")
        module, *names = parts[part], *rest.removeprefix("text_model.").split(".")
        for name in names[:-1]:
            if not hasattr(module, name):
                module.add_module(name, nn.Module())
            module = getattr(module, name)
        module.add_module(names[-1], copy.deepcopy(layer(base(), path)))
    return parts


def layer(parts: Mapping[str, Any], path: str) -> Any:
    """The module at a canonical path."""
    part, _, inside = path.partition(".")
    return parts[part].get_submodule(inside.removeprefix("text_model."))


def inside(paths: Iterable[str], part: str) -> list[str]:
    """The paths of a part, as its own modules are called."""
    own = [path.partition(".")[2] for path in paths if path.startswith(f"{part}.")]
    return [path.removeprefix("text_model.") for path in own]


@torch.no_grad()
def truth(parts: Mapping[str, nn.Module], paths: tuple[str, ...]) -> dict[str, Tensor]:
    """Path => dW, and path.bias => db where the bias changes: what the layers of `parts` do beyond the base's own.

    Layers in fp64 tell it to the last digit; those in fp32 less well, as a difference of large numbers.
    """
    found = {}
    for path in paths:
        new, old = layer(parts, path).eval(), own_layer(path)
        dtype = next(new.parameters(), torch.empty(0).double()).dtype
        measure = norm_change if "Norm" in type(old).__name__ else weight_change
        weight, bias = measure(lambda x, new=new, old=old, dtype=dtype: new(x.to(dtype)).double() - old(x), old)
        found[path] = weight.float()
        if bias.abs().max() > 1e-4:
            found[f"{path}.bias"] = bias.float()
    return found


@cache
def own_layer(path: str) -> Any:
    """The base's own layer in fp64. It is asked the same of every stranger, and remembers what it answered to each shape."""
    module = copy.deepcopy(layer(base(), path)).double()
    answers, forward = dict[torch.Size, Tensor](), module.forward
    module.forward = lambda x: answers[x.shape] if x.shape in answers else answers.setdefault(x.shape, forward(x))
    return module


def in_double(parts: Mapping[str, Any], paths: Iterable[str]) -> None:
    """These layers in fp64, with whatever is attached to them."""
    for path in paths:
        layer(parts, path).double()


def weight_change(change: Callable[[Tensor], Tensor], old: Any) -> tuple[Tensor, Tensor]:
    """dW and db of a linear layer or an odd, centred convolution of stride 1, from its answers to unit inputs."""
    _, width, *kernel = old.weight.shape
    units = torch.zeros(width, width, *kernel).double()
    units[(..., *(side // 2 for side in kernel))] = torch.eye(width).double()
    bias = change(0 * units[:1])  # over a kernel, the same everywhere
    answers = change(units) - bias
    return answers.flip([2, 3][: len(kernel)]).transpose(0, 1), bias.flatten(1).unflatten(1, (len(old.weight), -1))[0, :, 0]


def norm_change(change: Callable[[Tensor], Tensor], old: Any) -> tuple[Tensor, Tensor]:
    """dw and db of a LayerNorm or GroupNorm: the line through each channel's answers over its normalised inputs."""
    x = torch.randn(64, len(old.weight), generator=torch.Generator().manual_seed(3)).double()
    plain, y = (old(x) - old.bias) / old.weight, change(x)
    centred = plain - plain.mean(0)
    slope = (centred * y).sum(0) / centred.square().sum(0)
    return slope, y.mean(0) - slope * plain.mean(0)


def weights(paths: Iterable[str]) -> dict[str, Tensor]:
    """The base's weights under the paths of deltas."""
    modules = {path: layer(base(), path.removesuffix(".bias")) for path in paths}
    return {path: (one.bias if path.endswith(".bias") else one.weight).detach().clone() for path, one in modules.items()}


@torch.no_grad()
def fill(parameters: Iterable[nn.Parameter], dtype: torch.dtype, *, whole: bool = True) -> None:
    """Noise on every parameter, rounded so that the file's dtype holds the `whole` of it, or else the noise, exactly."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_((parameter.float() + noise).to(dtype) if whole else parameter + noise.to(dtype))


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of an adapter in a frozen model."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, through safetensors itself."""
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata() or {}


# ---------------------------------------------------------------- LyCORIS


class Older(nn.Module):
    """CLIPTextModel as transformers < 5.6 had it: everything one level down, in `text_model`."""

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model


USUAL = "network_dim=4 network_alpha=2 conv_dim=3 conv_alpha=1"
LYCORIS = {  # kind => what a user types behind --network_args
    "locon": "algo=locon",
    "locon rs": "algo=locon rs_lora=True conv_dim=4",
    "locon scalar": "algo=locon use_scalar=True",
    "locon tucker": "algo=locon use_tucker=True",
    "loha": "algo=loha",
    "loha rs": "algo=loha rs_lora=True conv_dim=4",
    "loha scalar": "algo=loha use_scalar=True",
    "loha tucker": "algo=loha use_tucker=True",
    "lokr": "algo=lokr",
    "lokr rs": "algo=lokr rs_lora=True conv_dim=4",
    "lokr scalar": "algo=lokr use_scalar=True",
    "lokr tucker": "algo=lokr use_tucker=True",
    "lokr full": "algo=lokr full_matrix=True",
    "lokr both": "algo=lokr decompose_both=True network_dim=2 conv_dim=2 network_alpha=3",
    "lokr both tucker": "algo=lokr decompose_both=True use_tucker=True network_dim=2 conv_dim=2 network_alpha=3",
    "lokr factor": "algo=lokr factor=4",
    "lokr factored w1": "algo=lokr decompose_both=True factor=48 network_dim=2 conv_dim=2",
    "lokr unbalanced": "algo=lokr factor=6 unbalanced_factorization=True",
    "dora": "algo=locon dora_wd=True",
    "dora on input": "algo=locon dora_wd=True wd_on_output=False",
    "dora tucker": "algo=locon dora_wd=True use_tucker=True",
    "dora loha": "algo=loha dora_wd=True",
    "dora loha on input": "algo=loha dora_wd=True wd_on_output=False",
    "dora lokr": "algo=lokr dora_wd=True",
    "dora lokr on input": "algo=lokr dora_wd=True wd_on_output=False",
    "diag-oft": "algo=diag-oft",
    "diag-oft constrained": "algo=diag-oft constraint=0.00390625",
    "diag-oft loose": "algo=diag-oft constraint=1",
    "diag-oft rescaled": "algo=diag-oft rescaled=True",
    "diag-oft both": "algo=diag-oft constraint=0.00390625 rescaled=True network_dim=8",
    "boft": "algo=boft network_dim=8 conv_dim=8",
    "boft constrained": "algo=boft network_dim=8 conv_dim=8 constraint=0.00390625",
    "boft rescaled": "algo=boft network_dim=12 conv_dim=12 rescaled=True",
    "glora": "algo=glora",
    "ia3": "algo=ia3",
    "ia3 on input": "algo=ia3",
    "full": "algo=full",
    "norms": "algo=locon train_norm=True",
}


@cache
def lycoris(kind: str, folder: Path, dtype: str) -> Stranger:
    """A file that LyCORIS wrote, all in `dtype`, as kohya's trainer has it written."""
    paths = LAYERS + NORMS if kind == "norms" else LAYERS
    path = folder / f"{kind} {dtype}.safetensors"
    with quietly():
        parts = cut(paths)
        network = lycoris_network(kind, parts, paths)
        if "oft" not in kind:  # these are fp32 inside, whatever they are given
            network.double()
            in_double(parts, paths)
        fill(network.parameters(), DTYPES[dtype], whole=kind != "full")
        for lora in network.loras if "scalar" in kind else ():
            lora.scalar.data.fill_(0.5)  # it is saved inside a factor, which must not need more digits
        deltas = truth(parts, paths)
        for lora in network.loras:
            check_merge(lora, deltas[lycoris_names(paths)[lora.lora_name]])
        network.save_weights(str(path), DTYPES[dtype], {"ss_network_module": "lycoris.kohya"})
    return Stranger(path, deltas, weights(deltas))


def lycoris_names(paths: Iterable[str]) -> dict[str, str]:
    """The names that files give to modules => their paths."""
    prefixed = {path: path.replace("unet.", "lora_unet.", 1).replace("text_encoder.", "lora_te.", 1) for path in paths}
    return {name.replace(".", "_"): path for path, name in prefixed.items()}


def lycoris_network(kind: str, parts: Mapping[str, nn.Module], paths: tuple[str, ...]) -> Any:
    """LyCORIS's modules on these layers, as kohya's trainer makes them."""
    from lycoris.kohya import PRESET, create_network

    text_names = [f"text_model.{name}" for name in inside(paths, "text_encoder")]
    names = [*inside(paths, "unet"), *text_names]
    PRESET["strangers"] = {
        "unet_target_module": [],
        "unet_target_name": inside(paths, "unet"),
        "text_encoder_target_module": [],
        "text_encoder_target_name": text_names,
        "use_fnmatch": True,  # else names are regular expressions that match beginnings
        "name_algo_map": {name: {"algo": "ia3", "train_on_input": True} for name in names if kind == "ia3 on input"},
    }
    typed: dict[str, Any] = dict(pair.split("=") for pair in f"{USUAL} {LYCORIS[kind]}".split())
    rank, alpha = (int(typed.pop(name)) for name in ("network_dim", "network_alpha"))
    text, unet = Older(parts["text_encoder"]), parts["unet"]
    network = create_network(1.0, rank, alpha, None, text, unet, preset="strangers", warn_on_unmatched=False, **typed)
    network.apply_to(text, unet, apply_text_encoder=True, apply_unet=True)
    assert len(network.loras) == len(paths)
    return network.eval()


@torch.no_grad()
def check_merge(lora: Any, delta: Tensor) -> None:
    """LyCORIS's other account of the same module, where it is right: its merged weight."""
    if type(lora).__name__ in ("LohaModule", "LokrModule") and not lora.scale == lora.scalar == 1:
        return  # these merge with the square of alpha / rank, and without the scalar
    if lora.name == "norm":
        merged, _ = lora.get_diff_weight()
    else:
        merged = lora.get_merged_weight(shape=lora.org_weight.shape)[0] - lora.org_weight
    torch.testing.assert_close(merged.float(), delta, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- peft

PATTERNS = {"rank_pattern": {"to_q": 9, "conv1": 3}, "alpha_pattern": {"attn1.to_q": 5, "q_proj": 1, "conv1": 2.5}}
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "patterns": ("LoraConfig", {"r": 4, "lora_alpha": 6, **PATTERNS}),
    "rslora patterns": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True, **PATTERNS}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "dora rslora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": True}),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 6}),
    "loha tucker": ("LoHaConfig", {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "loha patterns": ("LoHaConfig", {"r": 4, "alpha": 6, **PATTERNS}),
    "lokr": ("LoKrConfig", {"r": 4, "alpha": 6}),
    "lokr tucker": ("LoKrConfig", {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "lokr full": ("LoKrConfig", {"r": 64, "alpha": 160}),
    "lokr both": ("LoKrConfig", {"r": 2, "alpha": 6, "decompose_both": True}),
    "lokr factor": ("LoKrConfig", {"r": 4, "alpha": 6, "decompose_factor": 4}),
    "lokr patterns": ("LoKrConfig", {"r": 4, "alpha": 6, **PATTERNS}),
}


RESIDUAL = ("pissa", "olora")  # starts for which peft takes the adapter's first dW off the base's own weights


@cache
def peft(kind: str, part: str, folder: Path, dtype: str) -> Stranger:
    """What `save_pretrained` writes of one part: a folder with the weights, in `dtype`, and their config."""
    import peft as library

    name, options = PEFT.get(kind) or ("LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": kind})
    paths = tuple(path for path in LAYERS if path.startswith(f"{part}.") and not (kind in RESIDUAL and path in CONVS))
    own = folder / f"{kind} {part} {dtype}"
    with quietly():
        parts = cut(paths)
        config = getattr(library, name)(target_modules=inside(paths, part), **options)
        wrapped = library.get_peft_model(parts[part], config)
        in_double(parts, paths)
        fill(trained(wrapped), DTYPES[dtype])
        deltas = truth(parts, paths)
        for path in paths:
            if kind not in RESIDUAL and not options.get("use_dora"):  # peft's other account of the same layer
                second = layer(parts, path).get_delta_weight("default").detach().float()
                torch.testing.assert_close(second, deltas[path], rtol=1e-3, atol=1e-5)
        wrapped.save_pretrained(str(own))
    path = own / "adapter_model.safetensors"
    tensors, metadata = read(path)
    save_file({key: tensor.to(DTYPES[dtype]) for key, tensor in tensors.items()}, path, metadata)
    return Stranger(path, deltas, weights(deltas))


# ---------------------------------------------------------------- diffusers

DIFFUSERS = ("plain", "metadata", "metadata dora", "script", "script with convolutions")


@cache
def diffusers(kind: str, folder: Path, dtype: str) -> Stranger:
    """What `StableDiffusionPipeline.save_lora_weights` writes of both parts.

    "plain" has no LoraConfig in its header, so alpha = rank; "script" goes through convert_state_dict_to_diffusers, as
    diffusers' training scripts do, which renames attention layers and leaves convolutions and the feed-forward alone.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    paths, alpha = ((*ATTENTION, TEXT) if kind == "script" else LAYERS), (6 if "metadata" in kind else 4)
    name, layers = f"diffusers {kind} {dtype}.safetensors", {}
    with quietly():
        parts = copy.deepcopy(base())
        for part, model in parts.items():
            model.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=inside(paths, part), use_dora="dora" in kind))
            in_double(parts, [path for path in paths if path.startswith(f"{part}.")])
            fill(trained(model), DTYPES[dtype])
            state = get_peft_model_state_dict(model)
            state = convert_state_dict_to_diffusers(state) if "script" in kind else state
            layers[f"{part}_lora_layers"] = {key: value.to(DTYPES[dtype]) for key, value in state.items()}
        metadata = _collate_lora_metadata(parts) if "metadata" in kind else {}
        StableDiffusionPipeline.save_lora_weights(folder, **layers, **metadata, weight_name=name)
        deltas = truth(parts, paths)
    return Stranger(folder / name, deltas, weights(deltas))


def as_diffusers_reads(path: Path, paths: tuple[str, ...]) -> dict[str, Tensor]:
    """dW as diffusers' own loader and forward pass have it."""
    from diffusers import StableDiffusionPipeline as Pipeline

    with quietly():
        parts = copy.deepcopy(base())
        state, alphas, metadata = Pipeline.lora_state_dict(path, return_lora_metadata=True)
        if not any(key.startswith("unet.") for key in state):  # UNet2DConditionModel.load_attn_procs has forgotten its own files
            state = {f"unet.{key}": value for key, value in state.items()}
        Pipeline.load_lora_into_unet(state, alphas, parts["unet"], metadata=metadata)
        Pipeline.load_lora_into_text_encoder(state, alphas, parts["text_encoder"], prefix="text_encoder", metadata=metadata)
        in_double(parts, paths)
        return truth(parts, paths)


# ---------------------------------------------------------------- by hand

BY_HAND = {  # kind => layers
    "kohya": LAYERS,
    "kohya oft": LAYERS[:-1],  # it has none for text encoders
    "lycoris glora 1": (ATTENTION[0], FEEDFORWARD),
    "lycoris dylora": LAYERS,
    "diffusers 0.10 processors": ATTENTION,
    "diffusers 0.14 processors": ATTENTION,
    "diffusers 0.18 text attention": (*ATTENTION, TEXT, TEXT.replace("q_proj", "out_proj")),
    "diffusers 0.20 layers": LAYERS,
    "diffusers 0.20 alphas": LAYERS,
    "diffusers 0.20 unet alone": LAYERS[:-1],
}


@cache
def by_hand(kind: str, folder: Path, dtype: str) -> Stranger:
    """A file as tools wrote it that cannot be run here."""
    generator = torch.Generator().manual_seed(2)
    make = {
        "kohya": kohya,
        "kohya oft": kohya_oft,
        "lycoris glora 1": old_glora,
        "lycoris dylora": dylora,
        "diffusers 0.20 alphas": kohya,
    }.get(kind, plain)
    tensors, deltas = {}, {}
    for path in BY_HAND[kind]:
        own, deltas[path] = make(layer(base(), path).weight.detach(), DTYPES[dtype], generator)
        tensors |= {hand_key(kind, path, role): tensor.contiguous() for role, tensor in own.items()}
    path = folder / f"{kind} {dtype}.safetensors"
    save_file(tensors, path, {"format": "pt"})
    return Stranger(path, deltas, weights(deltas))


Made = tuple[dict[str, Tensor], Tensor]  # tensors by role, dW


def plain(weight: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Made:
    """Two factors of rank 4; dW = up @ down."""
    out, *rest = weight.shape
    down = (0.2 * torch.randn(4, *rest, generator=generator)).to(dtype)
    up = (0.2 * torch.randn(out, 4, *[1] * (len(rest) - 1), generator=generator)).to(dtype)
    return {"up": up, "down": down}, (up.flatten(1).float() @ down.flatten(1).float()).reshape(weight.shape)


def kohya(weight: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Made:
    """LoRAModule of kohya's networks/lora.py: dW = alpha / rank * up @ down, the alpha stored in the file's dtype."""
    own, delta = plain(weight, dtype, generator)
    return own | {"alpha": torch.tensor(2.0, dtype=dtype)}, delta * 2 / 4


def dylora(weight: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Made:
    """DyLoraModule of LyCORIS, whose forward pass takes a few ranks by chance: `lora_up` is flat, also of convolutions."""
    own, delta = kohya(weight, dtype, generator)
    return own | {"up": own["up"].flatten(1)}, delta


def kohya_oft(weight: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Made:
    """OFTModule of kohya's networks/oft.py, 4 blocks: alpha times the width is the most that the norm of all Q may be."""
    alpha, size = 2**-8, len(weight) // 4
    stored = (0.1 * torch.randn(4, size, size, generator=generator)).to(dtype)
    skew = stored.float() - stored.float().transpose(1, 2)
    norm = skew.flatten().norm()
    skew = skew * (norm.clamp(max=alpha * len(weight)) + 1e-8) / (norm + 1e-8)
    rotation = (torch.eye(size) + skew) @ (torch.eye(size) - skew).inverse()
    rotated = torch.einsum("knm,kn...->km...", rotation, weight.reshape(4, size, *weight.shape[1:]))
    return {"oft_blocks": stored, "alpha": torch.tensor(alpha, dtype=dtype)}, rotated.reshape(weight.shape) - weight


def old_glora(weight: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Made:
    """GLoRA of LyCORIS 1, rank 4: each pair the other way round, dW = alpha / rank * (W @ a2 @ a1 + b2 @ b1)."""
    out, width = weight.shape
    shapes = {"a1": (4, width), "a2": (width, 4), "b1": (4, width), "b2": (out, 4)}
    own = {name: (0.1 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
    a1, a2, b1, b2 = (tensor.float() for tensor in own.values())
    return own | {"alpha": torch.tensor(2.0, dtype=dtype)}, 2 / 4 * (weight @ a2 @ a1 + b2 @ b1)


def hand_key(kind: str, path: str, role: str) -> str:
    """The key of a layer's tensor in a file of this kind."""
    if not kind.startswith("diffusers"):
        ((name, _),) = lycoris_names([path]).items()
        leaves = {"up": "lora_up.weight", "down": "lora_down.weight", "alpha": "alpha", "oft_blocks": "oft_blocks"}
        return f"{name.replace('lora', 'oft') if 'oft' in kind else name}.{leaves.get(role, f'{role}.weight')}"
    block, _, leaf = path.removesuffix(".0").rpartition(".")
    text = path.startswith("text_encoder.")
    if kind == "diffusers 0.18 text attention" and text:
        return f"{block}.to_{leaf.removesuffix('_proj')}_lora.{role}.weight"
    if "processors" in kind or "text attention" in kind:  # 0.10 had no part in front: UNet2DConditionModel.save_attn_procs
        return f"{block.removeprefix('unet.') if '0.10' in kind else block}.processor.{leaf}_lora.{role}.weight"
    if role == "alpha":
        return f"{path}.alpha"
    stem = path.removeprefix("unet.") if "alone" in kind else path
    return f"{stem}.lora_linear_layer.{role}.weight" if text else f"{stem}.lora.{role}.weight"


# ---------------------------------------------------------------- words

EMBEDDINGS = {  # file kind => key => width
    "emb_params": {"emb_params": 192},  # A1111's, and kohya's of SD1 and SD2
    "clip_l clip_g": {"clip_l": 768, "clip_g": 1280},  # kohya's of SDXL
    "<zwx>": {"<zwx>": 192},  # diffusers': the word is the key
}


@cache
def embedding(kind: str, folder: Path, dtype: str) -> tuple[Path, dict[str, Tensor]]:
    """A textual inversion of three vectors as UIs save it, and its tensors."""
    generator = torch.Generator().manual_seed(4)
    tensors = {key: torch.randn(3, width, generator=generator).to(DTYPES[dtype]) for key, width in EMBEDDINGS[kind].items()}
    path = folder / f"embedding {len(kind)} {dtype}.safetensors"
    save_file(tensors, path, {"format": "pt"})
    return path, tensors
