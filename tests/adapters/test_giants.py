"""SD 1.5 at its true size, with random weights: loaded, trained, drawn, and drawn by the programs that people draw with.

`pytest -m slow tests/test_giants.py -s` says what was measured; it wants 4 GB of disk and 8 GB of memory. The checkpoint stays in
the folder that PERSONALIZE_GIANTS names, else it is removed. Other programs run in processes of their own, on the same files:

PERSONALIZE_COMFYUI   the Python that ComfyUI runs in; its checkout is `ComfyUI` in the folder PERSONALIZE_HOSTS
PERSONALIZE_SDCPP     a Python that has stable-diffusion-cpp-python
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import bases
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from test_hosts import checkout, comfy_paths, package, rank_one, stood_in
from torch import nn

from personalize.adapters import dialects
from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import LowRank
from personalize.adapters.hosts import HOSTS, ignored_layers
from personalize.adapters.ops.bake import bake
from personalize.families.checkpoint import open_weights
from personalize.families.names import modules, part_of
from personalize.formats.header import read_header
from personalize.inference import pipeline, schedulers
from personalize.inference.sheet import enlarge
from personalize.models.model import Base
from personalize.recipe.resolve import resolve
from personalize.training.loop import train
from personalize.tuning.attach import attach

pytestmark = pytest.mark.slow
SD1 = bases.ROWS["sd1"]
KOHYA = ["attention", "feedforward", "projection"]  # what kohya's tool trains if nothing else is said
ROLES = ("lora_up.weight", "lora_down.weight", "alpha")
PROMPT, SEED, STEPS, GUIDANCE, SIZE = "a zwx cat", 3, 4, 3.0, 128


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A single file, 2.1 GB in fp16, weights as the models' classes draw them."""
    kept = os.environ.get("PERSONALIZE_GIANTS")
    path = Path(kept or tmp_path_factory.mktemp("giants")) / "sd1.safetensors"
    if not path.is_file():
        bases.single(path.with_suffix(".part"), "sd1", true=True).rename(path)
    yield path
    if not kept:
        path.unlink()


def tell(capsys: pytest.CaptureFixture[str], **figures: Any) -> None:
    with capsys.disabled():
        print("\n" + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items()))


