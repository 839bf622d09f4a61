"""The ComfyUI pack against a recorded contract of its host: one table of nodes as V1 and V3, and what the nodes do."""

from __future__ import annotations

import ast
import importlib
import json
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy_examples
import comfy_stub
import pytest
import torch
from comfy_stub import NAME, PACK, Host, Interrupted, loaded
from loops import run_coroutine
from servers import SHORT, Service, wait

from personalize.adapters.ops.methods import METHODS
from personalize.errors import AdapterError
from personalize.service.samples import SAMPLES
from personalize.version import __version__

IDS = {f"Personalize{name}" for name in ("Dataset", "Train", "Load", "Stack", "Merge", "Resize", "Doctor", "Save")}


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Host]]:
    """The pack in a host that has V3, with a workspace of the test's own."""
    monkeypatch.setenv("PERSONALIZE_WORKSPACE", str(tmp_path / "workspace"))
    with loaded(tmp_path) as found:
        yield found


def module(name: str) -> Any:
    return sys.modules.get(f"{NAME}.personalize_comfyui.{name}") or importlib.import_module(f"{NAME}.personalize_comfyui.{name}")


# ---------------------------------------------------------------- one table, two faces


async def nodes_v3(pack: Any) -> dict[str, Any]:
    extension = await pack.comfy_entrypoint()
    assert isinstance(extension, comfy_stub.ComfyExtension)
    return {one.define_schema().node_id: one for one in await extension.get_node_list()}


def run_v3(pack: Any) -> dict[str, Any]:
    return run_coroutine(nodes_v3(pack))


def test_v3_where_the_host_has_it(pack: tuple[Any, Host]) -> None:
    assert not hasattr(pack[0], "NODE_CLASS_MAPPINGS"), "V1 would win"
    nodes = run_v3(pack[0])
    assert nodes.keys() == IDS
    schema = nodes["PersonalizeLoad"].define_schema()
    assert [(one.kind, one.id) for one in schema.inputs][:3] == [("Combo", "file"), ("String", "strength"), ("Int", "steps")]
    assert [one.told["display_name"] for one in schema.outputs] == ["model", "clip", "hooks", "adapter", "text"]
    assert len({one.id for one in [*schema.inputs, *schema.outputs]}) == len(schema.inputs) + len(schema.outputs)
    assert nodes["PersonalizeSave"].define_schema().is_output_node and schema.hidden == [comfy_stub.Hidden.unique_id]


def test_v1_elsewhere_is_the_same(tmp_path: Path, pack: tuple[Any, Host]) -> None:
    schemas = {name: node.define_schema() for name, node in run_v3(pack[0]).items()}
    with loaded(tmp_path, v3=False) as (old, _):
        assert not hasattr(old, "comfy_entrypoint")
        assert old.NODE_CLASS_MAPPINGS.keys() == old.NODE_DISPLAY_NAME_MAPPINGS.keys() == IDS
        for name, node in old.NODE_CLASS_MAPPINGS.items():
            told, schema = node.INPUT_TYPES(), schemas[name]
            assert [*told["required"], *told["optional"]] == [
                one.id for one in sorted(schema.inputs, key=lambda i: i.told["optional"])
            ]
            assert all(isinstance(kind, str | list) for kind, _ in (told["required"] | told["optional"]).values())
            assert tuple(one.told["display_name"] for one in schema.outputs) == node.RETURN_NAMES
            assert schema.is_output_node == node.OUTPUT_NODE and callable(getattr(node, node.FUNCTION))
            assert hasattr(node, "IS_CHANGED") == hasattr(run_v3(pack[0])[name], "fingerprint_inputs")


def test_lists_are_those_of_the_studio(pack: tuple[Any, Host]) -> None:
    nodes = module("nodes")
    assert (*METHODS,) == nodes.METHODS and nodes.SAMPLES[1:] == tuple(one.name for one in SAMPLES)
    host = pack[1]
    (host.root / "models" / "checkpoints" / "art.safetensors").touch()
    (host.root / "models" / "checkpoints" / "art.ckpt").touch()
    schema = run_v3(pack[0])["PersonalizeTrain"].define_schema()
    assert schema.inputs[1].told["options"] == ["pocket", "art.safetensors"], "a pickle is no base"


