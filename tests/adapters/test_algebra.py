"""The commands that compute with adapter files, on real files, and what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_adapters import make
from test_kinds import CONV, LINEAR, POCKET, dora, loha, lokr

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.delta import Dense
from personalize.adapters.describe import describe
from personalize.adapters.ops.compare import compare
from personalize.adapters.ops.methods import OPTIONS
from personalize.adapters.ops.resize import RULES
from personalize.cli import run
from personalize.cli.adapters import resize
from personalize.cli.checkpoints import extract
from personalize.cli.merge import OPTIONS as FLAGS
from tools.pocket import WEIGHTS

MADE = {"a": make(pick="attn", seed=1), "b": make(pick="attn2", rank=3, alpha=2.0, seed=2), "c": make(pick="conv", seed=3)}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of all that, and two that go with none of them."""
    folder = tmp_path_factory.mktemp("shelf")
    for name, adapter in MADE.items():
        adapter.save(folder / name)
    make("sd1", "mid_block.attentions.0.proj_in", rank=1).save(folder / "sd")
    Adapter({"unet.conv_in.bias": Dense(torch.ones(96))}).save(folder / "bias")
    (folder / "folder").mkdir()
    return folder


@pytest.fixture
def files(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Adapter]:
    """a, b and c in the folder that the commands run in."""
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return MADE


def load(name: str) -> Adapter:
    return Adapter.load(f"{name}.safetensors")


def test_a_merge_is_the_sum(files: dict[str, Adapter], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "a.safetensors:0.7", "b.safetensors:-0.3:0", "c.safetensors:lbw=MID", "-o", "d"]) == 0
    wanted = files["a"] * 0.7 + files["b"].part("unet") * -0.3
    mid = Adapter({path: delta for path, delta in files["c"].deltas.items() if "mid_block" in path})
    assert distance(load("d"), wanted + mid) < 1e-6
    assert "d.safetensors" in capsys.readouterr().out
    assert describe("d.safetensors").metadata["modelspec.merged_from"] == "a, b, c"


def test_a_merge_can_be_repeated_from_its_file(files: dict[str, Adapter], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "a.safetensors:0.7", "b.safetensors:*to_q*=0.5", "--method", "ties", "--density", "0.3", "-o", "d"]) == 0
    assert run(["merge", "--replay", "d.safetensors", "-o", "e"]) == 0
    assert distance(load("d"), load("e")) < 1e-12
    save_file({**load_file("a.safetensors"), "lora_unet_nothing.lora_up.weight": torch.ones(2, 2)}, "odd.safetensors")
    assert run(["merge", "odd.safetensors:0.123456789", "--allow-unmatched", "-o", "g"]) == 0
    assert run(["merge", "--replay", "g.safetensors", "-o", "h"]) == 0
    assert distance(load("h"), files["a"] * 0.123456789) < 1e-7
    files["c"].save("b")
    assert run(["merge", "--replay", "d.safetensors", "-o", "f"]) == 2
    assert "is not the file that d.safetensors was merged from" in capsys.readouterr().err
    assert run(["merge", "--replay", "a.safetensors", "-o", "f"]) == 2


def test_options_of_methods_have_flags() -> None:
    assert {name: text for name, (_, text) in FLAGS.items()} == {name: row.what for name, row in OPTIONS.items()}
    assert {name: kind for name, (kind, _) in FLAGS.items()} == {name: row.kind for name, row in OPTIONS.items()}
    assert RULES.keys() <= {option.name for option in resize.params} and RULES.keys() - {"size"} <= {
        o.name for o in extract.params
    }


def test_a_merged_file_tells_what_it_is(files: dict[str, Adapter], capsys: pytest.CaptureFixture[str]) -> None:
    for name, trigger in (("a", "zwx"), ("b", "vork")):
        files[name].save(f"{name} file", metadata={"modelspec.trigger_phrase": trigger})
    assert run(["merge", "a file.safetensors:0.7", "b file.safetensors", "-o", "a merge"]) == 0
    capsys.readouterr()
    assert run(["show", "nothing.safetensors", "a merge.safetensors", "folder"]) == 2
    told, errors = capsys.readouterr()
    assert "trigger   zwx, vork" in told and "'a file.safetensors:0.7' 'b file.safetensors:1'" in told
    assert "--replay 'a merge.safetensors'" in told and errors.count("\n") == 2
    moved = Path("elsewhere")
    moved.mkdir()
    Path("a merge.safetensors").rename(moved / "a.safetensors")
    Path("a file.safetensors").unlink()
    assert run(["merge", "--replay", "elsewhere/a.safetensors", "-o", "x"]) == 2
    assert "merged from files that are not here: there is no adapter a file.safetensors" in capsys.readouterr().err


