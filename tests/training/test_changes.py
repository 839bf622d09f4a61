"""Changing one's mind: more steps, other pictures, another beginning, a word to a run, an early end; nothing is lost by it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small import LATENT

from personalize.adapters.adapter import Adapter, distance
from personalize.adapters.delta import LowRank
from personalize.cli import run as command
from personalize.errors import AdapterError, FamilyMismatchError, OutputError, RecipeError
from personalize.models.model import Base
from personalize.recipe.fields import AdapterSpec, Recipe
from personalize.reports.metrics import evidence
from personalize.reports.run.read import Key, read_run
from personalize.reports.run.samples import samples_by_prompt, strip
from personalize.training.changes import picture_changes
from personalize.training.control import CONTROL, tell
from personalize.training.events import Encoded, Event, Finished, Sample, Saved, Started, Step, Stopped, Warned
from personalize.training.fleet import train_fleet
from personalize.training.loop import train
from personalize.training.preflight import check
from personalize.training.rundir import Commit, Run
from personalize.training.sample_names import drawing_of, prompt_name
from personalize.tuning.attach import attach
from personalize.tuning.fleet import Fleet
from personalize.tuning.targets import fresh

pytestmark = pytest.mark.usefixtures("short_exam")
Make = Callable[..., Recipe]


@pytest.fixture
def make(make: Make) -> Make:
    """2 steps of 1 picture, at the full learning rate from the first."""
    return partial(make, steps=2, batch_size=1, warmup=0)


def run(recipe: Recipe) -> list[Event]:
    return list(train(recipe))


def digest(recipe: Recipe) -> str:
    return hashlib.sha256((folder_of(recipe) / "zwx.safetensors").read_bytes()).hexdigest()


def folder_of(recipe: Recipe) -> Path:
    assert recipe.output
    return recipe.output


def weights(recipe: Recipe) -> Adapter:
    return Adapter.load(folder_of(recipe) / "zwx.safetensors")


def same(a: Recipe, b: Recipe) -> bool:
    """To the bit."""
    first, second = (weights(one).deltas for one in (a, b))
    pairs = [(delta.stored(), second[path].stored()) for path, delta in first.items()]
    return all(torch.equal(mine[role], theirs[role]) for mine, theirs in pairs for role in mine)


def steps_of(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, Step)]


def stop_after(recipe: Recipe, step: int) -> None:
    with closing(train(recipe)) as events:
        next(event for event in events if isinstance(event, Step) and event.step == step)


# ---------------------------------------------------------------- more steps


def test_a_finished_run_trains_on_as_one_of_so_many_steps_from_there(make: Make, tmp_path: Path) -> None:
    run(make(schedule="constant"))
    first, *more = run(make(schedule="constant", steps=4))
    assert isinstance(first, Started) and first.resumed == 2 and steps_of(more) == [3, 4]
    told = "--steps was 2, now 4: after step 2 the learning rate goes on as in a run of 4 steps, at 100% of its peak (constant)"
    assert first.changes == [told]
    run(whole := make(schedule="constant", steps=4, output=tmp_path / "whole"))
    assert same(make(), whole)  # nothing that was done is thrown away, or done otherwise
    said = weights(make()).metadata
    assert json.loads(said["personalize.changes"]) == [{"after": 2, "what": [told]}] and said["personalize.step"] == "4"
    assert (folder_of(whole).parent / "run" / "recipe.toml").read_text().startswith(f"# after step 2: {told}\n")
    assert "personalize.changes" not in weights(whole).metadata
    (again,) = run(make(schedule="constant", steps=4))
    assert isinstance(again, Finished) and again.again
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("zwx*")) == [
        "zwx-000002.safetensors",
        "zwx-000004.safetensors",
    ]


def test_the_learning_rate_goes_on_along_its_schedule(make: Make) -> None:
    run(make())
    first, *more = run(make(steps=4))
    rates = [event.lr for event in more if isinstance(event, Step)]
    assert isinstance(first, Started) and first.changes[0].endswith("at 50% of its peak (cosine)")
    assert rates[0] == pytest.approx(make().optim.lr * 0.5) and rates[1] < rates[0]


def test_fewer_steps_than_were_taken_are_refused(make: Make) -> None:
    run(make())
    with pytest.raises(RecipeError, match=r"has taken 2 steps, which is more than --steps 1 \(give --steps 2 or more"):
        run(make(steps=1))


# ---------------------------------------------------------------- other pictures


def test_a_run_goes_on_with_other_captions_and_says_which(make: Make, pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "zwx"))
    run(make(folder=folder))
    (folder / "0.txt").write_text("zwx cat on a chair")
    told = "the caption of 0.png was 'zwx cat', now 'zwx cat on a chair'"
    warned, again = run(make(folder=folder))  # no step is left that would learn it
    assert isinstance(warned, Warned) and warned.text == f"{told}: the run was finished before, more --steps train on with that"
    assert isinstance(again, Finished) and again.again
    first, *more = run(make(folder=folder, steps=3))
    assert isinstance(first, Started) and told in first.changes and steps_of(more) == [3]
    assert json.loads(weights(make()).metadata["personalize.changes"])[0]["what"] == first.changes
    assert [type(event) for event in run(make(folder=folder, steps=3))] == [Finished]


def test_each_kind_of_change_to_pictures_has_its_words() -> None:
    before = [["a", "x", 1, ""], ["b", "x", 1, ""], ["c", "x", 1, ""], ["d", "x", 1, ""], ["e", "x", 1, ""]]
    now = [["a", "y" * 50, 1, ""], ["B", "x", 1, ""], ["c", "x", 2, ""], ["d", "x", 1, "m"], ["f", "x", 1, ""]]
    names, old = ["a.png", "b.png", "c.png", "d.png", "f.png"], {"b": "b.png", "e": "e.png"}
    assert list(picture_changes(before, now, names, old)) == [  # type: ignore[arg-type]
        f"the caption of a.png was 'x', now '{'y' * 39}…'",
        "b.png is another picture",
        "c.png is repeated 2 times, was 1",
        "the mask of d.png is another",
        "f.png is new",
        "e.png is gone",
    ]


# ---------------------------------------------------------------- another beginning


@pytest.fixture
def other(narrow_base: Path) -> Callable[..., Adapter]:
    """A LoRA of random values on the tiny base's attention."""

    def build(rank: int = 1, targets: tuple[str, ...] = ("attention",)) -> Adapter:
        start = fresh(Base.load(narrow_base), AdapterSpec(rank=rank, alpha=0.5, targets=targets), ["unet"], 3)
        generator = torch.Generator().manual_seed(0)
        return Adapter({p: LowRank(torch.randn(d.up.shape, generator=generator), d.down, d.alpha) for p, d in start.items()})

    return build


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_a_run_begins_with_the_weights_of_an_adapter(
    make: Make, other: Callable[..., Adapter], tmp_path: Path, dialect: str
) -> None:
    given = other()
    path = given.save(tmp_path / "given.safetensors", dialect, {"personalize.step": "30"})
    plan = check(make(init=path))
    held = {p: delta for p, delta in plan.start.items() if p in given.deltas}
    assert distance(Adapter(held), given) < 1e-6  # in rank 2 and alpha 2 instead of 1 and 0.5
    assert {d.rank for d in plan.start.values()} == {2} and any(p not in given.deltas for p in plan.start)
    assert all(not d.up.any() for p, d in plan.start.items() if p not in given.deltas)
    if dialect != "kohya":
        return
    run(make(init=path, lr=1e-9))
    said = weights(make())
    assert distance(Adapter({p: said.deltas[p] for p in given.deltas}), given) < 1e-4
    facts = json.loads(said.metadata["personalize.init"])
    assert (facts["file"], facts["steps"]) == ("given.safetensors", "30") and len(facts["sha256"]) == 64
    assert json.loads(said.metadata["personalize.recipe"])["init"] == str(path)
    path.unlink()  # what was made of it is in the state
    assert steps_of(run(make(init=path, lr=1e-9, steps=3))) == [3]
    assert json.loads(weights(make()).metadata["personalize.init"]) == facts