def test_what_the_registry_asks_for() -> None:
    told = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert "comfyui" not in told["project"]["name"].lower() and told["project"]["version"] == __version__
    assert told["project"]["dependencies"] == [] and told["project"]["urls"]["Repository"]
    assert {"PublisherId", "DisplayName", "Icon"} <= told["tool"]["comfy"].keys()
    readme = (PACK / "README.md").read_text()
    assert "/personalize/{path}" in readme and "subprocess" in readme


@pytest.mark.parametrize("path", sorted(PACK.glob("personalize_comfyui/*.py")), ids=lambda path: path.name)
def test_nothing_is_asked_of_the_hosts_environment(path: Path) -> None:
    """Python 3.10; the standard library, what ComfyUI itself needs, and the host."""
    own = {"comfy", "folder_paths", "server", "aiohttp", "torch", "numpy", "PIL"}
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    assert {name.split(".")[0] for name in named} <= {*sys.stdlib_module_names, *own}
    at_import = {name for node in tree.body if isinstance(node, ast.Import) for name in (alias.name for alias in node.names)}
    assert not at_import & own, "the host's modules are imported when they are needed"


# ---------------------------------------------------------------- the examples


def test_examples_are_as_they_are_described(pack: tuple[Any, Host]) -> None:
    made = comfy_examples.files({node.id: node for node in pack[0].NODES})
    there = {path.name: path.read_text(encoding="utf-8") for path in comfy_examples.FOLDER.iterdir()}
    assert there == made, "run python tests/webui_ext/comfy_examples.py"


@pytest.mark.parametrize("name", comfy_examples.EXAMPLES)
def test_examples_fit_the_table(name: str, pack: tuple[Any, Host]) -> None:
    """Every input is there, every link has one type, every choice exists, and nothing but the embedded base is needed."""
    nodes = {node.id: node for node in pack[0].NODES}
    prompt = json.loads((comfy_examples.FOLDER / f"{name}.api.json").read_text())
    for box in prompt.values():
        if box["class_type"] not in nodes:
            assert box["class_type"] in comfy_examples.OWN
            continue
        inputs = {one.name: one for one in nodes[box["class_type"]].inputs}
        assert (
            box["inputs"].keys() <= inputs.keys() and {n for n, one in inputs.items() if not one.optional} <= box["inputs"].keys()
        )
        for key, value in box["inputs"].items():
            if isinstance(value, list):
                source = nodes[prompt[value[0]]["class_type"]]
                assert source.outputs[value[1]].type == inputs[key].type, key
            elif choices := inputs[key].choices:
                assert value in choices()
            else:
                assert type(value) is type(inputs[key].options["default"]), key
    workflow = json.loads((comfy_examples.FOLDER / f"{name}.json").read_text())
    at = {node["id"]: node for node in workflow["nodes"]}
    for number, source, out, target, slot, kind in workflow["links"]:
        assert number in at[source]["outputs"][out]["links"] and at[source]["outputs"][out]["type"] == kind
        assert at[target]["inputs"][slot]["link"] == number and at[target]["inputs"][slot]["type"] in (kind, "*")
    assert {one["type"] for one in workflow["nodes"]} == {one["class_type"] for one in prompt.values()}
    assert {one["inputs"]["base"] for one in prompt.values() if "base" in one["inputs"]} == {"pocket"}


# ---------------------------------------------------------------- the nodes at work, with a real studio


@pytest.fixture
def work(busy: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Host]]:
    """The pack, with a studio that is named, as one that runs elsewhere; and a host whose pictures are `images`."""
    monkeypatch.setenv("PERSONALIZE_URL", busy.address)
    monkeypatch.setenv("PERSONALIZE_WORKSPACE", str(tmp_path / "workspace"))
    with loaded(tmp_path) as (pack, host):
        yield {node.name: node for node in pack.NODES}, host


IMAGES = torch.linspace(0, 1, 3 * 64 * 64 * 3).reshape(3, 64, 64, 3)
TEXT = "\n".join(
    f"{name} = {json.dumps(value)}" for name, value in SHORT.items() if name not in ("class", "trigger", "steps", "rank")
)
PICTURES = {"name": "rex", "trigger": "zwx", "class": "cat", "folder": "", "captions": "one\n\nthree", "samples": "none"}
SETTINGS = {"base": "pocket", "steps": 3, "rank": 2, "seed": 5, "settings": TEXT}


