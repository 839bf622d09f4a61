"""Whole runs on real models with random weights: what they leave, that they go on, and that every setting does something."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from children import start_child
from PIL import Image
from slow import all_but
from small import small_recipe

from personalize import registry
from personalize.adapters.adapter import Adapter
from personalize.adapters.describe import describe
from personalize.data.folder import class_images
from personalize.errors import BaseModelError, DataError, OutputError, PersonalizeError, RecipeError, TrainingError
from personalize.inference.pipeline import draw
from personalize.inference.png import read_record
from personalize.models.model import Base
from personalize.recipe.fields import Recipe
from personalize.recipe.resolve import from_json, resolve
from personalize.recipe.settings import settings
from personalize.training.events import Chosen, Event, Finished, Sample, Saved, Started, Step, Sweep, event_record
from personalize.training.inputs import prepare_data, training_batches
from personalize.training.loop import defer_interrupts, train
from personalize.training.milestones import is_due
from personalize.training.preflight import check
from personalize.training.rundir import Run
from personalize.training.selection import STRENGTHS

pytestmark = pytest.mark.usefixtures("short_exam")
Make = Callable[..., Recipe]


def run(recipe: Recipe, **options: Any) -> list[Event]:
    return list(train(recipe, **options))


def digest(recipe: Recipe, name: str = "zwx") -> str:
    assert recipe.output
    return hashlib.sha256((recipe.output / f"{name}.safetensors").read_bytes()).hexdigest()


def diary(recipe: Recipe) -> list[dict[str, Any]]:
    assert recipe.output

    def strict(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=strict) for line in (recipe.output / "events.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- what a run tells and leaves


@pytest.fixture(scope="module")
def done(tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[Event]]:
    """One whole run with everything: pictures, checkpoints, both parts."""
    recipe = resolve(
        flags={
            "base": str(tiny_base), "folder": pictures, "output": tmp_path_factory.mktemp("done"), "steps": 4, "batch_size": 2,
            "rank": 2, "class": "cat", "sample_prompts": ["{trigger} {class}", "a {class}"], "sample_seeds": [0, 5],
            "sample_steps": 2, "sample_every": 2, "checkpoint_every": 2, "text_encoder_lr": 1e-3,
        }
    )  # fmt: skip
    return recipe, run(recipe)


def test_events_come_in_order(done: tuple[Recipe, list[Event]]) -> None:
    recipe, events = done
    kinds = [type(event).__name__ for event in events]
    pictures, sweep = ["Sample"] * 4, ["Sweep"] * 12
    choice = ["Scored"] * (2 + len(STRENGTHS)) + ["Chosen"]
    assert kinds == [
        "Started",
        "Encoded",
        *pictures,
        "Step",
        "Step",
        *pictures,
        "Saved",
        "Step",
        "Step",
        *pictures,
        "Saved",
        *choice,
        *sweep,
        "Saved",
        "Finished",
    ]
    assert diary(recipe) == [json.loads(json.dumps(event_record(event))) for event in events]
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2, 3, 4]
    assert all(event.base == (event.step == 0) for event in events if isinstance(event, Sample))


def test_started_says_what_is_trained(done: tuple[Recipe, list[Event]], pictures: Path) -> None:
    recipe, events = done
    started = events[0]
    assert isinstance(started, Started)
    assert started.recipe["trigger"] == "zwx" and started.recipe["output"] == str(recipe.output)
    assert [image["caption"] for image in started.images] == ["zwx cat"] * 4
    assert started.images[0]["sha256"] == hashlib.sha256((pictures / "0.png").read_bytes()).hexdigest()
    assert (started.device, started.dtype, started.resumed) == ("cpu", "float32", 0)
    assert started.parameters == sum(d.up.numel() + d.down.numel() for d in Adapter.load(adapter_of(recipe)).deltas.values())


def test_steps_tell_the_loss_of_each_picture(done: tuple[Recipe, list[Event]]) -> None:
    for event in done[1]:
        if isinstance(event, Step):
            assert len(event.losses) == len(event.timesteps) == 2
            assert event.loss == pytest.approx(sum(event.losses) / 2)
            assert event.grad_norm > 0 and event.lr > 0 and event.text_encoder_lr == pytest.approx(event.lr)
            assert not event.skipped


def adapter_of(recipe: Recipe) -> Path:
    assert recipe.output
    return recipe.output / "zwx.safetensors"


def test_the_folder_holds_what_it_should(done: tuple[Recipe, list[Event]]) -> None:
    folder = done[0].output
    assert folder
    chosen, names = next(event.step for event in done[1] if isinstance(event, Chosen)), ("zwx-cat", "a-cat")
    samples = {f"{step:06}-{name}-s{seed}.png" for step in (0, 2, 4) for name in names for seed in (0, 5)}
    sweep = {f"{chosen:06}-{name}-s0-x{strength}.png" for name in names for strength in ("0.25", "0.50", "0.75", "1.25")}
    assert {path.name for path in (folder / "samples").iterdir()} == samples | sweep | {"autoencoder.png"}
    names = {"zwx-000002.safetensors", "zwx-000004.safetensors", "state.safetensors"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == names
    own = {"zwx.safetensors", "zwx.png", "zwx.json", "recipe.toml", "events.jsonl", "samples", "checkpoints"}
    assert {path.name for path in folder.iterdir()} == own
    for event in done[1]:
        if isinstance(event, Sample | Sweep | Saved | Finished):
            assert (folder / event.path).is_file()


def test_the_first_pictures_are_the_bases_own(done: tuple[Recipe, list[Event]]) -> None:
    recipe, events = done
    base = Base.load(recipe.base)
    first = [event for event in events if isinstance(event, Sample) and event.base]
    drawn = draw(base, [e.prompt for e in first], [e.seed for e in first], steps=2, guidance=recipe.sampling.guidance)
    assert recipe.output
    for event, picture in zip(first, drawn, strict=True):
        with Image.open(recipe.output / event.path) as saved:
            assert saved.tobytes() == picture.tobytes()
    assert [(e.prompt, e.seed) for e in first] == [("zwx cat", 0), ("zwx cat", 5), ("a cat", 0), ("a cat", 5)]


def test_the_sweep_runs_from_the_base_to_beyond_the_adapter(done: tuple[Recipe, list[Event]]) -> None:
    sweep = [event for event in done[1] if isinstance(event, Sweep) and event.prompt == "zwx cat"]
    assert [event.strength for event in sweep] == [0.0, 0.25, 0.5, 0.75, 1.25, 1.0]
    paths = {event.strength: event.path for event in sweep}
    chosen = next(event.step for event in done[1] if isinstance(event, Chosen))
    assert paths[0.0] == "samples/000000-zwx-cat-s0.png" and paths[1.0] == f"samples/{chosen:06}-zwx-cat-s0.png"
    assert done[0].output
    assert len({(done[0].output / path).read_bytes() for path in paths.values()}) > 2


def test_the_adapter_says_what_it_is(done: tuple[Recipe, list[Event]]) -> None:
    recipe, _ = done
    path = adapter_of(recipe)
    about = describe(path)
    said = Adapter.load(path).metadata
    assert (about.family, about.trigger) == ("pocket", "zwx")
    assert said["ss_output_name"] == "zwx" and said["ss_base_model_version"] == "pocket" and said["ss_steps"] == "4"
    assert said["modelspec.prediction_type"] == "v" and said["modelspec.resolution"] == "64x64"
    assert json.loads(said["ss_tag_frequency"]) == {"zwx": {"zwx cat": 4}}
    picture = Image.open(io.BytesIO(base64.b64decode(said["modelspec.thumbnail"].partition(",")[2])))
    assert (picture.format, picture.size) == ("JPEG", (64, 64))
    assert json.loads((path.with_suffix(".json")).read_text())["activation text"] == "zwx cat"
    with Image.open(path.with_suffix(".png")) as preview:
        assert preview.size == (256, 256)


def test_the_resolved_recipe_is_a_preset_that_repeats_the_run(done: tuple[Recipe, list[Event]], tmp_path: Path) -> None:
    recipe, _ = done
    assert recipe.output
    again = resolve(flags={"preset": recipe.output / "recipe.toml", "output": tmp_path / "again"})
    assert (again.data, again.adapter, again.objective, again.optim, again.sampling, again.steps) == (
        recipe.data.model_copy(update={"trigger": "zwx"}), recipe.adapter, recipe.objective, recipe.optim, recipe.sampling, 4,
    )  # fmt: skip


@pytest.mark.slow
def test_training_lowers_the_loss(make: Make) -> None:
    events = run(make(steps=120, batch_size=4, lr=5e-3, flip=False, checkpoint_every=0, rank=8, min_snr=0))
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


# ---------------------------------------------------------------- stopping and going on


EVERYTHING = {
    "text_encoder_lr": 1e-3, "text_encoder_share": 0.5, "dropout": 0.2, "accumulate": 2, "caption_dropout": 0.3,
    "prior": "output", "prior_share": 0.5, "steps": 6,
    "sample_prompts": ["{trigger}", "a {class}"], "sample_every": 3, "choose": "best", "holdout": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def everything(narrow_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A whole run of all that."""
    recipe = small_recipe(narrow_base, pictures, output=tmp_path_factory.mktemp("everything") / "whole", **EVERYTHING)
    run(recipe)
    return recipe


