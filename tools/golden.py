"""Prove that a refactoring changed not one byte of what users get: run a fixed set of commands before and after, and compare.

    python tools/golden.py record --tree DIR --to FOLDER       run the commands with the code in DIR, results under FOLDER
    python tools/golden.py compare BEFORE AFTER                compare two such folders; exit code 1 if anything differs
    python tools/golden.py prove --before COMMIT [--work DIR]  record a commit and this tree, and compare

Everything goes through the outside of the program: command lines, the console script's entry point and the names in
`personalize.__all__`. What is finished is not done again, unless the code or the case has changed.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parents[1]
METHODS = (
    "concat", "svd", "slerp", "orthogonal", "common", "tsv", "knots", "ties", "dare", "dare-ties", "della", "magnitude",
    "breadcrumbs",
)  # fmt: skip
SAMPLERS = (
    "Euler", "Euler Karras", "Euler a", "Heun", "Heun Karras", "LMS", "LMS Karras", "DPM2", "DPM2 Karras", "DPM2 a",
    "DPM2 a Karras", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE", "DPM++ 2M SDE Karras", "DPM++ 3M SDE", "DPM++ 3M SDE Karras",
    "UniPC", "UniPC Karras", "DEIS", "DDIM", "DDPM", "PLMS", "LCM",
)  # fmt: skip

# ---------------------------------------------------------------- the cases: what is made ready for them


def subject(tree: Path, here: Path) -> None:
    """Five pictures with captions."""
    shutil.copytree(tree / "sample_data" / "subject", here / "cat")


def style(tree: Path, here: Path) -> None:
    """Six pictures of a style."""
    shutil.copytree(tree / "sample_data" / "style", here / "glass")


def masked(tree: Path, here: Path) -> None:
    """Three pictures, two of them with masks."""
    subject(tree, here)
    for number in (4, 5):
        for path in (here / "cat").glob(f"*-{number}.*"):
            path.unlink()
    for number in (1, 2):
        mask = Image.new("L", (64, 64))
        ImageDraw.Draw(mask).ellipse((12, 8 * number, 52, 60), fill=255)
        mask.save(here / "cat" / f"scarf-cat-{number}-masklabel.png")


def concepts(tree: Path, here: Path) -> None:
    """Two concepts in kohya's layout, in two shapes, with class images of somebody's."""
    data = tree / "sample_data"
    homes = {"many/3_zwx cat": "subject/*-[123].*", "many/1_vok": "style/*-[12].*", "class/1_cat": "subject/*-[45].png"}
    for home, names in homes.items():
        (here / home).mkdir(parents=True)
        for path in data.glob(names):
            shutil.copy(path, here / home)
    for path in (here / "many" / "1_vok").glob("*.png"):
        Image.open(path).resize((96, 64)).save(path)


def folders(tree: Path, here: Path) -> None:
    """Two folders of pictures, one with settings of its own."""
    for name, source in (("rex", "subject"), ("vase", "style")):
        shutil.copytree(tree / "sample_data" / source, here / "photos" / name)
    (here / "photos" / "vase" / "personalize.toml").write_text('class = "vase"\ntrigger = "vzx"\nlr = 2e-3\n')


def spoiled(tree: Path, here: Path) -> None:
    """What people hand over by mistake."""
    subject(tree, here)
    (here / "empty").mkdir()
    (here / "lies").mkdir()
    (here / "lies" / "a.png").write_text("not a picture")
    (here / "cut.safetensors").write_bytes((here / "text.safetensors").read_bytes()[:-1000])
    (here / "noise.safetensors").write_bytes(b"\xff" * 4096)


def prompts(tree: Path, here: Path) -> None:
    """A picture to begin with, a list of prompts, and a folder of adapters."""
    subject(tree, here)
    (here / "list.txt").write_text("# two\na zwx cat\n\na <lora:text:0.5:stop=0.5> zwx cat at night\n")
    (here / "shelf").mkdir()
    shutil.copy(here / "text.safetensors", here / "shelf")


# ---------------------------------------------------------------- the cases: a row each


@dataclass(frozen=True)
class Case:
    """Command lines that run in one folder, each with the file that keeps what it says.

    How that is compared goes by its ending: .json, .jsonl, .toml by value, .txt letter by letter, .said is a note only.
    One line runs as `python -m personalize`; several in one process, since importing torch for each would take minutes.
    """

    name: str
    lines: dict[str, str]
    make: Callable[[Path, Path], None] | None = None
    needs: tuple[str, ...] = ()  # cases whose adapter is brought in as CASE.safetensors
    interrupted: bool = False  # by Ctrl-C, then by kill -9, and finished: how far it came varies, and only the end is compared

    @property
    def key(self) -> str:
        """Changes whenever the case does, or one that it needs."""
        made = inspect.getsource(self.make) if self.make else ""
        needed = [one.key for one in CASES if one.name in self.needs]
        return repr((self.lines or PROBE, made, needed, self.interrupted))


def train(folder: str, more: str) -> dict[str, str]:
    """The command line of a small run."""
    short = "--steps 6 --checkpoint-every 3 --batch-size 2 --sample-every 0 --sample-steps 2 --sample-seeds 0"
    return {"train.said": f"train {folder} --output run {short} --sample-prompts 'a {{trigger}} {{class}}' {more}"}


TWO = "subject.safetensors:0.7 text.safetensors:-0.3:0.5:lbw=MID+OUT01"
CUTS = {"rank": "4", "error": "0.2", "size": "1MB", "sv-fro": "0.8", "sv-cumulative": "0.5", "sv-ratio": "4"}
INTO = {"lora": "--to lora --rank 4", "full": "--to full", "diffusers": "--dialect diffusers", "peft": "--dialect peft",
        "fp16": "--dtype fp16", "bf16": "--dtype bf16"}  # fmt: skip
WRONG = (
    "train cat --rnak 3", "trian cat", "train cat --rank 0", "train cat --dialect kohja", "train cat --preset pocket-subjct",
    "train nowhere", "train empty", "train lies", "train cat --holdout 1 --leave-one-out 1", "train cat --base pokcet",
    "train cat --targets atention --output run", "show cut.safetensors", "show noise.safetensors text.safetensors", "generate",
    "generate x --sampler eulr", "generate x --denoise 2", "generate x --size big", "generate x --xy stepps=1,2",
    "generate x --adapter none.safetensors:0.8", "generate x --base pocket --adapter cut.safetensors", "generate '<lora:zwx:1>'",
    "merge text.safetensors text.safetensors --method tise -o m.safetensors", "merge text.safetensors", "report nowhere",
    "resize text.safetensors --rank 2 --error 0.1 -o r.safetensors", "convert text.safetensors -o c.ckpt", "batch nowhere",
    "merge --replay text.safetensors -o m.safetensors",
)  # fmt: skip
CASES = (
    Case("interface", {}),  # what PROBE finds
    Case("subject", train("cat", "--class cat --trigger zwx --preset pocket-subject --choose best"), subject),
    Case("style", train("glass", "--preset pocket-style --dialect diffusers --choose none --sampler 'DPM++ 2M Karras'"), style),
    Case("text", train("cat", "--class cat --trigger zwx --text-encoder-lr 1e-3 --text-encoder-share 0.7 --text-rank 3 --alpha 1"
                              " --text-targets attention --accumulate 2 --min-snr 0 --rank 2 --targets cross-attention,conv"
                              " --schedule linear --warmup 2 --caption-shuffle --tag-dropout 0.2 --caption-dropout 0.2"
                              " --clip-skip 2 --dropout 0.1 --prior images --prior-images 2 --dialect peft"
                              " --choose none"), subject),
    Case("masks", train("cat", "--class cat --trigger zwx --rank 2 --leave-one-out 1 --steps 4 --checkpoint-every 2 --seed 7"
                               " --schedule constant --choose last --name masked"), masked),
    Case("concepts", train("many", "--rank 2 --balance --holdout 1 --prior images --regularization class --no-flip --choose last"
                                   " --caption-prefix 'photo, ' --steps 4 --checkpoint-every 2"), concepts),
    Case("memory", train("cat", "--class cat --rank 2 --micro-batch 1 --memory 58MB --steps 4 --choose none"), subject),
    Case("bfloat16", train("cat", "--class cat --rank 2 --precision bfloat16 --steps 2 --choose none"), subject),
    Case("batch", {"batch.said": "batch photos --class dog --output runs --preset pocket-subject --choose none --steps 4 --rank 2"
                                 " --batch-size 1 --sample-prompts '{trigger}' --sample-steps 2 --sample-seeds 0"
                                 " --checkpoint-every 2"}, folders),
    Case("resumed", train("cat", "--class cat --trigger zwx --rank 2 --steps 12 --checkpoint-every 4 --choose none"), subject,
         interrupted=True),
    Case("merge", {
        **{f"{method}.txt": f"merge {TWO} --method {method} --rank 4 -o {method}.safetensors" for method in METHODS},
        "exact.txt": f"merge {TWO} style.safetensors:*attn2*=0.5 -o exact.safetensors",
        "tuned.txt": f"merge {TWO} --method della --density 0.3 --seed 3 --epsilon 0.1 --mean -o tuned.safetensors",
        "again.txt": "merge --replay tuned.safetensors -o again.safetensors",
    }, needs=("subject", "text", "style")),
    Case("algebra", {
        **{f"to-{name}.txt": f"convert text.safetensors:0.8 -o to-{name}.safetensors {how}" for name, how in INTO.items()},
        **{f"cut-{rule}.txt": f"resize subject.safetensors --{rule} {x} -o cut-{rule}.safetensors" for rule, x in CUTS.items()},
        "drop.txt": "resize subject.safetensors --size 300KB --drop --max-rank 8 -o drop.safetensors",
        "bake.txt": "bake pocket subject.safetensors:0.8 text.safetensors:lbw=OUT01 -o tuned",
        "extract.txt": "extract tuned pocket --rank 4 -o extracted.safetensors",
        "full.txt": "extract tuned pocket --error 0.3 --part unet --target *attn* --full --clamp 0.99 -o whole.safetensors",
        "interpolate.txt": "interpolate pocket tuned --alpha 0.5 -o half",
        "diff.txt": "diff subject.safetensors text.safetensors",
        "diff.json": "diff subject.safetensors:0.5 to-full.safetensors --json",
        "doctor.txt": "doctor subject.safetensors text.safetensors --picture doctor.png",
        "doctor.json": "doctor subject.safetensors text.safetensors --json",
        "show.txt": "show subject.safetensors to-full.safetensors",
        "show.jsonl": "show subject.safetensors style.safetensors text.safetensors to-full.safetensors --json",
    }, needs=("subject", "text", "style")),
    Case("dataset", {
        "look.txt": "dataset cat --class cat --sheet sheet.png --html page.html",
        "look.json": "dataset cat --class cat --json",
        "dry.toml": "train cat --class cat --dry-run --rank 3",
        "dry-style.toml": "train cat --preset pocket-style --dry-run",
        "dry-again.toml": "train cat --from text.safetensors --dry-run",
    }, masked, needs=("text",)),
    Case("generate", {
        "samplers.said": f"generate 'a zwx cat' -a subject.safetensors --steps 3 --xy 'sampler={','.join(SAMPLERS)}' -o samplers",
        "image.said": "generate 'a zwx cat' -a subject.safetensors:0.8:0.5 --image cat/scarf-cat-1.png --denoise 0.6 --steps 3"
                      " -n fog -s 1,2 --grid -o image",
        "axes.said": "generate 'a zwx cat' -a z=subject.safetensors --xy 'z=0,1,0@0;1@1' --xy seed=3,4 --steps 2 -o axes",
        "moving.said": "generate 'a <lora:text:te=1@0,0@1:unet=0@0,1@0.5> zwx cat' -a subject.safetensors:1:start=1:stop=3"
                       " --lora-dir shelf --steps 4 --guidance 5 -o moving.png",
        "listed.said": "generate --prompts list.txt --lora-dir shelf --count 2 --size 96x64 --clip-skip 2 --steps 2 -o listed",
        "halves.said": "generate 'a cat' --base pocket --precision bfloat16 --steps 2 -o halves.png",
    }, prompts, needs=("subject", "text")),
    Case("wrong", {f"{number:02}.said": line for number, line in enumerate(WRONG)}, spoiled, needs=("text",)),
)  # fmt: skip


# ---------------------------------------------------------------- programs that run inside the tree's Python

DRIVER = """
import contextlib, io, json, sys, traceback
def run(words):
    from personalize.cli import main
    sys.argv, out, err, code = ["personalize", *words], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    return code, out.getvalue(), err.getvalue()
