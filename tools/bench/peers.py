"""How each tool is called for each task. The small scripts that others need to run here are written beside the files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from personalize.io import write_text

from .pairs import WEIGHTS

# What kohya's scripts import but never use here: packages that may be missing, and pipelines that need a transformers of 2023.
MISSING = [name for name in ("torchvision", "cv2", "imagesize", "voluptuous") if not importlib.util.find_spec(name)]
STAND_INS = [*MISSING, "library.lpw_stable_diffusion", "library.sdxl_lpw_stable_diffusion"]

KOHYA = '''"""Runs a script of sd-scripts with empty stand-ins for modules that it imports and never uses here."""
import importlib.abc, importlib.machinery, pathlib, runpy, sys, types
import diffusers.utils.import_utils, transformers.utils  # they ask for torchvision before they can see the stand-in

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"): raise AttributeError(name)
        return cls

class Nothing(metaclass=Anything):
    def __init__(self, *args, **options): pass

class Empty(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return Nothing

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name in EMPTY or name.split(".")[0] in EMPTY:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec): return Empty(spec.name)
    def exec_module(self, module): pass

EMPTY = sys.argv[1].split(",")
del sys.argv[:2]
script = pathlib.Path(sys.argv[0]).resolve()
sys.meta_path.insert(0, Finder())
sys.path[:0] = [str(script.parent), str(script.parents[1])]
runpy.run_path(str(script), run_name="__main__")
'''

PEFT = '''"""Two kohya files through peft's add_weighted_adapter: how, rank, output, weight and file, weight and file."""
import sys, time, torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file

if "--help" in sys.argv: sys.exit()
how, rank, output, *rest = sys.argv[1:]
weights, files = [float(x) for x in rest[::2]], [load_file(x) for x in rest[1::2]]
stems = {key.split(".")[0]: key.split(".")[0].replace("lora_", "") for key in files[0]}  # peft takes lora_ for its own

def layer(stem):
    down, up = (files[0][f"{stem}.lora_{side}.weight"] for side in ("down", "up"))
    kind, kernel = (torch.nn.Conv2d, [down.shape[2:]]) if down.ndim == 4 else (torch.nn.Linear, [])
    made = kind(down.shape[1], up.shape[0], *kernel, bias=False, device="meta")
    made.weight = torch.nn.Parameter(torch.zeros(1).expand(made.weight.shape), requires_grad=False)  # a base that costs nothing
    return made

def config(tensors):
    r = len(tensors[f"{next(iter(stems))}.lora_down.weight"])
    return LoraConfig(r=r, lora_alpha=float(tensors[f"{next(iter(stems))}.alpha"]), target_modules="[^.]+")

names = [f"file{i}" for i in range(len(files))]
base = torch.nn.ModuleDict({name: layer(stem) for stem, name in stems.items()})
base.config = {}
model = LoraModel(base, config(files[0]), names[0])
for name, tensors in zip(names, files):
    if name != names[0]:
        model.peft_config[name] = config(tensors)
        model.inject_adapter(base, name)
    for stem, one in stems.items():
        base[one].lora_A[name].weight.data.copy_(tensors[f"{stem}.lora_down.weight"])
        base[one].lora_B[name].weight.data.copy_(tensors[f"{stem}.lora_up.weight"])
began = time.perf_counter()
model.add_weighted_adapter(names, weights, "sum", combination_type=how, svd_rank=int(rank) if how == "svd" else None)
print(f"add_weighted_adapter: {time.perf_counter() - began:.2f} s")
made = {}
for stem, one in stems.items():
    down, up = base[one].lora_A["sum"].weight.data, base[one].lora_B["sum"].weight.data
    dtype = torch.float32 if how == "svd" else torch.float16
    made |= {f"{stem}.lora_down.weight": down.to(dtype).contiguous(), f"{stem}.lora_up.weight": up.to(dtype).contiguous()}
    made[f"{stem}.alpha"] = torch.tensor(base[one].scaling["sum"] * len(down))
save_file(made, output)
'''

PLAIN = '''"""The least that a program can do: read both files with safetensors, put the factors side by side, write them."""
import sys, torch
from safetensors.torch import load_file, save_file

