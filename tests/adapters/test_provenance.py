"""Adapter files of other trainers as commands see them: names, words inside, facts that nobody knows, what weighs too much."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.delta import LowRank
from personalize.adapters.describe import describe
from personalize.adapters.doctor.exam import examine
from personalize.adapters.embedding import Embedding
from personalize.adapters.ops.convert import convert
from personalize.adapters.ops.merge import merge
from personalize.adapters.ops.resize import resize
from personalize.cli.app import run
from personalize.errors import AdapterError, HostileFileError, UnmatchedKeysError

TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TO_Q = TO_K.replace("attn2_to_k", "attn1_to_q")
DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def kohya(name: str = TO_K, out: int = 320, inside: int = 768, rank: int = 4) -> dict[str, Tensor]:
    factors = {f"{name}.lora_up.weight": noise(out, rank), f"{name}.lora_down.weight": noise(rank, inside, seed=1)}
    return {**factors, f"{name}.alpha": torch.tensor(2.0)}


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "lead", ["unet.unet.", "unet.base_model.model.", "unet._orig_mod.", "module.unet.", "diffusion_model.", ""]
)
@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_wrapped_names_are_the_plain_layer(tmp_path: Path, lead: str, dialect: str) -> None:
    up, down = noise(320, 4), noise(4, 768, seed=1)
    file = write(tmp_path / "a.safetensors", {f"{lead}{DOTTED}.lora_A.weight": down, f"{lead}{DOTTED}.lora_B.weight": up})
    plain = Adapter({f"unet.{DOTTED}": LowRank(up, down, 4)})
    read = Adapter.load(Adapter.load(file).save(tmp_path / "b", dialect))
    assert read.family == "sd1" and distance(read, plain) < 1e-6


def test_onetrainers_names_are_sdxls_layers(tmp_path: Path) -> None:
    ff = "output_blocks.5.1.transformer_blocks.1.ff.net.2"
    names = {
        f"unet.{ff}": ((640, 2560), f"lora_unet_{ff.replace('.', '_')}"),
        "unet.input_blocks.1.0.in_layers.2": ((320, 320, 3, 3), "lora_unet_input_blocks_1_0_in_layers_2"),
        "clip_l.text_model.encoder.layers.11.mlp.fc1": ((3072, 768), "lora_te1_text_model_encoder_layers_11_mlp_fc1"),
        "clip_g.text_model.encoder.layers.31.mlp.fc1": ((5120, 1280), "lora_te2_text_model_encoder_layers_31_mlp_fc1"),
    }  # fmt: skip
    tensors = {}
    for name, (shape, _) in names.items():
        up = noise(shape[0], 2, *[1] * len(shape[2:]))
        tensors |= {
            f"{name}.lora_up.weight": up,
            f"{name}.lora_down.weight": noise(2, *shape[1:]),
            f"{name}.alpha": torch.tensor(1.0),
        }
    file = write(tmp_path / "omi.safetensors", tensors)
    found = describe(file)
    assert (found.dialect, found.family, found.unmatched) == ("omi", "sdxl", ())
    written = Adapter.load(file).save(tmp_path / "kohya")
    assert {key.partition(".")[0] for key in load_file(written)} == {kohya for _, kohya in names.values()}
    assert distance(Adapter.load(written), Adapter.load(file)) < 1e-6


def test_a_comfyui_extraction_keeps_its_biases(tmp_path: Path) -> None:
    """Its node writes LDM's names behind `diffusion_model.`, `diff_b` for biases, and CLIP's behind `text_encoders`."""
    tensors = {
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_up.weight": noise(320, 2),
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_down.weight": noise(2, 768),
        "diffusion_model.input_blocks.1.0.in_layers.2.diff_b": noise(320),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight": noise(3072, 2),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_down.weight": noise(2, 768),
    }
    adapter = Adapter.load(write(tmp_path / "a.safetensors", tensors))
    assert sorted(adapter.deltas) == [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        f"unet.{DOTTED}",
        "unet.down_blocks.0.resnets.0.conv1.bias",
    ]


@pytest.mark.parametrize(
    "name", [f"unet.somebody.{DOTTED}", "unet.down_blocks.9.attentions.0.proj_in", "transformer.single_blocks.0.x"]
)
def test_a_layer_that_no_family_has_is_named(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "a.safetensors", {f"{name}.lora_A.weight": noise(2, 8), f"{name}.lora_B.weight": noise(8, 2)})
    with pytest.raises(UnmatchedKeysError, match=name.replace(".", r"\.")):
        Adapter.load(file)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_diffusers_own_converter_finds_what_was_wrapped(tmp_path: Path, dialect: str) -> None:
    from strangers import as_diffusers_reads

    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    up, down = noise(192, 2), noise(2, 192, seed=1)  # pocket's, which the converter is given
    wrapped = {f"unet.unet._orig_mod.{layer}.lora_A.weight": down, f"unet.unet._orig_mod.{layer}.lora_B.weight": up}
    made = Adapter.load(write(tmp_path / "a.safetensors", wrapped)).save(tmp_path / "b", dialect)
    torch.testing.assert_close(as_diffusers_reads(made, (f"unet.{layer}",))[f"unet.{layer}"], up @ down, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- what nobody knows


def test_sdxls_first_text_encoder_alone_stays_that(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768))
    once = Adapter.load(file).save(tmp_path / "b")
    again = Adapter.load(Adapter.load(once).save(tmp_path / "c", "diffusers")).save(tmp_path / "d")  # there and back
    for made in (once, again):
        assert all(key.startswith("lora_te1_") for key in load_file(made))
        assert "ss_base_model_version" not in metadata_of(made)


def test_ldms_names_alone_are_sdxls(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", kohya("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", 1280, 1280))
    made = Adapter.load(file).save(tmp_path / "b")
    assert all(key.startswith("lora_unet_middle_block") for key in load_file(made))
    assert metadata_of(made)["ss_base_model_version"] == "sdxl_base_v1-0"


def test_layers_that_families_share_say_no_family(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", kohya(TO_Q, 320, 320))
    made = Adapter.load(file).save(tmp_path / "b")
    assert describe(made).family == "sd1 or sd2" and "ss_base_model_version" not in metadata_of(made)
    assert "family-open" in {finding.code for finding in examine(made).findings}


def test_names_that_differ_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    file = write(tmp_path / "a.safetensors", {f"{name}.lora_A.weight": noise(2, 768), f"{name}.lora_B.weight": noise(3072, 2)})
    assert run(["convert", str(file), "-o", str(tmp_path / "b")]) == 2
    assert "--family sd1 or --family sdxl" in capsys.readouterr().err
    for family, prefix, version in (("sd1", "lora_te_", "sd_v1"), ("sdxl", "lora_te1_", "sdxl_base_v1-0")):
        assert run(["convert", str(file), "-o", str(tmp_path / family), "--family", family]) == 0
        assert all(key.startswith(prefix) for key in load_file(tmp_path / f"{family}.safetensors"))
        assert metadata_of(tmp_path / f"{family}.safetensors")["ss_base_model_version"] == version
    assert run(["convert", str(file), "-o", str(tmp_path / "c"), "--family", "sd2"]) == 2
    assert "not those of sd2" in capsys.readouterr().err


# ---------------------------------------------------------------- a sparse rest


def sparse(size: list[int] | None = None, largest: int = 319) -> dict[str, Tensor]:
    place = torch.tensor([[0, 5, largest], [7, 0, 11]], dtype=torch.int16)
    rest = {"bias_indices": place, "bias_values": torch.tensor([1.0, -2.0, 3.0]), "bias_size": torch.tensor(size or [320, 320])}
    return kohya(TO_Q, 320, 320) | {f"{TO_Q}.{role}": value for role, value in rest.items()}


def test_a_sparse_rest_is_added(tmp_path: Path) -> None:
    tensors = sparse()
    adapter = Adapter.load(
        write(tmp_path / "a.safetensors", tensors),
    )
    whole = tensors[f"{TO_Q}.lora_up.weight"] @ tensors[f"{TO_Q}.lora_down.weight"]
    whole[[0, 5, 319], [7, 0, 11]] += torch.tensor([1.0, -2.0, 3.0])
    (delta,) = adapter.deltas.values()
    torch.testing.assert_close(delta.delta(), whole * (2.0 / 4))
    torch.testing.assert_close((delta * -3).delta(), whole * -1.5)
    kept, full = adapter.save(tmp_path / "b", dtype="fp16"), convert(adapter, "full")[0]
    assert describe(kept).kind == "LoRA+sparse" and describe(kept).dtype == "fp16"
    assert distance(Adapter.load(kept), full) < 1e-3 and distance(adapter, full) < 1e-6


@pytest.mark.parametrize(("size", "largest"), [([320, 319], 318), ([320, 320], 320), ([320, 320], -1)])
def test_a_sparse_rest_that_does_not_fit_is_refused(tmp_path: Path, size: list[int], largest: int) -> None:
    adapter = Adapter.load(write(tmp_path / "a.safetensors", sparse(size, largest)))
    with pytest.raises(AdapterError, match="sparse part"):
        next(iter(adapter.deltas.values())).delta()


# ---------------------------------------------------------------- words


WORD = {"bundle_emb.my word.emb_params": noise(2, 768, seed=3).half()}


def bundled(path: Path, words: dict[str, Tensor] | None = None) -> Path:
    return write(path, kohya() | (WORD if words is None else words))


@pytest.mark.parametrize(
    "command",
    [
        "convert {} -o {}",
        "resize {} --rank 2 -o {}",
        "merge {} -o {}",
        "convert {} --dtype fp16 --strip-metadata -o {}",
        "convert {}:0.5 -o {}",
    ],
)
def test_every_command_carries_words(tmp_path: Path, command: str) -> None:
    file = bundled(tmp_path / "a.safetensors")
    assert describe(file).words == {"my word": 2} and describe(file).unmatched == ()
    assert run(command.format(file, tmp_path / "b").split()) == 0
    assert torch.equal(
        load_file(tmp_path / "b.safetensors")["bundle_emb.my word.emb_params"], WORD["bundle_emb.my word.emb_params"]
    )


def test_a_word_of_a_converted_pickle_is_called_by_its_name(tmp_path: Path) -> None:
    """A1111 reads the word up to the first dot: `tom` here, not `tom.string_to_param`."""
    key = "bundle_emb.tom.string_to_param.*"
    file = bundled(tmp_path / "a.safetensors", {key: noise(1, 768)})
    assert describe(file).words == {"tom": 1}
    other = Adapter.load(bundled(tmp_path / "b.safetensors", {key: noise(2, 768)}))
    with pytest.warns(UserWarning, match="tom-2"):
        both = merge([Adapter.load(file), other], [1, 1])
    assert sorted(both.words) == ["tom", "tom-2"]


def test_an_update_of_no_known_layer_is_refused_by_its_name(tmp_path: Path) -> None:
    layer = "pipe.unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    write(tmp_path / "a.safetensors", {f"{layer}.lora_A.weight": noise(4, 768), f"{layer}.lora_B.weight": noise(320, 4)})
    with pytest.raises(UnmatchedKeysError, match=r"no known family has a layer pipe\.unet\.down_blocks") as caught:
        Adapter.load(tmp_path / "a.safetensors")
    assert "none whole" not in str(caught.value)


def test_words_of_two_adapters(tmp_path: Path) -> None:
    one = Adapter.load(bundled(tmp_path / "a.safetensors"))
    other = Adapter.load(
        bundled(
            tmp_path / "b.safetensors", {"bundle_emb.my word.emb_params": noise(3, 768), "bundle_emb.a.b.clip_l": noise(1, 768)}
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(merge([one, one], [1, 1]).words) == ["my word"]
    with pytest.warns(UserWarning, match="both|two adapters bring the word 'my word'"):
        both = merge([one, other], [1, 1])
    assert sorted(both.words) == ["a.b", "my word", "my word-2"]
    assert resize(both, "rank", 1)[0].words.keys() == both.words.keys()


def test_words_are_taken_out_where_they_have_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(bundled(tmp_path / "a.safetensors"))
    assert run(["convert", file, "--dialect", "diffusers", "-o", str(tmp_path / "b")]) == 2
    assert "convert --words FOLDER" in capsys.readouterr().err
    assert run(["convert", file, "--dialect", "diffusers", "--words", str(tmp_path / "words"), "-o", str(tmp_path / "b")]) == 0
    word = Embedding.load(tmp_path / "words" / "my word.safetensors")
    assert torch.equal(word.vectors["text_encoder"], WORD["bundle_emb.my word.emb_params"].float())
    assert Adapter.load(tmp_path / "b.safetensors").words == {}


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"emb_params": noise(2, 768)}, {"text_encoder"}),
        ({"emb_params": noise(2, 1024)}, {"text_encoder"}),
        ({"string_to_param.*": noise(2, 768)}, {"text_encoder"}),
        ({"<cat>": noise(768)}, {"text_encoder"}),
        ({"<cat>": noise(1, 1280)}, {"text_encoder_2"}),
        ({"clip_g": noise(1, 1280)}, {"text_encoder_2"}),
        ({"clip_l": noise(1, 768), "clip_g": noise(1, 1280)}, {"text_encoder", "text_encoder_2"}),
        ({"text_encoders_0": noise(1, 768), "text_encoders_1": noise(1, 1280)}, {"text_encoder", "text_encoder_2"}),
        ({"clip_l": noise(1, 768), "t5": noise(1, 4096)}, {"text_encoder", "text_encoder_3"}),
    ],
)  # fmt: skip
def test_words_alone_in_every_spelling(tmp_path: Path, tensors: dict[str, Tensor], parts: set[str], capsys: Any) -> None:
    file = write(tmp_path / "a.safetensors", tensors)
    word = Embedding.load(file)
    assert word.vectors.keys() == parts and Embedding.load(word.save(tmp_path / "b")).vectors.keys() == parts
    assert run(["show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "textual inversion" in shown and "would not load" not in shown


def test_vectors_of_an_encoders_output_are_no_word(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no textual inversion.*train it without output embeddings"):
        Embedding.load(write(tmp_path / "a.safetensors", {"clip_l_out": noise(1, 768), "clip_l": noise(1, 768)}))


def test_a_sick_word_is_refused(tmp_path: Path) -> None:
    file = bundled(tmp_path / "a.safetensors", {"bundle_emb.x.emb_params": torch.full((1, 768), torch.nan)})
    with pytest.raises((AdapterError, HostileFileError), match="NaN"):
        Adapter.load(file)


# ---------------------------------------------------------------- one answer


def dora(path: Path) -> Path:
    return write(
        path, kohya() | {f"{TO_K}.dora_scale": noise(1, 768).abs() + 0.5} | kohya(TO_Q, 320, 320), ss_base_model_version="sd_v1"
    )


@pytest.mark.parametrize("strength", ["", ":1", ":*attn2*=1", ":*attn1*=0"])
def test_merging_one_dora_is_converting_it(tmp_path: Path, strength: str) -> None:
    file = f"{dora(tmp_path / 'a.safetensors')}{strength}"
    assert run(["merge", file, "-o", str(tmp_path / "m")]) == run(["convert", file, "-o", str(tmp_path / "c")]) == 0
    m, c = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "c.safetensors")
    assert m.keys() == c.keys() and all(torch.equal(m[key], c[key]) for key in m)


def test_half_a_dora_is_refused_by_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"{dora(tmp_path / 'a.safetensors')}:0.5"
    said = set()
    for command in ("merge", "convert"):
        assert run([command, file, "-o", str(tmp_path / "b")]) == 2
        said.add(capsys.readouterr().err)
    assert len(said) == 1 and "--base" in said.pop()


# ---------------------------------------------------------------- metadata


def test_metadata_that_outweigh_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tags = json.dumps({"1_cats": {f"a cat number {i}": 1 for i in range(5000)}})
    file = write(tmp_path / "a.safetensors", kohya(), ss_tag_frequency=tags, ss_base_model_version="sd_v1", ss_seed="7")
    assert "metadata-heavy" in {finding.code for finding in examine(file).findings}
    assert run(["show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "ss_tag_frequency" in shown and f"convert {file} --strip-metadata" in shown
    for command in ("convert", "merge", "resize --rank 4"):
        assert run([*command.split(), str(file), "--strip-metadata", "-o", str(tmp_path / "b")]) == 0
        left = metadata_of(tmp_path / "b.safetensors")
        assert left["ss_base_model_version"] == "sd_v1" and not left.keys() & {"ss_seed", "ss_tag_frequency", "personalize.merge"}
        assert distance(Adapter.load(file), Adapter.load(tmp_path / "b.safetensors")) < 1e-6
    assert run(["show", str(tmp_path / "b.safetensors")]) == 0
    assert "more than the tensors" not in capsys.readouterr().out


# ---------------------------------------------------------------- q, k and v in one, and peft's biases

OPENCLIP = "conditioner.embedders.1.model.transformer.resblocks.0"
LAYER = "text_encoder_2.text_model.encoder.layers.0"
UP, DOWN = noise(3840, 4), noise(4, 1280, seed=1)


@pytest.mark.parametrize(
    "stem",
    [
        f"{OPENCLIP}.attn.in_proj",
        f"{OPENCLIP}.attn.in_proj_weight",
        "lora_te2_transformer_resblocks_0_attn_in_proj",
        "clip_g.transformer.resblocks.0.attn.in_proj",
    ],
)
def test_a_lora_of_q_k_and_v_in_one_is_read_as_three(tmp_path: Path, stem: str) -> None:
    file = write(
        tmp_path / "a", {f"{stem}.lora_up.weight": UP, f"{stem}.lora_down.weight": DOWN, f"{stem}.alpha": torch.tensor(2)}
    )
    adapter = Adapter.load(file)
    assert list(adapter.deltas) == [f"{LAYER}.self_attn.{one}_proj" for one in "kqv"]
    for part, one in zip((0.5 * UP @ DOWN).chunk(3), "qkv", strict=True):
        assert torch.allclose(adapter.deltas[f"{LAYER}.self_attn.{one}_proj"].delta(), part, atol=1e-5)
    assert describe(file).unmatched == () and describe(file).parameters == UP.numel() + DOWN.numel()
    assert run(["show", str(file)]) == 0
    codes = {finding.code for finding in examine(file).findings}
    assert codes & {"openclip-names", "dialect-unread"}, codes  # UIs read neither
    assert not {finding.code for finding in examine(adapter.for_family("sdxl").save(tmp_path / "b")).findings} & codes - {
        "family-open"
    }


def test_other_names_of_openclip_and_other_kinds_of_fused_updates(tmp_path: Path) -> None:
    """LoHa, full updates and biases, and LoKr whose first half has three parts, are cut exactly."""
    stem = f"{OPENCLIP}.attn.in_proj"
    kinds = {
        "loha": {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": 2 * UP, "hada_w2_b": DOWN.clone()},
        "lokr": {"lokr_w1": noise(60, 32), "lokr_w2": noise(64, 40, seed=2)},
        "full": {"diff": noise(3840, 1280)},
    }
    whole = {
        "loha": (UP @ DOWN) * (2 * UP @ DOWN),
        "lokr": torch.kron(kinds["lokr"]["lokr_w1"], kinds["lokr"]["lokr_w2"]),
        "full": kinds["full"]["diff"],
    }
    for kind, tensors in kinds.items():
        adapter = Adapter.load(write(tmp_path / kind, {f"{stem}.{role}": value for role, value in tensors.items()}))
        for part, one in zip(whole[kind].chunk(3), "qkv", strict=True):
            assert torch.allclose(adapter.deltas[f"{LAYER}.self_attn.{one}_proj"].delta(), part, atol=1e-4), kind
    bias = noise(3840)
    adapter = Adapter.load(write(tmp_path / "bias", {f"{stem}.diff_b": bias}))
    assert torch.equal(adapter.deltas[f"{LAYER}.self_attn.k_proj.bias"].delta(), bias[1280:2560])
    others = {f"{OPENCLIP}.mlp.c_fc.diff_b": noise(5120), f"{OPENCLIP}.attn.out_proj.diff_b": noise(1280)}
    assert list(Adapter.load(write(tmp_path / "others", others)).deltas) == [
        f"{LAYER}.mlp.fc1.bias",
        f"{LAYER}.self_attn.out_proj.bias",
    ]


@pytest.mark.parametrize("more", [{"dora_scale": noise(1, 1280)}, {"lokr_w1": noise(64, 32), "lokr_w2": noise(60, 40)}])
def test_a_fused_update_that_is_no_three_is_refused_with_what_to_do(tmp_path: Path, more: dict[str, Tensor]) -> None:
    lora = {} if "lokr_w1" in more else {"lora_up.weight": UP, "lora_down.weight": DOWN}
    file = write(tmp_path / "a", {f"{OPENCLIP}.attn.in_proj.{role}": value for role, value in (lora | more).items()})
    with pytest.raises(UnmatchedKeysError, match=r"attn\.in_proj.*\(q, k and v in one are read where they can be told apart"):
        Adapter.load(file)


@pytest.mark.parametrize("named", ["", ".default"])
def test_the_bias_of_pefts_lora_is_the_layers_where_it_has_one(tmp_path: Path, named: str) -> None:
    stem, bias = "text_encoder.text_model.encoder.layers.0.mlp.fc1", noise(3072)
    config = {
        "ss_base_model_version": "sd_v1",
        "lora_adapter_metadata": json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 2}),
    }
    tensors = {f"{stem}.lora_A{named}.weight": noise(4, 768), f"{stem}.lora_B{named}.weight": noise(3072, 4)}
    save_file(tensors | {f"{stem}.lora_B{named}.bias": bias}, file := tmp_path / "a.safetensors", config)
    adapter = Adapter.load(file)
    assert torch.equal(adapter.deltas[f"{stem}.bias"].delta(), bias / 2)
    again = Adapter.load(adapter.save(tmp_path / "b"))  # as kohya's files have it
    assert torch.equal(again.deltas[f"{stem}.bias"].delta(), bias / 2)
    q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lone = {f"{q}.lora_A.weight": noise(4, 320), f"{q}.lora_B.weight": noise(320, 4), f"{q}.lora_B.bias": noise(320)}
    with pytest.raises(UnmatchedKeysError, match=r"lora_B\.bias \(peft's lora_bias gives layers a bias that the base has not"):
        Adapter.load(write(tmp_path / "c.safetensors", lone))
    assert list(Adapter.load(tmp_path / "c.safetensors", allow_unmatched=True).deltas) == [q]