def test_the_adapter_carries_the_recipe_that_repeats_it(everything: Recipe, tmp_path: Path) -> None:
    carried = from_json(Adapter.load(adapter_of(everything)).metadata["personalize.recipe"])
    again = resolve(start=carried, flags={"output": tmp_path / "again"})
    run(again)
    assert digest(again) == digest(everything)


def train_until_killed(preset: Path, output: Path, kind: str, step: int) -> None:
    """As `kill -9` does it, when an event of this kind and step was told."""
    for event in train(resolve(flags={"preset": preset, "output": output})):
        if type(event).__name__ == kind and getattr(event, "step", None) == step:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_runs_end_with_the_same_bytes(everything: Recipe, make: Make, tmp_path: Path) -> None:
    whole, broken = everything, make(**EVERYTHING, output=tmp_path / "broken")
    assert whole.output
    for kind, step in (("Step", 3), ("Saved", 4)):
        child = start_child(train_until_killed, whole.output / "recipe.toml", tmp_path / "broken", kind, step)
        child.join(300)
        assert child.exitcode == -signal.SIGKILL
    with (tmp_path / "broken" / "events.jsonl").open("a") as torn:
        torn.write('{"event": "step", "st')
    resumed = run(broken)[0]
    assert isinstance(resumed, Started) and resumed.resumed == 4  # its state is kept before anything else is made of it
    assert digest(broken) == digest(whole)
    told = {
        name: [record["step"] for record in diary(broken) if record["event"] == name]
        for name in ("step", "sample", "saved", "sweep")
    }
    assert told == {name: [r["step"] for r in diary(whole) if r["event"] == name] for name in told}
    assert told["step"] == [1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / "broken").rglob(".*.tmp"))
    for name in ("samples", "checkpoints"):
        files = [sorted((path / name).glob("*[0-9]*")) for path in (whole.output, tmp_path / "broken")]
        assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


