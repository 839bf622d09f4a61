"""What one types: commands do what they say, and whatever is wrong is told in one line with exit code 2."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import click
import pytest
from children import start_child
from PIL import Image
from rich.console import Console

from personalize.adapters.adapter import Adapter
from personalize.adapters.strengths.grammar import every_part, split
from personalize.cli import cli, run
from personalize.cli.generate import seed_list
from personalize.cli.progress import RunView
from personalize.errors import AdapterError, RecipeError
from personalize.inference.png import read_record as read_parameters
from personalize.models.model import Base
from personalize.recipe.fields import Recipe
from personalize.recipe.rule import rule_of
from personalize.training.events import Chosen, Fold

pytestmark = pytest.mark.usefixtures("short_exam")
QUICK = ["--steps", "4", "--batch-size", "2", "--sample-steps", "1", "--sample-seeds", "0", "--sample-prompts", "a {trigger}",
         "--sample-prompts", "a cat", "--sample-every", "0", "--checkpoint-every", "2", "--rank", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "zwx"
    assert run(["train", str(pictures), "--base", str(tiny_base), "--output", str(folder), *QUICK]) == 0
    return folder


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr: a single line."""
    out = capsys.readouterr()
    lines = out.err.splitlines()
    assert len(lines) == 1, out
    return lines[0]


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


# ---------------------------------------------------------------- train


