"""The benchmarks: honest tasks, exact arithmetic, and a whole run on a base that knows nothing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from personalize.errors import RecipeError
from personalize.recipe.resolve import resolve
from tools.pocket import samples
from tools.pocket.judge import Judge, truth
from tools.pocket.proof import base, captions, choice, peer, personalization
from tools.pocket.proof.__main__ import BENCHMARKS, parser
from tools.pocket.proof.drawing import Trial, load_or_draw, obedience, renders
from tools.pocket.proof.figures import Figure, gap_closed, markdown, share
from tools.pocket.proof.tasks import LESSONS, Task, tasks
from tools.pocket.world import SUBJECTS, UNSEEN_STYLES, Scene, is_held_out

ALL = tasks(count=35)


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_no_test_scene_is_a_lesson(task: Task) -> None:
    learned = {(scene.object, scene.background, scene.style) for scene, _ in task.lessons}
    asked = [(trial.scene.object, trial.scene.background, trial.scene.style) for trial in task.called]
    assert len(task.lessons) == LESSONS[task.kind] and len(task.called) == len(task.plain) == len(task.unrelated) == 35
    assert not learned & set(asked) and len(set(asked)) == 35
    if task.kind == "style":
        assert not {scene.object for scene, _ in task.lessons} & {trial.scene.object for trial in task.called}


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_the_trigger_is_where_it_belongs_and_prompts_tell_the_scene(task: Task) -> None:
    assert all(task.trigger in words.replace(",", "").split() for words in [w for _, w in task.lessons])
    assert all(task.trigger in trial.prompt.split() for trial in task.called)
    assert not any(task.trigger in trial.prompt.split() for trial in (*task.plain, *task.unrelated))
    assert all(trial.scene.object in trial.prompt for trial in (*task.called, *task.plain, *task.unrelated))
    assert [trial.seed for trial in task.called] == [trial.seed for trial in task.plain]
    assert all(trial.scene.object != task.class_name for trial in task.unrelated)


def test_there_is_a_task_for_everything_unseen_and_unknown_names_are_refused() -> None:
    assert [task.name for task in ALL] == [*SUBJECTS, *UNSEEN_STYLES]
    assert [task.name for task in tasks("stained glass, scarf cat", 4)] == ["stained glass", "scarf cat"]
    assert len(tasks("styles", 4)) == len(UNSEEN_STYLES)
    with pytest.raises(RecipeError, match="scarf cat"):
        tasks("scarfcat")


def test_no_prompt_is_scored_on_what_its_style_cannot_show() -> None:
    for task in ALL:
        assert all(truth(trial.scene)[head] is not None for head in task.attributes for trial in (*task.called, *task.plain))


def test_tasks_are_the_same_every_time() -> None:
    assert tasks("neon", 8) == tasks("neon", 8)
    assert tasks("neon", 8, seed=1) != tasks("neon", 8)


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_for_the_base_tell_all_that_is_judged(held_out: bool) -> None:
    for trial in base.trials(40, 0, held_out):
        assert base.tells_all(trial.prompt, trial.scene) and is_held_out(trial.scene) == held_out


@pytest.mark.slow
def test_true_renders_obey_and_their_ceiling_is_near_one() -> None:
    asked = base.trials(60, 1, False)
    found = obedience(Judge.load(), renders(asked, 64), asked, base.HEADS)
    assert all(value > 0.9 for value in found.values())


def test_what_cannot_be_told_does_not_count() -> None:
    scene = Scene("cat", "red", "large", "middle", "beach", "blueprint", 0)
    found = obedience(Judge.load(), renders([Trial("", 0, scene)], 64), [Trial("", 0, scene)], ("object", "colour"))
    assert found == {"object": 1.0, "colour": 0.0, "all": 1.0}


def test_shares_and_gaps() -> None:
    assert share(0.45, 0.9) == 0.5 and share(1, 0) == 0
    assert gap_closed(0.2, 0.7, 0.9) == pytest.approx(5 / 7) and gap_closed(0.5, 1, 0.5) == 0
    assert Figure("leak", 0.0, 0.034, None, "<= 5 %", True).cells() == ("leak", "0.0 %", "3.4 %", "–", "<= 5 %", "yes")
    assert Figure("training", None, 61.23, None, "", False, "s").cells()[2:] == ("61.2 s", "–", "", "NO")
    assert markdown(("a", "b"), [("x", "1")]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"


def test_drawn_pictures_are_kept(tmp_path: Path) -> None:
    drawn = [Image.new("RGB", (8, 8), (10 * i, 0, 0)) for i in range(3)]
    first = load_or_draw(tmp_path / "x.npy", lambda: drawn)
    second = load_or_draw(tmp_path / "x.npy", lambda: pytest.fail("drawn twice"))
    assert [a.tobytes() for a in first] == [b.tobytes() for b in second] == [c.tobytes() for c in drawn]


def options(*arguments: str) -> argparse.Namespace:
    chosen = parser().parse_args(arguments)
    chosen.name = chosen.benchmark
    return chosen


def test_settings_for_tuning_reach_the_recipe(tmp_path: Path) -> None:
    told = options("personalization", "--steps", "7", "--set", "lr=2e-3", "--set", "prior=output", "--work", str(tmp_path))
    recipe = personalization.recipe_of(tasks("scarf cat", 2)[0], told, tmp_path)
    assert (recipe.steps, recipe.optim.lr, recipe.objective.prior, recipe.preset) == (7, 2e-3, "output", "pocket-subject")
    assert recipe.data.class_name == "cat" and recipe.sampling.sample_seeds == ()


def test_captions_are_held_against_the_scenes_that_were_drawn(tmp_path: Path) -> None:
    told = {"object": "cat", "colour": "red", "background": "beach", "style": "ink"}
    assert captions.values_in("a red cat on the beach, ink drawing") == told
    assert captions.values_in("in the snow") == dict.fromkeys(told) | {"background": "snow"}
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "other.png")
    captions.main(options("captions", "-n", "2", "--others", str(tmp_path), "--to", str(tmp_path / "figures")))
    found = json.loads((tmp_path / "figures/captions.json").read_text())["figures"]
    assert [row["name"] for row in found["seen combinations"]] == [*captions.HEADS, "nothing at all"]
    assert found["unseen individuals"][1]["true"] is None and len(found) == 5
    assert found["1 other pictures"] == [{"name": "anything", "told": 0.0, "true": None}]


@pytest.mark.slow
def test_base_benchmark_on_a_base_that_knows_nothing(tiny_base: Path, tmp_path: Path) -> None:
    folders = ("--cache", str(tmp_path / "cache"), "--to", str(tmp_path / "figures"))
    base.main(options("base", "--base", str(tiny_base), "-n", "4", "--sampler-steps", "1", *folders))
    told = json.loads((tmp_path / "figures/base.json").read_text())
    assert list(told["figures"]) == ["seen combinations", "held-out combinations"]
    assert all(0 <= figure["value"] <= 1 for table in told["figures"].values() for figure in table)
    assert (tmp_path / "figures/base.md").read_text().startswith("# How well the base obeys")
    assert (tmp_path / "figures/base-seen.png").is_file()


@pytest.mark.slow
def test_personalization_benchmark_trains_measures_and_keeps(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = options(
        *("personalization", "--base", str(tiny_base), "--only", "scarf cat,neon", "-n", "3", "--sampler-steps", "1"),
        *("--steps", "2", "--set", "batch_size=1", "--work", str(tmp_path / "work"), "--to", str(tmp_path / "figures")),
    )
    personalization.main(told)
    data = json.loads((tmp_path / "figures/personalization.json").read_text())
    assert [record["name"] for record in data["data"]] == ["scarf cat", "neon"]
    assert list(data["figures"]) == ["Subjects (1, means)", "Styles (1, means)"]
    assert data["data"][0]["seconds"] > 0 and data["data"][0]["identity"]["ceiling"] >= 2 / 3
    assert (tmp_path / "figures/personalization.png").is_file()
    capsys.readouterr()
    personalization.main(told)
    assert capsys.readouterr().out.count("already measured") == 2


@pytest.mark.slow
def test_the_stand_in_offers_what_the_script_uses(tmp_path: Path) -> None:
    if len(launcher := peer.launcher(tmp_path)) == 1:
        pytest.skip("torchvision is installed")
    script = tmp_path / "script.py"
    script.write_text("""
