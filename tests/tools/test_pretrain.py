"""Pretraining the pocket: what a kill must not change, and what the tokenizer must take."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from personalize.families.noise import VP
from personalize.models.clip import Clip
from personalize.models.model import Base
from tools.pocket import WEIGHTS, clip, diffusion, pool, pretrain
from tools.pocket.autoencoder import LATENT
from tools.pocket.card import card
from tools.pocket.diffusion import DENSITIES, AttentionInFloats, Teaching, deepen
from tools.pocket.pool import shuffled_batches, write_rows
from tools.pocket.proof import settings
from tools.pocket.proof.__main__ import parser
from tools.pocket.proof.settings import velocity
from tools.pocket.running import Plan, join_team, read_about, run, team


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")


PLAN = Plan(steps=6, batch=4, lr=1e-2, warmup=2, save_every=2, log_every=2)


def trained(folder: Path, stop: int = 1000) -> dict[str, Tensor]:
    """A small model (matrices for Muon, biases for AdamW) through the loop; killed when it asks for the batch of step `stop`."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16)), torch.arange(64.0)[:, None].expand(-1, 32) / 64

    rank, count = team()

    def batches(start: int) -> Iterator[Tensor]:
        for step, rows in enumerate(shuffled_batches(64, PLAN.batch, 0, start), start):
            if step == stop:
                raise KeyboardInterrupt
            yield data[rows[rank::count]]

    return run(folder, model, PLAN, batches, lambda x, step: F.mse_loss(model(x), x[:, :16].sin()))


def test_a_killed_stage_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", stop=5)  # one step after the last state
    resumed = trained(tmp_path / "broken")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def train_one_of_two(rank: int, folder: Path) -> None:
    join_team(rank, 2, folder / "meeting")
    weights = trained(folder / f"work-{rank}")
    torch.save(weights, folder / f"weights-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_the_first_writes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_one_of_two, (tmp_path,), 2)
    alone, first, second = trained(tmp_path / "alone"), *(torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1))
    for name, weights in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weights, rtol=1e-3, atol=1e-4)  # Muon computes in bf16
    assert (tmp_path / "work-0/state.safetensors").exists() and not any((tmp_path / "work-1").iterdir())


def test_the_rate_warms_up_stays_and_falls() -> None:
    plan = replace(PLAN, steps=100, warmup=10, decay=0.2)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3) and rates[10:80] == [1e-2] * 70
    assert rates[80:] == sorted(rates[80:], reverse=True) and rates[-1] < 1e-3


@pytest.mark.parametrize("start", [0, 3, 7])
def test_batches_go_on_where_they_were(start: int) -> None:
    assert np.array_equal(
        list(islice(shuffled_batches(12, 4, 5, start), 6)), list(islice(shuffled_batches(12, 4, 5, 0), start, start + 6))
    )


def test_rows_have_their_name_only_when_whole(tmp_path: Path) -> None:
    file, values = tmp_path / "rows.npy", np.arange(21.0).reshape(7, 3)
    with pytest.raises(IndexError):
        write_rows(file, 7, lambda rows: values[rows] if rows.start < 4 else values[99], batch=2)
    assert not file.exists()
    write_rows(file, 7, lambda rows: values[rows], batch=2)
    assert np.array_equal(np.load(file), values)


def test_the_opposite_of_a_caption_is_another_caption_or_itself(tokenizer: CLIPTokenizer) -> None:
    def said(words: str) -> str:
        return tokenizer.decode(clip.opposite(tokenizer, clip.tokens(tokenizer, [words]))[0], skip_special_tokens=True).strip()

    assert said("a tiny cat on the left") == "a huge cat on the right"
    assert said("a red cat in the snow") == "a red cat in the snow"


