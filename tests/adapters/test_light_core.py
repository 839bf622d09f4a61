"""The adapters with torch and safetensors alone, and on Python 3.10: what an image UI's own Python can import.

`test_a_fresh_environment_reads_merges_bakes_and_saves` installs just that: `pytest -m slow tests/adapters/test_light_core.py`.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from test_kinds import adapter

import personalize
from personalize.adapters.adapter import Adapter

PACKAGE = Path(personalize.__file__).parent
CORE = ("__init__", "errors", "findings", "io", "lazy", "registry", "text", "formats", "families", "adapters")
NEWER = {"UTC", "tomllib", "file_digest", "StrEnum", "Self", "ExceptionGroup", "TaskGroup", "LiteralString", "assert_never"}
OURS = Path.home() / ".pyenv" / "versions"

WORK = """
import hashlib, importlib.util, json, sys
from pathlib import Path
from personalize.adapters import Adapter, bake, convert, describe, merge, open_weights, resize
here, weights = Path(sys.argv[1]), Path(sys.argv[2])
a, b = Adapter.load(here / "a.safetensors"), Adapter.load(here / "b.safetensors")
base = open_weights(weights)
c = Adapter.load(here / "c.safetensors").resolve(base.__getitem__)
a.save(here / "peft", "peft")
(a * 0.7 + b * -0.3).save(here / "sum", dtype="fp16")
merge([a, b, c], [1, 0.5, -0.2], "ties", rank=8).save(here / "ties")
resize(a, "rank", 2)[0].save(here / "small")
convert(b, "full")[0].save(here / "full")
bake(base, [(a, 0.5), (c, 1.0)], here / "baked")
print(json.dumps({
    "found": [name for name in sys.argv[3].split() if importlib.util.find_spec(name)],
    "kinds": [describe(here / f"{name}.safetensors").kind for name in ("a", "b", "c", "full")],
    "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(here.glob("*.safetensors"))},
    "baked": hashlib.sha256(next((here / "baked" / "unet").glob("*.safetensors")).read_bytes()).hexdigest(),
}))
"""
FORBIDDEN = "numpy diffusers transformers peft accelerate pydantic click PIL rich"


def made(folder: Path) -> Path:
    """A LoRA, a LoKr and a DoRA of pocket's layers."""
    folder.mkdir()
    for name, kind in (("a", "LoRA"), ("b", "LoKr"), ("c", "DoRA")):
        (adapter(kind) if kind == "DoRA" else adapter(kind) * 0.5).save(folder / name)
    return folder


def worked(python: str, folder: Path, path: Path) -> dict[str, object]:
    """What the work above tells, done by an interpreter with nothing of ours but the package at `path`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [python, "-c", WORK, str(folder), str(PACKAGE / "pocket" / "weights"), FORBIDDEN]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": str(path)}, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.slow
def test_a_fresh_environment_reads_merges_bakes_and_saves(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    version = torch.__version__.partition("+")[0]
    subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={version}", "safetensors"], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "numpy"], check=True)
    package = tmp_path / "package"
    shutil.copytree(PACKAGE, package / "personalize", ignore=shutil.ignore_patterns("__pycache__", "pocket"))
    light = worked(python, made(tmp_path / "light"), package)
    full = worked(sys.executable, made(tmp_path / "full"), PACKAGE.parent)
    assert light.pop("found") == [] and len(str(full.pop("found")).split()) > 3
    assert light == full and light["kinds"] == ["LoRA", "LoKr", "DoRA", "full"]


# ---------------------------------------------------------------- Python 3.10

STUB = """
class Tensor: ...
class Generator: ...
class _Anything:
    def __getattr__(self, name): return _Anything()
    def __call__(self, *given, **named): return given[0] if len(given) == 1 and callable(given[0]) else _Anything()
    def __or__(self, other): return self
    def __hash__(self): return id(self)
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return _Anything()
"""
LOOK = """
import importlib, json, sys
from pathlib import Path
from personalize.adapters.describe import describe
from personalize.io import weights_hash
seen = describe(sys.argv[1])
assert "torch" not in sys.modules
for name in sys.argv[2].split():
    importlib.import_module(name)
from personalize.adapters.strengths.grammar import split
print(json.dumps([seen.kind, seen.parameters, weights_hash(Path(sys.argv[1])), str(split("x.safetensors:0.8:lbw=OUTD")[1])]))
"""


def core() -> Iterator[Path]:
    """The files of the light core."""
    for name in CORE:
        yield from sorted((PACKAGE / name).rglob("*.py")) if (PACKAGE / name).is_dir() else [PACKAGE / f"{name}.py"]


def oldest() -> str | None:
    """A Python 3.10, if this machine has one."""
    found = [str(path) for path in sorted(OURS.glob("3.10.*/bin/python3.10"))]
    return (*found, shutil.which("python3.10"))[0]


@pytest.mark.skipif(oldest() is None, reason="no Python 3.10 here")
def test_python_3_10_imports_the_core_and_describes(tmp_path: Path) -> None:
    path = adapter("LoHa").save(tmp_path / "a")
    stub = tmp_path / "stubs" / "torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(STUB + "\nfrom . import nn\n", encoding="utf-8")
    (stub / "nn.py").write_text(
        "class Module: ...\nclass Linear: ...\nclass Conv2d: ...\nfrom . import functional\n", encoding="utf-8"
    )
    (stub / "functional.py").write_text("", encoding="utf-8")
    names = [
        ".".join(["personalize", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__") for file in core()
    ]
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE.parent}{os.pathsep}{stub.parent}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(oldest()), "-W", "error", "-c", LOOK, str(path), " ".join(names)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kind, parameters, digest, strength = json.loads(done.stdout)
    assert kind == "LoHa" and parameters > 0 and strength == "0.8:lbw=OUTD"
    content = path.read_bytes()
    assert digest == sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert Adapter.load(path).metadata["sshs_model_hash"] == digest


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_uses_nothing_newer_than_python_3_10(path: Path) -> None:
    """Syntax and names; what stands under `if sys.version_info` is for the others."""
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    guarded = {
        id(node)
        for one in ast.walk(tree)
        if isinstance(one, ast.If) and "version_info" in ast.dump(one.test)
        for node in ast.walk(one)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.attr] if isinstance(node, ast.Attribute) else []
        assert not NEWER & set(names), f"{path}:{node.lineno}"  # type: ignore[attr-defined]
