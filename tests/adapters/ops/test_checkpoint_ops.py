"""Between checkpoints and adapters: extract, bake, interpolate, on the embedded base and on single files."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow import all_but
from small import LATENT
from test_adapters import low_rank, make
from test_checkpoint import POCKET, ROWS, TO_Q, converted, hollow, parameters, pocket_file, single, small_rows, sparse, tiny
from torch import Tensor

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.delta import Decomposed, Dense, LowRank, Structured
from personalize.adapters.ops.bake import STORY, bake, interpolate
from personalize.adapters.ops.extract import extract
from personalize.cli.app import run
from personalize.errors import AdapterError, BaseModelError, FamilyMismatchError, OutputError
from personalize.families.checkpoint import open_weights
from personalize.formats.checkpoint import Weights, rewrite
from personalize.models.model import Base
from personalize.tuning.attach import attach

__all__ = ["small_rows"]  # a fixture
CONV = "unet.down_blocks.1.resnets.0.conv1"
FC1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
SOME = (TO_Q, "unet.down_blocks.0.attentions.0.proj_in", CONV, FC1)  # linear, 1x1, 3x3, text encoder


def some(scale: float = 0.05, rank: int = 3, seed: int = 0) -> Adapter:
    """A random adapter on one layer of each sort."""
    base = open_weights(POCKET)
    return Adapter({path: low_rank(base.shape(path), rank, 2.0, seed + i) * scale for i, path in enumerate(SOME)})


def values(weights: Weights) -> dict[str, Tensor]:
    return {path: weights[path].float() for path in weights}


def predict(base: Base) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn(2, *LATENT, generator=draw)
    with torch.no_grad():
        return base.denoise(latents, torch.tensor([10, 700]), base.embed(["a photo of a dog", ""]))


def far(a: Tensor, b: Tensor) -> float:
    """Relative distance of a from b."""
    return float((a - b).norm() / b.norm())


# --- bake -----------------------------------------------------------------------------------------------------------


def test_baking_is_attaching_in_fp32(tmp_path: Path, tiny_base: Path) -> None:
    a, b = make("pocket", rank=2) * 0.02, some(seed=9)
    report = bake(tiny_base, [(a, {"text_encoder": 0.5}), (b, -0.7)], tmp_path / "baked")
    assert report.path == tmp_path / "baked"
    base = Base.load(tiny_base)
    plain = predict(base)
    with attach(base, [(a, {"text_encoder": 0.5}), (b, -0.7)]):
        wanted = predict(base)
    assert far(wanted, plain) > 0.05 and far(predict(Base.load(tmp_path / "baked")), wanted) < 1e-5
    assert report.changes.keys() == a.deltas.keys() and report.error < 1e-5 and not report.left_out


def test_baking_the_embedded_base_costs_fp16s_rounding(tmp_path: Path) -> None:
    a = make("pocket", rank=2) * 0.02
    bake(POCKET, [(a, 0.8)], tmp_path / "baked")
    base = Base.load(POCKET)
    with attach(base, [(a, 0.8)]):
        wanted = predict(base)
    assert far(predict(Base.load(tmp_path / "baked")), wanted) < 2e-3


def test_baked_minus_base_is_the_update(tmp_path: Path) -> None:
    a, b = some(), some(0.1, rank=1, seed=4)
    report = bake(POCKET, [(a, 1.0), (b, {"unet": 0.5, "text_encoder": 0.0})], tmp_path / "baked")
    before, after = open_weights(POCKET), open_weights(tmp_path / "baked")
    for path in before:
        update = after[path].float() - before[path].float()
        if path not in SOME:
            assert not update.any(), path
            continue
        wanted = a.deltas[path].delta() + (0.5 * b.deltas[path].delta() if path != FC1 else 0)
        assert (update - wanted).abs().max() <= 2.0**-11 * after[path].float().abs().max()
        assert report.changes[path].norm == pytest.approx(float(wanted.norm()), rel=1e-4)
        assert report.changes[path].lost == pytest.approx(float((update - wanted).norm()), rel=1e-2)


def test_what_depends_on_the_base_is_given_it(tmp_path: Path) -> None:
    base = open_weights(POCKET)
    dora = Decomposed(low_rank((96, 96)), torch.rand(1, 96) + 0.5)
    ia3 = Structured("IA3", {"weight": torch.randn(192, 1) * 0.1, "on_input": torch.tensor(0.0)}, None, (192, -1))
    bias = Dense(torch.randn(96))
    adapter = Adapter({TO_Q: dora, CONV: ia3, "unet.conv_in.bias": bias, "unet.conv_norm_out": bias})
    bake(POCKET, [(adapter, 0.5), (Adapter({TO_Q: dora}), 0.25)], tmp_path / "baked")
    after = open_weights(tmp_path / "baked")
    for path, strength in ((TO_Q, 0.75), (CONV, 0.5), ("unet.conv_in.bias", 0.5), ("unet.conv_norm_out", 0.5)):
        weight = base[path].float()
        wanted = weight + strength * adapter.deltas[path].delta(weight)
        assert far(after[path].float(), wanted) < 1e-3 and far(wanted, weight) > 1e-2, path


def test_bf16_loses_small_updates_and_the_report_says_so(tmp_path: Path) -> None:
    (tmp_path / "base" / "unet").mkdir(parents=True)
    file = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({"conv_in.weight": torch.ones(8, 4, 3, 3, dtype=torch.bfloat16)}, file)
    adapter = Adapter({"unet.conv_in": Dense(torch.full((8, 4, 3, 3), 1e-3))})
    assert bake(tmp_path / "base", [(adapter, 1.0)], tmp_path / "small").error == pytest.approx(1.0)
    assert bake(tmp_path / "base", [(adapter, 100.0)], tmp_path / "large").error < 0.1
    assert torch.equal(open_weights(tmp_path / "small")["unet.conv_in"], open_weights(tmp_path / "base")["unet.conv_in"])


def test_a_single_file_tells_what_was_baked(tmp_path: Path) -> None:
    file = pocket_file(tmp_path / "a.safetensors", metadata={"modelspec.title": "A", "sshs_model_hash": "old"})
    rex = Adapter(some().deltas, {"ss_output_name": "rex"})
    bake(file, [(rex, {"unet": 0.8})], tmp_path / "b.safetensors")
    bake(tmp_path / "b.safetensors", [(rex, -0.8), (some(), 0)], tmp_path / "c")
    told = open_weights(tmp_path / "c.safetensors").metadata
    first = "a.safetensors + rex (unet 0.8, text_encoder 1)"
    second = "b.safetensors + rex (unet -0.8, text_encoder -0.8) + an adapter (unet 0, text_encoder 0)"
    assert told == {"modelspec.title": "A", STORY: f"{first}; {second}"}
    back, base = open_weights(tmp_path / "c.safetensors"), open_weights(POCKET)
    assert far(back[TO_Q].float(), base[TO_Q].float()) < 1e-3
    ours, theirs = load_file(tmp_path / "c.safetensors"), load_file(file)
    assert {key for key in theirs if not torch.equal(ours[key], theirs[key])} <= {
        *(f"cond_stage_model.transformer.{FC1.removeprefix('text_encoder.')}{end}" for end in (".weight",)),
        *(key for key in theirs if key.startswith("model.diffusion_model.input_blocks")),
    }


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("name", all_but({"sdxl"}, ["sd2", "sdxl", "sdxl-refiner"]))
def test_baking_into_fused_tensors_lands_where_diffusers_looks(tmp_path: Path, name: str) -> None:
    family, before = tiny(ROWS[name]), parameters(name)
    save_file(single(before, family), tmp_path / "a.safetensors")
    layer = f"{family.texts[-1].part}.text_model.encoder.layers.2"
    paths = [f"{layer}.self_attn.{leaf}" for leaf in ("q_proj", "v_proj", "out_proj")] + [f"{layer}.mlp.fc2", "unet.conv_out"]
    paths += ["text_encoder_2.text_projection"] * (name != "sd2") + [f"{layer}.self_attn.k_proj.bias"]
    adapter = Adapter({path: Dense(torch.randn(before[path].shape)) for path in paths})
    bake(tmp_path / "a.safetensors", [(adapter, 2.0)], tmp_path / "b.safetensors")
    after = converted(load_file(tmp_path / "b.safetensors"), family)
    for path, value in before.items():
        wanted = value + 2 * adapter.deltas[path].delta() if path in adapter.deltas else value
        assert torch.allclose(after[path], wanted, rtol=0, atol=1e-6), path
    extracted, report = extract(tmp_path / "b.safetensors", tmp_path / "a.safetensors", value=99, full=True)
    assert distance(extracted, adapter * 2) < 1e-5 and report.error < 1e-5 and not report.left_out


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    sd1 = make("sd1", "attn2.to_k")
    wide = Adapter({TO_Q: low_rank((96, 95)), "unet.conv_in": low_rank((96, 16, 3, 3))})
    for adapter, strengths, kind, words in [
        (sd1, 1.0, FamilyMismatchError, r"\(sd1\) does not fit .* \(pocket\): 16 of 16 updates differ, e.g. unet"),
        (wide, 1.0, AdapterError, r"1 of 2 updates differ, e.g. .*to_q is \[96, 95\] there and here it is \[96, 96\]"),
        (some(), {"unett": 1.0}, AdapterError, "did you mean unet"),
        (some(), math.nan, AdapterError, "a strength of nan"),
        (some(), 1e30, AdapterError, "would hold NaN or Inf in float16"),
    ]:
        with pytest.raises(kind, match=words) as caught:
            bake(POCKET, [(adapter, strengths)], tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="would overwrite"):
        bake(POCKET, [(some(), 1.0)], POCKET)


# --- extract --------------------------------------------------------------------------------------------------------


def test_extracting_what_was_baked(tmp_path: Path, tiny_base: Path) -> None:
    for base, tolerance in ((tiny_base, 1e-5), (POCKET, 5e-3)):  # stored in fp32 and in fp16
        a = some()
        baked = tmp_path / f"baked-{tolerance:g}"
        bake(base, [(a, 1.0)], baked)
        got, report = extract(baked, base, value=3)
        assert distance(got, a) < tolerance and report.error < tolerance
        assert {path: delta.shape for path, delta in got.deltas.items()} == {path: one.shape for path, one in a.deltas.items()}
        assert all(isinstance(delta, LowRank) and delta.rank == delta.alpha == 3 for delta in got.deltas.values())
        assert got.metadata["ss_sd_model_name"] == Path(base).name and got.family == "pocket"
        assert distance(Adapter.load(got.save(tmp_path / "got")), got) < 1e-6


def test_a_file_and_a_folder_can_be_compared(tmp_path: Path) -> None:
    bake(pocket_file(tmp_path / "a.safetensors"), [(some(), 1.0)], tmp_path / "b.safetensors")
    got, _ = extract(tmp_path / "b.safetensors", POCKET, value=3)
    assert distance(got, some()) < 5e-3


def test_truncation_is_the_best_there_is_and_measured(tmp_path: Path) -> None:
    update = torch.linalg.qr(torch.randn(96, 96)).Q * torch.logspace(0, -3, 96) @ torch.linalg.qr(torch.randn(96, 96)).Q
    rewrite(open_weights(POCKET), tmp_path / "tuned", {TO_Q: open_weights(POCKET)[TO_Q].float() + update})
    true = open_weights(tmp_path / "tuned")[TO_Q].float() - open_weights(POCKET)[TO_Q].float()
    singular = torch.linalg.svdvals(true.double())
    for rule, value in (("rank", 7), ("rank", 90), ("sv_ratio", 30.0), ("sv_fro", 0.9), ("sv_cumulative", 0.7), ("error", 0.1)):
        got, report = extract(tmp_path / "tuned", POCKET, rule, value)
        (delta,) = got.deltas.values()
        assert isinstance(delta, LowRank)
        best = float(singular[delta.rank :].norm() / singular.norm())
        assert report.changes[TO_Q].rank == delta.rank and far(delta.delta(), true) == pytest.approx(best, rel=1e-3, abs=1e-6)
        assert report.error == pytest.approx(best, rel=1e-3, abs=1e-6)
        if rule == "rank":
            assert delta.rank == value
        if rule == "error":
            assert 0.05 < best <= 0.1
        short, _ = extract(tmp_path / "tuned", POCKET, rule, value, max_rank=2)
        assert short.deltas[TO_Q].down.shape[0] == 2


def test_clamping_cuts_and_is_measured(tmp_path: Path) -> None:
    bake(POCKET, [(some(), 1.0)], tmp_path / "tuned")
    plain, none = extract(tmp_path / "tuned", POCKET, value=3)
    whole, same = extract(tmp_path / "tuned", POCKET, value=3, clamp_quantile=1.0)
    cut, some_lost = extract(tmp_path / "tuned", POCKET, value=3, clamp_quantile=0.9)
    assert distance(plain, whole) < 1e-5 and same.error == pytest.approx(none.error, abs=1e-5)
    assert some_lost.error == pytest.approx(distance(cut, plain), rel=0.1) and some_lost.error > 0.05


def test_what_is_chosen_and_what_is_left_out(tmp_path: Path) -> None:
    table = "text_encoder.text_model.embeddings.token_embedding"
    extra = Adapter({"unet.conv_in.bias": Dense(torch.ones(96)), "unet.conv_norm_out": Dense(torch.ones(96))})
    tuned = rewrite(open_weights(POCKET), tmp_path / "tuned", {table: open_weights(POCKET)[table] + 1})
    bake(tuned, [(some() + extra, 1.0)], tmp_path / "all")

    def chosen(**options: object) -> tuple[set[str], set[str]]:
        got, report = extract(tmp_path / "all", POCKET, value=2, **options)  # type: ignore[arg-type]
        return set(got.deltas), set(report.left_out)

    vectors = set(extra.deltas)
    assert chosen() == (set(SOME), {*vectors, table})
    assert chosen(full=True) == ({*SOME, *vectors}, {table})
    assert chosen(parts=["text_encoder"]) == ({FC1}, {table})
    assert chosen(targets=["*.attn?.*", "down_blocks.1.*"]) == ({TO_Q, CONV}, {*SOME, *vectors, table} - {TO_Q, CONV})
    got, report = extract(tmp_path / "all", POCKET, value=2, full=True)
    assert isinstance(got.deltas["unet.conv_norm_out"], Dense) and report.changes["unet.conv_norm_out"].rank == 0
    assert report.left_out[table] == pytest.approx(math.sqrt(open_weights(POCKET)[table].numel()), rel=1e-2)
    assert set(report.part("unet").changes) == {*SOME, *vectors} - {FC1} and not report.part("unet").left_out


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    rewrite(open_weights(POCKET), tmp_path / "same", {})
    for options, words in [
        ({}, "are the same in every layer that was asked for$"),
        ({"rule": "rnak"}, "no rule for ranks is called 'rnak' .did you mean rank"),
        ({"rule": "size", "value": 1e6}, "extract at a rank, then resize"),
        ({"value": 0}, "rank 0 makes no sense"),
        ({"max_rank": 0}, "a rank of at most 0"),
        ({"clamp_quantile": 99}, "a quantile of 99"),
        ({"targets": ["*to_qq"]}, r"no layer matches the target '\*to_qq'"),
        ({"parts": ["unett"]}, "did you mean unet"),
    ]:
        with pytest.raises(AdapterError, match=words):
            extract(tmp_path / "same", POCKET, **options)  # type: ignore[arg-type]
    rewrite(open_weights(POCKET), tmp_path / "bias", {"unet.conv_in.bias": torch.ones(96)})
    with pytest.raises(AdapterError, match=r"what differs was not asked for: unet.conv_in.bias and 0 more"):
        extract(tmp_path / "bias", POCKET)
    with pytest.raises(BaseModelError, match=r"has no text_encoder_2 \(it has unet and text_encoder\)"):
        extract(tmp_path / "same", POCKET, parts=["text_encoder_2"])


def test_checkpoints_that_cannot_be_compared(tmp_path: Path) -> None:
    def refused(kind: type[Exception], words: str, tuned: Path, base: Path = POCKET) -> None:
        for work in (lambda: extract(tuned, base), lambda: interpolate(base, tuned, 0.5, tmp_path / "out")):
            with pytest.raises(kind, match=words) as caught:
                work()
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused(FamilyMismatchError, "is sd1 and .*weights is pocket", sparse(tmp_path / "a.safetensors", ROWS["sd1"]))

    folder = shutil.copytree(POCKET, tmp_path / "base")
    file = folder / "text_encoder" / "model.safetensors"
    whole = load_file(file)
    save_file({key: value for key, value in whole.items() if "layers.3" not in key}, file)
    refused(BaseModelError, r"base lacks text_encoder.*layers.3.* and 15 more differ", folder)
    refused(BaseModelError, r"base lacks text_encoder.*layers.3.* and 15 more differ", POCKET, folder)

    save_file(whole | {"encoder.layers.0.mlp.fc1.weight": torch.ones(700, 192), "final_layer_norm.bias": torch.ones(3)}, file)
    refused(AdapterError, r"mlp.fc1 is \[700, 192\] in .* and \[768, 192\] in .*, and 1 more differ", folder)

    save_file(whole | {"encoder.layers.0.mlp.fc1.weight": torch.full((768, 192), math.nan)}, file)
    with pytest.raises(AdapterError, match=r"mlp.fc1 holds NaN or Inf in .*base or"):
        extract(folder, POCKET)

    shutil.rmtree(folder / "unet")
    text_only = folder
    shutil.copytree(POCKET / "unet", tmp_path / "other" / "unet")
    refused(BaseModelError, "no part of a model in common", text_only, tmp_path / "other")


def test_more_words_in_a_text_encoder_hinder_nobody(tmp_path: Path) -> None:
    bake(POCKET, [(some(), 1.0)], tmp_path / "tuned")
    file = tmp_path / "tuned" / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"embeddings.token_embedding.weight": torch.ones(900, 192)}, file)
    got, report = extract(tmp_path / "tuned", POCKET, value=3)
    assert distance(got, some()) < 5e-3
    assert report.left_out == {"text_encoder.text_model.embeddings.token_embedding": math.inf}


def test_extracting_needs_the_memory_of_a_layer(tmp_path: Path) -> None:
    shapes = {f"layer_{i}.weight": (1024, 2048) for i in range(64)}
    for name in ("base", "tuned"):
        hollow(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors", shapes)
    changed = tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors"
    place = open_weights(tmp_path / "tuned").place("unet.layer_9").entry
    with changed.open("r+b") as file:
        file.seek(place.start)
        file.write(torch.ones(64, 2048, dtype=torch.float16).numpy().tobytes())
    code = """if True:
        import json, sys
        from personalize.adapters.ops.extract import extract
        def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10  # MiB, not the parent's
        before = peak()
        adapter, report = extract(sys.argv[1] + "/tuned", sys.argv[1] + "/base", "rank", 2)
        print(json.dumps([peak() - before, {path: delta.rank for path, delta in adapter.deltas.items()}, report.error]))
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    used, ranks, error = json.loads(done.stdout)
    assert used < 200, "MiB, of two files of 256"
    assert ranks == {"unet.layer_9": 1} and error < 1e-6