def jobs(busy: Service, kind: str) -> list[Any]:
    return busy.client.get("/api/jobs", params={"kind": kind}).json()["data"]  # type: ignore[no-any-return]


def test_from_pictures_to_a_file(work: tuple[Any, Host], busy: Service) -> None:
    """What an example does, with connected pictures; and that the same workflow again does nothing twice."""
    nodes, host = work
    data, count = nodes["Dataset"].run("1", **PICTURES, images=IMAGES)
    assert count == 3 and data.settings == {"trigger": "zwx", "class": "cat"}
    captions = busy.client.get(f"/api/datasets/{data.id}/captions").json()["captions"]
    assert captions == {"0001.png": "one", "0002.png": "", "0003.png": "three"}
    assert (
        nodes["Dataset"].run("1", **PICTURES, images=IMAGES)[0] == data
        and nodes["Dataset"].run("1", **PICTURES, images=IMAGES / 2)[0] != data
    )
    (one,), model, clip, path, samples = nodes["Train"].run("2", dataset=data, **SETTINGS)
    assert model is None and clip is None and samples.shape[1:] == (32, 32, 3) and 0 <= samples.min() < samples.max() <= 1
    assert path.startswith(str(host.root / "temp")), "a service elsewhere: a copy here"
    assert host.progress[-1] == (1, 1, None) and any("zwx" in line for line in host.said) and host.freed == 0
    before = len(jobs(busy, "train"))
    assert nodes["Train"].run("2", dataset=data, **SETTINGS)[0] == (one,) and len(jobs(busy, "train")) == before
    (stack,) = nodes["Stack"].run("3", adapter=(one,), strength="0.5")
    (stack,) = nodes["Stack"].run("3", adapter=(one,), strength="unet=0.25:te=0", stack=stack)
    (merged,), text = nodes["Merge"].run("4", adapter=stack, name="blend", method="concat", rank=0, settings="")
    assert merged.name == "blend" and "rank 4" in text
    (other,), _ = nodes["Merge"].run("4", adapter=stack, name="blend", method="svd", rank=2, settings='dtype = "fp16"')
    assert other.name.startswith("blend-"), "another one of that name is kept"
    (small,), text = nodes["Resize"].run("5", adapter=(merged,), name="", rank=1, settings="")
    assert small.name == "blend-rank1" and "rank 1" in text
    shown = nodes["Doctor"].run("6", adapter=stack)
    assert "sound" in shown.values[0] and "attempt" not in shown.values[0] and shown.ui == {"text": [shown.values[0]]}
    assert shown.values[1].shape[2] > 300, "the heat map"
    saved = nodes["Save"].run("7", adapter=(one,), name="mine", replace=False)
    assert saved[1] == "mine.safetensors" and Path(saved[0]).read_bytes() == Path(one.path).read_bytes()
    assert (host.root / "models" / "loras" / "mine.png").is_file()
    written = Path(saved[0]).stat().st_mtime_ns
    assert nodes["Save"].run("7", adapter=(one,), name="mine.safetensors", replace=True) == saved
    assert Path(saved[0]).stat().st_mtime_ns == written, "what is there already is not written again"
    told = [nodes["Save"].fingerprint(name=name) for name in ("mine", "mine", "other")]
    assert told[0] == told[1] != told[2]
    with pytest.raises(ValueError, match="no file name"):
        nodes["Save"].run("7", adapter=(one,), name="../mine", replace=True)
    with pytest.raises(ValueError, match="another adapter"):
        nodes["Save"].run("7", adapter=(small,), name="mine", replace=False)
    assert nodes["Doctor"].run("6", adapter=(comfy_use(saved[0]),)).values[0], "a file that the studio does not know is brought"


def comfy_use(path: str) -> Any:
    return module("values").Use(path)


def test_cancel_ends_the_training(work: tuple[Any, Host], busy: Service) -> None:
    nodes, host = work
    data, _ = nodes["Dataset"].run("1", **PICTURES, images=IMAGES)
    host.interrupted = True
    with pytest.raises(Interrupted):
        nodes["Train"].run("2", dataset=data, **{**SETTINGS, "seed": 77})
    (job,) = [one for one in jobs(busy, "train") if one["settings"].get("seed") == 77]
    wait(lambda: busy.client.get(f"/api/jobs/{job['id']}").json()["state"], lambda state: state == "cancelled", 30)
    (one,), *_ = nodes["Train"].run("2", dataset=data, **{**SETTINGS, "seed": 77})
    assert len([one for one in jobs(busy, "train") if one["settings"].get("seed") == 77]) == 1, "the same job has gone on"
    assert Path(one.path).is_file()


