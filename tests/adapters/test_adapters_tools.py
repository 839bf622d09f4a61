"""Adapter files between us and the tools that people use: what they write we read, what we write they draw with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from small import LATENT
from test_adapters import make
from torch import Tensor, nn

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.describe import describe
from personalize.families.names import canonical

MIXED = ("attn", "ff.net", "proj_", "resnets", "samplers", "conv_", "time_embedding", "layers.1.", "layers.3.")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    yield


@pytest.fixture
def pipeline(tiny_base: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_base)


def mixed() -> Adapter:
    """Every kind of layer in both parts, with mixed ranks and alphas."""
    whole = Adapter({})
    for i, pick in enumerate(MIXED):
        new = make(pick=pick, rank=1 + i % 3, alpha=0.5 + i, seed=100 * i)
        whole = Adapter(dict(new.deltas) | dict(whole.deltas))
    return whole


@torch.no_grad()
def outputs(pipe: StableDiffusionPipeline) -> tuple[Tensor, Tensor]:
    """What the UNet predicts [1, c, h, w] and the text encoder says [1, 77, 192] on fixed inputs."""
    latents = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(0))
    words = pipe.text_encoder(torch.arange(77)[None])[0]
    return pipe.unet(latents, torch.tensor([500]), words).sample, words


@torch.no_grad()
def merge(pipe: StableDiffusionPipeline, adapter: Adapter) -> None:
    """Add dW to the weights ourselves."""
    modules = {canonical(f"{part}.{path}"): m for part in adapter.parts for path, m in getattr(pipe, part).named_modules()}
    for path, delta in adapter.deltas.items():
        modules[path].weight += delta.delta()


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> None:
    for a, b, plain in zip(found, wanted, base, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5
        assert float((plain - b).norm() / b.norm()) > 1e-2, "the adapter does nothing"


def updates(model: nn.Module, part: str) -> dict[str, Tensor]:
    """dW of each LoRA layer as peft itself computes it."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            found[canonical(f"{part}.{path.removeprefix('base_model.model.')}")] = module.get_delta_weight("default").detach()
    return found


def assert_updates(adapter: Adapter, wanted: dict[str, Tensor]) -> None:
    assert adapter.deltas.keys() == wanted.keys()
    for path, delta in adapter.deltas.items():
        assert torch.allclose(delta.delta(), wanted[path], rtol=1e-4, atol=1e-6), path


# --- what we write --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_diffusers_draws_with_our_files(pipeline: StableDiffusionPipeline, tiny_base: Path, tmp_path: Path, dialect: str) -> None:
    adapter, base = mixed(), outputs(pipeline)
    path = adapter.save(tmp_path / "rex", dialect)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    ours = StableDiffusionPipeline.from_pretrained(tiny_base)
    merge(ours, adapter)
    assert_same(outputs(pipeline), outputs(ours), base)