# --- interpolate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", all_but({"file"}, ["folder", "file"]))
def test_between_two_and_beyond(tmp_path: Path, layout: str) -> None:
    base = POCKET if layout == "folder" else pocket_file(tmp_path / "a.safetensors")
    shift = {"unet.conv_in.bias": Dense(torch.ones(96)), "unet.conv_norm_out": Dense(torch.ones(96))}
    bake(POCKET, [(make("pocket", rank=1) * 0.02 + Adapter(shift), 1.0)], tmp_path / "tuned")
    ours, theirs = values(open_weights(base)), values(open_weights(tmp_path / "tuned"))
    for alpha in (0.0, 1.0, 0.25, 1.5, -0.5):
        report = interpolate(base, tmp_path / "tuned", alpha, tmp_path / f"{layout}{alpha:g}.d")
        name = f"{layout}{alpha:g}.d" + (".safetensors" if layout == "file" else "")
        between = open_weights(tmp_path / name)
        assert report.changes.keys() == ours.keys() == set(between)
        for path in ours:
            wanted = (1 - alpha) * ours[path] + alpha * theirs[path]
            assert between[path].dtype == torch.float16
            if alpha in (0.0, 1.0):
                assert torch.equal(between[path].float(), wanted), path
            else:
                assert torch.allclose(between[path].float(), wanted, rtol=1e-3, atol=1e-6), path
        story = f"{1 - alpha:g} x a.safetensors + {alpha:g} x tuned"
        assert between.metadata.get(STORY) == (story if layout == "file" else None)
    assert report.changes[TO_Q].norm == pytest.approx(0.5 * float((theirs[TO_Q] - ours[TO_Q]).norm()), rel=1e-2)


