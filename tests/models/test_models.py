"""The base: real models from ordinary folders, and what is said about folders that are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from small import LATENT
from transformers import CLIPTextModel

from personalize.errors import BaseModelError, HostileFileError
from personalize.families.noise import VP
from personalize.models import folder as models_folder
from personalize.models.model import Base
from personalize.models.sources import CONFIG, NAMED, SCHEDULER


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return Base.load(tiny_base)


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    """The folder of the tiny base, to be damaged."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def test_loads_the_real_classes_frozen(base: Base) -> None:
    assert isinstance(base.unet, UNet2DConditionModel)
    assert isinstance(base.vae, AutoencoderKL)
    assert isinstance(base.texts[0].model, CLIPTextModel)
    for model in (base.unet, base.vae, base.texts[0].model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (base.family.name, base.resolution, base.factor) == ("pocket", 64, 8)


def by_library(folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Base:
    """A base as the libraries' own loaders read it."""
    with monkeypatch.context() as without:
        without.setattr(models_folder, "fill_model", lambda *_: None)
        return Base.load(folder, dtype=dtype)


def assert_equal(a: Base, b: Base) -> None:
    """The same classes, settings, parameters and buffers, to the bit."""
    for one, two in zip(a.models.values(), b.models.values(), strict=True):
        assert type(one) is type(two) and one.training == two.training
        assert [name for name, _ in one.named_modules()] == [name for name, _ in two.named_modules()]
        for mine, theirs in ((one.named_parameters(), two.named_parameters()), (one.named_buffers(), two.named_buffers())):
            for (name, x), (other, y) in zip(mine, theirs, strict=True):
                assert name == other and x.dtype == y.dtype and x.requires_grad == y.requires_grad and torch.equal(x, y), name
    for text, theirs_too in zip(a.texts, b.texts, strict=True):
        assert text.model.config._attn_implementation == theirs_too.model.config._attn_implementation


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Parts that were read, and whether without their library's loader."""
    found: list[tuple[str, bool]] = []
    fill = models_folder.fill_model

    def seen(kind: Any, part: Path, *options: Any) -> Any:
        model = fill(kind, part, *options)
        found.append((part.name, model is not None))
        return model

    monkeypatch.setattr(models_folder, "fill_model", seen)
    return found


def half_precision(folder: Path) -> None:
    for path in folder.rglob("*model.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
        path.unlink()


def in_shards(folder: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    model.save_pretrained(folder / "unet", max_shard_size="1MB")


def with_positions(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(path) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path)


def without_inner_level(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    save_file({name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}, path)


def beside_another_file(folder: Path) -> None:
    shutil.copy(
        folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors"
    )


DAMAGES = (half_precision, in_shards, with_positions, without_inner_level, beside_another_file)


@pytest.mark.parametrize("change", DAMAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_filled_as_its_libraries_would_fill_it(
    narrow_base: Path, tmp_path: Path, change: Callable[[Path], None], dtype: torch.dtype,
    filled: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    copy = Path(shutil.copytree(narrow_base, tmp_path / "base"))
    change(copy)
    mine = Base.load(copy, dtype=dtype)
    assert dict(filled) == dict.fromkeys(("unet", "vae", "text_encoder"), True)
    assert_equal(mine, by_library(copy, dtype, monkeypatch))


def with_old_attention(folder: Path) -> None:
    """A VAE as diffusers named its attention until 0.13."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): tensor for key, tensor in tensors.items()}
    save_file(tensors, path)


def test_a_folder_with_names_of_old_is_read_by_its_library(
    narrow_base: Path, tmp_path: Path, filled: list[tuple[str, bool]]
) -> None:
    copy = Path(shutil.copytree(narrow_base, tmp_path / "base"))
    with_old_attention(copy)
    assert_equal(Base.load(copy), Base.load(narrow_base))
    assert dict(filled[:3]) == {"unet": True, "vae": False, "text_encoder": True}


def test_verbs_have_their_shapes(base: Base) -> None:
    mean, std = base.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    cond = base.embed(["zwx", "a photo of zwx"])
    assert mean.shape == std.shape == (2, *LATENT)
    assert cond.tokens.shape == (2, 77, 192) and cond.pooled is None
    assert base.denoise(mean, torch.tensor([0, 999]), cond).shape == mean.shape
    assert base.decode(mean).shape == (2, 3, 64, 64)
    assert base.decode(mean * 1e4).abs().max() <= 1


def test_encode_is_scaled_and_decode_undoes_it(base: Base) -> None:
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, std = base.encode(pixels)
    posterior = base.vae.encode(pixels).latent_dist
    assert torch.equal(mean, posterior.mean * 0.8) and torch.equal(std, posterior.std * 0.8)
    assert torch.allclose(base.decode(mean), base.vae.decode(posterior.mean).sample.clamp(-1, 1), atol=1e-5)


def test_embed_is_what_the_pipeline_conditions_on(base: Base) -> None:
    text = base.texts[0]
    tokens = text.tokenizer(["a zwx"], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(base.embed(["a zwx"]).tokens, text.model(tokens).last_hidden_state)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_schedule_is_that_of_the_scheduler_config(
    base_builder: Callable[..., Path], tiny_base: Path, prediction: str, rescale: bool
) -> None:
    config = json.loads((tiny_base / "scheduler" / "scheduler_config.json").read_text())
    config |= {"prediction_type": prediction, "rescale_betas_zero_snr": rescale}
    schedule = VP.of(config)
    assert torch.equal(schedule.alphas_cumprod, DDIMScheduler.from_config(config).alphas_cumprod)
    assert schedule.prediction == prediction
    assert (schedule.snr(torch.tensor([999])) == 0).item() == rescale


def test_loads_half_precision_shards(tiny_base: Path, tmp_path: Path, base: Base) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "sharded"))
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_pretrained(tiny_base / "unet").half().save_pretrained(folder / "unet", max_shard_size="6MB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    unet = Base.load(folder).unet
    assert torch.equal(unet.conv_in.weight, base.unet.conv_in.weight.half().float())


def test_loads_files_that_are_only_there_as_fp16_variant(copy: Path) -> None:
    for part in ("unet", "vae"):
        weights = copy / part / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix("").with_suffix(".fp16.safetensors"))
    assert Base.load(copy).resolution == 64


def test_loading_prints_nothing(tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Base.load(tiny_base)
    assert capfd.readouterr() == ("", "")


def test_names_stand_for_folders_of_the_package() -> None:
    assert set(NAMED) == {"pocket"}
    assert NAMED["pocket"].parts[-3:] == ("personalize", "pocket", "weights")


def lacks(part: str) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        shutil.rmtree(folder / part)
        return folder

    return damage


def pickled(folder: Path) -> Path:
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    return folder


def emptied(folder: Path) -> Path:
    next((folder / "vae").glob("*.safetensors")).unlink()
    return folder


def truncated(folder: Path) -> Path:
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


def incomplete(folder: Path, part: str = "text_encoder") -> Path:
    weights = next((folder / part).glob("*.safetensors"))
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights, {"format": "pt"})
    return folder


def garbled(folder: Path) -> Path:
    (folder / "unet" / "config.json").write_text("{")
    return folder


def misfitting(folder: Path) -> Path:
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 16', '"in_channels": 4'))
    return folder


def another_transformer(folder: Path) -> Path:
    (folder / "unet").rename(folder / "transformer")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "num_layers": 2}))
    return folder


def two_encoders(folder: Path) -> Path:
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"projection_class_embeddings_input_dim": 2816}))
    return folder


def a_file(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(b"\x80\x02")
        return folder / name

    return make


BAD = {
    "missing": (lambda folder: folder / "nowhere", "no base called .*nowhere"),
    "pickled checkpoint": (a_file("model.ckpt"), "model.ckpt is a pickle"),
    "pickle in disguise": (a_file("model.safetensors"), "model.safetensors is a Python pickle"),
    "another file": (a_file("model.zip"), "model.zip is no base"),
    **{f"no {part}": (lacks(part), f"lacks {part}/{CONFIG}") for part in ("unet", "vae")},
    "no scheduler": (lacks("scheduler"), f"lacks scheduler/{SCHEDULER}"),
    "pickled weights": (pickled, "unet has only pickled weights"),
    "no weights": (emptied, "vae has no weights"),
    "truncated weights": (truncated, "unet cannot be loaded"),
    "lacking a weight": (incomplete, "text_encoder lacks 1 weights"),
    "lacking a UNet weight": (lambda folder: incomplete(folder, "unet"), "unet lacks 1 weights|unet cannot be loaded"),
    "broken config": (garbled, "config.json cannot be read"),
    "weights of another shape": (misfitting, "unet cannot be loaded"),
    "another transformer": (another_transformer, "no base of a known family: its transformer is FluxTransformer2DModel"),
    "SDXL with one encoder": (two_encoders, "lacks its second text encoder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bases_are_refused_in_one_line(copy: Path, case: str) -> None:
    damage, message = BAD[case]
    with pytest.raises((BaseModelError, HostileFileError), match=message) as caught:
        Base.load(damage(copy))
    assert "\n" not in str(caught.value)
