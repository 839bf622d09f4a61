"""Hints are tried before they are printed: commands that messages propose exist with their options, and whole ones run."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from personalize.api.runs import proposal
from personalize.cli import cli, run
from personalize.reports.run import usage
from personalize.reports.run.read import read_run
from tools.architecture import ROOT, modules

pytestmark = pytest.mark.usefixtures("short_exam")
COMMAND = re.compile(r"(?<![\w/.-])personalize ([a-z]+)((?: [^`()\n]*)?)")
PROSE = {"and", "as", "can", "cannot", "has", "is", "makes", "or", "reads", "to", "with", "wrote"}  # in sentences


def texts() -> Iterator[tuple[str, str]]:
    """Every text of the package that is not a docstring of a module, with what is filled in as X; and the README."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield path.name, "".join(str(one.value) if isinstance(one, ast.Constant) else "X" for one in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path.name, node.value
    for name in ("README.md", "docs/jobs.md"):
        yield name, (ROOT / name).read_text(encoding="utf-8")


def proposals() -> list[tuple[str, str, list[str], tuple[str, ...]]]:
    """(file, command, words behind it, its flags) of every command that a text proposes."""
    found = []
    for file, text in texts():
        for match in COMMAND.finditer(text):
            if match[1] not in PROSE:
                words = match[2].partition("#")[0]
                found.append((file, match[1], words.split(), tuple(re.findall(r"(?<=\s)--?[a-z][\w-]*", words))))
    return found


def flags_of(command: click.Command) -> set[str]:
    with click.Context(command, info_name=command.name) as context:
        return {flag for one in command.get_params(context) for flag in (*one.opts, *one.secondary_opts)}


def test_proposed_commands_and_their_options_exist() -> None:
    found = proposals()
    assert len(found) > 20
    for file, name, words, flags in found:
        assert name in cli.commands, f"{file}: personalize {name}"
        command, known = cli.commands[name], flags_of(cli.commands[name])
        if isinstance(command, click.Group) and words and words[0].isalpha() and words[0].islower():
            assert words[0] in command.commands, f"{file}: personalize {name} {words[0]}"
            known |= flags_of(command.commands[words[0]])
            for inner in words[1:2] if words[0] == "add" else ["train"] if words[0] == "edit" else []:
                known |= flags_of(cli.commands[inner])  # whose arguments these two take
        assert set(flags) <= known, f"{file}: personalize {name} has no {set(flags) - known}"


@pytest.fixture(scope="module")
def trained(tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose name needs quotes."""
    folder = tmp_path_factory.mktemp("my runs") / "it's"
    quick = ["--steps", "1", "--rank", "1", "--batch-size", "1", "--sample-steps", "1", "--sample-seeds", "0", "--choose", "none"]
    assert run(["train", str(pictures), "--class", "dog", "--base", str(tiny_base), *quick, "--output", str(folder)]) == 0
    return folder


def try_command(command: str, tmp_path: Path, *more: str) -> None:
    """Run a proposed command as a shell would."""
    program, *words = shlex.split(command)
    assert program == "personalize"
    assert run([*words, *more]) == 0, command


def test_what_a_run_proposes_runs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The terminal's next command is the report's; the commands of `show` and the report run as they are."""
    assert run(["train", "--preset", str(trained / "recipe.toml")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next ")]
    following = line.removeprefix("next").strip()
    assert following == proposal(trained)
    assert shlex.split(following)[2] in (trained / "report.html").read_text(encoding="utf-8")  # the prompt
    try_command(following, tmp_path, "--steps", "1", "--output", str(tmp_path / "x.png"))
    try_command(usage.train_command(read_run(trained)), tmp_path, "--dry-run")
    capsys.readouterr()
    adapter = next(trained.glob("*.safetensors"))
    assert run(["show", str(adapter)]) == 0
    (repeat,) = re.findall(r"repeat +(.*)", capsys.readouterr().out)
    try_command(repeat.replace("FOLDER", shlex.quote(str(tmp_path))), tmp_path, "--help")
    assert run(["merge", str(adapter), "-o", str(tmp_path / "m.safetensors")]) == 0
    capsys.readouterr()
    assert run(["show", str(tmp_path / "m.safetensors")]) == 0
    replay = next(line for line in re.findall(r"repeat +(.*)", capsys.readouterr().out) if " merge " in line)
    try_command(replay.replace("NAME", shlex.quote(str(tmp_path / "again"))), tmp_path)


def test_what_the_check_of_a_folder_proposes_runs(
    tiny_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands repeat the base, the preset and the settings that it was given."""
    folder = tmp_path / "my dog's"
    shutil.copytree(pictures, folder)
    for picture in folder.glob("*.png"):
        picture.with_suffix(".txt").write_text(f"a dog called fido, number {picture.stem}", encoding="utf-8")
    given = ["--base", str(tiny_base), "--preset", "pocket-style", "--class", "dog", "--resolution", "128", "--no-flip"]
    assert run(["dataset", str(folder), *given]) == 0
    commands = [line.partition("$ ")[2] for line in capsys.readouterr().out.splitlines() if "$ personalize" in line]
    assert any("--trigger" in command for command in commands) and any("--resolution" in command for command in commands)
    for command in commands:
        words = shlex.split(command)
        assert words[2] == str(folder) and "--no-flip" in words and words.count("--resolution") == 1
        for flag, value in (("--base", str(tiny_base)), ("--preset", "pocket-style"), ("--class", "dog")):
            assert words[words.index(flag) + 1] == value
        try_command(command, tmp_path, "--dry-run")