def test_interpolating_touches_no_source(tmp_path: Path) -> None:
    bake(POCKET, [(some(), 1.0)], tmp_path / "tuned")
    with pytest.raises(OutputError, match="would overwrite"):
        interpolate(POCKET, tmp_path / "tuned", 0.5, tmp_path / "tuned")
    with pytest.raises(AdapterError, match="an alpha of inf"):
        interpolate(POCKET, tmp_path / "tuned", math.inf, tmp_path / "out")
    shutil.rmtree(tmp_path / "tuned" / "text_encoder")
    interpolate(POCKET, tmp_path / "tuned", 1.0, tmp_path / "out")
    after, base = open_weights(tmp_path / "out"), open_weights(POCKET)
    assert torch.equal(after[FC1], base[FC1]) and not torch.equal(after[TO_Q], base[TO_Q])


# --- second copies, rounding, other shapes, files of a denoiser alone -----------------------------------------------


def averaged(path: Path, scale: float = 2.0) -> Path:
    """The embedded base as a single file, with moving averages of its UNet as LDM's trainer keeps them."""
    tensors = load_file(pocket_file(path))
    own = {key: value for key, value in tensors.items() if key.startswith("model.diffusion_model.")}
    averages = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": value * scale for key, value in own.items()}
    save_file(tensors | averages | {"model_ema.decay": torch.tensor(0.9999)}, path)
    return path


