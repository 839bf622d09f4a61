"""Beside diffusers' `examples/dreambooth/train_dreambooth_lora.py`: same base, pictures, steps, batch size and rank.

The script is not part of this project: give its path. It knows one prompt for all pictures and attention layers only, and its
adapter is measured exactly as ours is. Where torchvision is missing, the script finds a stand-in for the transforms it uses.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from personalize.adapters.adapter import Adapter
from personalize.errors import DataError, TrainingError
from personalize.io import write_text
from personalize.models.clip import Clip
from personalize.models.model import Base
from personalize.models.sources import locate
from personalize.recipe.fields import Recipe
from personalize.recipe.resolve import resolve, to_toml

from ..judge import Judge
from . import personalization
from .drawing import Artist
from .figures import Figure, gap_closed, machine, publish
from .measuring import draw, mean, measure
from .personalization import brief, recipe_of
from .tasks import Task, tasks

SIX = "scarf cat,king fish,flag house,pirate boat,stained glass,blueprint"
TRANSFORMS = '''"""Stand-in for torchvision.transforms: what train_dreambooth_lora.py and its sdxl sister use of it."""
import enum, random, sys, types
import numpy, torch
from PIL import Image

def crop(image, top, left, height, width): return image.crop((left, top, left + width, top + height))

functional = sys.modules[__name__ + ".functional"] = types.ModuleType(__name__ + ".functional")
functional.crop, __path__ = crop, []

class InterpolationMode(enum.Enum):
    NEAREST, BILINEAR, BICUBIC, LANCZOS, BOX, HAMMING = 0, 2, 3, 1, 4, 5

class Compose:
    def __init__(self, parts): self.parts = parts
    def __call__(self, x):
        for part in self.parts: x = part(x)
        return x

class Resize:
    def __init__(self, size, interpolation): self.size, self.how = size, interpolation
    def __call__(self, image):
        scale = self.size / min(image.size)
        return image.resize([max(self.size, int(side * scale)) for side in image.size], self.how.value)

class RandomCrop:
    def __init__(self, size): self.size = size
    def at(self, room): return random.randint(0, room)
    @staticmethod
    def get_params(image, size):
        return random.randint(0, image.height - size[0]), random.randint(0, image.width - size[1]), *size
    def __call__(self, image):
        left, top = (self.at(side - self.size) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))

class CenterCrop(RandomCrop):
    def at(self, room): return round(room / 2)

class RandomHorizontalFlip:
    def __init__(self, p): self.p = p
    def __call__(self, image): return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < self.p else image

class ToTensor:
    def __call__(self, image): return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255

class Normalize:
    def __init__(self, mean, std): self.mean, self.std = mean[0], std[0]
    def __call__(self, x): return (x - self.mean) / self.std
'''


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told: all that `personalization` can, and where the other script is."""
    personalization.add_options(parser)
    parser.add_argument("--script", type=Path, required=True, help="path of train_dreambooth_lora.py")
    parser.add_argument("--peer-lr", type=float, action="append", default=[], help="its learning rates (default: 5e-4, and ours)")
    parser.add_argument("--lengths", type=float, nargs="*", default=[], help="further runs of both, of so many times our steps")
    parser.set_defaults(only=SIX)


