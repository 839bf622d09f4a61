"""Bases of every family, in folders and single files: loaded as diffusers would, embedded and drawn as its pipelines do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bases
import hub
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from slow import all_but
from torch import Tensor

from personalize.errors import BaseModelError
from personalize.families.cond import Cond
from personalize.families.emphasis import pieces
from personalize.families.family import addresses
from personalize.families.names import FAMILIES
from personalize.families.recognition import detect, family_in
from personalize.families.tokens import clip_tokenizer
from personalize.inference import sampling, schedulers
from personalize.inference.request import Request
from personalize.models.model import Base

NAMES = ("sd1", "sd2", "sdxl")
PROMPTS = ["a red cat", "a photograph of a house on a hill"]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder and a single file of each family."""
    path = tmp_path_factory.mktemp("families")
    for name in NAMES:
        bases.folder(path / name, name)
        bases.single(path / f"{name}.safetensors", name)
    return path


@pytest.fixture(scope="session")
def loaded(shelf: Path) -> dict[str, Base]:
    return {name: Base.load(shelf / name) for name in NAMES}


def pipeline(base: Base, name: str) -> Any:
    kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    options = {} if name == "sdxl" else {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    texts = {text.part: text.model for text in base.texts} | {
        text.part.replace("text_encoder", "tokenizer"): text.tokenizer for text in base.texts
    }
    made = kind(vae=base.vae, unet=base.unet, scheduler=schedulers.make_sampler(base, 4), **texts, **options)
    made.set_progress_bar_config(disable=True)
    return made


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("name", all_but({"sd2", "sdxl"}, NAMES))
def test_a_single_file_holds_the_same_models_as_the_folder(shelf: Path, loaded: dict[str, Base], name: str) -> None:
    file = Base.load(shelf / f"{name}.safetensors")
    assert file.family.name == loaded[name].family.name == name
    for part, model in {**loaded[name].parts, "vae": loaded[name].vae}.items():
        own = (file.vae if part == "vae" else file.parts[part]).state_dict()
        assert own.keys() == model.state_dict().keys()
        assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(file.embed(PROMPTS).tokens, loaded[name].embed(PROMPTS).tokens)
    assert file.vae.config.scaling_factor == loaded[name].vae.config.scaling_factor


@pytest.mark.parametrize("name", NAMES)
def test_what_was_loaded_is_told(shelf: Path, name: str) -> None:
    facts = Base.load(shelf / f"{name}.safetensors", dtype=torch.bfloat16).facts
    assert set(facts["dtypes"].values()) == {"bfloat16"} and set(facts["stored"]) == {"F16"}
    total = sum(facts["parameters"].values())
    assert facts["bytes"] == 2 * total
    assert abs(facts["stored"]["F16"] - 2 * total) < 0.1 * facts["bytes"]  # SD 2's unread layer, and the like


def test_weights_in_the_right_dtype_stay_in_the_file(shelf: Path) -> None:
    base = Base.load(shelf / "sd1.safetensors", dtype=torch.float16)
    weight = base.unet.conv_in.weight
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(shelf / "sd1.safetensors") in maps.read_text()
    before = weight.clone()
    weight.data.add_(1)
    assert torch.equal(Base.load(shelf / "sd1.safetensors", dtype=torch.float16).unet.conv_in.weight, before)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if addresses(family) and family.kin])
def test_true_sizes_are_recognised_from_keys_and_from_configs(name: str) -> None:
    row = bases.ROWS[name]
    assert family_in(bases.shapes(name)) is row
    assert detect(row.denoiser.config(row.texts), [text.part for text in row.texts]) is row


# ---------------------------------------------------------------- prediction