print(json.dumps({name: run(words) for name, words in json.load(sys.stdin).items()}))
"""

PROBE = '''
import json, subprocess, sys
import click
import personalize
from personalize.cli import main

def plain(value):
    return json.loads(json.dumps(value, default=lambda x: repr(x) if isinstance(x, type) or callable(x) else str(x)))

def parameter(one, ctx):
    kind, shown = one.type, one.make_metavar(ctx)
    about = {"required": one.required, "nargs": one.nargs, "many": getattr(one, "multiple", False), "type": kind.name,
             "default": json.dumps(plain(one.get_default(ctx, call=False))), "flag": getattr(one, "is_flag", False),
             "takes": shown.split("|"), "choices": list(getattr(kind, "choices", [])),
             "min": getattr(kind, "min", None), "max": getattr(kind, "max", None)}
    return about | {"samplers": [name for name in SAMPLERS if name in (getattr(one, "help", "") or "")]}

def command(one, parent):
    ctx = click.Context(one, info_name=one.name, parent=parent)
    told = {"flags": {}, "arguments": [], "commands": {}}
    for parameter_ in one.get_params(ctx):
        about = parameter(parameter_, ctx)
        if isinstance(parameter_, click.Argument):
            told["arguments"].append(about)
        told["flags"] |= {flag: about for flag in (*parameter_.opts, *parameter_.secondary_opts) if flag.startswith("-")}
    for name in one.list_commands(ctx) if isinstance(one, click.Group) else ():
        told["commands"][name] = command(one.get_command(ctx, name), ctx)
    return told

def fields(schema, every):
    """A JSON schema by field, without prose and without names of classes."""
    if "$ref" in schema:
        schema = every[schema["$ref"].rpartition("/")[2]] | {key: value for key, value in schema.items() if key != "$ref"}
    skipped = ("title", "description", "$defs", "properties", "required", "default")
    told = {key: value for key, value in schema.items() if key not in skipped}
    inner = {name: fields(one, every) for name, one in schema.get("properties", {}).items()}
    return told | (inner or {"default": json.dumps(schema.get("default"))})

def group():
    """What the console script's entry point runs, wherever it lives."""
    found = []
    def catch(self, *_, **__):
        found.append(self)
        raise SystemExit(0)
    click.Group.main, sys.argv = catch, ["personalize"]
    try:
        main()
    except SystemExit:
        return found[0]