import sys
from PIL import Image
from torchvision import transforms as t
assert sys.argv[1:] == ["--steps", "1"]
sizes = t.Resize(64, interpolation=t.InterpolationMode.LANCZOS), t.CenterCrop(64), t.RandomCrop(64)
x = t.Compose([*sizes, t.ToTensor(), t.Normalize([0.5], [0.5])])(Image.new("RGB", (100, 80), (255, 0, 0)))
assert x.shape == (3, 64, 64) and x.amax() == 1 and x.amin() == -1, x
""")
    subprocess.run([*launcher, script, "--steps", "1"], check=True)


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


@pytest.mark.slow
def test_sample_data_is_what_the_command_writes(tmp_path: Path) -> None:
    samples.write_samples(tmp_path)
    shipped = Path(__file__).parents[2] / "sample_data"
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*") if path.is_file()}
    assert made.keys() == {path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()}
    for name, path in made.items():
        if name.suffix != ".png":
            assert path.read_text() == (shipped / name).read_text()
        else:
            assert pixels(path) == pixels(shipped / name)


def test_peer_commands_name_the_same_training(tiny_base: Path, tmp_path: Path) -> None:
    told = options("peer", "--script", "x.py", "--base", str(tiny_base), "--work", str(tmp_path))
    told.side = 64
    task = tasks("king fish", 2)[0]
    recipe = personalization.recipe_of(task, told, tmp_path)
    theirs = peer.their_command(told, recipe, task, 5e-4, tmp_path)
    told_theirs = theirs[theirs.index("--pretrained_model_name_or_path") :]
    pairs = dict(zip(told_theirs[::2], told_theirs[1::2], strict=True))
    assert pairs["--rank"] == str(recipe.adapter.rank) and pairs["--max_train_steps"] == str(recipe.steps)
    assert pairs["--instance_prompt"] == f"a {task.trigger} fish" and pairs["--pretrained_model_name_or_path"] == str(tiny_base)
    assert os.path.basename(peer.our_command(recipe)[-2]) == "run.toml"


def test_peer_runs_both_at_other_lengths_and_ours_at_equal_work(tiny_base: Path, tmp_path: Path) -> None:
    told = options("peer", "--script", "x.py", "--base", str(tiny_base), "--work", str(tmp_path), "--lengths", "0.5", "2")
    told.side = 64
    task = tasks("king fish", 2)[0]
    recipe = personalization.recipe_of(task, told, tmp_path)
    jobs = peer.jobs_of(task, told, recipe, tmp_path)
    half, twice = recipe.steps // 2, 2 * recipe.steps
    assert [name for name in jobs if name.startswith("personalize")] == [
        "personalize", "personalize, equal work", f"personalize, {half} steps", f"personalize, {twice} steps"
    ]  # fmt: skip
    assert sum(name.startswith("diffusers") for name in jobs) == 6 and len({path for _, path in jobs.values()}) == len(jobs)
    assert str(twice) in jobs[f"diffusers, lr 0.0005, {twice} steps"][0]
    equal = resolve(tmp_path / "run-equal.toml")
    assert (equal.adapter.targets, equal.objective.prior, equal.steps) == (("attention",), "none", recipe.steps)


def test_peer_time_to_quality_is_the_fastest_good_run() -> None:
    def run(value: float, seconds: float, leak: float = 0.0, fidelity: float = 1.0) -> dict[str, Any]:
        identity = {"floor": 0.0, "value": value, "ceiling": 1.0}
        return {"identity": identity, "fidelity": {"value": fidelity, "base": 1.0}, "leak": {"value": leak}, "seconds": seconds}

    runs = {"personalize": run(0.9, 60), "personalize, 9 steps": run(0.85, 30), "personalize, equal work": run(1.0, 1)}
    never = {
        "diffusers, lr 1": run(0.7, 50),
        "diffusers, lr 2": run(0.9, 50, leak=0.1),
        "diffusers, lr 1, 9 steps": run(1, 120, 0, 0.9),
    }
    record = {"name": "king fish", "runs": runs | never}
    told = peer.time_to_quality(record)
    assert (told.floor, told.value, told.met) == (None, 30, True) and "none of 3 of theirs, the longest took 4.0x" in told.goal
    record["runs"]["diffusers, lr 3"] = run(0.9, 80)
    told = peer.time_to_quality(record)
    assert (told.floor, told.value, told.met) == (80, 30, False) and "2.7x" in told.goal
    assert peer.equal_work(record).met is True
    assert peer.time_to_quality({"name": "a", "runs": never | {"personalize": run(0.1, 9)}}).met is False


def test_peer_tables_hold_the_rates_of_their_kind() -> None:
    run = {
        "identity": {"floor": 0.0, "value": 0.5, "ceiling": 1.0},
        "fidelity": {"value": 1.0},
        "leak": {"value": 0.0},
        "drift": {"value": 1.0, "changed": 0.0},
        "seconds": 10.0,
    }
    rates = {"subject": ("5e-4", "4e-3"), "style": ("5e-4", "3e-3")}
    run["fidelity"]["base"] = 1.0
    records = [
        {
            "name": kind,
            "kind": kind,
            "runs": {"personalize": run, "personalize, equal work": run} | {f"diffusers, lr {lr}": run for lr in lrs},
        }
        for kind, lrs in rates.items()
    ]
    named = [f"{kind.capitalize()}s (1), beside diffusers, lr {lr}" for kind, lrs in rates.items() for lr in lrs]
    more = list(peer.tables(records))[-2:]
    assert list(peer.tables(records)) == named + more and more == [peer.EQUAL_WORK, peer.QUALITY]
    assert list(peer.tables(records[:1])) == named[:2] + more


@pytest.mark.slow
def test_choice_benchmark_trains_scores_and_measures_every_checkpoint(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = options(
        *(
            "choice",
            "--base",
            str(tiny_base),
            "--only",
            "scarf cat",
            "--no-prior",
            "scarf cat",
            "-n",
            "2",
            "--sampler-steps",
            "1",
        ),
        *("--set", "steps=2", "--set", "checkpoint_every=1", "--set", "batch_size=1"),
        *("--work", str(tmp_path / "work"), "--to", str(tmp_path / "figures")),
    )
    choice.main(told)
    records = json.loads((tmp_path / "figures/choice.json").read_text())["data"]
    assert [(one["variant"], [row["step"] for row in one["checkpoints"]]) for one in records] == [
        ("preset", [1, 2]),
        ("no prior", [1, 2]),
    ]
    assert all(one["choosing"] > 0 and one["chosen"]["step"] in (1, 2) for one in records)
    page = (tmp_path / "figures/choice.md").read_text()
    assert "rank correlation" in page and page.count(" *") == 2
    times = sorted((tmp_path / "work").rglob("choice.json"))
    before = [path.stat().st_mtime_ns for path in times]
    choice.main(told)
    assert [path.stat().st_mtime_ns for path in times] == before


def test_the_truth_is_one_number_between_nothing_and_all() -> None:
    all_right = {
        "identity": {"value": 0.9, "ceiling": 0.9},
        "fidelity": {"value": 1.0},
        "leak": {"value": 0.0},
        "drift": {"value": 0.9, "base": 0.8},
    }
    assert choice.truth(all_right) == 1
    assert choice.truth(all_right | {"leak": {"value": 1.0}}) == 0
    assert choice.truth(all_right | {"identity": {"value": 0.45, "ceiling": 0.9}}) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [([1, 2, 3], [2, 4, 9], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 2, 3], [5, 5, 5], 0), ([1, 2, 2, 4], [1, 3, 3, 8], 1)],
)
def test_ranks_are_compared(a: list[float], b: list[float], found: float) -> None:
    assert choice.spearman(a, b) == pytest.approx(found)


def test_no_benchmark_changes_the_defaults_of_others() -> None:
    found = {name: vars(parser().parse_args([name, *(["--script", "x"] if name == "peer" else [])])) for name in BENCHMARKS}
    steps = dict.fromkeys(BENCHMARKS, 20) | {"choice": 12, "verdict": 12}
    assert {name: one["sampler_steps"] for name, one in found.items()} == steps
    assert {name: one["sampler"] for name, one in found.items()} == dict.fromkeys(BENCHMARKS, "auto") | {"settings": "DDIM"}
