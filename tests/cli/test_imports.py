"""What the command's own process imports: what a run uses; and whatever it does is what a process that imports all does."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from personalize.cli import imports, run

UNUSED = [
    "scipy.stats",
    "scipy.integrate",
    "peft",
    "sklearn",
    "accelerate",
]
LATER = ["torch._meta_registrations", "torch._decomp", "torch.export", "transformers.models.bert"]  # no picture needs them
COMPILER = ["torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"]  # which torch's optimizers import
COMMANDS = """
import json, sys
from personalize.cli import run
from personalize.cli.imports import import_only_what_is_used
import_only_what_is_used()
commands, compiler, unused, later = map(json.loads, sys.argv[1:])
for command in commands:
    assert run(command) == 0
    print(command[0], [name for name in [*unused, *(compiler + later) * (command == commands[0])] if name in sys.modules])
import torch._dynamo, peft, scipy.stats
from torch.distributed import is_available
from scipy.integrate import quad
from diffusers.schedulers import scheduling_lms_discrete as lms, scheduling_euler_discrete as euler
print("real", is_available(), callable(torch._dynamo.reset), quad(float, 0, 2)[0], peft.LoraConfig.__name__)
print("late", lms.integrate.quad(float, 0, 2)[0], round(euler.scipy.stats.beta.ppf(0.5, 2, 2), 3))
print("compiled", torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""


def commands(base: Path, folder: Path, out: Path) -> list[list[str]]:
    """Drawing in a sampler that is not the base's own, training an adapter, and drawing with it."""
    least = ["--steps", "1", "--batch-size", "1", "--rank", "2", "--sample-steps", "1", "--sample-seeds", "0", "--warmup", "0"]
    adapter = out / "zwx" / "zwx.safetensors"
    return [
        ["generate", "a cat", "--base", str(base), "--sampler", "UniPC", "--steps", "2", "--output", str(out / "b.png")],
        ["train", str(folder), "--base", str(base), "--output", str(out / "zwx"), "--prior", "none", *least],
        ["generate", "a zwx", "--base", str(base), "--adapter", str(adapter), "--steps", "1", "--output", str(out / "a.png")],
    ]


@pytest.mark.usefixtures("short_exam")
def test_a_run_imports_what_it_uses_and_does_the_same(narrow_base: Path, pictures: Path, tmp_path: Path) -> None:
    lean, whole = tmp_path / "lean", tmp_path / "whole"
    lines = commands(narrow_base, pictures, lean)
    call = [sys.executable, "-c", COMMANDS, *map(json.dumps, (lines, COMPILER, UNUSED, LATER))]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ", 1)[0] in ANSWERS)
    assert said == ANSWERS
    assert all(run(command) == 0 for command in commands(narrow_base, pictures, whole))
    for name in ("zwx/checkpoints/zwx-000001.safetensors", "a.png", "b.png"):
        assert weights_or_picture(lean / name) == weights_or_picture(whole / name), name


ANSWERS = {
    "generate": "[]",
    "train": "[]",
    "real": "True True 2.0 LoraConfig",
    "late": "2.0 0.5",
    "compiled": "2.0",
}


def weights_or_picture(file: Path) -> bytes:
    """A file's bytes; of an adapter without its header, in which the time of its run is."""
    data = file.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :] if file.suffix == ".safetensors" else data


AFTER = (  # what each process is asked for, and what it says
    {
        "import torch._refs; torch._refs.add(torch.ones(1), 1).item()": "2.0",
        "torch.rand(1, generator=torch.Generator().manual_seed(0)).item() > 0": "True",
        "torch.export.export(torch.nn.Linear(2, 3), (torch.ones(1, 2),)).module()(torch.ones(1, 2)).shape[1]": "3",
        "from transformers import BertConfig; BertConfig(vocab_size=7).vocab_size": "7",
        "import diffusers; diffusers.UNet2DModel.__name__": "UNet2DModel",
        "diffusers.SD3Transformer2DModel.__name__": "SD3Transformer2DModel",
    },
    {
        "import torch._decomp; len(torch._decomp.decomposition_table) > 500": "True",
        "import transformers; transformers.__version__ == importlib.metadata.version('transformers')": "True",
        "hasattr(transformers, 'nothing'), transformers.CLIPModel.__name__": "False CLIPModel",
        "from diffusers.models.transformers import *; Transformer2DModel.__name__": "Transformer2DModel",
    },
    {
        "from torch._subclasses.fake_tensor import FakeTensorMode; fake = FakeTensorMode(); fake.__enter__() is fake": "True",
        "torch.nn.Conv2d(3, 8, 3)(torch.ones(1, 3, 9, 9)).std().shape": "torch.Size([])",
        "fake.__exit__(None, None, None)": "None",
        "from diffusers.models.autoencoders import AutoencoderTiny; AutoencoderTiny.__name__": "AutoencoderTiny",
        "import requests; requests.Session.__name__": "Session",
    },
)
LEAN = """
from personalize.cli.imports import import_only_what_is_used
import_only_what_is_used()
import importlib.metadata
import torch, diffusers
from transformers import CLIPTextModel, CLIPTokenizer
"""


@pytest.mark.slow
def test_what_nobody_needed_is_there_for_who_does() -> None:
    for answers in AFTER:
        code = "\n".join(f"{lines};print({value})" for lines, _, value in (f"0;{line}".rpartition(";") for line in answers))
        done = subprocess.run([sys.executable, "-c", LEAN + code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert dict(zip(answers, done.stdout.splitlines(), strict=True)) == answers


def test_a_library_that_needs_more_is_imported_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy").mkdir()
    (tmp_path / "needy" / "__init__.py").write_text("from . import part\nimport colorsys\nname = 1\n")
    (tmp_path / "needy" / "part.py").write_text("import torch\ndistributed = torch.distributed.is_available()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(imports.LIBRARIES, "needy", imports.Library(("name",), ("colorsys",)))
    monkeypatch.setattr(sys, "meta_path", [imports.Finder(), *sys.meta_path])
    needy = importlib.import_module("needy")
    assert needy.name == 1 and needy.part.distributed and needy.colorsys is sys.modules["colorsys"]


def test_only_a_process_of_our_own_imports_less() -> None:
    """Commands that are called from Python, as tests and hosts do, leave both libraries whole."""
    assert not any(isinstance(finder, imports.Finder) for finder in sys.meta_path)