def test_twins_are_called_twins(files: dict[str, Adapter], capsys: pytest.CaptureFixture[str]) -> None:
    (files["a"] * 0.9).save("twin")
    assert run(["doctor", "a.safetensors", "twin.safetensors"]) == 0
    told = capsys.readouterr().out
    assert "A and B are nearly the same update" in told and "block weights that would help" not in told


def test_convert_resize_and_diff(files: dict[str, Adapter], capsys: pytest.CaptureFixture[str]) -> None:
    for dialect in ("diffusers", "peft"):
        assert run(["convert", "b.safetensors", "-o", dialect, "--dialect", dialect]) == 0
        assert describe(f"{dialect}.safetensors").dialect == dialect and distance(load(dialect), files["b"]) < 1e-6
    assert run(["convert", "b.safetensors:0.5", "-o", "half", "--dtype", "fp16"]) == 0
    assert describe("half.safetensors").dtype == "fp16" and distance(load("half"), files["b"] * 0.5) < 1e-3
    assert run(["resize", "b.safetensors", "--rank", "1", "-o", "small"]) == 0
    assert set(describe("small.safetensors").ranks) == {1}
    capsys.readouterr()
    assert run(["resize", "b.safetensors", "--size", "60kB", "--dtype", "fp16", "-o", "tiny"]) == 0
    assert Path("tiny.safetensors").stat().st_size <= 60_000 and "True" not in capsys.readouterr().out
    capsys.readouterr()
    assert run(["diff", "b.safetensors", "diffusers.safetensors"]) == 0
    assert "0.00%    1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resize", "a.safetensors", "-o", "x"], "how many ranks? (choose one of --rank"),
        (["resize", "a.safetensors", "--rank", "2", "--error", "0.1", "-o", "x"], "two rules for ranks at once"),
        (["merge", "-o", "x"], "which adapters?"),
        (["merge", "a.safetensors", "--method", "teis", "-o", "x"], "did you mean ties?"),
        (["merge", "a.safetensors", "--density", "0.3", "-o", "x"], "density"),
        (["merge", "nothing.safetensors:0.3", "-o", "x"], "there is no adapter nothing.safetensors"),
        (["convert", "a.safetensors", "-o", "x", "--dialect", "koyha"], "did you mean kohya?"),
        (["extract", "pocket", "pocket", "-o", "x"], "are the same"),
        (["bake", "pocket", "a.safetensors", "-o", "a.safetensors"], "a.safetensors"),
        (["bake", "a.safetensors", "b.safetensors", "-o", "x"], "name the checkpoint"),
        (["diff", "a.safetensors", "sd.safetensors"], "a is for pocket, sd is for sd1"),
        (["merge", "a.safetensors", "sd.safetensors", "-o", "x"], "a is for pocket, sd is for sd1"),
        (["doctor", "a.safetensors", "sd.safetensors"], "a is for pocket, sd is for sd1"),
        (["merge", "a.safetensors", "b.safetensors", "-o", "b.safetensors"], "would overwrite b.safetensors, which is read"),
        (["resize", "a.safetensors", "--rank", "1", "-o", "a"], "would overwrite a.safetensors, which is read"),
        (["convert", "a.safetensors", "-o", "folder"], "folder is a folder (name a file in it)"),
        (["convert", "a.safetensors", "-o", "x.pt"], "x.pt would be a pickle"),
        (["convert", "a.safetensors:abc", "-o", "x"], "'abc' is no strength of a.safetensors"),
        (["convert", "a.safetensors:lbw=OUTD", "-o", "x"], "lbw=OUTD is a preset for SD 1 and 2"),
        (["convert", "bias.safetensors", "--dialect", "diffusers", "-o", "x"], "leave it out: FILE:unet.conv_in.bias=0"),
        (["resize", "a.safetensors", "--sv-fro", "90", "-o", "x"], "sv-fro 90 makes no sense"),
        (["doctor", "a.safetensors", "--picture", "x.txt"], "--picture writes a .png"),
        (["generate", "x", "--output", "x.jpg"], "pictures are written as .png"),
        (["generate", "x", "--device", "cuda"], "torch sees no GPU here"),
    ],
)
def test_mistakes_end_in_one_line(
    files: dict[str, Adapter], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(path.name for path in Path().iterdir())
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == before


def test_other_kinds_become_lora_or_are_refused(files: dict[str, Adapter], capsys: pytest.CaptureFixture[str]) -> None:
    strange = Adapter({LINEAR: loha(POCKET[LINEAR]), CONV: lokr(POCKET[CONV], two=False)})
    strange.save("s")
    assert run(["convert", "s.safetensors", "-o", "x", "--dialect", "diffusers"]) == 2
    assert "diffusers files hold LoRA only" in capsys.readouterr().err
    assert run(["convert", "s.safetensors", "-o", "x", "--dialect", "diffusers", "--to", "lora", "--rank", "96"]) == 0
    assert distance(load("x"), strange) < 1e-5 and describe("x.safetensors").kind == "LoRA"
    Adapter({LINEAR: dora(POCKET[LINEAR])}).save("dora")
    assert run(["merge", "dora.safetensors", "a.safetensors", "-o", "y"]) == 2
    assert "name the base: --base" in capsys.readouterr().err
    assert run(["merge", "dora.safetensors", "a.safetensors", "-o", "y", "--base", "pocket"]) == 0


def test_bake_extract_and_interpolate(files: dict[str, Adapter]) -> None:
    assert run(["bake", "pocket", "a.safetensors:0.5", "-o", "baked"]) == 0
    assert run(["extract", "baked", "pocket", "--rank", "2", "--dtype", "fp32", "-o", "back"]) == 0
    assert distance(load("back"), files["a"] * 0.5) < 2e-2  # fp16 weights
    assert run(["interpolate", str(WEIGHTS), "baked", "--alpha", "0.5", "-o", "half"]) == 0
    assert run(["extract", "half", "pocket", "--rank", "2", "--dtype", "fp32", "-o", "quarter"]) == 0
    assert distance(load("quarter"), files["a"] * 0.25) < 4e-2


def test_two_adapters_beside_each_other(files: dict[str, Adapter]) -> None:
    rows = {row.name: row for row in compare(files["a"], files["a"] * -2)}
    assert rows["all"].cosine == pytest.approx(-1) and rows["all"].difference == pytest.approx(3 * rows["all"].a)
    assert rows["MID"].b == pytest.approx(2 * rows["MID"].a) and {"unet", "text_encoder"} & rows.keys()
    apart = {row.name: row for row in compare(files["a"], files["c"])}["all"]
    assert apart.cosine == 0 and apart.difference == pytest.approx(torch.tensor([apart.a, apart.b]).norm().item())


def test_the_doctor_sees_collisions_and_keeps_on_where_a_file_is_sick(
    files: dict[str, Adapter], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", "a.safetensors", "b.safetensors:0.5", "--picture", "map.png"]) == 0
    told = capsys.readouterr().out
    assert "svd at rank 4" in told and "overlap" in told and "map.png" in told
    with Image.open("map.png") as picture:
        assert picture.width > 300
    tensors = load_file("a.safetensors")
    next(value for key, value in tensors.items() if key.endswith("up.weight")).view(-1)[0] = float("nan")
    save_file(tensors, "sick.safetensors")
    assert run(["doctor", "sick.safetensors", "b.safetensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "not-finite" in json.dumps(found["files"][0]) and len(found["files"]) == 2


def test_unmatched_keys_stop_unless_they_may_be_left_out(files: dict[str, Adapter], capsys: pytest.CaptureFixture[str]) -> None:
    save_file({**load_file("a.safetensors"), "lora_unet_nothing.lora_up.weight": torch.ones(2, 2)}, "odd.safetensors")
    assert run(["convert", "odd.safetensors", "-o", "x"]) == 2
    assert "lora_unet_nothing" in capsys.readouterr().err
    for command in (["convert", "odd.safetensors"], ["merge", "odd.safetensors"], ["resize", "odd.safetensors", "--rank", "2"]):
        assert run([*command, "-o", "x", "--allow-unmatched"]) == 0
        assert distance(load("x"), files["a"]) < 1e-6


def test_folders_of_peft_and_diffusers_are_files_too(files: dict[str, Adapter]) -> None:
    files["c"].save("peft/adapter_model", "peft")
    files["a"].save("diffusers/pytorch_lora_weights", "diffusers")
    assert run(["merge", "peft", "diffusers:0.5", "-o", "x"]) == 0
    assert distance(load("x"), files["c"] + files["a"] * 0.5) < 1e-6
    assert run(["show", "peft"]) == 0