schema = personalize.Recipe.model_json_schema(by_alias=True)
defaults = personalize.resolve(flags={"folder": "."}).model_dump(mode="json", by_alias=True)
methods = subprocess.run([sys.executable, "-m", "personalize", "merge", "--list"], capture_output=True, text=True).stdout
print(json.dumps({
    "commands": command(group(), None),
    "recipe": {key: {name: json.dumps(one) for name, one in value.items()} if isinstance(value, dict) else json.dumps(value)
               for key, value in defaults.items()},
    "bounds": fields(schema, schema["$defs"]),
    "all": sorted(personalize.__all__),
    "methods": [line.split()[0] for line in methods.splitlines()],
}, indent=1))
'''

# ---------------------------------------------------------------- recording


def record(tree: Path, to: Path) -> None:
    """Run every case that is not done yet with the code as it is now."""
    tree, to, total = tree.resolve(), to.resolve(), 0.0
    found = run(["-c", "import personalize; print(personalize.__file__)"], tree, to, to).stdout.strip()
    if not Path(found).is_relative_to(tree):
        raise SystemExit(f"{tree} is not what is imported, but {found or 'nothing'}")
    code = fingerprint(tree)
    for case in CASES:
        marker, key = to / "done" / f"{case.name}.json", hashlib.sha256(f"{code} {case.key}".encode()).hexdigest()
        done = json.loads(marker.read_text()) if marker.exists() else {}
        if done.get("key") != key:
            began = time.perf_counter()
            perform(case, tree, to)
            if fingerprint(tree) != code:
                raise SystemExit(f"{tree} was changed while {case.name} ran: once more, please")
            done = {"key": key, "seconds": time.perf_counter() - began}
            marker.parent.mkdir(exist_ok=True)
            marker.write_text(json.dumps(done))
        total += done["seconds"]
        print(f"{case.name:<12}{done['seconds']:>7.1f} s", flush=True)
    print(f"{'all':<12}{total:>7.1f} s  in {to}")


def fingerprint(tree: Path) -> str:
    """Changes with every file that decides what the program does."""
    digest = hashlib.sha256()
    for top in ("personalize", "presets", "sample_data", "pyproject.toml"):
        for path in sorted([tree / top, *(tree / top).rglob("*")]):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(tree)} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def perform(case: Case, tree: Path, to: Path) -> None:
    """One case, in a folder of its own. What goes wrong in it is recorded too."""
    here = to / "cases" / case.name
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    for name in case.needs:
        for made in (to / "cases" / name / "run").glob("*.safetensors"):
            shutil.copy(made, here / f"{name}.safetensors")
    if case.make:
        case.make(tree, here)
    codes = {}
    for name, (code, out, err) in told(case, tree, to, here).items():
        (here / name).write_text(out, encoding="utf-8")
        (here / f"{name}.err.said").write_text(err, encoding="utf-8")
        codes[name] = {"exit code": code, "one line on stderr": err.count("\n") == 1}
    (here / "codes.json").write_text(json.dumps(codes, indent=1))


def told(case: Case, tree: Path, to: Path, here: Path) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each of a case's commands."""
    if len(case.lines) > 1:
        words = json.dumps({name: shlex.split(line) for name, line in case.lines.items()})
        done = run(["-c", DRIVER], tree, to, here, input=words)
        return json.loads(done.stdout) if done.returncode == 0 else {"driver.said": (done.returncode, "", done.stderr)}
    name, line = next(iter(case.lines.items()), ("interface.json", ""))
    command = ["-m", "personalize", *shlex.split(line)] if line else ["-c", f"SAMPLERS = {SAMPLERS}\n{PROBE}"]
    if case.interrupted:
        interrupt(command, tree, to, here)
    done = run(command, tree, to, here)
    return {name: (done.returncode, done.stdout, done.stderr)}


def surroundings(tree: Path, to: Path) -> dict[str, str]:
    """Environment variables: the tree's package wins over an installed one, and nothing is shared with other recordings."""
    folders = {"PERSONALIZE_CACHE": str(to / "cache"), "XDG_CACHE_HOME": str(to / "xdg"), "PYTHONPATH": str(tree)}
    return os.environ | folders | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}


def run(words: list[str], tree: Path, to: Path, here: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Python with a tree's code."""
    here.mkdir(parents=True, exist_ok=True)
    env = surroundings(tree, to)
    return subprocess.run([sys.executable, *words], cwd=here, env=env, capture_output=True, text=True, **more)


def interrupt(command: list[str], tree: Path, to: Path, here: Path) -> None:
    """The same command twice: Ctrl-C once a checkpoint is saved, and kill -9 once the next one is."""
    events = here / "run" / "events.jsonl"

    def heard() -> None:  # also where we run in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    how: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "preexec_fn": heard}
    for number, sent in enumerate((signal.SIGINT, signal.SIGKILL), start=1):
        with subprocess.Popen([sys.executable, *command], cwd=here, env=surroundings(tree, to), **how) as process:
            while process.poll() is None:
                if events.exists() and events.read_text().count('"event": "saved"') >= number:
                    process.send_signal(sent)
                    process.wait()
                time.sleep(0.01)
        (here / f"stopped-{number}.json").write_text(json.dumps({"exit code": process.returncode}))


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Difference:
    """What differs, where; a note is told and does no harm."""

    file: str
    key: str
    before: Any
    after: Any
    note: bool = False


VARIES = {"time", "seconds", "versions", "version", "peak_bytes", "personalize.versions"}  # of the machine, not of the program
SHOWN, MOST = 300, 4  # characters of a value, differences of a file
NOTES = {".said", ".md"}  # files whose differences do no harm
PROSE = {"why", "words", "text", "warnings", "cause", "message"}  # in events.jsonl
NUMBERS = re.compile(r"\d[\d.,-]* ?(?:steps/s|s/step|seconds|s|min|[kMG]B|bytes)\b|step \d+/\d+")  # in what a run says


def value(thing: Any, root: str) -> Any:
    """A JSON value without what varies; texts that are JSON are read, and versions and the scratch folder's name go."""
    if isinstance(thing, dict):
        return {key: value(one, root) for key, one in thing.items() if key not in VARIES}
    if isinstance(thing, list):
        return [value(one, root) for one in thing]
    if not isinstance(thing, str):
        return thing
    if thing[:1] in ("{", "["):
        try:
            return value(json.loads(thing), root)
        except ValueError:
            pass
    return plain(thing, root)


def plain(text: str, root: str) -> str:
    """A text without our version and the scratch folder's name."""
    return re.sub(r"personalize \d+\.\d+\S*", "personalize X", text.replace(root, "ROOT") if root else text)


def safetensors(path: Path, root: str) -> Any:
    """The metadata, and each tensor in the header's order with a hash of its bytes."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = value(header.pop("__metadata__", {}), root)
    tensors = [
        [name, one["dtype"], one["shape"], hashlib.sha256(raw[slice(*(start + at for at in one["data_offsets"]))]).hexdigest()]
        for name, one in header.items()
    ]
    order = [*(() if path.name == "state.safetensors" else metadata), *(one[0] for one in tensors)]  # a state's metadata has none
    return {"metadata": metadata, "tensors": {one[0]: one[1:] for one in tensors}, "order": order}


def picture(source: Path | io.BytesIO, root: str = "") -> Any:
    """Pixels and text chunks."""
    with Image.open(source) as opened:
        opened.load()
        texts = value({key: str(one) for key, one in getattr(opened, "text", {}).items()}, root)
        return {"size": opened.size, "mode": opened.mode, "pixels": hashlib.sha256(opened.tobytes()).hexdigest(), "texts": texts}


def page(path: Path, root: str) -> Any:
    """Hashes of the pictures and other data inside."""
    found = re.findall(r"data:([\w/+.-]+);base64,([A-Za-z0-9+/=]+)", path.read_text(encoding="utf-8"))
    raws = [(kind, base64.b64decode(text)) for kind, text in found]
    drawn = [re.fullmatch("image/(png|jpeg|webp)", kind) for kind, _ in raws]
    return sorted(
        picture(io.BytesIO(raw))["pixels"] if is_one else raw.hex() for is_one, (_, raw) in zip(drawn, raws, strict=True)
    )


def said(path: Path, root: str) -> Any:
    """What a run told, without its speed."""
    return NUMBERS.sub("#", plain(path.read_text(encoding="utf-8"), root))


def lines(path: Path, root: str) -> Any:
    """A JSON value per line."""
    return [value(json.loads(line), root) for line in path.read_text(encoding="utf-8").splitlines()]


READERS: dict[str, Callable[[Path, str], Any]] = {
    ".safetensors": safetensors,
    ".png": picture,
    ".html": page,
    ".json": lambda path, root: value(json.loads(path.read_text(encoding="utf-8")), root),
    ".jsonl": lines,
    ".toml": lambda path, root: value(tomllib.loads(path.read_text(encoding="utf-8")), root),
    ".said": said,
    ".md": lambda path, root: plain(path.read_text(encoding="utf-8"), root),
    ".txt": lambda path, root: plain(path.read_text(encoding="utf-8"), root),
}


def apart(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ: (key, before, after)."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys((*before, *after)):
            yield from apart(before.get(name, "nothing"), after.get(name, "nothing"), f"{key}/{name}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from apart(*pair, f"{key}/{number}")
    elif before != after or type(before) is not type(after):
        yield key, before, after


def lost(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What an interface had and has no more: it may only grow."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, one in before.items():
            yield from lost(one, after.get(name, "nothing"), f"{key}/{name}")
    elif isinstance(before, list) and isinstance(after, list) and not key.endswith("arguments"):
        yield from ((key, one, "nothing") for one in before if one not in after)
    else:
        yield from apart(before, after, key)


def differences(name: str, file: str, before: Path, after: Path) -> Iterator[Difference]:
    """What differs between two recordings of a file of a case."""
    one, other = before / "cases" / name / file, after / "cases" / name / file
    if not (one.exists() and other.exists()):
        here = ["there" if path.exists() else "missing" for path in (one, other)]
        yield Difference(file, "", here[0], here[1])
        return
    read = READERS.get(one.suffix, lambda path, _: hashlib.sha256(path.read_bytes()).hexdigest())
    try:
        pair = read(one, str(before.resolve())), read(other, str(after.resolve()))
    except (ValueError, OSError) as error:  # not what its name says
        if one.read_bytes() != other.read_bytes():
            yield Difference(file, f"cannot be read: {error}", "", "")
        return
    for key, old, new in (lost if file == "interface.json" else apart)(*pair):
        prose = one.name == "events.jsonl" and not PROSE.isdisjoint(key.split("/"))
        yield Difference(file, key, old, new, note=prose or one.suffix in NOTES)


def files(case: Case, *recordings: Path) -> list[str]:
    """The files of a case in any of the recordings that are compared; of an interrupted run, what it ends with."""
    homes = [folder / "cases" / case.name for folder in recordings]
    found = {str(path.relative_to(home)) for home in homes for path in home.rglob("*") if path.is_file()}
    ends = (".safetensors", ".png", ".toml", "codes.json", "stopped-1.json", "stopped-2.json")
    return sorted(name for name in found if not case.interrupted or name.endswith(ends))


def compare(before: Path, after: Path) -> int:
    """Print a row per case, then what differs. 1 if anything does that is no note."""
    print(f"{'case':<12}{'files':>7}{'tensor files':>14}{'pictures':>10}{'notes':>7}  result")
    lines, bad = list[str](), False
    for case in CASES:
        names, wrong, notes = files(case, before, after), 0, 0
        for name in names:
            found = list(differences(case.name, name, before, after))
            notes, wrong = notes + any(one.note for one in found), wrong + (not all(one.note for one in found))
            lines += shown(case, found)
        bad = bad or bool(wrong) or not names
        counts = f"{count(names, '.safetensors'):>14}{count(names, '.png'):>10}{notes:>7}"
        result = "nothing was recorded" if not names else f"{wrong} files differ" if wrong else "equal"
        print(f"{case.name:<12}{len(names):>7}{counts}  {result}", flush=True)
    print("\n".join([*sorted(lines), "SOMETHING DIFFERS" if bad else "everything is equal"]))
    return int(bad)


def count(names: list[str], ending: str) -> int:
    """How many names end so."""
    return sum(name.endswith(ending) for name in names)


def shown(case: Case, found: list[Difference]) -> list[str]:
    """The first few differences of a file as text."""
    lines = []
    for number, one in enumerate(found[: MOST + 1]):
        begin = f"{'note' if one.note else 'DIFFERS'}  {case.name}/{one.file}  "
        values = f"{one.key}\n    before {str(one.before)[:SHOWN]!r}\n    after  {str(one.after)[:SHOWN]!r}"
        lines.append(begin + (values if number < MOST else f"~ {len(found)} in all"))
    return lines


def prove(commit: str, work: Path) -> int:
    """Record a commit in a worktree and this tree as it is, and compare."""
    work = work.resolve()
    sha = subprocess.run(["git", "rev-parse", commit], cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()
    tree = work / f"tree-{sha[:12]}"
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), sha], cwd=HERE, check=True)
    before, after = work / f"before-{sha[:12]}", work / "after"
    record(tree, before)
    record(HERE, after)
    return compare(before, after)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record")
    one.add_argument("--tree", type=Path, default=HERE)
    one.add_argument("--to", type=Path, required=True)
    two = commands.add_parser("compare")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    three = commands.add_parser("prove")
    three.add_argument("--before", required=True, metavar="COMMIT")
    three.add_argument("--work", type=Path, default=Path("/tmp/golden-proof"))
    given = parser.parse_args()
    if given.command == "record":
        record(given.tree, given.to)
        return 0
    return compare(given.before, given.after) if given.command == "compare" else prove(given.before, given.work)


if __name__ == "__main__":
    sys.exit(main())
