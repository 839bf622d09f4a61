"""Kinds of jobs: each is its command, checked before it is queued, with its answer as the result."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from captioners import build_classifier, plain_picture
from PIL import Image
from small import QUIET, SMALL

from personalize import registry
from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import LowRank
from personalize.cli import cli
from personalize.cli.work import parameters, settings_of
from personalize.errors import AdapterError, BaseModelError, DataError, JobError, OutputError, PersonalizeError, RecipeError
from personalize.jobs import Engine, Job, Store, Workspace
from personalize.lock import holder_process
from personalize.models.resident import Resident
from personalize.recipe.fields import Recipe

ROWS = list(registry.table("jobs"))


@pytest.fixture
def store(workspace: Workspace) -> Store:
    return Store(workspace)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter file of a layer that every SD 1 base has, without a trigger."""
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    torch.manual_seed(0)
    made = Adapter({path: LowRank(torch.randn(64, 2), torch.randn(2, 64), 2.0)})
    file = tmp_path_factory.mktemp("adapters") / "rex.safetensors"
    made.save(file)
    return file


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_command_and_checks_its_settings(name: str, store: Store) -> None:
    row = registry.table("jobs")[name]
    assert row.command is cli.commands[name] and row.lane in ("long", "quick")
    with pytest.raises(RecipeError, match=f"{name} has no setting 'nonsense'"):
        store.add(name, {"nonsense": 1})
    with pytest.raises(PersonalizeError) as error:  # what it cannot be without
        store.add(name, {})
    assert "\n" not in str(error.value) and store.list() == []


@pytest.mark.parametrize(
    ("kind", "settings", "error", "told"),
    [
        ("train", {"folder": "{pictures}", "stpes": 3}, RecipeError, "no setting 'stpes' .*did you mean steps"),
        ("train", {"folder": "{pictures}", "class": "cat", "steps": 0}, RecipeError, "steps"),
        ("train", {"folder": "{pictures}", "class": "cat", "base": "nope"}, BaseModelError, "there is no base called nope"),
        ("train", {"folder": "{here}/none", "class": "cat"}, DataError, "none"),
        ("train", {"folder": "{pictures}", "class": "cat", "preset": "nope"}, RecipeError, "unknown preset 'nope'"),
        ("train", {"folder": "{pictures}", "class": "cat", "output": "{pictures}"}, PersonalizeError, "pictures|zwx"),
        ("batch", {"folders": ["{here}/none"]}, DataError, "none"),
        ("batch", {"folders": ["{pictures}"], "class": "cat", "base": "nope"}, BaseModelError, "no base called nope"),
        ("generate", {}, RecipeError, "what should be drawn"),
        ("generate", {"prompts": ["a cat"], "seeds": ["x"]}, RecipeError, "--seeds"),
        ("generate", {"prompts": ["a cat"], "sampler": "nope"}, RecipeError, "sampler"),
        ("generate", {"prompts": ["a cat"], "stack": ["none.safetensors"]}, AdapterError, "there is no adapter none.safetensors"),
        ("generate", {"prompts": ["a cat"], "output": "/tmp"}, RecipeError, "a folder of its own"),
        ("caption", {"folder": "{here}/none"}, DataError, "none"),
        ("caption", {"folder": "{pictures}", "model": "nowhere"}, BaseModelError, "no captioner called nowhere"),
        ("caption", {"folder": "{pictures}", "batch_size": 0}, RecipeError, "batch-size"),
        ("caption", {"folder": "{pictures}", "precision": "nope"}, RecipeError, "precision"),
        ("caption", {"folder": "{pictures}", "steps": 3}, RecipeError, "no setting 'steps'"),
        ("caption", {"folder": "{pictures}", "prompt": "what?"}, RecipeError, "takes no --prompt"),
        ("caption", {"folder": "{pictures}", "prefix": "{{triger}}"}, RecipeError, "did you mean trigger"),
        ("merge", {"files": []}, RecipeError, "which adapters"),
        ("merge", {"files": ["{adapter}"], "output": "{adapter}"}, OutputError, "would overwrite"),
        ("resize", {"file": "{adapter}"}, RecipeError, "how many ranks"),
        ("resize", {"file": "{adapter}", "rank": 1, "error": 0.5}, RecipeError, "two rules"),
        ("convert", {"file": "{adapter}", "output": "x.pt"}, OutputError, "pickle"),
        ("convert", {"file": "{adapter}", "kind": "nope"}, RecipeError, "nope"),
    ],
)
def test_what_cannot_be_done_is_not_queued(
    store: Store,
    pictures: Path,
    adapter: Path,
    tmp_path: Path,
    kind: str,
    settings: dict[str, Any],
    error: type[PersonalizeError],
    told: str,
) -> None:
    places = {"pictures": pictures, "adapter": adapter, "here": tmp_path}

    def fill(value: Any) -> Any:
        return [fill(one) for one in value] if isinstance(value, list) else str(value).format(**places)

    with pytest.raises(error, match=told):
        store.add(kind, {key: fill(value) if isinstance(value, str | list) else value for key, value in settings.items()})
    assert store.list() == []