def test_an_adapter_that_a_run_cannot_hold_is_told_with_what_would(
    make: Make, other: Callable[..., Adapter], tmp_path: Path, base_builder: Callable[..., Path]
) -> None:
    high, wide, foreign = (tmp_path / f"{name}.safetensors" for name in ("high", "wide", "foreign"))
    other(rank=3).save(high, "kohya")
    with pytest.raises(AdapterError, match=r"has rank 3 at unet.*, more than --rank 2 holds \(--rank 3 holds it exactly"):
        check(make(init=high))
    assert check(make(init=high, rank=3)).start
    other(targets=("attention", "conv")).save(wide, "kohya")
    with pytest.raises(AdapterError, match=r"changes \d+ layers that would not be trained.*--targets .*conv.* trains them"):
        check(make(init=wide))
    Adapter({"unet.conv_in": LowRank(torch.ones(320, 1, 1, 1), torch.ones(1, 4, 3, 3), 1)}).save(foreign, "diffusers")
    with pytest.raises((FamilyMismatchError, AdapterError), match="does not fit"):
        check(make(init=foreign))
    with pytest.raises(AdapterError, match="nowhere"):
        check(make(init=tmp_path / "nowhere.safetensors"))


# ---------------------------------------------------------------- a word to a run, and an early end