@pytest.mark.parametrize("stop", all_but({1, 3, 6}, [1, 2, 3, 4, 6, 7]))
def test_closed_or_interrupted_anywhere_it_goes_on(make: Make, done_quiet: str, stop: int) -> None:
    """`stop` counts events: Started, two steps, a checkpoint, two steps, the adapter."""
    recipe = make()
    events = train(recipe)
    seen = [next(events) for _ in range(stop)]
    if stop % 2:
        events.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            events.throw(KeyboardInterrupt())
    steps = max((event.step for event in seen if isinstance(event, Step)), default=0)
    assert diary(recipe)[-1] == {"event": "stopped", "step": steps}
    first, *rest = run(recipe)
    assert isinstance(first, Started) and first.resumed == steps
    assert [event.step for event in rest if isinstance(event, Step)] == list(range(steps + 1, 5))
    assert digest(recipe) == done_quiet
    assert [record["step"] for record in diary(recipe) if record["event"] == "step"] == [1, 2, 3, 4]


@pytest.mark.usefixtures("sgd")
def test_a_run_with_another_optimizer_goes_on_to_the_same_bytes(make: Make, tmp_path: Path) -> None:
    whole, broken = (make(optimizer="sgd", lr=0.1, output=tmp_path / name) for name in ("whole", "broken"))
    run(whole)
    events = train(broken)
    list(islice(events, 4))
    events.close()
    run(broken)
    assert digest(whole) == digest(broken)
    state = Run(tmp_path / "broken", "zwx").load_state()
    assert state and {name.rpartition(".")[2] for name in state.tensors} == {"up", "down", "momentum_buffer"}
    assert describe(adapter_of(broken)).metadata["ss_optimizer"] == "sgd"