def test_a_vocabulary_can_change_under_a_trained_clip(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    pool.build_tokenizer(tmp_path, ["a marmalade cat in the snow"] * 300)
    words, old = CLIPTokenizer.from_pretrained(tmp_path), Clip.of(WEIGHTS).model
    new = clip.carry_over(old, tokenizer, words)
    before, after = (model.text_model.embeddings.token_embedding.weight for model in (old, new))
    old_number, number = tokenizer.get_vocab(), words.get_vocab()
    assert torch.equal(after[number["cat</w>"]], before[old_number["cat</w>"]])
    letters = [*"marmalad", "e</w>"]
    assert torch.allclose(after[number["marmalade</w>"]], before[[old_number[letter] for letter in letters]].mean(0))
    assert torch.equal(new.vision_model.post_layernorm.weight, old.vision_model.post_layernorm.weight)


@pytest.mark.parametrize("text", ["a zwx cat", "Na\u00efve \u732b \u2603 42!", "photo-of_my.Dog"])
def test_any_typed_word_tokenizes(text: str, tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer(text).input_ids
    assert len(ids) > 2 and tokenizer.eos_token_id not in ids[1:-1]
    assert "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) == "".join(text.lower().split())


TEACHINGS = [
    Teaching(),
    Teaching(zero_snr=False),
    Teaching("epsilon", zero_snr=False),
    Teaching("sample", min_snr=5),
    Teaching(min_snr=5, density="logit-normal"),
]


@pytest.mark.parametrize("teaching", TEACHINGS, ids=Teaching.describe)
def test_whoever_predicts_the_truth_has_no_loss(teaching: Teaching) -> None:
    """And whatever is predicted, it tells the same v."""
    schedule = VP.of(teaching.scheduler().config)
    assert (schedule.prediction, bool(schedule.alphas_cumprod[-1])) == (teaching.prediction, not teaching.zero_snr)
    x0, generator = torch.randn(6, 16, 8, 8, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(0)
    seen = []

    def knows(x: Tensor, t: Tensor, cond: Tensor) -> SimpleNamespace:
        signal, noise = schedule.signal(t), schedule.noise(t)
        eps = (x - signal * x0) / noise
        truth = schedule.target(x0, eps, t)
        seen.append((velocity(truth, x, t, schedule), signal * eps - noise * x0, signal))
        return SimpleNamespace(sample=truth)

    assert teaching.loss(knows, schedule, x0, torch.zeros(6, 4, 8), generator) < 1e-5
    found, v, signal = seen[0]
    fine = signal.flatten() > 0.1  # where there is a signal to be seen
    assert torch.allclose(found[fine], v[fine], atol=1e-3)
    assert teaching.loss(lambda x, t, cond: SimpleNamespace(sample=x * 0), schedule, x0, torch.zeros(6, 4, 8), generator) > 0.05


def test_a_unet_that_knows_the_truth_draws_latents_again_as_they_were() -> None:
    teaching = Teaching(width=(16, 32, 32))
    unet, schedule = teaching.build(8, channels=4), VP.of(teaching.scheduler().config)
    x0, seen = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1)), []

    def knows(x: Tensor, t: Tensor, cond: Tensor) -> SimpleNamespace:
        seen.append(t)
        return SimpleNamespace(sample=schedule.target(x0, (x - schedule.signal(t) * x0) / schedule.noise(t), t))

    empty = torch.zeros(1, 5, 192)
    drawn = diffusion.redraw(unet, teaching, empty, "cpu")(x0, torch.Generator().manual_seed(0))
    assert drawn.shape == x0.shape and not torch.allclose(drawn, x0, atol=0.1)  # random weights know nothing
    unet.forward = knows  # type: ignore[method-assign]
    drawn = diffusion.redraw(unet, teaching, empty, "cpu", until=0.2)(x0, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn, x0, atol=1e-3) and int(seen[0].max()) < 200 and len(set(seen[0].tolist())) > 1


def test_attention_is_in_floats_and_all_else_as_autocast_says() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    true = F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = F.scaled_dot_product_attention(q, k, v)
        with AttentionInFloats():
            found, product = F.scaled_dot_product_attention(q, k, v), q @ k.mT
    assert torch.equal(found, true) and rounded.dtype == product.dtype == torch.bfloat16


def test_a_trained_unet_keeps_its_body_below_a_new_level() -> None:
    torch.manual_seed(3)
    two = diffusion.CONFIG | {name: diffusion.CONFIG[name][1:] for name in ("down_block_types", "attention_head_dim")}
    two |= {"up_block_types": diffusion.CONFIG["up_block_types"][:2], "in_channels": 88, "out_channels": 88}
    before = UNet2DConditionModel(sample_size=8, block_out_channels=(96, 192), **two)
    after = deepen(before)
    assert after.config.in_channels == LATENT and after.config.sample_size == 16
    assert tuple(after.config.block_out_channels) == Teaching().width
    old, new = before.state_dict(), after.state_dict()
    kept = {name for name, t in old.items() if name in new and new[name].shape == t.shape and torch.equal(new[name], t)}
    assert {name.split(".")[0] for name in kept} >= {"mid_block", "up_blocks"}
    for name in ("down_blocks.0.attentions.0.proj_in.weight", "down_blocks.1.resnets.0.conv2.weight"):
        head, number, *rest = name.split(".")
        assert torch.equal(new[".".join([head, str(int(number) + 1), *rest])], old[name])
    t = torch.arange(0, 1000, 7)

    def told(unet: UNet2DConditionModel) -> Tensor:
        block = unet.mid_block.resnets[0]
        with torch.no_grad():
            return block.time_emb_proj(block.nonlinearity(unet.time_embedding(unet.time_proj(t))))

    assert float((told(after) - told(before)).square().mean()) < 0.3 * float(told(before).var(0).mean())


def test_an_unfinished_unet_has_the_structure_that_it_started_with(tmp_path: Path) -> None:
    begun = Teaching(width=(16, 32, 32)).build(8, channels=4)  # not what is built without a start
    begun.save_pretrained(tmp_path / "unet/start")
    averaged = {f"ema/{name}": t + 1 for name, t in begun.state_dict().items()}
    save_file(averaged, tmp_path / "unet/state.safetensors")
    found = pretrain.finished_unet(pretrain.arguments(["--work", str(tmp_path), "--start", str(WEIGHTS)])).state_dict()
    assert all(torch.equal(found[name], averaged[f"ema/{name}"]) for name in found)


def test_what_is_seen_weighs_more() -> None:
    teaching, schedule = Teaching(), VP.of(Teaching().scheduler().config)
    x0, shows = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([4.0, 0, 0, 0])[:, None, None]

    def loss(channel: int) -> float:
        def guess(x: Tensor, t: Tensor, cond: Tensor) -> SimpleNamespace:
            eps = (x - schedule.signal(t) * x0) / schedule.noise(t)
            wrong = schedule.target(x0, eps, t)
            wrong[:, channel] += 1
            return SimpleNamespace(sample=wrong)

        return float(teaching.loss(guess, schedule, x0, torch.zeros(6, 4, 8), torch.Generator().manual_seed(0), shows))

    assert loss(0) == pytest.approx(1, rel=1e-3) and loss(1) < 1e-5


def test_densities_stay_in_the_schedule_and_prefer_what_they_say() -> None:
    even = (torch.arange(1000) + 0.5) / 1000
    assert DENSITIES["uniform"](even) is even
    middle = DENSITIES["logit-normal"](even)
    assert middle.min() > 0 and middle.max() < 1 and ((middle - 0.5).abs() < 0.25).float().mean() > 0.7
    assert torch.allclose(middle, 1 - middle.flip(0), atol=1e-6)


def test_settings_reach_the_folder_of_the_base(tmp_path: Path) -> None:
    words = ["--work", str(tmp_path), "--unet-prediction", "epsilon", "--no-unet-zero-snr", "--unet-width", "32", "64", "128"]
    teaching = pretrain.teaching_of(pretrain.arguments(words))
    assert teaching == Teaching("epsilon", zero_snr=False, width=(32, 64, 128)) and teaching.describe() == "epsilon prediction"
    config = teaching.scheduler().config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("epsilon", False)
    assert tuple(teaching.build(8).config.block_out_channels) == (32, 64, 128)
    shipped = json.loads((WEIGHTS / "scheduler/scheduler_config.json").read_text())
    ours = pretrain.teaching_of(pretrain.arguments(["--work", str(tmp_path)])).scheduler().config
    assert {key: ours[key] for key in ours if not key.startswith("_")} == {key: shipped[key] for key in shipped if key[0] != "_"}


def test_what_cannot_be_learned_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pretrain.arguments(["--work", str(tmp_path), "--unet-prediction", "epsilon"])
    assert ended.value.code == 2 and "add --no-unet-zero-snr" in capsys.readouterr().err


def test_a_pool_has_as_many_pictures_as_were_asked_for(tmp_path: Path) -> None:
    pool.build_pool(tmp_path, 5, 32, 3, 1)
    pictures, captions = pool.open_pool(tmp_path)
    assert pictures.shape == (5, 32, 32, 3) and len(captions) == 5 and pictures[4].std() > 0


@pytest.mark.slow
def test_settings_are_compared_alike_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["epsilon, no zero SNR", "text encoder untrained", "narrower, 32 to 128"]
    words = ["--images", "16", "--batch", "8", "--pool", "24", "-n", "2", "--sampler-steps", "2", "--no-muon", "--size", "64"]
    options = parser().parse_args(
        ["settings", *words, "--only", *rows, "--work", str(tmp_path / "w"), "--to", str(tmp_path), "--name", "s"]
    )
    monkeypatch.setattr(settings, "SHOWN", 24)
    settings.main(options)
    told = json.loads((tmp_path / "s.json").read_text())["figures"]["Changed alone"]
    assert [row["name"] for row in told] == rows and all(0 < row["error"] < 100 for row in told)
    assert told[2]["parameters"] < told[0]["parameters"] == told[1]["parameters"]
    base, other = (Base.load(str(tmp_path / "w" / name / "base")) for name in ("epsilon-no-zero-SNR", "text-encoder-untrained"))
    assert base.noise.prediction == "epsilon" and other.noise.prediction == "v_prediction"
    shipped = Base.load("pocket").embed(["a red cat"]).tokens
    assert torch.allclose(base.embed(["a red cat"]).tokens, shipped, atol=2e-2)
    assert not torch.allclose(other.embed(["a red cat"]).tokens, shipped, atol=2e-2)
    before = (tmp_path / "s.json").read_text()
    monkeypatch.setattr(pretrain, "run", None)  # what is finished is read
    monkeypatch.setattr(settings, "prepare_folder", lambda options: None)
    settings.main(options)
    assert (
        json.loads((tmp_path / "s.json").read_text())["figures"]["Changed alone"]
        == json.loads(before)["figures"]["Changed alone"]
    )


def test_the_card_tells_every_run_that_a_base_came_from(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/log.jsonl").write_text('{"step": 50, "loss": 0.5, "images": 3200, "seconds": 53}\n')
    first = card(pretrain.arguments(["--work", str(tmp_path), "--no-muon"]), "v-prediction")
    assert "| 1 | unet | 50 | 3,200 | 53 | 0.5 |" in first and "--start" not in first
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text(first)
    second = card(pretrain.arguments(["--work", str(tmp_path), "--start", str(tmp_path / "base"), "--no-muon"]), "v-prediction")
    rows = [line for line in second.splitlines() if line.startswith(("| 1", "| 2"))]
    assert rows == ["| 1 | unet | 50 | 3,200 | 53 | 0.5 |", "| 2 | unet | 50 | 3,200 | 53 | 0.5 |"]
    assert "`--start`: 2 runs" in second


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain.arguments(["--work", str(tmp_path), "--unet-batch", "10", "--processes", "4"])
    assert "--processes 4 cannot share batches of 10" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("clip_steps, same", [(0, True), (5, False)])
def test_a_text_encoder_that_is_not_trained_on_keeps_its_tokens(clip_steps: int, same: bool, tmp_path: Path) -> None:
    words = ["--work", str(tmp_path), "--start", str(WEIGHTS), "--pool", "40", "--clip-steps", str(clip_steps), "--no-muon"]
    pretrain.stage_pool(pretrain.arguments([*words, "--workers", "1", "--size", "32"]))
    mine, shipped = (CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab() for folder in (tmp_path, WEIGHTS))
    assert (mine == shipped) == same


@pytest.mark.slow
def test_parts_that_are_not_trained_on_stay_as_they_are_and_two_processes_train_one(tmp_path: Path) -> None:
    kept = ("--vae-steps", "0", "--decoder-steps", "0", "--clip-steps", "0", "--unet-steps", "0")
    words = ["--start", str(WEIGHTS), "--pool", "40", "--workers", "1", "--no-muon", *kept]
    pretrain.run(pretrain.arguments(["--work", str(tmp_path), "--to", str(tmp_path / "base"), *words]))
    for file in WEIGHTS.rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "base" / file.relative_to(WEIGHTS)).read_bytes(), file
    two = ["--work", str(tmp_path), *words, "--unet-steps", "2", "--unet-batch", "4", "--processes", "2"]
    pretrain.run(pretrain.arguments(two), ("unet",))
    assert read_about(tmp_path / "unet/state.safetensors")["step"] == 2
    assert next((tmp_path / "unet/done").glob("*.safetensors")).is_file()


def test_a_pool_that_was_broken_off_goes_on_to_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    monkeypatch.setattr(pool, "CHUNK", 4)
    monkeypatch.setattr(pool, "get_context", lambda kind: SimpleNamespace(Pool=lambda n: HereAndNow(9)))
    pool.build_pool(whole, 14, 16, 5, 1)
    monkeypatch.setattr(pool, "get_context", lambda kind: SimpleNamespace(Pool=lambda n: HereAndNow(2)))
    with pytest.raises(KeyboardInterrupt):
        pool.build_pool(broken, 14, 16, 5, 1)
    part = broken / "captions.part.jsonl"
    part.write_text(part.read_text() + '["cut sho')
    pool.build_pool(broken, 14, 16, 5, 1)  # two chunks are left
    for (pictures, captions), again in zip([pool.open_pool(whole)], [pool.open_pool(broken)], strict=True):
        assert np.array_equal(pictures, again[0]) and captions == again[1] and len(captions) == 14
    assert not part.exists()


def test_a_broken_pool_of_other_pictures_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CHUNK", 4)
    for allowed, seed in ((1, 5), (9, 6)):
        monkeypatch.setattr(pool, "get_context", lambda kind, n=allowed: SimpleNamespace(Pool=lambda _: HereAndNow(n)))
        with pytest.raises(KeyboardInterrupt) if allowed == 1 else nullcontext():
            pool.build_pool(tmp_path / "other", 8, 16, seed, 1)
    pool.build_pool(tmp_path / "alone", 8, 16, 6, 1)
    assert np.array_equal(pool.open_pool(tmp_path / "other")[0], pool.open_pool(tmp_path / "alone")[0])


class HereAndNow:
    """A pool of processes that is none, and is killed after some jobs."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed

    def __enter__(self) -> HereAndNow:
        return self

    def __exit__(self, *_: object) -> None: ...

    def imap(self, function: Callable, jobs: list) -> Iterator:
        for i, job in enumerate(jobs):
            if i == self.allowed:
                raise KeyboardInterrupt
            yield function(job)


@pytest.mark.slow
def test_the_gpu_s_command_makes_a_base_of_128_pixels_in_calls_that_end(tmp_path: Path) -> None:
    """What `make pretrain-gpu TINY=1` runs, from nothing to a base that draws; a call whose time is over is gone on with."""
    make = ["make", "--no-print-directory", "-n", "pretrain-gpu", "TINY=1", f"WORK={tmp_path}"]
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # this may run inside `make test`
    told = subprocess.run(make, env=outside, capture_output=True, text=True, check=True)
    command = shlex.split(told.stdout.replace("\\\n", " ").splitlines()[-1])
    assert "--device" in command and command[command.index("--size") + 1] == "128"
    words = [sys.executable, *command[1:]]
    words[words.index("--workers") + 1] = "1"
    words[words.index("--minutes") + 1] = "0.1"
    first = subprocess.run(words, capture_output=True, text=True, check=True)
    assert first.stdout.splitlines()[-1] == "stopped; the same command goes on" and not (tmp_path / "base").exists()
    words[words.index("--minutes") + 1] = "9"
    subprocess.run(words, capture_output=True, text=True, check=True)
    base = Base.load(str(tmp_path / "base"))
    assert base.resolution == 128 and base.unet.config.sample_size == 16
    assert read_about(tmp_path / "decoder/state.safetensors")["step"] == 2  # of --decoder-steps 2