def test_settings_are_what_is_typed_or_what_json_has(adapter: Path) -> None:
    typed = settings_of("merge", [f"{adapter}:0.5", str(adapter), "--rank", "3", "--strip-metadata"])
    assert typed == {"files": (f"{adapter}:0.5", str(adapter)), "rank": "3", "strip_metadata": True}
    ways = [typed, {"files": [f"{adapter}:0.5", str(adapter)], "rank": 3, "strip-metadata": True, "method": None}]
    for settings in ways:
        _, values = parameters(cli.commands["merge"], {**settings, "output": "x"})
        assert (values["rank"], values["strip_metadata"], values["method"]) == (3, True, "concat")
        assert [(path, str(weighting)) for path, weighting in values["files"]] == [(adapter, "0.5"), (adapter, "1")]
    _, values = parameters(cli.commands["train"], {"folder": "x", "sample_prompts": [], "flip": False, "lr": 1e-4, "fresh": True})
    assert (values["sample_prompts"], values["flip"], values["lr"], values["fresh"]) == ([], False, 1e-4, True)
    assert settings_of("train", ["x", "--no-flip", "--sample-prompts", "a", "--sample-prompts", "b"]) == {
        "folder": "x", "flip": False, "sample_prompts": ["a", "b"],
    }  # fmt: skip
    with pytest.raises(RecipeError, match="No such option"):
        settings_of("merge", ["--nope"])


