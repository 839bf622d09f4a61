"""Two runs that share a cache: both work, what one computes the other waits for, and a dead one is no obstacle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from personalize.data import cache

RUN = """
import sys, time
from pathlib import Path
import torch
from personalize.data import cache

folder, warnings = Path(sys.argv[1]), []

def compute(name, seconds):
    with (folder / "computed").open("a") as log:
        log.write(name + "\\n")
    print("computing", flush=True)
    time.sleep(seconds)
    return {"x": torch.full((3,), float(len(name)))}

print("ready", flush=True)
for name in sys.stdin.readline().split():
    found = cache.recall(cache.key(name=name), lambda: compute(name, float(sys.argv[2])), warnings)
    assert found["x"].tolist() == [len(name)] * 3
print(warnings)
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A run that wants some entries, as soon as they are named, and takes so long for each."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PERSONALIZE_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", RUN, str(folder), str(seconds)]
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def ask(process: subprocess.Popen[str], names: str) -> None:
    assert process.stdin
    process.stdin.write(f"{names}\n")
    process.stdin.flush()


def test_two_runs_compute_nothing_twice_and_the_second_is_told(tmp_path: Path) -> None:
    with start(tmp_path, 1.5) as first, start(tmp_path, 1.5) as second:
        ask(first, "a bb ccc")
        assert first.stdout and first.stdout.readline() == "computing\n"
        ask(second, "a bb ccc")
        told = [process.communicate(timeout=300)[0] for process in (first, second)]
        assert (first.returncode, second.returncode) == (0, 0)
    assert sorted((tmp_path / "computed").read_text().split()) == ["a", "bb", "ccc"]
    assert f"waited for what another run puts into the cache (by process {first.pid} on " in told[1]
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 3 and {path.suffix for path in files} == {".safetensors"}


def test_a_dead_run_is_no_obstacle_and_a_stuck_one_is_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONALIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PATIENCE", 0.3)
    with start(tmp_path, 600) as other:
        ask(other, "a")
        assert other.stdout and other.stdout.readline() == "computing\n"
        warnings = list[str]()
        found = cache.recall(cache.key(name="a"), lambda: {"x": torch.ones(3)}, warnings)
        assert found["x"].tolist() == [1] * 3 and f"by process {other.pid} " in warnings[0]
        for path in (tmp_path / "cache").rglob("*.safetensors"):
            path.unlink()
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert list((tmp_path / "cache").rglob("*.lock"))
    warnings = []
    cache.recall(cache.key(name="a"), lambda: {"x": torch.ones(3)}, warnings)
    assert warnings == [] and not list((tmp_path / "cache").rglob("*.lock"))