LAUNCH = """# Runs a script with the stand-in. transformers and diffusers ask for torchvision before they can see it.
import pathlib, runpy, sys
from diffusers.utils.import_utils import is_torchvision_available
from transformers.utils import is_torchvision_available as is_available
assert not is_available() and not is_torchvision_available()
sys.path.insert(0, str(pathlib.Path(sys.argv.pop(0)).parent / "packages"))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launcher(folder: Path) -> list[str]:
    """How to start the script: as it is, or, where there is no torchvision, with a stand-in that is written to `folder`."""
    if importlib.util.find_spec("torchvision"):
        return [sys.executable]
    write_text(folder / "packages" / "torchvision" / "__init__.py", "from . import transforms\n")
    write_text(folder / "packages" / "torchvision" / "transforms.py", TRANSFORMS)
    return [sys.executable, str(write_text(folder / "launch.py", LAUNCH).resolve())]


def prompt_of(task: Task) -> str:
    """The one prompt that the script knows."""
    return f"a {task.trigger} {task.class_name}" if task.class_name else f"a picture, {task.trigger} style"


def their_command(options: argparse.Namespace, recipe: Recipe, task: Task, lr: float, folder: Path) -> list[str]:
    """Their command line with our base, pictures, steps, batch size, rank and seed; the rest are its defaults."""
    told: dict[str, Any] = {
        "pretrained_model_name_or_path": locate(options.base).resolve(),
        "instance_data_dir": (folder / "plain").resolve(),
        "instance_prompt": prompt_of(task),
        "output_dir": their_folder(folder, recipe, lr).resolve(),
        "resolution": recipe.data.resolution or options.side,
        "train_batch_size": recipe.batch_size,
        "max_train_steps": recipe.steps,
        "rank": recipe.adapter.rank,
        "learning_rate": lr,
        "lr_warmup_steps": recipe.optim.warmup,
        "seed": recipe.seed,
    }
    flags = [text for name, value in told.items() for text in (f"--{name}", str(value))]
    return [*launcher(folder.parent / "stand-in"), str(options.script.resolve()), *flags]


def their_folder(folder: Path, recipe: Recipe, lr: float) -> Path:
    """Where the script leaves its adapter."""
    return folder / f"peer-{lr:g}-{recipe.steps}"


def our_command(recipe: Recipe) -> list[str]:
    """Our command line for a recipe."""
    assert recipe.output
    preset = write_text(recipe.output.with_suffix(".toml"), to_toml(recipe))
    return [sys.executable, "-m", "personalize", "train", str(recipe.data.folder), "--preset", str(preset), "--fresh"]


def time_command(command: Sequence[str], adapter: Path, log: Path) -> dict[str, Any]:
    """Run a command and time it to its end; the adapter that it left. Raises TrainingError if there is none."""
    began = time.perf_counter()
    with log.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
    seconds = time.perf_counter() - began
    if done.returncode or not adapter.is_file():
        raise TrainingError(f"{log.stem} ended with {done.returncode}", f"its output is in {log}")
    return {"seconds": seconds, "adapter": str(adapter)}


EQUAL = {"targets": ["attention"], "prior": "none"}  # what the script does
Job = tuple[list[str], Path]  # a command, and the adapter that it leaves


def jobs_of(task: Task, options: argparse.Namespace, recipe: Recipe, folder: Path) -> dict[str, Job]:
    """All runs of a task: ours and theirs at our length, ours at equal work, and both at further lengths."""
    jobs: dict[str, Job] = {}
    for length in (1.0, *options.lengths):
        steps = round(length * recipe.steps)
        more = "" if length == 1 else f", {steps} steps"
        one = ours(recipe, folder / f"run-{steps}", steps=steps)
        jobs[f"personalize{more}"] = our_command(one), adapter_of(one)
        if not more:
            equal = ours(recipe, folder / "run-equal", **EQUAL)
            jobs["personalize, equal work"] = our_command(equal), adapter_of(equal)
        for lr in dict.fromkeys(options.peer_lr or (5e-4, recipe.optim.lr)):
            left = their_folder(folder, one, lr) / "pytorch_lora_weights.safetensors"
            jobs[f"diffusers, lr {lr:g}{more}"] = their_command(options, one, task, lr, folder), left
    return jobs


def ours(recipe: Recipe, output: Path, **flags: Any) -> Recipe:
    """The recipe with other settings, in a run folder of its own."""
    return resolve(start=recipe, flags={"output": output, **flags})


def adapter_of(recipe: Recipe) -> Path:
    """Where a run of ours leaves its adapter."""
    assert recipe.output
    return recipe.output / f"{recipe.data.trigger}.safetensors"


def compare_trainers(task: Task, options: argparse.Namespace, judge: Judge, clip: Clip | None, artist: Artist) -> dict[str, Any]:
    """Both trainers on one task: read, or run and measured now, one after the other."""
    folder = personalization.place_of(task, options, artist)
    recipe = recipe_of(task, options, folder)
    file, found = folder / "figures.json", {}
    key = [judge.identity, options.pictures, options.seed, artist.how]
    if file.is_file() and (before := json.loads(file.read_text()))["key"] == key and not options.fresh:
        found = before["runs"]
    task.write(folder / "pictures", artist.base.resolution, not options.no_captions)
    task.write(folder / "plain", artist.base.resolution, captions=False)
    jobs = jobs_of(task, options, recipe, folder)
    for name, (command, adapter) in jobs.items():
        if name not in found:
            about = time_command(command, adapter, folder / f"{name}.log") | {"machine": machine()}
            found[name] = about | measure(judge, clip, task, draw(artist, task, Adapter.load(adapter)))
            write_text(file, json.dumps({"key": key, "runs": found}, indent=1) + "\n")
        print(f"{task.name}, {name}: {brief(found[name])}", flush=True)
    return {"name": task.name, "kind": task.kind, "runs": found}


HEADS = ("figure", "diffusers", "personalize", "ceiling", "goal", "met")
READ = {  # figure -> (how to read it from a run, whether more is better)
    "gap closed": (lambda run: gap_closed(*(run["identity"][key] for key in ("floor", "value", "ceiling"))), True),
    "prompt fidelity (of ceiling)": (lambda run: run["fidelity"]["value"], True),
    "leak without the trigger": (lambda run: run["leak"]["value"], False),
    "unrelated prompts obeyed": (lambda run: run["drift"]["value"], True),
    "unrelated verdicts changed": (lambda run: run["drift"]["changed"], False),
    "seconds from command to adapter": (lambda run: run["seconds"], False),
}


def table(records: Sequence[dict[str, Any]], ours: str, theirs: str) -> list[Figure]:
    """Their means, and ours, figure by figure."""
    figures = []
    for name, (read, more) in READ.items():
        us, them = (mean(read(record["runs"][which]) for record in records) for which in (ours, theirs))
        if "seconds" in name:
            figures.append(Figure(name, them, us, None, f"{them / us:.1f}x faster; >= 2x", them >= 2 * us, "s"))
        else:
            figures.append(Figure(name, them, us, None, "at least as good", us >= them if more else us <= them))
    return figures


def tables(records: Sequence[dict[str, Any]]) -> dict[str, list[Figure]]:
    """One for each kind and each of their rates: subjects and styles have rates of their own."""
    found = {}
    for kind in ("subject", "style"):
        rows = [record for record in records if record["kind"] == kind]
        for theirs in [
            name for name in (rows[0]["runs"] if rows else ()) if name.startswith("diffusers") and "steps" not in name
        ]:
            found[f"{kind.capitalize()}s ({len(rows)}), beside {theirs}"] = table(rows, "personalize", theirs)
    return found | {
        EQUAL_WORK: [equal_work(one) for one in records],
        QUALITY: [time_to_quality(one) for one in records],
    }


def equal_work(record: dict[str, Any]) -> Figure:
    """Seconds of both where they do the same."""
    them = min(run["seconds"] for name, run in record["runs"].items() if name.startswith("diffusers") and "steps" not in name)
    us = record["runs"]["personalize, equal work"]["seconds"]
    return Figure(record["name"], them, us, None, f"{them / us:.1f}x faster; >= 1.5x", them >= 1.5 * us, "s")


EQUAL_WORK = "Seconds of as many steps on attention layers, without prior"
GAP, LOST, LEAK = 0.8, 0.05, 0.05  # at least this share of the gap; at most so much less fidelity than the base's; less leak
QUALITY = (
    f"Seconds until an adapter has {GAP:.0%} of the gap, its fidelity within {LOST:.0%} of the base's, under {LEAK:.0%} of leak"
)


def time_to_quality(record: dict[str, Any]) -> Figure:
    """The fastest run of each that is good; where none of theirs is, their longest tells how long at least."""
    runs = {
        tool: {name: run for name, run in record["runs"].items() if name.startswith(tool) and "equal" not in name}
        for tool in ("diffusers", "personalize")
    }
    them, us = (min((run["seconds"] for run in own.values() if is_good(run)), default=None) for own in runs.values())
    tried = max(run["seconds"] for run in runs["diffusers"].values())
    if us is None:
        return Figure(record["name"], them, float("nan"), None, "ours never; >= 3x", False, "s")
    ratio = (them or tried) / us
    words = f"{ratio:.1f}x" if them else f"none of {len(runs['diffusers'])} of theirs, the longest took {ratio:.1f}x"
    return Figure(record["name"], them, us, None, f"{words}; >= 3x", ratio >= 3, "s")


def is_good(run: dict[str, Any]) -> bool:
    """Whether a run's adapter is as good as is asked for."""
    identity, fidelity = run["identity"], run["fidelity"]
    gap = gap_closed(identity["floor"], identity["value"], identity["ceiling"])
    return gap >= GAP and fidelity["value"] >= fidelity["base"] - LOST and run["leak"]["value"] < LEAK


def main(options: argparse.Namespace) -> None:
    """Run both, measure both, publish."""
    if not options.script.is_file():
        raise DataError(f"there is no script {options.script}", "examples/dreambooth/train_dreambooth_lora.py of diffusers")
    judge, base = Judge.load(), Base.load(options.base)
    options.side = base.resolution
    artist = Artist(base, options.work / "base-pictures", options)
    clip = Clip.of(base.path)
    records = [
        compare_trainers(task, options, judge, clip, artist) for task in tasks(options.only, options.pictures, options.seed)
    ]
    about = {
        "base": f"{options.base} ({artist.identity}), on {machine()}",
        "torchvision": "installed" if importlib.util.find_spec("torchvision") else "a stand-in for the transforms in use",
        "captions": "one prompt for all, for both" if options.no_captions else "read by personalize; the script has one prompt",
        "pictures": f"{options.pictures} per figure and task, {artist.told}",
    }
    publish(options.to, options.name, "Beside diffusers' train_dreambooth_lora.py", about, tables(records), records, HEADS)