def test_a_word_to_a_run_is_obeyed_after_the_step_that_it_takes(make: Make) -> None:
    recipe, told = make(steps=5, checkpoint_every=0, sample_prompts=["{trigger}"], sample_every=0), list[Event]()
    words = {1: "sample", 2: "save", 3: "dance", 4: "stop"}
    for event in train(recipe):
        told.append(event)
        if isinstance(event, Step) and event.step in words:
            word = words[event.step]
            tell(folder_of(recipe), word) if word != "dance" else (folder_of(recipe) / CONTROL).write_text(word)
    kinds = [
        (type(event), event.step)
        for event in told[1:]
        if not isinstance(event, Started | Encoded) and (event.step or not isinstance(event, Warned))
    ]
    samples = [(Sample, 0)]
    assert kinds == [*samples, (Step, 1), (Sample, 1), (Step, 2), (Saved, 2), (Step, 3), (Warned, 3), (Step, 4), (Stopped, 4)]
    assert "'dance'" in next(event.text for event in told if isinstance(event, Warned))
    assert (folder_of(recipe) / "checkpoints" / "zwx-000002.safetensors").is_file()
    assert not (folder_of(recipe) / CONTROL).exists()
    assert steps_of(run(recipe)) == [5]
    with pytest.raises(OutputError, match="no run goes on in"):
        tell(folder_of(recipe), "stop")
    with pytest.raises(RecipeError, match="did you mean stop"):
        tell(folder_of(recipe), "stopp")