def test_diffusers_refuses_alphas_in_its_own_dialect(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """Why our diffusers files fold alpha: should this ever pass, they may carry it."""
    tensors = load_file(make(pick="to_q").save(tmp_path / "rex", "diffusers"))
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(tensors | {"unet.conv_in.alpha": torch.tensor(1.0)})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers by the old name
def test_peft_loads_our_files(pipeline: StableDiffusionPipeline, tiny_base: Path, tmp_path: Path) -> None:
    adapter, base = mixed(), outputs(pipeline)
    for part in adapter.parts:
        path = adapter.part(part).save(tmp_path / part / "adapter_model", "peft")
        setattr(pipeline, part, PeftModel.from_pretrained(getattr(pipeline, part), path.parent))
        assert distance(Adapter.load(path), adapter.part(part)) < 1e-7
    ours = StableDiffusionPipeline.from_pretrained(tiny_base)
    merge(ours, adapter)
    assert_same(outputs(pipeline), outputs(ours), base)


def test_peft_names_a_module_of_both_parts_as_we_do(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    both = nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    model = get_peft_model(both, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path / "adapter_model.safetensors")
    assert adapter.parts == ("unet", "text_encoder")
    ours, theirs = load_file(adapter.save(tmp_path / "ours", "peft")), load_file(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()


def test_diffusers_finds_every_layer_of_our_sdxl_files(tmp_path: Path) -> None:
    """Its own tables lead from the LDM names in our file to the same modules."""
    adapter = make("sdxl", rank=1)
    path = adapter.save(tmp_path / "xl")
    config = SimpleNamespace(layers_per_block=2)
    tensors, alphas = StableDiffusionXLPipeline.lora_state_dict(tmp_path, weight_name=path.name, unet_config=config)
    found = Adapter.load(save(tensors, tmp_path / "read.safetensors"))
    assert len(alphas) == len(adapter.deltas)
    assert distance(found, adapter) < 1e-6 and found.family == "sdxl"


# --- what others write ----------------------------------------------------------------------------------------------


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


TARGETS = {"unet": ["to_q", "to_out.0", "conv1", "ff.net.2"], "text_encoder": ["q_proj", "out_proj", "fc1"]}
PATTERNS: dict[str, dict[str, Any]] = {
    "unet": {
        "rank_pattern": {"attn2.to_q": 2, "mid_block.resnets.0.conv1": 1},
        "alpha_pattern": {"attn2.to_q": 3, "mid_block.attentions.0.transformer_blocks.0.attn2.to_q": 5},  # the first wins
    },
    "text_encoder": {"rank_pattern": {"layers.1.mlp.fc1": 1}, "alpha_pattern": {"q_proj": 2}},
}


def config(part: str, kind: str) -> LoraConfig:
    alphas = {"plain": {"lora_alpha": 4}, "alpha": {"lora_alpha": 10}, "rslora": {"lora_alpha": 6, "use_rslora": True}}
    return LoraConfig(r=4, target_modules=TARGETS[part], init_lora_weights=False, **alphas.get(kind) or PATTERNS[part])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["plain", "alpha", "patterns", "rslora"])
@pytest.mark.parametrize("part", TARGETS)
def test_we_read_what_peft_saves(pipeline: StableDiffusionPipeline, tmp_path: Path, part: str, kind: str) -> None:
    model = get_peft_model(getattr(pipeline, part), config(part, kind))
    model.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path / "adapter_model.safetensors")
    assert_updates(adapter, updates(model, part))
    seen = describe(tmp_path / "adapter_model.safetensors")
    assert (seen.dialect, seen.family, seen.unmatched) == ("peft", adapter.family, ())
    assert sorted(seen.alphas) == sorted({delta.alpha for delta in adapter.deltas.values()})


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("kind", ["plain", "alpha", "patterns"])
def test_we_read_what_diffusers_saves(pipeline: StableDiffusionPipeline, tmp_path: Path, kind: str, converted: bool) -> None:
    configs = {part: config(part, kind) for part in TARGETS}
    for part, each in configs.items():
        getattr(pipeline, part).add_adapter(each)
    states = {part: get_peft_model_state_dict(getattr(pipeline, part)) for part in TARGETS}
    if converted:  # as its training scripts do; with convolutions this writes two spellings into one file
        states = {part: convert_state_dict_to_diffusers(state) for part, state in states.items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"].to_dict(),
        text_encoder_lora_adapter_metadata=configs["text_encoder"].to_dict(),
    )
    adapter = Adapter.load(tmp_path / "pytorch_lora_weights.safetensors")
    assert_updates(adapter, updates(pipeline.unet, "unet") | updates(pipeline.text_encoder, "text_encoder"))


def test_we_read_a_bare_state_dict(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """Without the `unet.` in front, where diffusers loads nothing."""
    pipeline.unet.add_adapter(config("unet", "plain"))
    adapter = Adapter.load(save(get_peft_model_state_dict(pipeline.unet), tmp_path / "bare.safetensors"))
    assert_updates(adapter, updates(pipeline.unet, "unet"))


def test_we_read_old_attention_names(tmp_path: Path) -> None:
    """diffusers before 0.22, and what its kohya converter still makes."""
    block, layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1", "text_encoder.text_model.encoder.layers.0.self_attn"
    stems = {
        f"{block}.processor.to_q_lora": f"{block}.to_q",
        f"{block}.processor.to_out_lora": f"{block}.to_out.0",
        f"{layer}.to_out_lora": f"{layer}.out_proj",
        f"{layer}.q_proj.lora_linear_layer": f"{layer}.q_proj",
    }
    tensors = {
        f"{stem}.{side}.weight": torch.ones(192, 1) if side == "up" else torch.ones(1, 192)
        for stem in stems
        for side in ("up", "down")
    }
    adapter = Adapter.load(save(tensors, tmp_path / "old.safetensors"))
    assert set(adapter.deltas) == set(stems.values()) and adapter.family == "pocket"