@pytest.fixture
def done_quiet(plain_run: Recipe) -> str:
    """The digest of the unbroken run of `make()`."""
    return digest(plain_run)


def test_ctrl_c_waits_for_the_end_of_a_step() -> None:
    reached = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
        reached.append("the end")
    assert reached == ["the end"]
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_finished_run_does_nothing_again(make: Make) -> None:
    recipe = make()
    first = run(recipe)[-1]
    assert recipe.output
    before = {path: path.stat().st_mtime_ns for path in recipe.output.rglob("*")}
    (again,) = run(recipe)
    assert isinstance(again, Finished) and isinstance(first, Finished) and again.again and not first.again
    assert (again.step, again.path, again.seconds) == (first.step, first.path, pytest.approx(first.seconds))
    assert {path: path.stat().st_mtime_ns for path in recipe.output.rglob("*")} == before


def test_a_finished_run_whose_adapter_was_lost_writes_it_again(finished: Recipe, done_quiet: str) -> None:
    adapter_of(finished).unlink()
    assert not any(isinstance(event, Step) for event in run(finished))
    assert digest(finished) == done_quiet


def test_another_dialect_is_exported_without_training_again(make: Make, finished: Recipe) -> None:
    kohya = Adapter.load(adapter_of(finished))
    assert not any(isinstance(event, Step) for event in run(make(dialect="peft")))
    assert describe(adapter_of(finished)).dialect == "peft"
    peft = Adapter.load(adapter_of(finished))
    assert all(torch.equal(peft.deltas[path].delta(), delta.delta()) for path, delta in kohya.deltas.items())


def test_a_changed_recipe_does_not_go_on(make: Make, finished: Recipe) -> None:
    before = digest(finished)
    with pytest.raises(RecipeError, match=r"--alpha was 2.0, now 2.5; --rank was 2, now 4 \(.*--init FILE.*--fresh") as caught:
        run(make(rank=4, alpha=2.5, steps=8))
    assert "\n" not in str(caught.value)
    assert digest(finished) == before
    fresh = run(make(rank=4, alpha=2, steps=5), fresh=True)
    assert isinstance(fresh[-1], Finished) and digest(finished) != before
    assert [record["step"] for record in diary(finished) if record["event"] == "step"] == [1, 2, 3, 4, 5]


def test_another_base_does_not_go_on(make: Make, base_builder: Callable[..., Path], tmp_path: Path) -> None:
    base = base_builder(tmp_path / "base", seed=1, narrow=True)
    run(make(base=str(base), steps=1))
    base_builder(base, seed=2, narrow=True)
    with pytest.raises(RecipeError, match="the weights of the base changed"):
        run(make(base=str(base), steps=1))


def test_a_damaged_state_is_named(finished: Recipe) -> None:
    assert finished.output
    state = finished.output / "checkpoints" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(OutputError, match=r"cannot go on from .*state.safetensors.*--fresh"):
        run(finished)


def test_fresh_removes_only_what_is_ours(finished: Recipe) -> None:
    assert finished.output
    (finished.output / "notes.txt").write_text("mine")
    run(finished, fresh=True)
    assert (finished.output / "notes.txt").read_text() == "mine"


