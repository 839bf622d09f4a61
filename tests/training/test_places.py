"""Where a run may write, and what is said of pictures that changed, folders of one name, and a warm-up without an end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from personalize.cli import run
from personalize.data.folder import read_folder
from personalize.recipe.resolve import resolve
from personalize.training.changes import changes_since, identity
from personalize.training.preflight import check, names_of
from personalize.training.rundir import Run, State


def filled(folder: Path, *names: str, side: int = 64) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((side, side)).rotate(20 * i).convert("RGB").save(folder / name)
    return folder


@pytest.mark.parametrize("output", ["", ".", "../zwx"])
def test_a_run_folder_among_the_pictures_is_refused(tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.png")
    before = sorted(folder.iterdir())
    flags = ["--output", str(folder / output)]
    assert run(["train", str(folder), *flags, "--dry-run"]) == run(["train", str(folder), *flags, "--fresh"]) == 2
    assert capsys.readouterr().err.count("would lie among the pictures") == 2
    assert run(["batch", str(folder), "--output", str(tmp_path)]) == 2
    assert "would lie among the pictures" in capsys.readouterr().err
    assert run(["dataset", str(folder), "--sheet", str(folder / "sheet.png")]) == 2
    assert sorted(folder.iterdir()) == before


def test_a_run_folder_below_the_pictures_is_not_learned(tmp_path: Path, tiny_base: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.png", "runs/zwx/zwx.png")
    (folder / "runs" / "zwx" / "zwx.safetensors").touch()
    plan = check(resolve(flags={"folder": folder, "base": str(tiny_base), "output": folder / "runs" / "zwx"}))
    assert len(plan.dataset.examples) == 2 and plan.dataset.warnings == []


def test_what_changed_is_named(tmp_path: Path) -> None:
    folder = filled(tmp_path / "zwx", "a.png", "b.png", "c.png")
    recipe = resolve(flags={"folder": folder})

    def about() -> tuple[dict[str, Any], list[str]]:
        dataset = read_folder(recipe.data)
        pictures = [identity(example) for example in dataset.examples]
        return {"settings": {"steps": recipe.steps}, "weights": "", "pictures": pictures}, names_of(recipe, dataset)

    state, run = State(0, about()[0], {}), Run(tmp_path, "zwx")
    assert changes_since(state, about()[0], recipe, run, about()[1]) == []
    (folder / "a.txt").write_text("zwx asleep")
    filled(folder, "b.png", side=70)
    (folder / "c.png").unlink()
    now, names = about()
    assert changes_since(state, now, recipe, run, names) == [  # no diary tells what the old ones were called
        "the caption of a.png was 'zwx', now 'zwx asleep'",
        "b.png is new",
        "a picture is gone",
        "a picture is gone",
    ]


def test_a_run_of_before_goes_on_with_escaped_brackets(tmp_path: Path) -> None:
    recipe = resolve(flags={"folder": tmp_path})
    old, new = (
        {"settings": {"steps": recipe.steps}, "weights": "", "pictures": [["sha", caption, 1, ""]]}
        for caption in ("zwx_(dog)", r"zwx_\(dog\)")
    )
    assert changes_since(State(0, old, {}), new, recipe, Run(tmp_path, "zwx"), ["a.png"]) == []


def test_two_folders_of_one_name_are_both_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = filled(tmp_path / "a" / "rex", "a.png"), filled(tmp_path / "b" / "rex", "a.png")
    assert run(["batch", str(one), str(two), "--class", "dog", "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and f"{two} and {one} have one name" in err


def test_a_warm_up_longer_than_the_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = filled(tmp_path / "zwx", "a.png")
    assert run(["train", str(folder), "--steps", "40", "--warmup", "40", "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert "--warmup 40 is as long as the run or longer (40 steps)" in err
    assert run(["train", str(folder), "--steps", "40", *shlex.split(err.rpartition(": ")[2]), "--dry-run"]) == 0
    assert capsys.readouterr().err == ""