def test_finish_makes_everything_of_where_a_run_stands_and_it_can_go_on(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make(steps=4, sample_prompts=["{trigger}"], sample_every=0)
    stop_after(recipe, 3)
    assert command(["finish", str(folder_of(recipe))]) == 0
    assert f"report   {folder_of(recipe)}" in capsys.readouterr().out
    assert weights(recipe).metadata["ss_steps"] == "3"
    assert (folder_of(recipe) / "report.html").is_file() and (folder_of(recipe) / "samples" / "000003-zwx-s0.png").is_file()
    assert command(["finish", str(folder_of(recipe))]) == 0
    assert "already finished" in capsys.readouterr().out
    assert steps_of(run(recipe)) == [4]
    run(whole := make(steps=4, sample_prompts=["{trigger}"], sample_every=0, output=tmp_path / "whole"))
    assert same(recipe, whole)
    assert command(["finish", str(tmp_path / "nothing")]) == command(["tell", str(tmp_path / "run"), "stop"]) == 2
    told = capsys.readouterr().err
    assert "there is no run in" in told and "no run goes on in" in told


# ---------------------------------------------------------------- pictures that are held back


def test_held_pictures_stay_the_same_ones_where_others_come(make: Make, pictures: Path, tmp_path: Path) -> None:
    """A number of pictures is drawn once: new ones are learned, whatever a draw from the new folder would give."""
    folder = Path(shutil.copytree(pictures, tmp_path / "zwx"))
    asked = {"folder": folder, "holdout": 2, "choose": "last"}
    recipe = make(**asked, steps=1)
    run(recipe)
    held = [example.path.name for example in check(make(**asked, steps=2)).held]
    assert len(held) == 2
    for i in range(9):
        Image.new("RGB", (64, 64), (9 * i, 40, 200 - 9 * i)).save(folder / f"0-new{i}.png")  # a draw from all would take others
    fresh = check(make(**asked, steps=2, output=tmp_path / "other"))
    assert [example.path.name for example in fresh.held] != held
    plan = check(make(**asked, steps=2))
    assert [example.path.name for example in plan.held] == held and len(plan.dataset.examples) == len(fresh.dataset.examples)
    assert plan.changes[-1] == f"--holdout 2 holds the same pictures back: {', '.join(held)}"
    (folder / held[0]).rename(folder / f"1-renamed{Path(held[0]).suffix}")  # by its bytes, not by its name
    events = run(make(**asked, steps=2))
    assert steps_of(events) == [2]
    again = check(make(**asked, steps=3))
    assert sorted(example.path.name for example in again.held) == sorted([f"1-renamed{Path(held[0]).suffix}", held[1]])
    assert not any("holdout" in change for change in again.changes)  # told once
    with pytest.raises(RecipeError, match="--holdout was"):
        check(make(**asked | {"holdout": 3}, steps=3))  # another number is another run
    (folder / held[1]).unlink()
    assert check(make(**asked, steps=3)).changes[-1].endswith("; 1 of them gone")


# ---------------------------------------------------------------- sample pictures


def test_new_prompts_and_seeds_are_drawn_for_base_and_adapter_and_nothing_else_is(make: Make) -> None:
    asked = {"sample_every": 0, "checkpoint_every": 1}
    recipe = make(sample_prompts=["a {trigger}"], **asked)
    stop_after(recipe, 1)
    both = make(sample_prompts=["a {trigger}", "A {trigger}!"], **asked)
    drawn = [(event.step, event.prompt, event.seed) for event in run(both) if isinstance(event, Sample)]
    assert drawn == [(0, "A zwx!", 0), (2, "a zwx", 0), (2, "A zwx!", 0)]
    before = {path: path.read_bytes() for path in (folder_of(recipe) / "samples").iterdir()}
    times = {path: path.stat().st_mtime_ns for path in before if "-x" not in path.name}
    more = make(sample_prompts=["a {trigger}"], sample_seeds=[0, 7], **asked)
    events = run(more)
    assert [(e.step, e.seed, e.base) for e in events if isinstance(e, Sample)] == [(0, 7, True), (2, 7, False)]
    assert not steps_of(events)
    assert all(path.read_bytes() == data for path, data in before.items())
    assert {path: path.stat().st_mtime_ns for path in times} == times
    names = {path.name for path in (folder_of(recipe) / "samples").glob("0*") if "-x" not in path.name}
    assert names == {
        f"{step:06}-{name}-s{seed}.png"
        for step in (0, 2)
        for name, seed in (("a-zwx", 0), (prompt_name("A zwx!"), 0), ("a-zwx", 7))
    }


def test_one_prompt_drawn_in_two_ways_is_two_pictures(make: Make) -> None:
    """What kohya's options behind a prompt say is drawn, kept when the run goes on, and has a name of its own."""
    asked = {"sample_prompts": ["a {trigger}", "a {trigger} --w 64 --h 96", "a {trigger} --d 5"], "sample_every": 0}
    recipe = make(**asked)
    drawn = [event for event in run(recipe) if isinstance(event, Sample) and not event.base]
    sizes = []
    for event in drawn:
        with Image.open(folder_of(recipe) / event.path) as picture:
            sizes.append((event.seed, picture.size))
    assert sizes[0][0] == sizes[1][0] == 0 and sizes[0][1] != sizes[1][1] == (64, 96) and sizes[2] == (5, sizes[0][1])
    assert [event.step for event in run(make(**asked, steps=3)) if isinstance(event, Sample)] == [3, 3, 3]


def test_a_prompt_drawn_in_another_way_later_overwrites_nothing_and_has_a_row_of_its_own(make: Make) -> None:
    """Another sampler, guidance or number of sampler steps for a finished run, and back again."""
    asked = {"sample_prompts": ["a {trigger}"], "sample_every": 1, "steps": 1, "checkpoint_every": 1}
    run(recipe := make(**asked))
    folder = folder_of(recipe)
    before = {path: path.read_bytes() for path in (folder / "samples").iterdir()}
    ways = {"guidance": 5, "sampler": "Euler"}
    for number, (name, value) in enumerate(ways.items(), 2):
        drawn = [event for event in run(make(**asked, **{name: value})) if isinstance(event, Sample)]
        assert [(event.step, event.base) for event in drawn] == [(0, True), (1, False)]
        assert len({drawing_of(path.name) for path in (folder / "samples").iterdir() if drawing_of(path.name)}) == number
    assert {path: path.read_bytes() for path in before} == before
    run(make(**asked))  # as at first: it is all there
    rows = samples_by_prompt(records := read_run(folder))
    assert [(key.prompt, sorted(by_step), bool(base)) for key, by_step, base in rows] == [("a zwx", [1], True)] * 3
    assert [path for _, by_step, base in rows[-1:] for path in (base, by_step[1])] == [
        "samples/000000-a-zwx-s0.png",
        "samples/000001-a-zwx-s0.png",
    ]
    titles = [strip(records, key, [], lambda path, side: None, 64).title for key, *_ in rows]
    assert len(set(titles)) == 3 and sum("Euler, " in title for title in titles) == 1
    assert sum("guidance 5" in title for title in titles) == 1
    assert len({Key.of(record) for record in records.sweeps}) == 1  # of the way that was asked for last
    assert len(evidence(folder).with_trigger) == 3


def test_a_damaged_sample_is_drawn_anew_under_its_name(make: Make) -> None:
    asked = {"sample_prompts": ["a {trigger}"], "sample_every": 1, "steps": 1, "checkpoint_every": 1}
    run(recipe := make(**asked))
    path = folder_of(recipe) / "samples" / "000001-a-zwx-s0.png"
    whole = path.read_bytes()
    path.write_bytes(b"torn")
    run(make(**asked, save_precision="bf16"))  # another recipe, and so the end is made again
    assert path.read_bytes() == whole


def test_every_prompt_has_a_file_name_of_its_own() -> None:
    prompts = ["a cat", "A cat", "a cat!", "a-cat", "a  cat", "", "猫", "x" * 300, "x" * 301, "../a cat", "a/cat"]
    names = [prompt_name(prompt) for prompt in prompts]
    assert len(set(names)) == len(prompts) and names[0] == "a-cat" and all("/" not in name for name in names)


# ---------------------------------------------------------------- fleets that are killed


class Killed(BaseException):
    """What nobody catches: the process would be gone."""


def files_of(recipes: list[Recipe]) -> dict[str, bytes]:
    """Everything in run folders that must repeat to the byte."""
    return {
        f"{i}/{path.relative_to(folder_of(recipe))}": path.read_bytes()
        for i, recipe in enumerate(recipes)
        for path in sorted(folder_of(recipe).rglob("*"))
        if path.suffix in (".safetensors", ".png", ".json") and path.name != "state.safetensors"
    }


@pytest.mark.parametrize(("choose", "every"), [("none", 9), pytest.param("best", 1, marks=pytest.mark.slow)])
def test_a_fleet_killed_at_any_point_of_its_ending_ends_with_the_same_bytes(
    make: Make, tmp_path: Path, choose: str, every: int
) -> None:
    """Two members end first, the third one has a step to go: nobody's steps are taken again in other company."""
    flags = {"sample_prompts": ["{trigger}"], "sample_every": 0, "choose": choose, "rank": 1, "checkpoint_every": 3, "lr": 1e-2}
    recipes = [make(output=tmp_path / "runs" / str(i), seed=i, steps=n, **flags) for i, n in enumerate((2, 2, 3))]
    events = []
    for i, (_, event) in enumerate(train_fleet(recipes)):
        events.append(event)
        shutil.copytree(tmp_path / "runs", tmp_path / str(i))  # what is on the disk at a kill: nobody could tidy up
    wanted = files_of(recipes)
    last = max(i for i, event in enumerate(events) if isinstance(event, Step) and event.step == 2)
    points = [i for i in range(last, len(events)) if not isinstance(events[i], Step) or i == last]
    for point in points[::every]:
        shutil.rmtree(tmp_path / "runs")
        (tmp_path / str(point)).rename(tmp_path / "runs")
        again = [event for _, event in train_fleet(recipes)]
        if point > last:
            assert all(event.step == 3 for event in again if isinstance(event, Step)), point
        found = files_of(recipes)
        assert found.keys() == wanted.keys() and [name for name in wanted if found[name] != wanted[name]] == [], point


SLOW = [pytest.param(moment, marks=pytest.mark.slow) for moment in ("before the first", 0, 1, 2, "clear")]


@pytest.mark.parametrize("moment", ["commit", *SLOW])
def test_a_fleet_killed_while_its_states_take_their_places_goes_on_from_all_of_them(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str | int
) -> None:
    """Before the commit, all go on from the states of before; from then on, all from the new ones: to the same bytes."""
    flags = {"steps": 3, "checkpoint_every": 1, "rank": 1, "lr": 1e-2}
    whole, recipes = ([make(output=tmp_path / name / str(i), seed=i, **flags) for i in range(3)] for name in ("whole", "broken"))
    list(train_fleet(whole))
    put, puts = Run.put_state, list[Run]()
    made, cleared = list[Commit](), list[Commit]()

    def put_or_die(self: Run) -> None:
        puts.append(self)
        if isinstance(moment, int) and len(puts) == 4 + moment:  # of the second step
            raise Killed
        put(self)

    def commit_or_die(self: Commit) -> None:
        made.append(self)
        if moment == "before the first" and len(made) == 2:
            raise Killed
        make_commit(self)
        if moment == "commit" and len(made) == 2:
            raise Killed

    def clear_or_die(self: Commit) -> None:
        cleared.append(self)
        if moment == "clear" and len(cleared) == 2:
            raise Killed
        clear_commit(self)

    make_commit, clear_commit = Commit.make, Commit.clear
    with monkeypatch.context() as patch:
        patch.setattr(Run, "put_state", put_or_die)
        patch.setattr(Commit, "make", commit_or_die)
        patch.setattr(Commit, "clear", clear_or_die)
        with pytest.raises(Killed):
            list(train_fleet(recipes))
    states = [Run(folder_of(recipe), "zwx").load_state() for recipe in recipes]
    assert [state.done for state in states if state] == [1 if moment == "before the first" else 2] * 3
    shutil.move(tmp_path / "broken", tmp_path / "moved")  # it says where the others are from where it is
    recipes = [make(output=tmp_path / "moved" / str(i), seed=i, **flags) for i in range(3)]
    list(train_fleet(recipes))
    assert files_of(recipes) == files_of(whole)
    assert not [path for path in (tmp_path / "moved").rglob(".*") if path.name != ".lock"]


def test_states_are_kept_together_or_not_at_all(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [make(output=tmp_path / str(i), seed=i, steps=4, checkpoint_every=1 + i) for i in range(3)]
    written, write = list[int](), Run.write_state

    def die_at_the_fifth(self: Run, state: Any) -> None:
        written.append(state.done)
        if len(written) == 5:
            raise Killed
        write(self, state)

    monkeypatch.setattr(Run, "write_state", die_at_the_fifth)
    with pytest.raises(Killed):
        list(train_fleet(recipes))
    assert written == [1, 1, 1, 2, 2]  # whoever's turn it is, all write theirs
    states = [Run(folder_of(recipe), "zwx").load_state() for recipe in recipes]
    assert [state.done for state in states if state] == [1, 1, 1]


def test_one_member_alone_on_the_base_gives_what_it_gives_alone(narrow_base: Path) -> None:
    base, starts = Base.load(narrow_base), []
    for seed in range(2):
        starts.append(fresh(base, AdapterSpec(rank=2, alpha=3.0, targets=("attention", "conv")), ["unet"], seed))
        for delta in starts[-1].values():
            delta.up.normal_(std=0.1)
    x, t, cond = torch.randn(2, *LATENT), torch.tensor([100, 900]), base.embed(["a", "b"])
    with attach(base, Adapter(starts[1])), torch.no_grad():
        alone = base.denoise(x, t, cond)
    with Fleet(base, starts) as company, company.active.of(1), torch.no_grad():
        assert torch.equal(base.denoise(x, t, cond), alone)