def test_prediction_is_read_or_told(shelf: Path, tmp_path: Path) -> None:
    def prediction(path: Path, **known: str) -> tuple[str, bool]:
        facts = Base.load(path, **known).facts  # type: ignore[arg-type]
        return facts["prediction"], facts["zero_snr"]

    assert prediction(shelf / "sd2.safetensors") == ("epsilon", False)
    assert prediction(shelf / "sd2.safetensors", prediction="v_prediction", zero_snr="yes") == ("v_prediction", True)
    folder = bases.folder(tmp_path / "zero", "sd1", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert prediction(folder) == ("v_prediction", True)
    assert prediction(folder, prediction="epsilon", zero_snr="no") == ("epsilon", False)
    said = {"modelspec.architecture": "stable-diffusion-v2-768-v", "modelspec.prediction_type": "v"}
    assert prediction(bases.single(tmp_path / "said.safetensors", "sd2", metadata=said)) == ("v_prediction", False)
    assert Base.load(tmp_path / "said.safetensors").resolution == 768


def test_marks_in_a_file_tell_its_prediction(tmp_path: Path) -> None:
    tensors = bases.ldm("sdxl") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(tensors, tmp_path / "marked.safetensors")
    facts = Base.load(tmp_path / "marked.safetensors").facts
    assert (facts["prediction"], facts["zero_snr"]) == ("v_prediction", True)


def test_sd2_is_told_by_its_biases(tmp_path: Path) -> None:
    tensors = bases.ldm("sd2")
    key = addresses(bases.tiny("sd2"))[bases.ROWS["sd2"].telling].key
    for spread, prediction in ((0.2, "v_prediction"), (0.02, "epsilon")):
        tensors[key] = torch.linspace(-1, 1, len(tensors[key])).half() * spread * 1.7
        save_file(tensors, tmp_path / "biased.safetensors")
        assert Base.load(tmp_path / "biased.safetensors").facts["prediction"] == prediction


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_embedded_as_the_pipeline_does(loaded: dict[str, Base], name: str) -> None:
    with torch.no_grad():
        cond = loaded[name].embed(PROMPTS)
        theirs = pipeline(loaded[name], name).encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    assert torch.allclose(cond.tokens, theirs[0], atol=1e-5)
    if name == "sdxl":
        assert torch.allclose(cond.pooled, theirs[2], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_those_of_the_pipeline(loaded: dict[str, Base], name: str) -> None:
    base = loaded[name]
    shape = schedulers.latent_shape(base, 64)
    with torch.no_grad():
        ours = sampling.denoise(base, [Request(PROMPTS[0], 3, 4, 5.0, (64, 64))])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))[None]
        theirs = pipeline(loaded[name], name)(
            PROMPTS[0], num_inference_steps=4, guidance_scale=5.0, latents=noise, height=64, width=64, output_type="latent"
        ).images
    assert torch.allclose(ours, theirs, atol=1e-3 * float(theirs.abs().max()))


def test_clip_skip_reads_another_layer_through_the_final_norm(shelf: Path, loaded: dict[str, Base]) -> None:
    with torch.no_grad():
        whole = loaded["sd1"]
        skipped = Base.load(shelf / "sd1", clip_skip=2).embed(PROMPTS).tokens
        model, ids = whole.texts[0].model, whole.texts[0].tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
        hidden = model(ids, output_hidden_states=True).hidden_states
        assert torch.allclose(skipped, model.final_layer_norm(hidden[-2]), atol=1e-6)
        assert not torch.allclose(skipped, whole.embed(PROMPTS).tokens, atol=1e-2)
        deep = [Base.load(shelf / "sdxl", clip_skip=skip) for skip in (2, 3)]
        deep = [base.embed(PROMPTS).tokens for base in (loaded["sdxl"], *deep)]
    assert torch.equal(deep[0], deep[1]) and not torch.allclose(deep[1], deep[2], atol=1e-2)  # SDXL never reads its last
    with pytest.raises(BaseModelError, match="--clip-skip 9, but the text encoder has 3 layers"):
        Base.load(shelf / "sd1", clip_skip=9)


def test_long_prompts_fill_windows_that_end_behind_commas(loaded: dict[str, Base]) -> None:
    text = loaded["sd1"].texts[0]
    cats, comma = text.tokenizer("cat,", add_special_tokens=False).input_ids
    assert [len(chunk) for chunk in text.chunks("cat " * 80, False)] == [75, 5]
    assert [len(chunk) for chunk in text.chunks("cat " * 60 + ", " + "cat " * 30, False)] == [61, 30]
    assert [len(chunk) for chunk in text.chunks("cat, " + "cat " * 90, False)] == [75, 17]  # too far from the end
    assert [len(chunk) for chunk in text.chunks("cat BREAK red cat", True)] == [1, 2]
    assert text.chunks("cat BREAK", False)[0] == [
        (cats, 1.0),
        (text.tokenizer("break", add_special_tokens=False).input_ids[0], 1.0),
    ]
    assert text.chunks("", True) == [[]] and comma != cats