if "--help" in sys.argv: sys.exit()
output, a, b = sys.argv[1], load_file(sys.argv[2]), load_file(sys.argv[3])
axes = {"up": 1, "down": 0}
side = {key: next((axis for leaf, axis in axes.items() if f"lora_{leaf}." in key), None) for key in a}
save_file({key: a[key] if axis is None else torch.cat([a[key], b[key]], axis) for key, axis in side.items()}, output)
'''


class Task(NamedTuple):
    """What is asked of all tools: of which files, and at which rank if it is cut."""

    title: str
    files: int
    rank: int | None


@dataclass(frozen=True)
class Tool:
    """One way to do a task. `dense` tools make dW and take its SVD, which no whole file can wait for."""

    name: str
    task: str
    command: Callable[[list[str], str], list[str]]  # files, output => what to run
    start: tuple[str, ...] = ()  # the same program, ending as soon as it has loaded what it needs
    dense: bool = False
    judged: bool = True  # whether its output is an answer at all


def tasks(rank: int) -> Mapping[str, Task]:
    """The tasks for files of this rank."""
    return {
        "resize": Task(f"Resize, rank {rank} to {rank // 2}", 1, rank // 2),
        "svd": Task(f"Merge of two into one of rank {rank}", 2, rank),
        "concat": Task("Merge of two by concatenation", 2, None),
    }


def tools(folder: Path, kohya: Path | None, rank: int) -> list[Tool]:
    """Every way to do each task. Without `kohya`, a checkout of sd-scripts, its scripts are left out."""
    found = [*_ours(rank), *_peft(folder, rank), *_disk(folder)]
    return found + (_kohya(folder, kohya, rank) if kohya else [])


def _ours(rank: int) -> list[Tool]:
    run = [sys.executable, "-m", "personalize"]
    start = (sys.executable, "-c", "import personalize.cli, personalize.adapters.ops.merge")
    start_of_bytes = (sys.executable, "-c", "import numpy, personalize.cli, personalize.adapters.ops.concat")  # no torch
    a, b = WEIGHTS

    def resize(files: list[str], output: str) -> list[str]:
        return [*run, "resize", files[0], "-o", output, "--rank", f"{rank // 2}", "--dtype", "fp32"]

    def svd(files: list[str], output: str) -> list[str]:
        strong = [f"{files[0]}:{a}", f"{files[1]}:{b}"]
        return [*run, "merge", *strong, "-o", output, "--method", "svd", "--rank", f"{rank}", "--dtype", "fp32"]

    def concat(files: list[str], output: str) -> list[str]:
        return [*run, "merge", f"{files[0]}:{a}", f"{files[1]}:{b}", "-o", output]

    return [
        Tool("personalize resize", "resize", resize, start),
        Tool("personalize merge --method svd", "svd", svd, start),
        Tool("personalize merge", "concat", concat, start_of_bytes),
    ]


def _kohya(folder: Path, checkout: Path, rank: int) -> list[Tool]:
    launch = [sys.executable, str(write_text(folder / "kohya.py", KOHYA)), ",".join(STAND_INS)]
    ratios = [f"{weight}" for weight in WEIGHTS]

    def run(script: str) -> list[str]:
        return [*launch, str(checkout / "networks" / f"{script}.py")]

    def tool(name: str, task: str, *more: str, merges: bool = True, dense: bool = False) -> Tool:
        program = run(name.split()[0])

        def command(files: list[str], output: str) -> list[str]:
            inputs = ["--models", *files, "--ratios", *ratios] if merges else ["--model", *files]
            return [*program, *inputs, "--save_to", output, *more]

        return Tool(f"kohya {name}", task, command, (*program, "--help"), dense)

    return [
        tool("resize_lora", "resize", "--new_rank", f"{rank // 2}", "--save_precision", "float", merges=False, dense=True),
        tool("svd_merge_lora", "svd", "--new_rank", f"{rank}", "--save_precision", "float", dense=True),
        tool("merge_lora", "svd", "--save_precision", "fp16"),
        tool("merge_lora --concat", "concat", "--save_precision", "fp16", "--concat"),
    ]


def _peft(folder: Path, rank: int) -> list[Tool]:
    if not importlib.util.find_spec("peft"):
        return []
    program = [sys.executable, str(write_text(folder / "with_peft.py", PEFT))]

    def tool(how: str, task: str) -> Tool:
        def command(files: list[str], output: str) -> list[str]:
            pairs = [text for weight, file in zip(WEIGHTS, files, strict=True) for text in (f"{weight}", file)]
            return [*program, how, f"{rank}", output, *pairs]

        return Tool(f"peft add_weighted_adapter, {how}", task, command, (*program, "--help"), how == "svd")

    return [tool("svd", "svd"), tool("linear", "svd"), tool("cat", "concat")]


def _disk(folder: Path) -> list[Tool]:
    """What no merge can beat: a copy of the bytes, and reading and writing with nothing checked or told."""
    plain = [sys.executable, str(write_text(folder / "plain.py", PLAIN))]
    copy = ["sh", "-c", 'cat "$1" "$2" > "$0"; sync "$0"']
    return [
        Tool("cat A B > C, sync", "concat", lambda files, out: [*copy, out, *files], judged=False),
        Tool("safetensors alone", "concat", lambda files, out: [*plain, out, *files], (*plain, "--help"), judged=False),
    ]