def test_faults_are_told_in_the_studios_words(work: tuple[Any, Host], monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, host = work
    data = module("values").Dataset("nothing")
    with pytest.raises(RuntimeError, match="nothing"):
        nodes["Train"].run("2", dataset=data, **SETTINGS)
    good, _ = nodes["Dataset"].run("1", **PICTURES, images=IMAGES)
    with pytest.raises(RuntimeError, match=r"^unknown setting 'learn_rate' \([^()]*\)$"):
        nodes["Train"].run("2", dataset=good, **{**SETTINGS, "settings": "learn_rate = 1"})
    with pytest.raises(ValueError, match="NAME = VALUE"):
        nodes["Train"].run("2", dataset=data, **{**SETTINGS, "settings": "lr 1"})
    with pytest.raises(ValueError, match="name a folder"):
        nodes["Dataset"].run("1", **PICTURES)
    with pytest.raises(ValueError, match="no folder"):
        nodes["Dataset"].run("1", **{**PICTURES, "folder": "nowhere"})
    with pytest.raises(ValueError, match="5 lines"):
        nodes["Dataset"].run("1", **{**PICTURES, "captions": "a\nb\nc\nd\ne"}, images=IMAGES)
    monkeypatch.delenv("PERSONALIZE_URL")
    monkeypatch.setenv("PERSONALIZE_PYTHON", str(host.root / "no-python"))
    with pytest.raises(RuntimeError, match=r"there is no .*no-python.*sidebar"):
        nodes["Dataset"].run("1", **{**PICTURES, "samples": "style"})


def test_samples_and_folders(work: tuple[Any, Host]) -> None:
    nodes, host = work
    data, count = nodes["Dataset"].run("1", **{**PICTURES, "samples": "subject", "trigger": "", "class": ""})
    assert data.id == "scarf-cat" and data.settings == {"trigger": "zwx", "class": "cat"} and count > 3
    folder = host.root / "input" / "rex"
    (folder / ".hidden").mkdir(parents=True)
    for number, png in enumerate(module("pictures").to_pngs(IMAGES)):
        (folder / f"{number}.png").write_bytes(png)
        (folder / ".hidden" / f"{number}.png").write_bytes(png)
    (folder / "0.txt").write_text("zwx cat")
    told = {**PICTURES, "folder": "rex", "trigger": ""}
    data, count = nodes["Dataset"].run("1", **told)
    assert count == 3 and data.settings["trigger"] == "rex"
    before = nodes["Dataset"].fingerprint(**told, images=None)
    assert nodes["Dataset"].fingerprint(**told, images=None) == before
    (folder / "0.txt").write_text("zwx dog!")
    assert nodes["Dataset"].fingerprint(**told, images=None) != before and nodes["Dataset"].run("1", **told)[0].id != data.id


# ---------------------------------------------------------------- Load


class Patcher:
    """A MODEL or CLIP that remembers what lies on it."""

    def __init__(self, patches: dict[str, list[Any]] | None = None) -> None:
        self.patches = dict(patches or {})

    def put(self, tensors: Any, strength: float) -> Patcher:
        names = {key.rpartition(".lora")[0].rpartition(".alpha")[0] or key.split(".")[0] for key in tensors}
        return Patcher({**self.patches, **{name: [*self.patches.get(name, []), strength] for name in names}})


def give_comfy_functions() -> list[Any]:
    """Comfy's functions as far as Load calls them: they note what they are given."""
    from safetensors.torch import load_file

    made: list[Any] = []
    sd, utils, hooks = (sys.modules[f"comfy.{name}"] for name in ("sd", "utils", "hooks"))
    vars(utils).update(load_torch_file=lambda path, safe_load: load_file(path))
    vars(sd).update(
        load_lora_for_models=lambda model, clip, tensors, a, b: (
            model.put({k: v for k, v in tensors.items() if k.startswith("lora_unet")}, a) if model else None,
            clip.put({k: v for k, v in tensors.items() if k.startswith("lora_te")}, b) if clip else None,
        )
    )

    def group(tensors: Any, a: float, b: float) -> Any:
        one = SimpleNamespace(tensors=tensors, strength=(a, b), frames=None)
        one.set_keyframes_on_hooks = lambda frames: setattr(one, "frames", frames.all)
        made.append(one)
        return one

    def frames() -> Any:
        all: list[Any] = []
        return SimpleNamespace(all=all, add=all.append)

    vars(hooks).update(
        create_hook_lora=group,
        HookKeyframeGroup=frames,
        HookKeyframe=lambda strength, start_percent, guarantee_steps: (start_percent, strength),
        HookGroup=SimpleNamespace(combine_all_hooks=list),
    )
    return made


@pytest.fixture
def lora(pack: tuple[Any, Host], tmp_path: Path) -> str:
    """A LoRA of some of SD 1.5's layers, in the host's folder."""
    from personalize.adapters import Adapter, LowRank

    shapes = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (320, 768),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (1280, 1280),
        "text_encoder.text_model.encoder.layers.3.mlp.fc1": (3072, 768),
    }
    deltas = {path: LowRank(torch.ones(rows, 1), torch.ones(1, columns), alpha=1.0) for path, (rows, columns) in shapes.items()}
    Adapter(deltas, {"ss_base_model_version": "sd_v1"}).save(tmp_path / "models" / "loras" / "art.safetensors")
    return "art.safetensors"