@pytest.mark.parametrize("name", NAMES)
def test_windows_are_read_apart_and_side_by_side(loaded: dict[str, Base], name: str) -> None:
    base = loaded[name]
    with torch.no_grad():
        long, first, empty = base.embed(["cat " * 75 + "red house"]), base.embed(["cat " * 75]), base.embed(["a cat"], windows=2)
        assert torch.allclose(long.tokens[:, :77], first.tokens, atol=1e-5)
        assert torch.allclose(long.tokens[:, 77:], base.embed(["red house"]).tokens, atol=1e-5)
        assert torch.allclose(empty.tokens[:, 77:], base.embed([""]).tokens, atol=1e-5)
        if long.pooled is not None:
            assert torch.allclose(long.pooled, first.pooled, atol=1e-5)
        assert base.denoise(torch.zeros(1, 4, 8, 8), torch.tensor([5]), long).isfinite().all()


def test_weights_scale_their_tokens_and_keep_the_mean(loaded: dict[str, Base]) -> None:
    base = loaded["sd1"]
    with torch.no_grad():
        plain, weighted = (base.embed([prompt], weighted=True).tokens for prompt in ("a red cat", "a (red:1.5) cat"))
        literal = base.embed(["a (red:1.5) cat"]).tokens
    factor = torch.ones(77)
    factor[2] = 1.5
    wanted = plain * factor[:, None]
    assert torch.allclose(weighted, wanted * plain.mean() / wanted.mean(), atol=1e-5)
    assert not torch.allclose(literal, weighted, atol=1e-3)


def test_pieces_of_prompts() -> None:
    assert pieces("a (b (c:2) [d]") == [("a ", 1.0), ("b ", 1.1), ("c", 2.2), (" ", 1.1), ("d", 1.0)]
    assert pieces("x) y] 16:9") == [("x) y] 16:9", 1.0)]
    assert pieces("(a BREAK b:2)") == [("a ", 2.0), ("", None), (" b", 2.0)]
    assert pieces("Bob: (sad:-0.5)") == [("Bob: ", 1.0), ("sad", -0.5)]
    assert pieces("") == []


def test_the_tokenizer_is_that_of_clip() -> None:
    """Ids that OpenAI's tokenizer gives, known from its model cards and papers' code."""
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A Diagram").input_ids == [49406, 320, 22697, 49407]
    assert clip_tokenizer("!")(["a"], padding="max_length").input_ids[0][:5] == [49406, 320, 49407, 0, 0]


# ---------------------------------------------------------------- sizes and crops


def test_sdxl_is_told_sizes_and_crops(loaded: dict[str, Base]) -> None:
    base = loaded["sdxl"]
    latents, t = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        cond = base.embed(["a cat"])

        def predicted(sizes: Tensor | None) -> Tensor:
            return base.denoise(latents, t, cond.with_sizes(sizes))

        whole = predicted(None)
        assert torch.equal(predicted(torch.tensor([[64.0, 128, 0, 0, 64, 128]])), whole)
        assert not torch.equal(predicted(torch.tensor([[64.0, 128, 8, 0, 64, 128]])), whole)
    assert not loaded["sd1"].sized and cond.pooled is not None


def test_rows_of_conditioning() -> None:
    cond = Cond(torch.arange(6.0).reshape(3, 1, 2), torch.arange(3.0)[:, None], torch.zeros(3, 6))
    assert len(cond[[2, 0]]) == 2 and cond[[2, 0]].pooled.tolist() == [[2.0], [0.0]]
    both = Cond.cat([cond[:1], cond[1:]])
    assert torch.equal(both.tokens, cond.tokens) and torch.equal(both.pooled, cond.pooled) and both.sizes.shape == (3, 6)
    assert cond[:1].expand(4).tokens.shape == (4, 1, 2) and not cond.zeros().tokens.any() and not cond.zeros().pooled.any()


# ---------------------------------------------------------------- what is refused