def test_the_state_holds_no_pickle(make: Make) -> None:
    recipe = make(text_encoder_lr=1e-3, steps=1)
    run(recipe)
    assert recipe.output and recipe.name is None
    state = Run(recipe.output, "zwx").load_state()
    assert state and state.done == 1
    assert {name.rpartition(".")[2] for name in state.tensors} == {"up", "down", "step", "exp_avg", "exp_avg_sq"}
    assert {tensor.dtype for tensor in state.tensors.values()} == {torch.float32}
    assert not [path for path in recipe.output.rglob("*") if path.suffix in (".pt", ".bin", ".pth", ".pkl", ".ckpt")]


@pytest.mark.parametrize(("every", "steps", "expected"), [(2, 5, [2, 4, 5]), (0, 3, [3]), (3, 3, [3]), (10, 4, [4])])
def test_what_is_due(every: int, steps: int, expected: list[int]) -> None:
    assert [done for done in range(steps + 1) if is_due(done, every, steps)] == expected


def test_a_second_run_in_the_same_folder_is_told_and_changes_nothing(make: Make, done_quiet: str) -> None:
    """Neither goes wrong: the first one ends as if there had been no other."""
    events = train(make())
    next(events)
    for other in (make(), make(rank=4)):
        with pytest.raises(OutputError, match=rf"is in use: by process {os.getpid()} on .*personalize tell .* stop"):
            run(other, fresh=True)
    list(events)
    assert digest(make()) == done_quiet and len([r for r in diary(make()) if r["event"] == "step"]) == 4
    assert not list(Path(str(make().output)).glob(".*"))


# ---------------------------------------------------------------- when it goes wrong


def test_three_steps_that_are_not_finite_are_rolled_back_and_then_end_the_run(make: Make) -> None:
    recipe = make(lr=1e30, clip=0, warmup=0, steps=8, checkpoint_every=0)
    assert recipe.output
    recipe.output.mkdir()
    adapter_of(recipe).write_bytes(b"a good file")
    events = []
    with pytest.raises(TrainingError, match=r"steps 2, 4, 6 were not finite .*the loss of \d.png at timestep") as caught:
        events.extend(train(recipe))
    steps = [record for record in diary(recipe) if record["event"] == "step"]
    assert [step["skipped"] for step in steps] == [False, True, False, True, False, True]  # each is taken back
    assert steps[1]["loss"] is None or steps[1]["grad_norm"] is None
    assert "at timestep" in steps[1]["cause"] and not steps[0]["cause"]
    assert diary(recipe)[-1] == {"event": "error", "step": 6, "message": str(caught.value)}
    assert adapter_of(recipe).read_bytes() == b"a good file"
    assert "--lr" in str(caught.value)


def test_an_adapter_that_is_not_finite_is_not_written(make: Make) -> None:
    recipe = make(lr=3e38, clip=0, warmup=0, steps=1, schedule="constant", weight_decay=1e3)
    assert recipe.output
    recipe.output.mkdir()
    adapter_of(recipe).write_bytes(b"a good file")
    with pytest.raises(TrainingError, match="not finite after 1 steps; nothing was overwritten"):
        run(recipe)
    assert adapter_of(recipe).read_bytes() == b"a good file"


def under_a_file(make: Make, tmp_path: Path) -> Recipe:
    (tmp_path / "file").write_text("")
    return make(output=tmp_path / "file" / "run")


