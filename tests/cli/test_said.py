"""What commands say: to a person on any console and in any log, and to a program with --json."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from personalize.cli import cli, main, run, view
from personalize.cli.messages import Answer, answer, print_error
from personalize.cli.progress import RunView, doing_after
from personalize.errors import AdapterError, RecipeError
from personalize.recipe.fields import Recipe
from personalize.recipe.resolve import resolve
from personalize.text import command_line, find_shell, quote, transfer_command
from personalize.training.events import Saved, Scored, Step, Sweep
from personalize.training.rundir import Run

pytestmark = pytest.mark.usefixtures("short_exam")


def answers(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What a command answers to a program: one line of strict JSON in ASCII, whatever else it says."""
    code = run([*words, "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert line.isascii() and found["ok"] == (code == 0) and (found["error"] is None) == found["ok"]
    assert isinstance(found["warnings"], list)
    return found


@pytest.fixture(scope="module")
def made(tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names of what commands need, made once."""
    folder = tmp_path_factory.mktemp("made")
    quick = ["--base", str(tiny_base), "--steps", "1", "--rank", "1", "--batch-size", "1", "--sample-steps", "1"]
    quick += ["--sample-seeds", "0", "--sample-prompts", "a {trigger}", "--choose", "none", "--checkpoint-every", "0"]
    assert run(["train", str(pictures), *quick, "--output", str(folder / "zwx")]) == 0
    run_folder = folder / "zwx"
    return {"run": str(run_folder), "a": str(run_folder / "zwx.safetensors"), "pictures": str(pictures), "folder": str(tiny_base)}


WITH_JSON: dict[str, tuple[str, set[str]]] = {  # a command => its words, and keys of its own
    "train": ("{pictures} --base {folder} --preset pocket-subject --class cat --dry-run", {"recipe", "pictures"}),
    "batch": ("{pictures} --base {folder} --preset pocket-subject --class cat --dry-run", {"runs"}),
    "generate": ("zwx --adapter {a} --steps 1 --output {out}.png", {"pictures"}),
    "dataset": ("{pictures} --class cat", {"folder", "pictures", "findings"}),
    "caption": ("{pictures} --dry-run", {"captions", "written", "unclear", "kept", "left_out", "captioner", "dry_run"}),
    "finish": ("{run}", {"run", "adapter", "report"}),
    "tell": ("{run} save", {"run", "word"}),
    "report": ("{run}", {"report"}),
    "presets": ("sd15-style", {"presets"}),
    "version": ("", {"versions", "platform"}),
    "merge": ("{a} {a}:0.5 -o {out}", {"written", "bytes", "kind", "layers"}),
    "convert": ("{a} -o {out}", {"written", "bytes", "kind", "layers"}),
    "resize": ("{a} --rank 1 -o {out}", {"written", "parts"}),
    "extract": ("{folder} {folder} -o {out}", set()),
    "bake": ("{folder} {a} -o {out}", {"written", "weights"}),
    "interpolate": ("{folder} {folder} -o {out}", {"written", "weights"}),
    "diff": ("{a} {a}", {"rows"}),
    "doctor": ("{a} {a}", {"files", "collision", "predictions"}),
    "show": ("{a}", {"files", "trigger", "family"}),
}


@pytest.mark.parametrize("command", sorted(WITH_JSON))
def test_every_command_answers_programs(
    command: str, made: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, keys = WITH_JSON[command]
    with Run(Path(made["run"]), "zwx").hold() if command == "tell" else contextlib.nullcontext():  # to a run that goes on
        found = answers(capsys, command, *(word.format(out=tmp_path / "out", **made) for word in words.split()))
    assert found["command"] == command and (found["ok"] or command == "extract"), (
        found
    )  # extract: two equal ones differ in nothing
    assert keys <= found.keys()
    if written := found.get("written"):
        assert Path(written).exists()


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_answers_a_mistake(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = answers(capsys, command, "--no-such-option")
    assert found["error"] == {"kind": "RecipeError", "what": found["error"]["what"], "hint": ""}
    assert "--no-such-option" in found["error"]["what"]


def test_an_answer_says_what_went_wrong_and_what_to_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answers(capsys, "show", str(tmp_path / "none.safetensors"))
    assert found["error"]["kind"] == "AdapterError" and found["error"]["hint"] and found["files"][0]["error"] == found["error"]
    assert answers(capsys, "train")["error"]["hint"] == "personalize train FOLDER"
    assert answers(capsys, "nope")["command"] == ""


def test_an_answer_is_strict_json() -> None:
    found = json.loads(Answer("x", {"loss": float("nan"), "path": Path("a"), "run": Saved(1, "b")}).line(130))
    assert (found["loss"], found["path"], found["run"]["path"]) == (None, "a", "b")
    assert found["error"]["kind"] == "Stopped" and not found["ok"]
    answer(nothing=1)  # outside of --json nothing happens


# ---------------------------------------------------------------- consoles


SPEAK = (
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp1252"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
)


@pytest.mark.parametrize("speaks", SPEAK, ids=["ascii", "cp1252", "C"])
def test_every_line_is_in_the_consoles_own_letters(speaks: dict[str, str], tmp_path: Path) -> None:
    """stdout and stderr alike: click would write UTF-8 where the stream is ASCII."""
    title = {"modelspec.title": "caf\u00e9 \u732b"}
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    factors = {f"{layer}.lora_down.weight": torch.ones(2, 1280), f"{layer}.lora_up.weight": torch.ones(1280, 2)}
    save_file(factors, tmp_path / "a.safetensors", title)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))} | speaks
    words = [sys.executable, "-m", "personalize", "show", str(tmp_path / "a.safetensors")]
    done = subprocess.run(words, capture_output=True, env=env)
    page = "cp1252" if speaks.get("PYTHONIOENCODING") == "cp1252" else "ascii"
    assert done.returncode == 0 and ("caf\u00e9 ?" if page == "cp1252" else "caf? ?") in done.stdout.decode(page), done.stderr
    assert "Traceback" not in done.stderr.decode(page)


def test_help_is_in_letters_that_every_console_has(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ((), *((name,) for name in cli.commands)):
        assert run([*command, "--help"]) == 0
        assert capsys.readouterr().out.isascii(), command


def in_a_process(page: str, words: list[str]) -> tuple[int, bytes, bytes]:
    """Exit code, output and errors of a command whose Python writes in a code page."""
    env = os.environ | {"PYTHONIOENCODING": page}
    done = subprocess.run([sys.executable, "-m", "personalize", *words], capture_output=True, env=env)
    return done.returncode, done.stdout, done.stderr


def in_this_process(page: str, words: list[str]) -> tuple[int, bytes, bytes]:
    """The same without a process of its own."""
    kept = io.BytesIO(), io.BytesIO()
    out, err = (io.TextIOWrapper(one, encoding=page, write_through=True) for one in kept)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["personalize", *words])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(str(ended.value.code)), kept[0].getvalue(), kept[1].getvalue()


@pytest.mark.parametrize(
    ("page", "type_words"),
    [("cp1252", in_a_process), ("cp932", in_this_process), ("gbk", in_this_process), ("ascii", in_this_process)],
)
def test_what_a_code_page_lacks_is_replaced(
    page: str, type_words: Callable[[str, list[str]], tuple[int, bytes, bytes]], tmp_path: Path
) -> None:
    """Output in a code page, as on Windows into a pipe: a dry run's preset survives it, and other letters become `?`."""
    folder = tmp_path / "\u732b\u2728\u00e9"
    folder.mkdir()
    Image.new("RGB", (64, 64), "teal").save(folder / "1.png")
    (folder / "1.txt").write_text("a \u732b\u2728 in the snow", encoding="utf-8")
    words = ["train", str(folder), "--class", "\u00e9\u2728", "--dry-run"]
    code, out, err = type_words(page, words)
    assert code == 0, err
    (tmp_path / "mine.toml").write_bytes(out)
    again = resolve(tmp_path / "mine.toml")
    assert (again.data.folder, again.data.class_name) == (folder, "\u00e9\u2728")
    code, _, err = type_words(page, ["show", str(folder / "\u2728.safetensors")])
    assert code == 2 and b"Traceback" not in err and b"?.safetensors does not exist" in err


def test_a_long_message_keeps_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    names = ", ".join(f"layer{i}" for i in range(500))
    error = AdapterError(f"no layers called {names} in rex.safetensors", "personalize show rex.safetensors")
    print_error(error)
    line = capsys.readouterr().err
    assert len(line) < 700 and line.startswith("personalize: no layers called layer0, ")
    assert line.endswith("in rex.safetensors (personalize show rex.safetensors)\n") and " … " in line


def test_commands_suit_the_shell() -> None:
    words = ("personalize", "generate", "a {rex} dog, it's", "--adapter", r"C:\my runs\rex.safetensors:0.8")
    quoted = '"a {rex} dog, it\'s" --adapter "C:\\my runs\\rex.safetensors:0.8"'
    assert command_line(*words, shell="cmd") == f"personalize generate {quoted}"
    assert command_line(*words, shell="powershell") == f"personalize generate {quoted}"
    assert quote('say "hi"', "cmd") == '"say \\"hi\\""' and quote("my folder\\", "cmd") == '"my folder\\\\"'
    assert quote("$HOME", "posix") == "'$HOME'"
    moving = transfer_command(["it's.png", "b.png"], "aside", move=True, shell="cmd")
    assert moving.startswith('powershell -NoProfile -Command "New-Item') and "'it''s.png','b.png' 'aside'" in moving
    there = transfer_command(["$1.png"], "aside", shell="powershell")
    assert there == "Copy-Item -LiteralPath '$1.png' 'aside'"  # between double quotes it would read $1


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("$trigger dog", "'$trigger dog'"),
        ("a `dog`", "'a `dog`'"),
        ("it's $5", "'it''s $5'"),
        ('say "hi"', "'say \\\"hi\\\"'"),
        ("\u201cdog\u201d", "'\u201cdog\u201d'"),
        ("a dog, it's", '"a dog, it\'s"'),
    ],
)
def test_what_powershell_reads_in_double_quotes_stands_in_single_ones(word: str, quoted: str) -> None:
    assert quote(word, "powershell") == quoted


def test_the_shell_of_the_system_is_found() -> None:
    home = {"USERPROFILE": r"C:\Users\me"}
    modules = r"C:\Program Files\WindowsPowerShell\Modules;C:\WINDOWS\system32\WindowsPowerShell\v1.0\Modules"
    assert find_shell("posix", {"PSModulePath": "/home/me/.local/share/powershell/Modules"}) == "posix"
    assert find_shell("nt", home | {"PSModulePath": modules}) == "cmd" == find_shell("nt", {})
    for own in (r"C:\Users\me\Documents\PowerShell\Modules", r"D:\OneDrive\Documents\WindowsPowerShell\Modules"):
        assert find_shell("nt", home | {"PSModulePath": f"{own};{modules}"}) == "powershell"


# ---------------------------------------------------------------- presets


def test_presets_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["presets"]) == 0
    assert "sdxl-style " in capsys.readouterr().out
    assert run(["presets", "sdxl-style"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("A style on SDXL") and "Why:" in out and "guidance = 6" in out and "pictures.50.batch_size = 2" in out


@pytest.mark.parametrize(
    ("given", "wanted"), [("style", "pocket-style"), ("stlye", "pocket-style"), ("sd15-sytle", "sd15-style")]
)
def test_a_typo_in_a_preset_proposes_one_of_the_base(
    given: str, wanted: str, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", str(pictures), "--preset", given, "--dry-run"]) == 2
    assert f"did you mean {wanted}?" in capsys.readouterr().err


# ---------------------------------------------------------------- what goes on


def test_a_log_without_a_terminal_gets_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "SILENCE", 0.01)
    out = io.StringIO()
    with RunView(Console(file=out, width=200), Recipe(steps=500)) as shown:
        shown.begin("judging step 500")
        until = time.monotonic() + 20
        while "since the start" not in out.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert "... judging step 500 (" in out.getvalue()


def test_after_the_last_step_the_bar_says_what_is_done() -> None:
    recipe = Recipe(steps=10)
    step = Step(10, 0.1, 0.1, 0.1, 0.1, 0.1)
    checkpoint, judged = Saved(10, "checkpoints/a-000010.safetensors"), Scored(10, 1, 0, 0, 0, 0, 0)
    assert doing_after(step, recipe) == "drawing the samples"
    assert doing_after(checkpoint, recipe) == "judging the checkpoints"
    assert doing_after(judged, recipe) == "judging step 10 at strength 1"
    assert doing_after(Sweep(10, 1, "", 0, ""), recipe) == "writing the adapter"
    assert doing_after(Saved(10, "a.safetensors"), recipe) == "writing the report"
    assert doing_after(Step(9, 0.1, 0.1, 0.1, 0.1, 0.1), recipe) == "training"


def test_errors_shorten_the_middle() -> None:
    assert str(RecipeError("x" * 2000, "do this")).endswith("x (do this)") and len(str(RecipeError("x" * 2000))) == 500


# ---------------------------------------------------------------- names that are no text

ODD = os.fsdecode(b"caf\xe9")  # as Python holds bytes of a name that are no UTF-8


def test_an_image_with_a_name_that_is_no_text_is_begun_with(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / f"{ODD}.png"
    Image.new("RGB", (64, 64), "teal").save(odd)
    words = ["generate", "a cat", "--base", str(tiny_base), "--steps", "1", "--denoise", "0.1", "--image", str(odd)]
    assert run([*words, "--output", str(tmp_path / ODD / "out.png")]) == 0, capsys.readouterr().err
    with Image.open(tmp_path / ODD / "out.png") as drawn:
        assert json.loads(drawn.info["personalize"])["image"] == "caf\N{REPLACEMENT CHARACTER}.png"


def test_names_that_are_no_text_are_read_and_written_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a file of ours would have to tell such a name, one line says so; nothing is a traceback."""
    layer, odd = "lora_unet_mid_block_attentions_0_proj_in", tmp_path / f"{ODD}.safetensors"
    save_file({f"{layer}.lora_down.weight": torch.ones(2, 1280), f"{layer}.lora_up.weight": torch.ones(1280, 2)}, odd)
    pictures = tmp_path / "zwx"
    pictures.mkdir()
    Image.new("RGB", (64, 64), "teal").save(pictures / "0.png")
    Image.new("RGB", (64, 64), "teal").save(tmp_path / f"{ODD}.png")
    for words in (
        ["show", odd],
        ["doctor", odd],
        ["convert", odd, "-o", tmp_path / f"{ODD}2"],
        ["merge", odd, odd, "-o", odd.with_stem("m")],
    ):
        assert run([*map(str, words)]) == 0, (words, capsys.readouterr().err)
    told = {
        "train": [pictures, "--class", "cat", "--output", tmp_path / f"{ODD}run"],
        "generate": [f"a {ODD}", "--output", tmp_path / "out"],
        "report": [tmp_path / f"{ODD}none"],
        "tell": [tmp_path / f"{ODD}none", "save"],
        "batch": [tmp_path / f"{ODD}none"],
        "dataset": [tmp_path / f"{ODD}none"],
        "caption": [tmp_path / f"{ODD}none"],
    }
    for command, words in told.items():
        capsys.readouterr()
        assert run([command, *map(str, words)]) == 2, command
        assert len(capsys.readouterr().err.splitlines()) == 1, command
    assert not (tmp_path / f"{ODD}run").exists()