def refused(path: Path, words: str, **options: Any) -> None:
    with pytest.raises(BaseModelError, match=words) as caught:
        Base.load(path, **options)
    assert "\n" not in str(caught.value)


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    refused(bases.single(tmp_path / "paint.safetensors", "sd1", channels=9), r"an inpainting model of SD 1\.x")
    refused(bases.folder(tmp_path / "paint", "sd1", channels=9), r"an inpainting model of SD 1\.x")
    refused(bases.single(tmp_path / "depth.safetensors", "sd2", channels=5), r"a depth-to-image model of SD 2\.x")
    refused(bases.single(tmp_path / "edit.safetensors", "sdxl", channels=8), "an image-editing model .* of SDXL")
    refused(bases.single(tmp_path / "refiner.safetensors", "sdxl-refiner"), "the SDXL refiner, which only ends")
    save_file({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "flux.safetensors")
    refused(tmp_path / "flux.safetensors", "it is Flux")
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02")
    refused(tmp_path / "old.ckpt", r"is a pickle, which can run code when opened \(take the \.safetensors")


def test_missing_and_misshaped_parts_are_named(tmp_path: Path, shelf: Path) -> None:
    def lacking(prefix: str) -> Path:
        return bases.single(tmp_path / "lacking.safetensors", "sdxl", without=prefix)

    refused(lacking("first_stage_model."), "has no VAE in it .*--vae")
    refused(lacking("first_stage_model.decoder.mid"), "the VAE in .* cannot be loaded")
    refused(lacking("conditioner.embedders.1."), "no checkpoint of a known family|has no text_encoder_2|refiner")
    refused(
        lacking("model.diffusion_model.middle_block.1.norm"), "the unet of .* lacks 2 weights, model.diffusion_model.middle_block"
    )
    tensors = bases.ldm("sd1")
    key = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, tmp_path / "cut.safetensors")
    refused(tmp_path / "cut.safetensors", rf"the text_encoder of .* does not fit: {key} is \[127, 32\], and sd1 has \[128, 32\]")
    whole = bases.folder(tmp_path / "half", "sdxl")
    for file in (whole / "text_encoder_2").iterdir():
        file.unlink()
    (whole / "text_encoder_2").rmdir()
    refused(whole, "is SDXL and lacks its second text encoder")


def test_another_vae(tmp_path: Path, shelf: Path, loaded: dict[str, Base]) -> None:
    bare = bases.single(tmp_path / "bare.safetensors", "sdxl", without="first_stage_model.")
    save_file(
        {
            key.removeprefix("first_stage_model."): value
            for key, value in bases.ldm("sdxl").items()
            if key.startswith("first_stage")
        },
        tmp_path / "vae.safetensors",
    )
    wanted = loaded["sdxl"].vae.state_dict()
    for vae in (tmp_path / "vae.safetensors", shelf / "sdxl.safetensors", shelf / "sdxl", shelf / "sdxl" / "vae"):
        found = Base.load(bare, vae=vae).vae.state_dict()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert not torch.equal(
        Base.load(shelf / "sd1", vae=shelf / "sdxl").vae.encoder.conv_in.weight,
        loaded["sd1"].vae.encoder.conv_in.weight,
    )


# ---------------------------------------------------------------- the hub


LOADING = "import sys; from personalize.models import Base; print(Base.load(sys.argv[1]).family.name)"


@pytest.mark.slow
def test_a_repository_is_downloaded_once_and_safetensors_only(shelf: Path, tmp_path: Path) -> None:
    repository = Path(shutil.copytree(shelf / "sd1", tmp_path / "repository"))
    (repository / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (repository / "model.ckpt").write_bytes(b"another")
    (repository / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(
        (repository / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    )

    def load(name: str, **settings: str) -> subprocess.CompletedProcess[str]:
        around = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
        around |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", **settings}
        return subprocess.run([sys.executable, "-c", LOADING, name], env=around, capture_output=True, text=True)

    with hub.serving("someone/tiny", repository) as (address, taken):
        first = load("someone/tiny", HF_ENDPOINT=address)
        assert first.stdout == "sd1\n", first.stderr
        assert "vae/diffusion_pytorch_model.fp16.safetensors" in taken and "unet/diffusion_pytorch_model.safetensors" in taken
        assert not any(file.endswith((".bin", ".ckpt")) or file == "vae/diffusion_pytorch_model.safetensors" for file in taken)
        unknown = load("someone/unknown", HF_ENDPOINT=address)
        assert "BaseModelError: someone/unknown cannot be had from the hub" in unknown.stderr
    again = load("someone/tiny", HF_ENDPOINT="http://127.0.0.1:9")  # where nobody answers
    assert again.stdout == "sd1\n", again.stderr
    offline = load("someone/else", HF_HUB_OFFLINE="1")
    assert "someone/else is not in the cache, and HF_HUB_OFFLINE is set" in offline.stderr