def asked(renderer: str, variable: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What another program, in its own Python, answers to a job; or this test is skipped."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python that has it")
    (folder / "job.json").write_text(json.dumps(job | {"out": str(folder)}))
    driver = Path(__file__).parents[2] / "tests" / "renderers" / f"{renderer}.py"
    done = subprocess.run([python, driver, folder / "job.json"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads((folder / "answers.json").read_text()))


# ---------------------------------------------------------------- loaded

LOADING = """
import json, sys, time, torch
from personalize.models import Base
began = time.perf_counter()
base = Base.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024  # not the parent's, as ru_maxrss may be
print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak, **base.facts}))
"""


@pytest.mark.parametrize(("dtype", "most"), [("float16", 1.0e9), ("float32", 7.5e9)])  # its 2.1 GB stay in the file; twice that
def test_loading_takes_no_more_memory_than_it_must(
    file: Path, dtype: str, most: float, capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run([sys.executable, "-c", LOADING, str(file), dtype], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    tell(capsys, loaded_in=dtype, seconds=f"{told['seconds']:.1f}", peak=f"{told['peak'] / 1e9:.2f} GB")
    assert told["parameters"] == {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}
    assert told["peak"] < most


def test_what_was_written_is_what_is_loaded(file: Path) -> None:
    """Against diffusers' own converters of keys."""
    from diffusers.loaders import single_file_utils as theirs

    base, tensors = Base.load(file, dtype=torch.float16), load_file(file)
    wanted = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(tensors), dict(base.unet.config)),
        "text_encoder": {
            key.removeprefix("cond_stage_model.transformer.text_model."): value
            for key, value in tensors.items()
            if key.startswith("cond_stage_model.")
        },
        "vae": theirs.convert_ldm_vae_checkpoint(dict(tensors), dict(base.vae.config)),
    }
    for part, model in base.models.items():
        found = {name.removeprefix("text_model."): value for name, value in model.named_parameters()}
        assert found.keys() == wanted[part].keys(), part
        assert all(torch.equal(found[name], value.reshape(found[name].shape)) for name, value in wanted[part].items()), part


# ---------------------------------------------------------------- trained and drawn


@pytest.fixture(scope="module")
def trained(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of kohya's targets after two steps at 128 pixels; the folder is its run."""
    folder, run = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("run")
    for i in range(2):
        picture = Image.linear_gradient("L").resize((SIZE, SIZE)).convert("RGB")
        picture.paste((60 + 60 * i, 200, 90), (20, 20, 90, 90 + 10 * i))
        picture.save(folder / f"{i}.png")
    flags = {
        "base": str(file), "folder": folder, "output": run, "trigger": "zwx", "class": "cat", "resolution": SIZE, "steps": 2,
        "batch_size": 1, "rank": 4, "targets": KOHYA, "lr": 1e-3, "text_encoder_lr": 1e-3, "sample_prompts": ["a {trigger}"],
        "sample_seeds": [0], "sample_steps": 2, "sample_every": 0, "checkpoint_every": 0,
    }  # fmt: skip
    losses = [event.loss for event in train(resolve(flags=flags)) if hasattr(event, "losses")]
    assert len(losses) == 2 and all(0.1 < loss < 10 for loss in losses)
    return run / "zwx.safetensors"


def test_a_run_leaves_what_uis_want(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = Adapter.load(trained)
    unet, text = (sum(path.startswith(f"{part}.") for path in adapter.deltas) for part in ("unet", "text_encoder"))
    tell(capsys, layers_of_the_unet=unet, of_the_text_encoder=text, bytes=trained.stat().st_size)
    assert (unet, text) == (192, 72)  # as kohya's tool says of SD 1.5
    assert all(delta.norm() > 0 for delta in adapter.deltas.values())
    said = adapter.metadata
    assert (said["ss_base_model_version"], said["modelspec.architecture"]) == ("sd_v1", "stable-diffusion-v1/lora")
    assert json.loads(trained.with_suffix(".json").read_text())["sd version"] == "SD1"
    with (
        Image.open(trained.with_suffix(".png")) as preview,
        Image.open(next((trained.parent / "samples").glob("000000-*-s0.png"))) as before,
    ):
        assert preview.size == (256, 256) and before.size == (SIZE, SIZE)
        assert preview.tobytes() != enlarge(before, 256).tobytes()


def test_every_host_knows_every_layer(trained: Path) -> None:
    slots = dialects.read_keys(read_header(trained)).slots
    assert [(host.name, lost) for host in HOSTS if (lost := ignored_layers(host, "kohya", SD1, slots))] == []


def test_kohyas_tool_would_write_these_keys(trained: Path) -> None:
    assert kohya_keys("sd1") == set(read_header(trained).tensors)


# ---------------------------------------------------------------- true shapes, without memory

COUNTS = {"sd1": (192, 72), "sd2": (192, 138), "sdxl": (722, 264)}  # layers of the UNet and of the text encoders


def kohya_keys(name: str) -> set[str]:
    """What kohya's own network over models of a family's shapes would write."""
    root, family = checkout("sd-scripts", "networks/lora.py", "library/sdxl_original_unet.py"), bases.ROWS[name]
    with stood_in({"library": package("library", root / "library"), "library.utils": MagicMock()}, [root]), torch.device("meta"):
        network, wide = importlib.import_module("networks.lora"), importlib.import_module("library.sdxl_original_unet")
        unet = wide.SdxlUNet2DConditionModel() if name == "sdxl" else UNet2DConditionModel(**family.denoiser.config(family.texts))
        texts = [bases.text_model(replace(text, openclip=True)) for text in family.texts]
        old = [nn.ModuleDict({"text_model": getattr(text, "text_model", text)}) for text in texts]  # before transformers 5.6
        made = network.LoRANetwork(old, unet, lora_dim=1, alpha=1, is_sdxl=name == "sdxl")
    assert (len(made.unet_loras), len(made.text_encoder_loras)) == COUNTS[name]
    return {f"{module.lora_name}.{role}" for module in made.unet_loras + made.text_encoder_loras for role in ROLES}


def kohyas_targets(name: str, folder: Path) -> Path:
    """An adapter of rank 1 on what kohya's tool trains, in a family's true shapes."""
    patterns = {row.part: [row.targets[target] for target in KOHYA if target in row.targets] for row in bases.ROWS[name].networks}
    paths = [path for path in modules(bases.ROWS[name]) if any(re.fullmatch(p, path) for p in patterns[part_of(path)])]
    return rank_one(bases.ROWS[name], paths).save(folder / f"adapter-{name}")


@pytest.mark.parametrize("name", COUNTS)
def test_kohyas_targets_are_ours(name: str, tmp_path: Path) -> None:
    assert set(read_header(kohyas_targets(name, tmp_path)).tensors) == kohya_keys(name)


@pytest.mark.parametrize("name", COUNTS)
def test_comfyui_finds_every_layer_of_true_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(checkout("ComfyUI", "comfy/sd.py", "comfyui_version.py"))
    job = {"checkout": root, "task": "map", "adapter": str(kohyas_targets(name, tmp_path)), "shapes": bases.shapes(name)}
    told = asked("comfyui", "PERSONALIZE_COMFYUI", job, tmp_path)
    tell(capsys, ComfyUI=told["version"], model=told["config"], unet=len(told["unet"]), clip=len(told["clip"]), said=told["said"])
    assert (len(told["unet"]), len(told["clip"])) == COUNTS[name] and not told["nowhere"] and not told["said"]


# ---------------------------------------------------------------- drawn by others

LOUD = 0.3  # of each weight's norm: what two steps have learned is too little to see


@pytest.fixture(scope="module")
def loud(file: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What renderers are told to draw: the base, the base with the trained adapter made louder, and both baked into one file."""
    folder, weights, adapter = tmp_path_factory.mktemp("loud"), open_weights(file), Adapter.load(trained)
    baked, louder = folder / "baked.safetensors", {}
    for path, delta in adapter.deltas.items():
        assert isinstance(delta, LowRank)
        louder[path] = delta * (LOUD * float(weights[path].float().norm()) / delta.norm())
    made = Adapter(louder, adapter.metadata).save(folder / "loud")
    bake(file, [(Adapter.load(made), 1.0)], baked)
    files = {"base": str(file), "adapter": str(made), "baked": str(baked)}
    yield files | {"prompt": PROMPT, "seed": SEED, "guidance": GUIDANCE, "size": SIZE}
    baked.unlink()


@pytest.fixture(scope="module")
def ours(loud: dict[str, Any]) -> dict[str, Any]:
    """Our own pictures of these three. The noise levels that they were drawn along are told to others: from the strongest on."""
    drawn: dict[str, Any] = {}
    for name, path in (("base", loud["base"]), ("baked", loud["baked"])):
        base = Base.load(path)
        base.scheduler_config["timestep_spacing"] = "trailing"
        drawn[name] = picture(base)
        if name == "base":
            loud["sigmas"] = schedulers.make_sampler(base, STEPS).sigmas.tolist()
            with attach(base, Adapter.load(loud["adapter"])):
                drawn["adapter"] = picture(base)
        del base
    return drawn


def picture(base: Base) -> Any:
    return np.asarray(pipeline.draw(base, [PROMPT], [SEED], steps=STEPS, guidance=GUIDANCE, size=SIZE)[0]).astype(float)


def rendered(folder: Path) -> dict[str, Any]:
    """The pictures that another program has left."""
    drawn = {}
    for name in ("base", "adapter", "baked"):
        with Image.open(folder / f"{name}.png") as opened:
            drawn[name] = np.asarray(opened.convert("RGB")).astype(float)
    return drawn


def relative_difference(a: Any, b: Any) -> float:
    """Mean absolute difference of two pictures, in levels of 255."""
    return float(np.abs(a - b).mean())


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """How far pictures are from each other."""
    pairs = {
        "adapter from base": (theirs["adapter"], theirs["base"]),
        "adapter from baked": (theirs["adapter"], theirs["baked"]),
        **{f"their {name} from ours": (theirs[name], ours[name]) for name in ours},
    }
    return {what: round(relative_difference(*pair), 3) for what, pair in pairs.items()}


def test_we_draw_the_adapter_as_its_baked_checkpoint(ours: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    far = compare(ours, {})
    tell(capsys, **far)
    assert far["adapter from base"] > 10 and far["adapter from baked"] < 0.5  # a baked weight is rounded to fp16


def test_stable_diffusion_cpp_draws_it(
    ours: dict[str, Any], loud: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = asked("sdcpp", "PERSONALIZE_SDCPP", loud, tmp_path)
    far = compare(rendered(tmp_path), ours)
    applied = [line for line in told["said"] if "LoRA tensors have been applied" in line]
    tell(capsys, version=told["version"], **far, applied=applied[-1].partition(" - ")[2])
    assert "(792 / 792)" in applied[-1]
    assert far["adapter from base"] > 10 and far["adapter from baked"] < 1
    assert max(far[f"their {name} from ours"] for name in ours) < 3


def test_comfyui_draws_it(ours: dict[str, Any], loud: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {key: path for key, path in comfy_paths(SD1).items() if path in Adapter.open(loud["adapter"]).deltas}
    job = loud | {"checkout": str(checkout("ComfyUI", "comfy/sd.py", "comfyui_version.py")), "task": "draw"}
    told = asked("comfyui", "PERSONALIZE_COMFYUI", job, tmp_path)
    far = compare(rendered(tmp_path), ours)
    weights, adapter, wrong = open_weights(loud["base"]), Adapter.load(loud["adapter"]), 0.0
    found = load_file(tmp_path / "patched.safetensors")
    for key, patched in found.items():
        wanted = adapter.deltas[paths[key]].delta(weights[paths[key]].float())
        wrong = max(wrong, float((patched - weights[paths[key]].float() - wanted).norm() / wanted.norm()))
    tell(
        capsys, version=told["version"], unet=len(told["unet"]), clip=len(told["clip"]), said=told["said"], dW_off_by=wrong, **far
    )
    assert (len(told["unet"]), len(told["clip"]), len(found)) == (192, 72, 264) and not told["said"]
    assert wrong < 1e-4
    assert far["adapter from base"] > 10 and far["adapter from baked"] < 1
    assert max(far[f"their {name} from ours"] for name in ours) < 1