def test_a_moving_average_gets_the_same_update(tmp_path: Path) -> None:
    file = averaged(tmp_path / "a.safetensors")
    report = bake(file, [(some(), 1.0)], tmp_path / "b")
    before, after = open_weights(file), open_weights(tmp_path / "b.safetensors")
    deltas = some().deltas
    assert report.copies == len(before.copy) - sum(path not in deltas for path in before.copy) == 3
    for path in before.copy:
        moved = deltas[path].delta().reshape(before.shape(path)) if path in deltas else 0.0
        torch.testing.assert_close(after.copy[path].float(), before.copy[path].float() + moved, rtol=1e-3, atol=1e-3)
    plain = pocket_file(tmp_path / "plain.safetensors")
    assert interpolate(file, plain, 0.5, tmp_path / "c").copies == len(before.copy)
    half = open_weights(tmp_path / "c.safetensors").copy[TO_Q].float()
    torch.testing.assert_close(half, 1.5 * open_weights(plain)[TO_Q].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lead", ["ema.", "model_ema.", "ema_model."])
def test_a_moving_average_under_names_with_dots_gets_the_same_update(tmp_path: Path, lead: str) -> None:
    plain = load_file(pocket_file(tmp_path / "a.safetensors"))
    own = {key: value for key, value in plain.items() if key.startswith("model.diffusion_model.")}
    names = {key: lead + (key if lead == "ema." else key.removeprefix("model.")) for key in own}
    save_file(plain | {names[key]: value.clone() for key, value in own.items()}, tmp_path / "a.safetensors")
    assert bake(tmp_path / "a.safetensors", [(some(), 1.0)], tmp_path / "b").copies == 3
    after = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(after[key], after[name]) for key, name in names.items())
    assert any(not torch.equal(after[key], value) for key, value in own.items())