WRONG: dict[str, tuple[type[PersonalizeError], str, Callable[[Make, Path], Recipe]]] = {
    "no folder": (DataError, "there is no folder", lambda make, tmp: make(folder=tmp / "nowhere")),
    "no base": (BaseModelError, "no base called", lambda make, tmp: make(base=str(tmp / "nowhere"))),
    "no such target": (RecipeError, "did you mean conv", lambda make, tmp: make(targets=["convv"])),
    "no such text target": (
        RecipeError,
        "matches the target",
        lambda make, tmp: make(text_targets=["conv"], text_encoder_lr=1e-3),
    ),
    "output under a file": (OutputError, "cannot write .*file/run: Not a directory", under_a_file),
    "odd resolution": (RecipeError, "multiple of 8", lambda make, tmp: make(resolution=60)),
    "no GPU": (RecipeError, "torch sees no GPU", lambda make, tmp: make(device="cuda")),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_be_checked_is_checked_first(make: Make, tmp_path: Path, case: str) -> None:
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    error, message, broken = WRONG[case]
    with pytest.raises(error, match=message) as caught:
        check(broken(make, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_disk_that_refuses_is_one_error_and_leaves_nothing_half_written(make: Make) -> None:
    recipe = make()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            run(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert recipe.output and list(recipe.output.iterdir()) == []
    assert isinstance(run(recipe)[-1], Finished)


def test_check_changes_nothing(make: Make) -> None:
    recipe = make()
    job = check(recipe)
    assert recipe.output and list(recipe.output.iterdir()) == []
    assert (job.recipe.name, job.recipe.data.trigger, job.class_prompts[0]) == ("zwx", "zwx", "a cat")


# ---------------------------------------------------------------- every setting does something


# How each setting that decides the weights is changed; the run it is compared with has the same other settings.
TAGS = {"caption": "{trigger}, a mat, asleep, by night, ink"}
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "steps": (3, {}), "batch_size": (3, {}), "seed": (1, {}), "trigger": ("vok", {}), "class": ("dog", {}),
    "caption": ("{trigger}", {}), "resolution": (48, {}), "flip": (False, {}), "caption_dropout": (0.9, {}),
    "caption_prefix": ("photo of", {}), "caption_shuffle": (True, TAGS), "tag_dropout": (0.5, TAGS),
    "keep_tokens": (3, TAGS | {"caption_shuffle": True}),
    "buckets": (False, {}), "bucket_step": (32, {}), "upscale": (True, {"resolution": 96}),
    "rank": (3, {}), "alpha": (1.0, {}), "dropout": (0.5, {}), "targets": (["conv"], {}),
    "text_rank": (2, {"text_encoder_lr": 1e-3}), "text_targets": (["feedforward"], {"text_encoder_lr": 1e-3}),
    "text_encoder_share": (0.5, {"text_encoder_lr": 1e-3}),
    "rank_by_timestep": (0.5, {"rank": 4}),
    "kind": ("loha", {}), "rslora": (True, {}), "lora_plus": (4.0, {}), "lokr_factor": (4, {"kind": "lokr"}),
    "lokr_full": (True, {"kind": "lokr"}), "biases": (True, {"kind": "norms"}),
    "min_snr": (1.0, {}), "prior": ("output", {}), "prior_weight": (3.0, {"prior": "output"}),
    "prior_share": (0.5, {"prior": "output"}), "dco_beta": (1e5, {"prior": "dco"}),
    "prior_images": (3, {"prior": "images"}), "prior_prompts": (["the {class}", "an {class}"], {"prior": "images"}),
    "freeze": (["down_blocks"], {}), "lr_scale": (["up_blocks=2"], {}), "lr_decay": (0.5, {}), "unfreeze": ("gradual", {}),
    "lr": (2e-3, {}), "text_encoder_lr": (1e-3, {}), "schedule": ("constant", {"warmup": 0}), "warmup": (1, {}),
    "weight_decay": (0.5, {}), "beta1": (0.5, {}), "beta2": (0.9, {}), "clip": (0.01, {}), "accumulate": (2, {}),
    "optimizer": ("sgd", {}), "ema": (0.9, {}), "scale_weight_norms": (1e-3, {}),
    "weighting": ("debiased", {}), "p2_gamma": (2.0, {"weighting": "p2"}), "huber": (0.1, {}),
    "huber_schedule": ("constant", {"huber": 0.1}),
    "noise_offset": (0.1, {}), "pyramid_noise": (0.3, {}), "input_perturbation": (0.1, {}), "density": ("cubic", {}),
    "logit_mean": (1.0, {"density": "logit-normal"}), "logit_std": (2.0, {"density": "logit-normal"}),
    "min_timestep": (500, {}), "max_timestep": (500, {}),
    "vectors": (2, {}), "init_word": ("dog", {"vectors": 1}), "embedding_lr": (1e-2, {"vectors": 1}),
    "embedding_share": (0.5, {"vectors": 1}), "pivot": (0.5, {"vectors": 1}),
    "precision": ("bfloat16", {}), "quantize": ("nf4", {}),
    "prediction": ("epsilon", {}), "zero_snr": ("no", {}), "clip_skip": (2, {}),
    "holdout": ("1", {}),
}  # fmt: skip
# Some of each section; the others are slow.
TELLING = [
    "resolution",
    "caption_dropout",
    "rank",
    "targets",
    "text_rank",
    "prior_share",
    "lr",
    "accumulate",
    "quantize",
    "holdout",
]
ELSEWHERE = {
    "oft_block",  # test_kinds_trained.py
    "save_precision",  # test_metadata.py
    "folder",
    "base",
    "vae",
    "preset",
    "name",
    "output",
    "dialect",
    "checkpoint_every",
    "device",
    "balance",
    "alpha_mask",
    "mask_outside",
    "regularization",
    "choose",
    "leave_one_out",
    "memory",
    "checkpointing",
    "free_encoders",
    "tile_vae",
    "micro_batch",
    "compile",
    "offload",
    "init",
    "trackers",  # test_trackers.py
}  # tested above or below, in test_choose.py, test_fit.py and test_changes.py, or with one value


@pytest.fixture
def sgd() -> Iterator[None]:
    """An optimizer that another package has added."""
    registry.table("optimizers").add("sgd", lambda groups, optim: torch.optim.SGD(groups, lr=0.0, momentum=0.5))
    yield
    registry.table("optimizers").remove("sgd")


def test_the_table_of_changes_is_complete() -> None:
    sampling = {name for name, setting in settings().items() if setting.section == "sampling"}
    assert set(CHANGES) | ELSEWHERE | sampling == set(settings())


@pytest.mark.usefixtures("sgd")
@pytest.mark.parametrize("name", all_but(TELLING, CHANGES))
def test_every_setting_changes_the_adapter(
    make: Make, tmp_path: Path, weights_of: Callable[[Recipe], dict[str, torch.Tensor]], name: str
) -> None:
    value, given = CHANGES[name]
    small = {"steps": 2, "prior_images": 2, "trigger": "zwx", **given}
    before = weights_of(make(**small, output=tmp_path / "before"))
    after = weights_of(make(**{**small, name: value}, output=tmp_path / "after"))
    assert set(before) != set(after) or any(not torch.equal(before[path], after[path]) for path in before)


def test_another_vae_changes_the_adapter(
    make: Make, tmp_path: Path, base_builder: Callable[..., Path], weights_of: Callable[[Recipe], dict[str, torch.Tensor]]
) -> None:
    other = base_builder(tmp_path / "other", seed=5)
    before = weights_of(make(steps=2, output=tmp_path / "before"))
    after = weights_of(make(steps=2, vae=str(other), output=tmp_path / "after"))
    assert any(not torch.equal(before[path], after[path]) for path in before)


@pytest.fixture(scope="module")
def weights_of() -> Callable[[Recipe], dict[str, torch.Tensor]]:
    """dW of a run, remembered by its settings: many changes are compared with the same run."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
        key = recipe.model_dump_json(exclude={"output"})
        if key not in known:
            run(recipe)
            assert recipe.output
            adapter = Adapter.load(next(recipe.output.glob("*.safetensors")))
            known[key] = {path: delta.delta() for path, delta in adapter.deltas.items()}
            known[key] |= {f"{word} {at}": one for word, own in adapter.words.items() for at, one in own.items()}
        return known[key]

    return weights


@pytest.mark.parametrize(("rates", "parts"), [({}, ("unet",)), ({"lr": 0, "text_encoder_lr": 1e-3}, ("text_encoder",))])
def test_a_part_is_trained_if_it_has_a_learning_rate(make: Make, rates: dict[str, float], parts: tuple[str, ...]) -> None:
    recipe = make(**rates, steps=2)
    run(recipe)
    adapter = Adapter.load(adapter_of(recipe))
    assert adapter.parts == parts
    assert all(delta.norm() > 0 for delta in adapter.deltas.values())


def test_the_text_encoder_stays_as_it_is_after_its_share(make: Make, tmp_path: Path) -> None:
    recipe = make(steps=6, text_encoder_lr=1e-3, text_encoder_share=0.5, checkpoint_every=1, prior="output")
    steps = [event for event in run(recipe) if isinstance(event, Step)]
    assert [event.text_encoder_lr > 0 for event in steps] == [True] * 3 + [False] * 3
    assert recipe.output
    files = sorted((recipe.output / "checkpoints").glob("*[0-9].safetensors"))
    assert files[-1].read_bytes() == adapter_of(recipe).read_bytes()
    for part, last in (("text_encoder", 3), ("unet", 6)):
        deltas = [Adapter.load(file).part(part).deltas for file in files]
        changes = [any(not torch.equal(a[path].up, b[path].up) for path in a) for a, b in itertools.pairwise(deltas)]
        assert changes == [step <= last for step in range(2, 7)]


@pytest.mark.parametrize(("share", "rows"), [(1.0, 4), (0.5, 2), (0.1, 1)])
@pytest.mark.parametrize("prior", ["images", "output"])
def test_the_prior_holds_its_share_of_rows(make: Make, prior: str, share: float, rows: int) -> None:
    job = check(make(prior=prior, prior_share=share, batch_size=4, prior_images=3, sample_steps=1))
    inputs = next(training_batches(job, prepare_data(job), 0))
    assert len(inputs.mean) == (4 + rows if prior == "images" else 4)
    assert (inputs.class_images if prior == "images" else len(inputs.class_cond)) == rows


def test_class_images_are_drawn_once_and_of_each_prompt_in_turn(make: Make) -> None:
    recipe = make(prior="images", prior_images=3, prior_prompts=["a {class}", "a {class}, ink drawing"], steps=3)
    events = train(recipe)
    next(events)
    assert recipe.output
    drawn = sorted((recipe.output / "class_images").glob("*.png"))
    prompts = ["a cat", "a cat, ink drawing", "a cat"]
    assert [read_record(path)["prompt"] for path in drawn] == prompts
    assert [example.caption for example in class_images(recipe.output / "class_images", "").examples] == prompts
    times = [path.stat().st_mtime_ns for path in drawn]
    next(events)
    events.close()
    run(recipe)
    assert [path.stat().st_mtime_ns for path in drawn] == times


def test_prior_output_holds_the_class_prompts_too(make: Make, tmp_path: Path) -> None:
    job = check(make(prior="output", prior_prompts=["a {class}, ink drawing", "a house"], output=tmp_path / "run"))
    data = prepare_data(job)
    captions = job.class_captions
    assert captions[-2:] == ["a cat, ink drawing", "a house"] and len(captions) == len(job.dataset.examples) + 2
    assert data.class_cond is not None
    shown = [inputs.class_cond_off for inputs in islice(training_batches(job, data, 0), 6)]
    kept = data.class_cond.tokens
    held = {i for cond in shown for row in cond.tokens for i in range(len(kept)) if torch.equal(row, kept[i])}
    assert {data.class_rows[caption] for caption in captions[-2:]} < held
    assert len(kept) == len(set(captions)) == 3 < len(captions)  # four pictures say "a cat" without the trigger: read once
    again = next(training_batches(job, data, 5)).class_cond_off
    assert torch.equal(again.tokens, shown[5].tokens)  # a run that goes on holds the same


def test_without_a_class_only_prompts_that_need_none_are_held(make: Make) -> None:
    assert check(make(**{"class": ""}, prior="output", prior_prompts=["a {class}", "a red cat"])).class_prompts == ["a red cat"]


def test_class_images_need_a_prompt(make: Make) -> None:
    with pytest.raises(RecipeError, match="--prior-prompts"):
        make(prior="images", prior_prompts=[])


def test_name_output_and_checkpoints(make: Make, tmp_path: Path) -> None:
    recipe = make(name="rex", output=tmp_path / "elsewhere", checkpoint_every=1, steps=3)
    run(recipe)
    assert (tmp_path / "elsewhere" / "rex.safetensors").is_file()
    names = {path.name for path in (tmp_path / "elsewhere" / "checkpoints").iterdir()}
    assert names == {"rex-000001.safetensors", "rex-000002.safetensors", "rex-000003.safetensors", "state.safetensors"}


def test_output_is_named_after_the_trigger(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = check(make().model_copy(update={"output": None}))
    assert job.recipe.output == Path("runs/zwx")