def test_jobs_do_what_their_commands_do(
    store: Store,
    wait: Callable[..., Job],
    adapter: Path,
    pictures: Path,
    narrow_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of each quick kind, by one worker; and a batch, whose folders are a training each."""
    monkeypatch.chdir(adapter.parent)  # paths are relative to where a job is asked for
    draw = {"prompts": ["a cat"], "base": str(narrow_base), "steps": 1, "size": "64", "count": 2}
    jobs = {
        "merge": store.add("merge", {"files": [f"{adapter.name}:0.5", "rex.safetensors"]}),
        "resize": store.add("resize", {"file": "rex.safetensors", "rank": 1}),
        "convert": store.add("convert", {"file": "rex.safetensors", "kind": "full", "output": str(tmp_path / "full")}),
        "doctor": store.add("doctor", {"files": ["rex.safetensors"]}),
        "dataset": store.add("dataset", {"folder": str(pictures), "quick": True}),
        "generate": store.add("generate", draw),
        "again": store.add("generate", draw | {"seeds": [5]}),
    }
    batch = store.add("batch", {"folders": [str(pictures)], "base": str(narrow_base), **SMALL, **QUIET, "steps": 1})
    monkeypatch.chdir(tmp_path)
    with Engine(store.workspace):
        done = {name: wait(store, job.id) for name, job in jobs.items()}
        trained = wait(store, batch.id)
    assert {name: (job.state, job.error) for name, job in done.items()} == dict.fromkeys(jobs, ("succeeded", None))
    results = {name: job.result or {} for name, job in done.items()}
    assert results["merge"]["written"] == str(store.workspace.adapters / "rex-rex.safetensors")
    assert Path(results["resize"]["written"]).is_file() and {one["rank"] for one in results["resize"]["parts"].values()} == {"1"}
    assert results["convert"]["written"] == str(tmp_path / "full.safetensors")
    assert results["doctor"]["files"] and results["dataset"]["pictures"]
    with Image.open(results["doctor"]["picture"]) as picture:  # drawn into the job's own folder
        assert picture.width > 300 and Path(picture.filename) == done["doctor"].folder / "doctor.png"
    assert [Path(one["path"]).name for one in results["generate"]["pictures"]] == ["a-cat-s0.png", "a-cat-s1.png"]
    assert done["generate"].progress["done"] == done["generate"].progress["total"] == 2
    for picture in (*results["generate"]["pictures"], *results["again"]["pictures"]):
        assert size_of(Path(picture["path"])) == (64, 64)
    assert done["generate"].folder != done["again"].folder
    told = [record for _, record in store.events(done["generate"].id) if record["event"] == "picture"]
    assert [record["path"] for record in told] == [one["path"] for one in results["generate"]["pictures"]]
    assert trained.state == "succeeded" and trained.result and trained.result["runs"][0]["state"] == "done", trained
    assert (trained.folder / "zwx" / "zwx.safetensors").is_file() and (trained.folder / "summary.json").is_file()


def test_a_picture_that_was_drawn_halfway_is_drawn_once(store: Store, narrow_base: Path, wait: Callable[..., Job]) -> None:
    """What a worker that was killed has left is no second picture."""
    job = store.add("generate", {"prompts": ["a cat"], "base": str(narrow_base), "steps": 1, "size": "64"})
    job.folder.mkdir(parents=True)
    (job.folder / "a-cat-s0.png").write_bytes(b"half of one")
    with Engine(store.workspace):
        assert wait(store, job.id).state == "succeeded"
    assert [path.name for path in job.folder.iterdir()] == ["a-cat-s0.png"]
    assert size_of(job.folder / "a-cat-s0.png") == (64, 64)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture
def resident() -> Iterator[Resident]:
    found = Resident()
    found.keeps = True
    yield found
    found.forget()


def test_a_base_is_kept_until_another_is_asked_for_or_its_files_change(
    resident: Resident, tiny_base: Path, narrow_base: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(narrow_base, tmp_path / "base"))
    recipe, other = Recipe(base=str(copy)), Recipe(base=str(tiny_base))
    first = resident.open(recipe, "cpu", torch.float32)
    assert resident.open(recipe, "cpu", torch.float32) is first
    assert resident.open(recipe.model_copy(update={"clip_skip": 2}), "cpu", torch.float32) is not first
    second = resident.open(recipe, "cpu", torch.float32)
    weights = next(copy.rglob("*.safetensors"))
    os.utime(weights, (1, 1))
    assert resident.open(recipe, "cpu", torch.float32) is not second
    assert resident.open(other, "cpu", torch.float32).name == str(tiny_base)
    resident.keeps = False  # a command's process
    assert resident.open(other, "cpu", torch.float32) is not resident.open(other, "cpu", torch.float32)


def test_captions_are_written_once_whoever_is_killed(store: Store, wait: Callable[..., Job], tmp_path: Path) -> None:
    """A worker that dies among pictures: the next one goes on with those that have no caption; and what a cancel leaves."""
    (folder := tmp_path / "zwx").mkdir()
    for number in range(250):
        plain_picture(folder / f"{number}.png")
    (folder / "0.txt").write_text("by hand\n")
    tagger = build_classifier(tmp_path / "tagger", ["cat", "dog"])
    settings = {"folder": str(folder), "model": str(tagger), "batch_size": 1}

    def captions() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.txt")}

    job = store.add("caption", settings)
    with Engine(store.workspace):
        wait(store, job.id, lambda one: one.progress.get("done", 0) >= 2)
        os.kill(holder_process(store.workspace.lane("cpu/quick")) or 0, signal.SIGKILL)
        before = captions()
        done = wait(store, job.id)
        assert done.state == "succeeded" and done.attempts >= 2, done
        after = captions()
        assert 3 <= len(before) < len(after) == 250 and {name: after[name] for name in before} == before
        assert done.result and done.result["kept"] >= len(before) and done.result["captioner"] == str(tagger)
        told = [record["picture"] for _, record in store.events(job.id) if record["event"] == "caption"]
        assert len(told) == len(set(told)) and "0.png" not in told and done.progress["done"] == done.progress["total"]
        other = store.add("caption", settings | {"overwrite": True, "prefix": "other"})
        wait(store, other.id, lambda one: one.progress.get("done", 0) >= 2)
        with pytest.raises(JobError, match=f"job {other.id} writes to"):  # one at a time in a folder
            store.add("caption", settings)
        store.cancel(other.id)
        assert wait(store, other.id).state == "cancelled"
    texts = [path.read_text() for path in folder.glob("*.txt")]
    assert len(texts) == 250 and 2 <= sum(text == "other, cat, dog\n" for text in texts) < 250 and all(texts)