def test_what_was_rounded_and_stored_in_more_bits_later_is_no_learning(tmp_path: Path) -> None:
    """fp16 that was upcast, and fp32 that was fp16 on its way to bf16; small learning from a base that was upcast stays."""
    torch.manual_seed(0)
    base = {key: value.float() * 1.0001 for key, value in load_file(pocket_file(tmp_path / "a.safetensors")).items()}
    save_file(base, tmp_path / "a.safetensors")
    upcast = {key: value.half().float() for key, value in base.items()}
    for name, values in (("up", upcast), ("twice", {key: value.bfloat16() for key, value in upcast.items()})):
        save_file(values, tmp_path / f"{name}.safetensors")
        with pytest.raises(AdapterError, match="the same in every layer"):
            extract(tmp_path / f"{name}.safetensors", tmp_path / "a.safetensors")
    key = next(key for key in base if key.endswith("attn1.to_q.weight"))
    save_file(upcast | {key: upcast[key] * (1 + 1e-5)}, tmp_path / "learned.safetensors")
    found, _ = extract(tmp_path / "learned.safetensors", tmp_path / "up.safetensors", "rank", 1)
    assert len(found.deltas) == 1


@pytest.mark.parametrize(("narrow", "wide"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float16)])
def test_rounding_is_not_learning(tmp_path: Path, narrow: torch.dtype, wide: torch.dtype) -> None:
    values = {key: value.to(wide) for key, value in load_file(pocket_file(tmp_path / "a.safetensors")).items()}
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    save_file(values, base)
    save_file({key: value.to(narrow) for key, value in values.items()}, tuned)
    for pair in ((tuned, base), (base, tuned)):
        with pytest.raises(AdapterError, match="the same in every layer"):
            extract(*pair)
    moved = {key: value + 0.1 if key.endswith("attn1.to_q.weight") else value for key, value in values.items()}
    save_file({key: value.to(narrow) for key, value in moved.items()}, tuned)
    found, report = extract(tuned, base, "rank", 1)
    assert {path.rpartition(".attn1.")[2] for path in found.deltas} == {"to_q"} and not report.left_out