def test_train_leaves_adapter_report_and_recipe(trained: Path) -> None:
    assert Adapter.load(trained / "zwx.safetensors").family == "pocket"
    assert "<html" in (trained / "report.html").read_text(encoding="utf-8")
    assert tomllib.loads((trained / "recipe.toml").read_text(encoding="utf-8"))["steps"] == 4
    kinds = [json.loads(line)["event"] for line in (trained / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kinds[0] == "started" and kinds[-1] == "finished" and kinds.count("step") == 4


def test_the_same_command_again_does_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "zwx.safetensors").stat().st_mtime_ns
    assert run(["train", "--preset", str(trained / "recipe.toml")]) == 0
    out = capsys.readouterr().out
    assert "already finished" in out and f"adapter  {trained / 'zwx.safetensors'}" in out
    assert (trained / "zwx.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow  # that a recipe repeats its run: test_loop
def test_fresh_and_from_repeat_the_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again"
    assert run(["train", "--from", str(trained / "zwx.safetensors"), "--output", str(again)]) == 0
    out = capsys.readouterr().out
    assert "4 pictures" in out and "step 4/4" in out and "next     personalize generate" in out
    chosen = r"chosen   step [24] of 4 \(validation [+-]\d+ % on the training pictures, drift \d\.\d\d\), strengths? [\d.]+"
    assert re.search(chosen, out), out
    one, two = Adapter.load(trained / "zwx.safetensors"), Adapter.load(again / "zwx.safetensors")
    assert all((one.deltas[path].up == two.deltas[path].up).all() for path in one.deltas)
    assert run(["train", "--preset", str(again / "recipe.toml"), "--fresh", "--steps", "2", "--choose", "none"]) == 0
    assert "step 2/2" in capsys.readouterr().out


def test_dry_run_prints_a_preset_and_touches_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", str(pictures), "--dry-run", "--class", "cat", "--no-flip", "--preset", "pocket-subject"]) == 0
    out = capsys.readouterr().out
    assert "# 4 pictures in" in out and "trigger 'zwx'" in out and "zwx cat" in out
    (tmp_path / "mine.toml").write_text(out, encoding="utf-8")
    assert run(["train", "--dry-run", "--preset", "mine.toml"]) == 0
    again = capsys.readouterr().out
    assert again.replace("mine.toml", "pocket-subject") == out
    assert tomllib.loads(out)["data"]["flip"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_dry_run_says_which_package_the_run_would_miss(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(pictures), "--dry-run", "--class", "cat", "--optimizer", "prodigy"]
    monkeypatch.setitem(sys.modules, rule_of("prodigy").package, None)
    assert run(command) == 0
    said = capsys.readouterr()
    assert 'optimizer = "prodigy"' in said.out and "needs the package" in said.err and "pip install 'personalize[" in said.err
    assert run([*command[:-1], "adamw"]) == 0
    assert "needs the package" not in capsys.readouterr().err


def type_command(arguments: list[str], pipe: Connection) -> None:
    """A command in a process of its own, which says all that it says to a pipe."""
    for number in (1, 2):
        os.dup2(pipe.fileno(), number)
    with open(1, "w", buffering=1, encoding="utf-8", closefd=False) as sys.stdout:
        sys.stderr = sys.stdout
        sys.exit(run(arguments))


def interrupted(arguments: list[str], at: str) -> tuple[int | None, list[str]]:
    """Exit code and lines of a command that gets Ctrl-C once it has said `at`."""
    reading, writing = Pipe(duplex=False)
    child = start_child(type_command, arguments, writing)
    writing.close()
    lines = []
    with reading, open(reading.fileno(), encoding="utf-8", closefd=False) as said:
        for line in said:
            lines.append(line.rstrip("\n"))
            if line.startswith(at):
                assert child.pid
                os.kill(child.pid, signal.SIGINT)
                at = "only once"
    child.join(300)
    return child.exitcode, lines


def test_ctrl_c_saves_and_the_same_command_goes_on(narrow_base: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = ["train", str(pictures), "--base", str(narrow_base), *QUICK, "--steps", "5000", "--output", str(tmp_path / "run")]
    for at in ("saved", "going on after step"):
        code, lines = interrupted(arguments, at)
        assert code == 130, lines
        assert re.fullmatch(r"stopped after step \d+ of 5000. To go on, type the same command again.", lines[-2]), lines
        assert lines[-1] == f"To make an adapter of it as it stands: personalize finish {tmp_path / 'run'}"


def test_a_picture_left_out_and_a_better_checkpoint_are_told() -> None:
    out = io.StringIO()
    view = RunView(Console(file=out, width=200), Recipe(steps=500))
    view.show(Fold(1, 3, ["a.png"], 200, 0.123))
    view.show(Chosen(500, 300, 5, 0.5, -0.04, 0.1, 0.6, "2 pictures held back", 0.7, 1.0, 1.1))
    assert out.getvalue().splitlines() == [
        "left out a.png (1 of 3): best on it after step 200, validation -12 %",
        "chosen   step 500 of 500 (validation +4 % on 2 pictures held back, drift 0.10), strengths 0.7 to 1.1",
        "         step 300 scored best: --choose best takes it, without training again",
    ]


# ---------------------------------------------------------------- generate


def test_generate_stacks_adapters_and_names_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = str(trained / "zwx.safetensors")
    arguments = ["generate", "a zwx cat", "a house", "--adapter", f"{adapter}:0.8", "--adapter", f"{adapter}:te=0.1:unet=0.5"]
    arguments += ["--seeds", "3,4", "--steps", "1", "--grid", "--negative", "fog", "--size", "64x48", "--output", str(tmp_path)]
    assert run(arguments) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = ["a-zwx-cat-s3.png", "a-zwx-cat-s4.png", "a-house-s3.png", "a-house-s4.png", "a-zwx-cat-grid.png"]
    assert [path.name for path in paths] == names
    assert size(paths[0]) == (64, 48)
    about = read_parameters(paths[1])
    assert (about["prompt"], about["seed"], about["negative"]) == ("a zwx cat", 4, "fog")
    assert [used["strength"] for used in about["adapters"]] == ["0.8", "0.5:0.1"]
    assert len(about["adapters"][0]["sha256"]) == 64


def test_nothing_is_overwritten(narrow_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "a cat", "--base", str(narrow_base), "--steps", "1", "--output", str(tmp_path)]
    assert run(arguments) == run(arguments) == 0
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == ["a-cat-s0.png", "a-cat-s0-2.png"]


def test_generate_into_one_file(narrow_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "a cat", "--base", str(narrow_base), "--steps", "1", "--output", str(tmp_path / "x.png")]
    assert run(arguments) == 0
    assert read_parameters(tmp_path / "x.png")["prompt"] == "a cat"
    assert run([*arguments, "--count", "2", "--grid"]) == 0
    assert size(tmp_path / "x.png")[0] > 2 * 192
    capsys.readouterr()
    assert run([*arguments, "--count", "2"]) == 2
    assert "2 pictures do not fit into" in told(capsys)


def test_a_missing_trigger_is_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "a cat", "--adapter", str(trained / "zwx.safetensors"), "--steps", "1", "--output", str(tmp_path)]
    assert run(arguments) == 0
    assert told(capsys) == "warning: zwx listens to 'zwx', which no prompt says"


def test_prompts_say_which_adapters_they_get(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tags find files by their name and by what they call themselves, and outweigh the command line for their prompt."""
    shelf = tmp_path / "shelf"
    (shelf / "deep").mkdir(parents=True)
    shutil.copy(trained / "zwx.safetensors", shelf / "deep" / "v2.safetensors")
    (shelf / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "list.txt").write_text("# two\na zwx <lora:zwx:0.5:stop=0.5> cat\n\n a zwx <lora:V2:1> cat\n", encoding="utf-8")
    options = ["--lora-dir", str(shelf), "--adapter", f"rex={trained / 'zwx.safetensors'}:0.8", "--steps", "2", "--output"]
    listed = ["--prompts", str(tmp_path / "list.txt")]
    assert run(["generate", "a zwx <lora:rex:0.2> cat", *listed, *options, str(tmp_path / "out")]) == 0
    out = capsys.readouterr()
    paths = [Path(line) for line in out.out.splitlines()]
    about = [read_parameters(path) for path in paths]
    used = [[(one["name"], one["strength"]) for one in each["adapters"]] for each in about]
    assert used == [[("rex", "0.2")], [("rex", "0.8"), ("v2", "0.5:stop=0.5")], [("rex", "0.8"), ("v2", "1")]]
    assert {each["prompt"] for each in about} == {"a zwx cat"} and not out.err
    with Image.open(paths[1]) as first:
        text = first.info["parameters"].splitlines()[0]
        assert run(["generate", text, *options, str(tmp_path / "again.png")]) == 0
        with Image.open(tmp_path / "again.png") as again:
            assert again.info["parameters"].splitlines()[0] == text and again.tobytes() == first.tobytes()


def test_generate_takes_a_sampler_and_a_precision(narrow_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "a cat", "--base", str(narrow_base), "--steps", "2", "--output", str(tmp_path)]
    for more in ([], ["--sampler", "ddim", "--precision", "float32"], ["--sampler", "dpmpp_2m"], ["--precision", "bfloat16"]):
        assert run([*arguments, *more]) == 0
    assert run([*arguments, "--xy", "sampler=ddim,Euler a"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    told = [read_parameters(path) for path in paths[:-1]]
    names = [(one["sampler"], one["precision"]) for one in told]
    float32 = [("DDIM", "float32"), ("DDIM", "float32"), ("DPM++ 2M", "float32")]
    assert names == [*float32, ("DDIM", "bfloat16"), ("DDIM", "float32"), ("Euler a", "float32")]
    assert [path.name for path in paths[-3:]] == ["a-cat-s0-samplerddim.png", "a-cat-s0-samplerEuler-a.png", "a-cat-grid.png"]
    pixels = [Image.open(path).tobytes() for path in paths[:-1]]
    assert pixels[0] == pixels[1] == pixels[4] and len(set(pixels)) == 4
    with Image.open(paths[2]) as picture:
        assert "Sampler: DPM++ 2M, " in picture.info["parameters"]


def test_names_that_are_two_files_are_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(trained / "zwx.safetensors", tmp_path / folder)
    assert run(["generate", "<lora:zwx:1> zwx", "--lora-dir", str(tmp_path)]) == 2
    assert f"zwx is {tmp_path}/a/zwx.safetensors and {tmp_path}/b/zwx.safetensors" in told(capsys)
    both = [f"--adapter={tmp_path}/{folder}/zwx.safetensors" for folder in "ab"]
    assert run(["generate", "a zwx cat", *both, "--steps", "1", "--output", str(tmp_path / "x.png")]) == 0
    assert [used["name"] for used in read_parameters(tmp_path / "x.png")["adapters"]] == ["zwx", "zwx-2"]


def test_generate_begins_with_a_picture(trained: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = ["generate", "a zwx cat", "--adapter", str(trained / "zwx.safetensors"), "--steps", "2"]
    arguments += ["--image", str(pictures / "1.png"), "--denoise", "0.5", "--output", str(tmp_path / "x.png")]
    assert run(arguments) == 0
    about = read_parameters(tmp_path / "x.png")
    assert (about["image"], about["denoise"], about["size"]) == ("1.png", 0.5, [80, 64])
    with Image.open(tmp_path / "x.png") as picture:
        assert "Denoising strength: 0.5" in picture.info["parameters"]


def test_a_large_picture_is_told_once(narrow_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (3000, 2000), "teal").save(tmp_path / "large.jpg")
    arguments = ["generate", "a cat", "a dog", "--base", str(narrow_base), "--image", str(tmp_path / "large.jpg"), "--steps", "2"]
    axes = ["--xy", "denoise=0.1,1", "--xy", "guidance=1,2"]  # a sheet for each prompt
    assert run([*arguments, *axes, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr()
    paths = [Path(line) for line in out.out.splitlines()]
    assert len(paths) == 10 and size(paths[0]) == (80, 56) and read_parameters(paths[0])["size"] == [80, 56]
    (line,) = out.err.splitlines()
    assert line.startswith("warning: the picture of 3000x2000 is drawn over at 80x56, as large as ")


def test_pictures_are_drawn_in_batches(narrow_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, decode = [], Base.decode
    monkeypatch.setattr(Base, "decode", lambda self, latents: sizes.append(len(latents)) or decode(self, latents))
    arguments = ["generate", "a cat", "a dog", "--base", str(narrow_base), "--steps", "1", "--output", str(tmp_path)]
    assert run([*arguments, "--count", "5", "--batch-size", "4"]) == 0
    assert sizes == [4, 4, 2]


def test_sheets_along_axes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = f"zwx={trained / 'zwx.safetensors'}:0.8:lbw=MID"
    arguments = ["generate", "a zwx cat", "--adapter", adapter, "--steps", "2"]
    axes = ["--xy", "zwx=0,1,0@0;1@1", "--xy", "seed=3,4"]
    assert run([*arguments, *axes, "--output", str(tmp_path)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(paths) == 7 and paths[-1].name == "a-zwx-cat-grid.png" and size(paths[-1]) == (8 + 3 * 200, 8 + 22 + 2 * 222)
    about = [read_parameters(path) for path in paths[:-1]]
    strengths = ["0:lbw=MID", "1:lbw=MID", "0@0,1@1:lbw=MID"]
    assert [(one["adapters"][0]["strength"], one["seed"]) for one in about] == [(s, seed) for s in strengths for seed in (3, 4)]
    assert paths[3].name == "a-zwx-cat-s4-zwx1-seed4.png"
    assert run([*arguments, "--xy", "adapter=none,zwx", "--seeds", "0,1", "--output", str(tmp_path / "x.png")]) == 0
    assert size(tmp_path / "x.png") == (8 + 2 * 200, 8 + 22 + 2 * 222)


@pytest.mark.parametrize(
    ("text", "path", "unet", "text_encoder"),
    [
        ("rex.safetensors", "rex.safetensors", 1, 1),
        ("rex.safetensors:0.8", "rex.safetensors", 0.8, 0.8),
        ("rex.safetensors:-.5", "rex.safetensors", -0.5, -0.5),
        ("rex.safetensors:0.8:0.5", "rex.safetensors", 0.8, 0.5),
        ("rex.safetensors:unet=0.8:te=0", "rex.safetensors", 0.8, 0),
        ("rex.safetensors:TE=0.3", "rex.safetensors", 1, 0.3),
        (r"C:\loras\rex.safetensors", r"C:\loras\rex.safetensors", 1, 1),
        (r"C:\loras\rex.safetensors:1.25", r"C:\loras\rex.safetensors", 1.25, 1.25),
        ("a:b/rex.safetensors:1", "a:b/rex.safetensors", 1, 1),
    ],
)
def test_strengths(text: str, path: str, unet: float, text_encoder: float) -> None:
    found, weighting = split(text)
    assert found == path
    assert weighting.parts == every_part({"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder})


def test_a_file_may_look_like_a_strength(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rex:0.5").touch()
    assert split("rex:0.5")[0] == "rex:0.5"
    with pytest.raises(AdapterError, match="too many strengths"):
        split("x.safetensors:1:2:3")


def test_seeds_count_up() -> None:
    assert seed_list([], None) == [0]
    assert seed_list([], 3) == [0, 1, 2]
    assert seed_list(["7"], 3) == [7, 8, 9]
    assert seed_list(["1,5", "9"], 2) == [1, 5]
    with pytest.raises(RecipeError, match="not '-1'"):
        seed_list(["-1"], None)


# ---------------------------------------------------------------- show, report, help


def test_show(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(trained / "zwx.safetensors")
    assert run(["show", path]) == 0
    out = capsys.readouterr().out
    for words in ("LoRA for pocket, kohya names", "trigger   zwx", "rank      2", "steps 4"):
        assert words in out
    assert run(["show", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trigger"] == "zwx"


def test_what_a_file_says_cannot_steer_the_terminal(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = Adapter.load(trained / "zwx.safetensors")
    path = adapter.save(
        tmp_path / "evil.safetensors", metadata={"modelspec.trigger_phrase": "\x1b]0;owned\x07\x1b[2J", "personalize.recipe": "{"}
    )
    assert run(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "is not JSON" in out


def test_report_is_written_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "report.html").unlink()
    assert run(["report", str(trained)]) == 0
    assert capsys.readouterr().out.strip() == str(trained / "report.html")
    assert (trained / "report.html").is_file()


def test_every_command_answers_to_h_whoever_asked_for_its_options_before(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in cli.commands.items():
        asked = {flag for parameter in command.get_params(click.Context(command)) for flag in parameter.opts}  # as tools do
        assert run([name, "-h"]) == 0 and {"-h", "--help"} <= asked
        assert capsys.readouterr().out.count("-h, --help") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["train", "-h"], ["generate", "-h"], ["show", "-h"], ["report", "-h"], ["version"]]
)
def test_help_and_version(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    out = capsys.readouterr()
    assert "ersonalize" in out.out and not out.err


# ---------------------------------------------------------------- what can go wrong


@pytest.fixture(scope="module")
def spoiled(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that people and bad people hand over."""
    folder, good = tmp_path_factory.mktemp("spoiled"), trained / "zwx.safetensors"
    (folder / "empty").mkdir()
    (folder / "comments.txt").write_text("# nothing\n\n")
    (folder / "texts").mkdir()
    (folder / "texts" / "notes.md").write_text("no picture")
    (folder / "lies").mkdir()
    (folder / "lies" / "a.png").write_text("not a picture")
    (folder / "file").write_text("in the way")
    (folder / "cut.safetensors").write_bytes(good.read_bytes()[:-1000])
    (folder / "noise.safetensors").write_bytes(b"\xff" * 4096)
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"a": [1] * 100}))
    adapter = Adapter.load(good)
    wider = {
        path: type(delta)(delta.up.repeat(2, *[1] * (delta.up.ndim - 1)), delta.down, delta.alpha)
        for path, delta in adapter.deltas.items()
    }
    Adapter(wider).save(folder / "other.safetensors")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "where are the pictures? (personalize train FOLDER)"),
        (["train", "{pictures}", "--rnak", "3"], "No such option '--rnak'"),
        (["train", "{pictures}", "--rank", "0"], "--rank must be 1 to 1024, not 0"),
        (["train", "{pictures}", "--dialect", "kohja"], "did you mean kohya?"),
        (["train", "{pictures}", "--preset", "pocket-subjct"], "did you mean pocket-subject?"),
        (["train", "{pictures}", "--base", "{base}", "--targets", "atention", "--output", "{tmp}/o"], "did you mean attention?"),
        (["train", "{pictures}", "--base", "pokcet"], "there is no base called pokcet"),
        (["train", "{tmp}/nowhere"], "there is no folder {tmp}/nowhere"),
        (["train", "{tmp}/empty"], "there are no pictures in {tmp}/empty"),
        (["train", "{tmp}/texts"], "there are no pictures in {tmp}/texts"),
        (["train", "{tmp}/lies"], "none of the 1 pictures in {tmp}/lies can be read"),
        (["train", "{pictures}", "--base", "{base}", "--output", "{tmp}/file"], "cannot write {tmp}/file"),
        (["train", "{pictures}", "--base", "{base}", "--output", "/proc/nowhere"], "cannot write /proc/nowhere"),
        (["train", "{pictures}", "--from", "{tmp}/cut.safetensors"], "{tmp}/cut.safetensors"),
        (["trian", "{pictures}"], "No such command 'trian'. Did you mean 'train'?"),
        (["generate"], "what should be drawn?"),
        (["generate", "--prompts", "{tmp}/none.txt"], "{tmp}/none.txt cannot be read: No such file"),
        (["generate", "--prompts", "{tmp}/noise.safetensors"], "not UTF-8"),
        (["generate", "--prompts", "{tmp}/comments.txt"], "there are no prompts in {tmp}/comments.txt"),
        (["generate", "a <lora:zxw:1>", "--adapter", "{good}"], "no adapter is called 'zxw' (did you mean zwx?)"),
        (["generate", "a <lora:zxw:1>", "--lora-dir", "{folder}"], "no adapter is called 'zxw' (did you mean zwx?)"),
        (["generate", "a <lora:zwx:1>"], "no adapter is called 'zwx' (give it: --adapter FILE or --lora-dir FOLDER)"),
        (["generate", "a <lora:zwx:1", "--lora-dir", "{folder}"], "a tag is not closed"),
        (["generate", "x", "--lora-dir", "{tmp}/nowhere"], "there is no folder {tmp}/nowhere"),
        (["generate", "x", "--adapter", "{good}:lbw=OUT99"], "zwx: pocket has no block OUT99"),
        (["generate", "x", "-a", "a={good}", "-a", "a={tmp}/other.safetensors"], "two adapters are called a"),
        (["generate", "x", "--adapter", "{good}:stop=0"], "is not before stop=0"),
        (["generate", "x", "--xy", "strength=0,1"], "--xy strength has no adapter to act on"),
        (["generate", "x", "--xy", "stepps=1,2"], "--xy stepps= is no axis and no adapter (did you mean steps?)"),
        (["generate", "x", "--xy", "steps=1,x"], "--xy steps=x makes no sense"),
        (["generate", "x", "--xy", "steps=1", "--xy", "seed=1", "--xy", "denoise=1"], "3 axes do not fit on a sheet"),
        (["generate", "x", "--xy", "strength=much", "--adapter", "{good}"], "'much' says no strength"),
        (["generate", "x", "--image", "{tmp}/lies/a.png", "--base", "{base}"], "{tmp}/lies/a.png: not a picture"),
        (["generate", "x", "--negative", "<lora:a:1>"], "adapters go into the prompt"),
        (["generate", "x", "--sampler", "eulr"], "unknown sampler 'eulr' (did you mean euler?)"),
        (["generate", "x", "--xy", "sampler=ddim,dpm2m"], "unknown sampler 'dpm2m' (did you mean "),
        (["generate", "x", "--precision", "bf16"], "float16, not 'bf16' (did you mean bfloat16?)"),
        (["generate", "x", "--base", "{base}", "--sampler", "lcm", "--steps", "60"], "--sampler LCM does not draw in 60 steps"),
        (["generate", "x", "--denoise", "2"], "2.0 is not in the range"),
        (["merge", "{good}:1:stop=0.5", "{good}", "--output", "{tmp}/m.safetensors"], "changes from step to step"),
        (["generate", "x", "--adapter", "{tmp}/none.safetensors:0.8"], "there is no adapter {tmp}/none.safetensors"),
        (["generate", "x", "--base", "{base}", "--adapter", "{tmp}/cut.safetensors"], "{tmp}/cut.safetensors"),
        (["generate", "x", "--base", "{base}", "--adapter", "{tmp}/noise.safetensors"], "{tmp}/noise.safetensors"),
        (["generate", "x", "--base", "{base}", "--adapter", "{tmp}/other.safetensors"], "does not fit"),
        (["generate", "x", "--base", "{base}", "--output", "{tmp}/file"], "cannot write {tmp}/file"),
        (["generate", "x", "--base", "{base}", "--size", "50"], "--size must be a multiple of 8"),
        (["generate", "x", "--base", "{base}", "--size", "big"], "--size must be a side or WIDTHxHEIGHT, not big"),
        (["generate", "x", "--seeds", "1,x"], "--seeds must be whole numbers"),
        (["show", "{tmp}/cut.safetensors"], "{tmp}/cut.safetensors"),
        (["show", "{tmp}/pickle.safetensors"], "{tmp}/pickle.safetensors"),
        (["report", "{tmp}/nowhere"], "no run folder at {tmp}/nowhere"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, narrow_base: Path, pictures: Path, trained: Path, spoiled: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = sorted(spoiled.rglob("*"))
    names = {"tmp": spoiled, "pictures": pictures, "base": narrow_base, "folder": trained, "good": trained / "zwx.safetensors"}
    capsys.readouterr()
    assert run([argument.format(**names) for argument in arguments]) == 2
    assert message.format(**names) in told(capsys)
    left = [path for path in sorted(spoiled.rglob("*")) if path not in before and path.is_file()]
    assert not left, "something half-written"


def test_one_bad_picture_is_skipped_and_named(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "zwx"
    shutil.copytree(pictures, folder)
    (folder / "bad.png").write_text("not a picture")
    assert run(["train", str(folder), "--dry-run"]) == 0
    out = capsys.readouterr()
    assert "# 4 pictures" in out.out
    assert out.err.startswith("warning: skipped bad.png")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(tmp_path: Path, narrow_base: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A 1 MB file system, where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        arguments = ["train", str(pictures), "--base", str(narrow_base), *QUICK, "--rank", "32"]
        assert run([*arguments, "--output", str(disk / "run")]) == 2
        assert "free some space" in told(capsys)
        assert not list(disk.rglob("*.safetensors"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_without_a_preset_the_bases_own_for_subjects_is_used(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(pictures), "--dry-run", "--class", "cat"]) == 0
    assert "# from preset pocket-subject" in capsys.readouterr().out
    assert run(["train", str(pictures), "--dry-run", "--class", "cat", "--preset", "pocket-style"]) == 0
    assert "# from preset pocket-style" in capsys.readouterr().out