def test_strengths_by_part_block_and_layer(pack: tuple[Any, Host], lora: str) -> None:
    give_comfy_functions()
    load = {node.name: node for node in pack[0].NODES}["Load"]

    def strengths(text: str) -> tuple[list[float], list[float], str]:
        model, clip, hooks, _, line = load.run("1", file=lora, strength=text, steps=20, model=Patcher(), clip=Patcher())
        assert hooks is None
        return sorted(chain(*model.patches.values())), [*chain(*clip.patches.values())], line

    assert strengths("0.8") == ([0.8] * 3, [0.8], "art: 4 weights changed, of 4 layers")
    assert strengths("unet=0.5:te=0.25")[:2] == ([0.5] * 3, [0.25])
    assert strengths("0.8:lbw=MID")[:2] == ([0.8], []), "BASE is no block that was named"
    assert strengths("*attn2*=0.5")[:2] == ([0.5, 1, 1], [1])
    *_, line = load.run("1", file=lora, strength="0.5", steps=20)
    assert line == "art: 4 layers; no MODEL or CLIP is connected"
    for bad, what in [("0.8:lbw=XX", "no block XX"), ("much", "says no strength"), ("*nothing*=1", "matches no layer")]:
        with pytest.raises(AdapterError, match=what):
            strengths(bad)


def test_a_schedule_is_a_hook(pack: tuple[Any, Host], lora: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = give_comfy_functions()
    load = {node.name: node for node in pack[0].NODES}["Load"]
    model = Patcher()
    found = load.run("1", file=lora, strength="unet=0@0,1@1:te=0.5:start=1:stop=4", steps=5, model=model)
    assert found[0] is model and not model.patches and found[2] == made and "step by step" in found[4]
    frames = {frozenset(key.split("_")[1] for key in one.tensors): one.frames for one in made}
    assert frames[frozenset({"te"})] == [(0, 0), (0.2, 0.5), (0.8, 0)]
    assert frames[frozenset({"unet"})] == [(0, 0), (0.2, 0.25), (0.4, 0.5), (0.6, 0.75), (0.8, 0)]
    assert all(one.strength == (1, 1) for one in made)


def test_load_takes_one_source(pack: tuple[Any, Host], lora: str) -> None:
    load = {node.name: node for node in pack[0].NODES}["Load"]
    with pytest.raises(ValueError, match="choose a file"):
        load.run("1", file="none", strength="1", steps=20)
    with pytest.raises(ValueError, match="set the file to none"):
        load.run("1", file=lora, strength="1", steps=20, adapter=(comfy_use("x"),))
    before = load.fingerprint(file=lora, strength="1")
    path = pack[1].root / "models" / "loras" / lora
    path.write_bytes(path.read_bytes() + b" ")
    assert load.fingerprint(file=lora, strength="1") != before != "" and load.fingerprint(file="none") == ""