def test_one_step_of_the_same_dtype_is_learning(tmp_path: Path) -> None:
    values = load_file(pocket_file(tmp_path / "a.safetensors"))
    key = next(key for key in values if key.endswith("attn1.to_q.weight"))
    save_file(values | {key: values[key].nextafter(torch.tensor(9.0, dtype=values[key].dtype))}, tmp_path / "b.safetensors")
    assert len(extract(tmp_path / "b.safetensors", tmp_path / "a.safetensors", "rank", 1)[0].deltas) == 1


def test_an_inpainting_model_less_the_plain_one(tmp_path: Path) -> None:
    """The layer that reads more channels is left out, whether it was chosen or not."""
    values = load_file(pocket_file(tmp_path / "a.safetensors"))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tuned = {key: value + 0.1 if key.endswith("attn1.to_q.weight") else value for key, value in values.items()}
    tuned[first] = torch.cat([values[first], values[first][:, :5]], 1)
    save_file(tuned, tmp_path / "b.safetensors")
    for targets in (("*",), ("*attn*",)):
        found, report = extract(tmp_path / "b.safetensors", tmp_path / "a.safetensors", "rank", 1, targets=targets)
        assert all(path.endswith("attn1.to_q") for path in found.deltas) and report.left_out == {"unet.conv_in": math.inf}
    with pytest.raises(AdapterError, match="conv_in is"):
        extract(tmp_path / "b.safetensors", tmp_path / "a.safetensors", "rank", 1, targets=("unet.conv_in",))


