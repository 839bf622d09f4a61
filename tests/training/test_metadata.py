"""What stands beside an adapter and inside it, for every family, from folders and from single files: what UIs go by."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import bases
import pytest
from PIL import Image
from small import small_recipe

from personalize.adapters.adapter import Adapter
from personalize.adapters.describe import describe
from personalize.data.folder import read_folder
from personalize.models.model import Base
from personalize.recipe.fields import Recipe
from personalize.recipe.resolve import resolve
from personalize.training.loop import train
from personalize.training.memory.ladder import ComputePlan
from personalize.training.metadata import describe_run, sidecar

KEYS = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type")
SAID = {  # family, prediction => `sd version` of the .json, and KEYS as kohya's tools write them (its sai_model_spec.py)
    ("sd1", "epsilon"): ("SD1", "sd_v1", "False", "stable-diffusion-v1/lora", "epsilon"),
    ("sd1", "v_prediction"): ("SD1", "sd_v1_v", "False", "stable-diffusion-v1/lora", "v"),
    ("sd2", "epsilon"): ("SD2", "sd_v2", "True", "stable-diffusion-v2-512/lora", "epsilon"),
    ("sd2", "v_prediction"): ("SD2", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v"),
    ("sdxl", "epsilon"): ("SDXL", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "epsilon"),
    ("sdxl", "v_prediction"): ("SDXL", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "v"),
}


def small(pictures: Path, base: Path, output: Path, **flags: Any) -> Recipe:
    own = {"base": str(base), "folder": pictures, "output": output, "class": "cat", "resolution": 64, "steps": 1, "rank": 1}
    drawn = {"batch_size": 1, "sample_prompts": ["{trigger}"], "sample_seeds": [0], "sample_steps": 1, "checkpoint_every": 0}
    return resolve(flags=own | drawn | flags)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_an_adapter_says_what_it_is_for(name: str, pictures: Path, tmp_path: Path) -> None:
    file = bases.single(tmp_path / "base.safetensors", name)
    recipe = small(pictures, file, tmp_path / "run")
    dataset = read_folder(recipe.data)
    for prediction in ("epsilon", "v_prediction"):
        base, (version, *wanted) = Base.load(file, prediction=prediction), SAID[name, prediction]
        said = describe_run(recipe, base, dataset, "zwx", 1, None, ComputePlan())
        assert [said[key] for key in KEYS] == wanted
        assert json.loads(sidecar(recipe, base, dataset, 1, 1.0))["sd version"] == version
        on_a_gpu = describe_run(recipe, base, dataset, "zwx", 1, None, ComputePlan(), peak=5)
        assert json.loads(on_a_gpu["personalize.fit"]) == json.loads(said["personalize.fit"]) | {"peak": 5}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize(("name", "prediction"), SAID)
def test_a_run_leaves_what_uis_want(name: str, prediction: str, kind: str, pictures: Path, tmp_path: Path) -> None:
    """Bases that say of themselves what they predict, as their kind does."""
    version, *wanted = SAID[name, prediction]
    if kind == "folder":
        base = bases.folder(tmp_path / "base", name, prediction_type=prediction)
    else:
        spoken = {"modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[prediction]}
        base = bases.single(tmp_path / "base.safetensors", name, metadata=spoken)
    list(train(small(pictures, base, tmp_path / "run", choose="none")))
    path = tmp_path / "run" / "zwx.safetensors"
    said, beside = Adapter.load(path).metadata, json.loads(path.with_suffix(".json").read_text())
    assert [said[key] for key in KEYS] == wanted
    assert (beside["sd version"], beside["activation text"], beside["preferred weight"]) == (version, "zwx cat", 1.0)
    thumbnail = base64.b64decode(said["modelspec.thumbnail"].partition(",")[2])
    with Image.open(path.with_suffix(".png")) as preview, Image.open(io.BytesIO(thumbnail)) as inside:
        assert (preview.format, preview.size, inside.format, inside.size) == ("PNG", (256, 256), "JPEG", (64, 64))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_file_keeps_the_precision_that_was_asked_for(precision: str, pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    recipe = small_recipe(
        tiny_base, pictures, output=tmp_path, steps=1, batch_size=1, rank=1, resolution=64, save_precision=precision
    )
    list(train(recipe))
    found = describe(next(tmp_path.glob("*.safetensors")))
    assert found.dtype == precision
    assert ("save_precision" in found.metadata["personalize.recipe"]) == (precision != "fp32")  # old files stay the same


def test_what_a_precision_cannot_hold_is_kept_and_told(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    flags = {"steps": 1, "batch_size": 1, "rank": 1, "resolution": 64, "save_precision": "fp16", "lr": 1e-8}
    with pytest.warns(UserWarning, match="fp16 cannot hold .* kept as fp32"):
        list(train(small_recipe(tiny_base, pictures, output=tmp_path, **flags)))
    assert describe(next(tmp_path.glob("*.safetensors"))).dtype == "fp32"