@pytest.mark.parametrize("lead", ["", "diffusion_model.", "module.model.diffusion_model.", "model.diffusion_model."])
def test_a_denoiser_alone_is_read_whatever_stands_before_its_names(tmp_path: Path, lead: str) -> None:
    prefix = "model.diffusion_model."
    whole = load_file(pocket_file(tmp_path / "whole.safetensors"))
    save_file(
        {lead + key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)},
        tmp_path / "a.safetensors",
    )
    weights = open_weights(tmp_path / "a.safetensors")
    assert weights.parts == ("unet",) and weights.family == "pocket"
    assert torch.equal(weights[TO_Q], open_weights(tmp_path / "whole.safetensors")[TO_Q])
    with pytest.raises(AdapterError, match=r"has no text_encoder.*te=0"):
        bake(weights, [(some(), 1.0)], tmp_path / "b")
    report = bake(weights, [(some(), {"text_encoder": 0.0})], tmp_path / "b")
    assert report.changes.keys() == {path for path in SOME if path.startswith("unet.")}


def test_the_hint_for_a_denoiser_alone_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = some().save(tmp_path / "lora")
    whole = load_file(pocket_file(tmp_path / "whole.safetensors"))
    save_file({key: value for key, value in whole.items() if key.startswith("model.")}, tmp_path / "a.safetensors")
    command = ["bake", str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "b.safetensors")]
    assert run([*command, str(adapter)]) == 2
    hint = capsys.readouterr().err.rpartition("leave it out: ")[2].strip().removesuffix(")")
    assert hint == f"{adapter}:1:0" and run([*command, hint]) == 0
